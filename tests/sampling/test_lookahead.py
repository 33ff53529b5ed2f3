"""Many candidates behind one trunk, against a forward pass of each of them by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from tests.helpers import tiny_gpt2, tiny_llama
from tests.sampling.test_decode import DEEPER, PROMPTS, VOCABULARY, batch_of
from vbon_lightning.models import ValueModel, ValueModelConfig
from vbon_lightning.sampling import lookahead
from vbon_lightning.sampling.lookahead import (
    can_look_ahead,
    extend_trunk,
    look_ahead_one,
    lookahead_states,
    trunk_cache,
)
from vbon_lightning.types import Responses

SAMPLES, LENGTH, CANDIDATES = 2, 4, 3
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "initializer_range": 0.4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def seeded(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        return make().float().eval()


def gemma2(**entries: Any) -> Any:
    plain = {"layer_types": ["full_attention"] * 2, "attn_logit_softcapping": None, "query_pre_attn_scalar": 2}
    return seeded(lambda: Gemma2ForCausalLM(Gemma2Config(**(SIZES | plain | entries))))


def mistral() -> Any:
    return seeded(lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=3)))


def valued(body: Any) -> ValueModel:
    """Make a value model of a language model's body."""
    model = ValueModel(ValueModelConfig(copy.deepcopy(body.config), longest=4)).eval()
    model.body.load_state_dict(body.base_model.state_dict())
    return model


ABLE: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_llama(VOCABULARY, **DEEPER["llama"]),
    "eager": lambda: tiny_llama(VOCABULARY, **DEEPER["llama"], attn_implementation="eager"),
    "gpt2": lambda: tiny_gpt2(VOCABULARY, **DEEPER["gpt2"]),
    "gemma2": gemma2,  # it scales its queries in its own way
    "value": lambda: valued(tiny_llama(VOCABULARY, **DEEPER["llama"])),
}
UNABLE: dict[str, Callable[[], Any]] = {
    "windows": mistral,
    "capped": lambda: gemma2(attn_logit_softcapping=0.2),
    "both": lambda: gemma2(attn_logit_softcapping=0.2, sliding_window=3, layer_types=None),
    "value": lambda: valued(mistral()),
}
KINDS = pytest.mark.parametrize(
    "make", [*ABLE.values(), *UNABLE.values()], ids=[*ABLE, *(f"unable {name}" for name in UNABLE)]
)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


RESPONSES = Responses(
    drawn(len(PROMPTS), SAMPLES, LENGTH, seed=0), torch.ones(len(PROMPTS), SAMPLES, LENGTH, dtype=torch.bool)
)
AHEAD = drawn(len(PROMPTS), SAMPLES, LENGTH + 1, CANDIDATES, seed=1)


@torch.no_grad()
def alone(model: PreTrainedModel, candidates: Tensor = AHEAD) -> Tensor:
    """Run each prefix with each candidate by itself, without a cache."""
    found = torch.empty(*candidates.shape, 16)
    for place, prompt in enumerate(PROMPTS):
        for sample in range(SAMPLES):
            for state in range(candidates.shape[2]):
                trunk = prompt + RESPONSES.tokens[place, sample, :state].tolist()
                rows = torch.tensor([[*trunk, token] for token in candidates[place, sample, state].tolist()])
                found[place, sample, state] = model.base_model(input_ids=rows, use_cache=False).last_hidden_state[:, -1]
    return found


@KINDS
def test_equals_each_candidate_by_itself(make: Any) -> None:
    model = make()
    found = lookahead_states(model, batch_of(PROMPTS), RESPONSES, AHEAD)
    assert found.shape == (4, SAMPLES, LENGTH + 1, CANDIDATES, 16)
    torch.testing.assert_close(found, alone(model), atol=1e-5, rtol=1e-4)
    assert can_look_ahead(model) == (make in ABLE.values())


@KINDS
@pytest.mark.parametrize("max_tokens", [1, 17])
def test_chunks_change_nothing(make: Any, max_tokens: int) -> None:
    model = make()
    whole = lookahead_states(model, batch_of(PROMPTS), RESPONSES, AHEAD)
    parts = lookahead_states(model, batch_of(PROMPTS), RESPONSES, AHEAD, max_tokens=max_tokens)
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-5)


def test_chunks_bound_what_is_run_at_once() -> None:
    model, sizes = ABLE["llama"](), []
    assert can_look_ahead(model)
    model.get_input_embeddings().register_forward_hook(lambda _, arguments, out: sizes.append(arguments[0].numel()))
    lookahead_states(model, batch_of(PROMPTS), RESPONSES, AHEAD, max_tokens=2 * (LENGTH + 1) * CANDIDATES)
    assert sizes == [4 * 5, 8 * LENGTH, *[2 * (LENGTH + 1) * CANDIDATES] * 4]


