"""Models without a cache that could be shared: sampled and scored as their authors' forward pass has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertLMHeadModel

from tests.modules.setting import make_data, make_files, make_module, make_trainer
from tests.sampling.test_decode import (
    PAD,
    PROMPTS,
    VOCABULARY,
    assert_same,
    batch_of,
    noise_of,
    pad_left,
    rows_of,
    slow_decode,
)
from vbon_lightning.finite import NotFiniteError
from vbon_lightning.models import ModelError, ModelSpec
from vbon_lightning.sampling import response_log_probs, sample_completions
from vbon_lightning.sampling.plain import left_aligned, refuse_plain, runs_plain
from vbon_lightning.sampling.request import SamplingRequest
from vbon_lightning.sampling.scoring import output_head

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": PAD,
}
KINDS: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4},
    "rwkv": {"attention_hidden_size": 16, "context_length": 64},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 24},
    # Counts positions from the pad token's id on.
    "roberta": {"is_decoder": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


def make(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SMALL | KINDS.get(kind, {}) | changes))
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_and_scored_as_a_plain_forward_pass_has_it(kind: str) -> None:
    model = make(kind)
    with pytest.warns(UserWarning, match=f"(?i){kind}.*sampled and scored without one"):
        assert runs_plain(model)
    ends, noise = [2, 7, 20], noise_of([0, 1, 2, 3])
    ours = sample_completions(
        model, SamplingRequest(*pad_left(PROMPTS), noise, end_ids=ends, pad_id=PAD, temperature=0.7)
    )
    scored = response_log_probs(model, batch_of(PROMPTS), ours, temperature=0.7)
    torch.testing.assert_close(scored, ours.log_probs, atol=1e-5, rtol=1e-5)
    lengths = set()
    for prompt, group, uniforms in zip(PROMPTS, rows_of(ours), noise, strict=True):
        for row, uniform in zip(group, uniforms, strict=True):
            assert_same(row, slow_decode(model, prompt, uniform, ends, 0.7))
            lengths.add(len(row[0]))
    assert len(lengths) > 3, "responses end at various places"


def test_the_gradient_of_a_plain_score() -> None:
    model = make("roberta").train()
    runs_plain(model)
    batch = batch_of(PROMPTS)
    drawn = sample_completions(
        model, SamplingRequest(batch.tokens, batch.mask, noise_of([0, 1, 2, 3]), end_ids=[2], pad_id=PAD)
    )
    assert model.training
    response_log_probs(model, batch, drawn).sum().backward()
    ours = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    total = torch.zeros(())
    for row, prompt in enumerate(PROMPTS):
        for sample in range(drawn.mask.shape[1]):
            response = drawn.tokens[row, sample][drawn.mask[row, sample]]
            logits = model(input_ids=torch.cat([torch.tensor(prompt), response])[None], use_cache=False).logits[0]
            said = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            total = total + said.gather(1, response[:, None]).sum()
    total.backward()
    for name, value in model.named_parameters():
        if value.grad is not None:
            torch.testing.assert_close(ours[name], value.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "gemma2"])
def test_attention_decoders_keep_their_cache(kind: str) -> None:
    assert not runs_plain(make(kind))
    refuse_plain(make(kind), "anything")


def test_what_has_no_other_way_is_refused() -> None:
    with pytest.raises(ModelError, match="guided decoding needs a model with a plain cache .* Rwkv"):
        refuse_plain(make("rwkv"), "guided decoding")


def test_a_model_that_reads_ahead_is_refused() -> None:
    torch.manual_seed(0)
    encoder = BertLMHeadModel(BertConfig(**SMALL | {"is_decoder": False})).eval()
    with pytest.raises(ModelError, match="BertLMHeadModel is no causal language model"):
        runs_plain(encoder)


def test_a_model_that_says_nan_is_told_from_one_that_reads_ahead() -> None:
    model = make("llama")
    with torch.no_grad():
        model.lm_head.weight[2] = 1e38  # finite, and its product with what it is given is not
    with pytest.raises(NotFiniteError, match="LlamaForCausalLM. says of a few tokens is NaN.*a run that diverged"):
        runs_plain(model)


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5).filter(any), min_size=1, max_size=4))
@settings(deadline=None, max_examples=30)
def test_left_aligned_keeps_the_real_tokens_in_order(rows: list[list[bool]]) -> None:
    mask = torch.tensor(rows)
    tokens = torch.arange(mask.numel()).view_as(mask) + 100
    moved, lengths = left_aligned(tokens, mask)
    for before, kept, after, length in zip(tokens, mask, moved, lengths.tolist(), strict=True):
        assert after[:length].tolist() == before[kept].tolist()
        assert (after[length:] == after[0]).all()


def test_training_of_a_recurrent_model(tmp_path: Any) -> None:
    files = make_files(tmp_path / "files")
    config = {**SMALL, **KINDS["mamba"], "model_type": "mamba"}
    del config["vocab_size"]
    policy = ModelSpec(config=config, tokenizer=str(files / "llama"))
    data = make_data(files, policy=policy, sampler="graph")
    make_trainer(tmp_path, steps=2).fit(make_module("klrl", data), data)


# -- what a fresh model is too small to tell --


@pytest.mark.parametrize("cap", [None, 5.0])
def test_a_capped_head_is_known_however_small_its_logits(cap: float | None) -> None:
    model = make("gemma2", initializer_range=0.01, final_logit_softcapping=cap, attn_logit_softcapping=None)
    assert (output_head(model) is None) == (cap is not None)


def test_scores_of_a_model_that_grew_are_those_of_its_forward_pass() -> None:
    model = make("gemma2", initializer_range=0.02, final_logit_softcapping=5.0)
    batch, noise = batch_of(PROMPTS), noise_of([0, 1, 2, 3])
    output_head(model)  # judged when its logits are small
    with torch.no_grad():
        model.model.norm.weight.add_(300.0)  # logits are now far beyond the cap
    drawn = sample_completions(model, SamplingRequest(batch.tokens, batch.mask, noise, end_ids=[2], pad_id=PAD))
    with torch.no_grad():
        scored = response_log_probs(model, batch, drawn)
    for row, prompt in enumerate(PROMPTS):
        response = drawn.tokens[row, 0][drawn.mask[row, 0]]
        with torch.no_grad():
            logits = model(input_ids=torch.cat([torch.tensor(prompt), response])[None]).logits[0]
        plain = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, response[:, None])[:, 0]
        torch.testing.assert_close(scored[row, 0][drawn.mask[row, 0]], plain, atol=1e-4, rtol=1e-4)
