"""Prompts that samples share in the cache, and models whose attention cannot share them."""

from __future__ import annotations

import pytest

from tests.helpers import tiny_llama
from tests.sampling.test_decode import (
    PAD,
    PROMPTS,
    VOCABULARY,
    assert_same,
    noise_of,
    other_model,
    pad_left,
    rows_of,
    slow_decode,
)
from tests.sampling.test_plain import make
from vbon_lightning.sampling import decode as decode_module
from vbon_lightning.sampling import sample_completions
from vbon_lightning.sampling.cache import can_share_prompts, squashes_scores
from vbon_lightning.sampling.lookahead import can_look_ahead
from vbon_lightning.sampling.request import SamplingRequest


@pytest.mark.parametrize(("kind", "shares"), [("gemma2", False), ("mistral", False), ("qwen2", True)])
def test_models_whose_attention_is_another_are_noticed_and_sampled_right(kind, shares, monkeypatch):
    monkeypatch.setattr(decode_module, "SHARE_FROM", 1)
    model = other_model(kind)
    assert can_share_prompts(model) == shares
    noise = noise_of([0, 1, 2, 3])
    ours = sample_completions(model, SamplingRequest(*pad_left(PROMPTS), noise, end_ids=[2, 7, 20], pad_id=PAD))
    for prompt, group, uniforms in zip(PROMPTS, rows_of(ours), noise, strict=True):
        for row, uniform in zip(group, uniforms, strict=True):
            assert_same(row, slow_decode(model, prompt, uniform, [2, 7, 20], 1.0))


def test_long_prompts_are_held_once(monkeypatch):
    model = tiny_llama(VOCABULARY, seed=2)
    made = []
    build = decode_module.SamplingCache

    def keep(*arguments, **named):
        made.append(build(*arguments, **named))
        return made[-1]

    monkeypatch.setattr(decode_module, "SamplingCache", keep)
    for length in (decode_module.SHARE_FROM - 1, decode_module.SHARE_FROM):
        model.config.max_position_embeddings = 2 * length
        prompt = [3 + i % 20 for i in range(length)]
        noise = noise_of([0, 1], samples=4, length=3)
        sample_completions(model, SamplingRequest(*pad_left([prompt, prompt[::-1]]), noise, end_ids=[99], pad_id=PAD))
    # Two prompts with four samples each: eight rows of prompt and response, or two of prompts and eight of responses.
    copied, shared = (cache.layers[0] for cache in made)
    assert copied._keys.shape[0] == 8
    assert copied._keys.shape[2] == decode_module.SHARE_FROM - 1 + 2
    assert shared.prompt_keys.shape[:3] == (2, 1, decode_module.SHARE_FROM)
    assert shared._keys.shape[:3] == (8, 1, 2)


@pytest.mark.parametrize("cap", [None, 5.0])
def test_capped_attention_is_known_however_small_its_scores(cap: float | None) -> None:
    model = make(
        "gemma2", initializer_range=0.01, final_logit_softcapping=None, attn_logit_softcapping=cap, sliding_window=64
    )
    assert squashes_scores(model) == (cap is not None)
    if cap is not None:
        assert not can_share_prompts(model) and not can_look_ahead(model)