def test_a_model_is_asked_once_what_it_can() -> None:
    model, calls = ABLE["gpt2"](), []
    model.get_input_embeddings().register_forward_hook(lambda *_: calls.append(1))
    assert can_look_ahead(model)
    assert calls
    calls.clear()
    assert can_look_ahead(model)
    assert not calls


def test_the_slow_way_is_taken_where_the_fast_one_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ABLE["llama"]()
    expected = lookahead_states(model, batch_of(PROMPTS), RESPONSES, AHEAD)
    monkeypatch.setattr(lookahead, "can_look_ahead", lambda _: False)
    monkeypatch.setattr(lookahead, "look_ahead", None)
    found = lookahead_states(model, batch_of(PROMPTS), RESPONSES, AHEAD)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@KINDS
def test_only_the_first_states(make: Any) -> None:
    model, first = make(), AHEAD[:, :, :1]
    for states in (1, 3):
        found = lookahead_states(model, batch_of(PROMPTS), RESPONSES, AHEAD[:, :, :states])
        torch.testing.assert_close(found, alone(model, AHEAD[:, :, :states]), atol=1e-5, rtol=1e-4)
    no_tokens = Responses(RESPONSES.tokens[..., :0], RESPONSES.mask[..., :0])
    found = lookahead_states(model, batch_of(PROMPTS), no_tokens, first)
    torch.testing.assert_close(found, alone(model, first), atol=1e-5, rtol=1e-4)


def test_neighbours_and_their_padding_do_not_matter() -> None:
    model = ABLE["llama"]()
    whole = lookahead_states(model, batch_of(PROMPTS), RESPONSES, AHEAD)
    for row, prompt in enumerate(PROMPTS):
        one = Responses(RESPONSES.tokens[row : row + 1], RESPONSES.mask[row : row + 1])
        found = lookahead_states(model, batch_of([prompt]), one, AHEAD[row : row + 1])
        torch.testing.assert_close(found, whole[row : row + 1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "value"])
def test_half_precision(kind: str) -> None:
    model = ABLE[kind]().bfloat16()
    found = lookahead_states(model, batch_of(PROMPTS), RESPONSES, AHEAD)
    assert found.dtype == torch.bfloat16
    assert can_look_ahead(model)
    torch.testing.assert_close(found.float(), alone(model), atol=0.1, rtol=0.1)


# -- one state --


@torch.no_grad()
def trunk_of(model: PreTrainedModel, length: int) -> tuple[Any, Tensor]:
    """Run prompts and the first tokens of their responses; return the cache and which of its tokens are real."""
    prompts = batch_of(PROMPTS)
    cache = trunk_cache(model, prompts, RESPONSES.tokens[..., :length])
    mask = prompts.mask.long().repeat_interleave(SAMPLES, dim=0)
    return cache, torch.nn.functional.pad(mask, (0, length), value=1)


def contents(cache: Any) -> list[Tensor]:
    return [part.clone() for layer in cache.layers for part in (layer.keys, layer.values)]


@KINDS
@pytest.mark.parametrize("length", [0, 2])
def test_one_state_at_a_time(make: Any, length: int) -> None:
    model = make()
    cache, attended = trunk_of(model, length)
    before, ahead = contents(cache), AHEAD[:, :, length].flatten(0, 1)
    with torch.no_grad():
        for _ in range(2):
            found = look_ahead_one(model, cache, attended, ahead)
            expected = alone(model, AHEAD[:, :, : length + 1])[:, :, length].flatten(0, 1)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        assert all(torch.equal(*both) for both in zip(contents(cache), before, strict=True))
        # And the trunk grows as if nobody had looked.
        grown = extend_trunk(model, cache, attended, RESPONSES.tokens[:, :, length].reshape(-1, 1))
        untouched, _ = trunk_of(model, length)
        same = extend_trunk(model, untouched, attended, RESPONSES.tokens[:, :, length].reshape(-1, 1))
    assert torch.equal(grown, same)
    assert cache.get_seq_length() == 5 + length + 1


@KINDS
def test_looking_leaves_the_models_attention_as_it_was(make: Any) -> None:
    model = make()
    tokens = torch.tensor([PROMPTS[0]])
    before = model.base_model.config._attn_implementation
    with torch.no_grad():
        expected = model.base_model(input_ids=tokens).last_hidden_state
        lookahead_states(model, batch_of(PROMPTS), RESPONSES, AHEAD)
        assert torch.equal(model.base_model(input_ids=tokens).last_hidden_state, expected)
        cache, attended = trunk_of(model, 1)
        with pytest.raises(IndexError):  # no such token
            look_ahead_one(model, cache, attended, AHEAD[:, :, 1].flatten(0, 1) + VOCABULARY)
    assert model.base_model.config._attn_implementation == before
    assert not lookahead._running
