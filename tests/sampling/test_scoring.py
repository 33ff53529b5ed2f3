"""Teacher-forced logits, and the statistics that are made of them in chunks."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from tests.helpers import tiny_gpt2, tiny_llama
from tests.sampling.test_decode import PAD, PROMPTS, VOCABULARY, batch_of, noise_of
from vbon_lightning.functional import token_log_probs, vocabulary_kl
from vbon_lightning.sampling import (
    response_log_probs,
    response_logits,
    response_statistics,
    sample_completions,
    scoring,
    text_log_probs,
)
from vbon_lightning.sampling.request import SamplingRequest
from vbon_lightning.types import Completions, Responses

MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


@pytest.fixture(params=list(MODELS))
def model(request):
    return MODELS[request.param](VOCABULARY, seed=9)


def sampled(model, prompts) -> Completions:
    return sample_completions(
        model,
        SamplingRequest(
            prompts.tokens, prompts.mask, noise_of(prompts.index.tolist(), samples=3), end_ids=[2, 3], pad_id=PAD
        ),
    )


def test_equals_a_pass_over_each_row_alone(model):
    prompts = batch_of(PROMPTS)
    drawn = sampled(model, prompts)
    length = drawn.tokens.shape[-1]
    scored = response_logits(model, prompts, drawn, hidden=True)
    assert scored.logits.shape == (12, length, VOCABULARY)
    assert scored.hidden is not None
    for row in range(12):
        prompt, response = PROMPTS[row // 3], drawn.tokens[row // 3, row % 3]
        real = int(drawn.mask[row // 3, row % 3].sum())
        output = model(
            input_ids=torch.tensor([prompt + response[:real].tolist()]), output_hidden_states=True, use_cache=False
        )
        span = slice(len(prompt) - 1, len(prompt) - 1 + real)
        assert torch.allclose(scored.logits[row, :real], output.logits[0, span], atol=1e-5)
        assert torch.allclose(scored.hidden[row, :real], output.hidden_states[-1][0, span], atol=1e-5)


@pytest.mark.parametrize("max_logits", [1, 5 * VOCABULARY, 2**25], ids=["one", "five", "all"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_of_one_model(model, max_logits, temperature):
    prompts = batch_of(PROMPTS)
    drawn = sampled(model, prompts)
    assert not drawn.mask.all()
    logits = response_logits(model, prompts, drawn).logits
    expected = token_log_probs(logits, drawn.tokens.flatten(0, 1), temperature=temperature).view(drawn.mask.shape)
    found = response_log_probs(model, prompts, drawn, temperature=temperature, max_logits=max_logits)
    assert torch.allclose(found, torch.where(drawn.mask, expected, 0.0), atol=1e-5)


def test_no_hidden_states_unless_asked_for(model):
    prompts = batch_of(PROMPTS)
    assert response_logits(model, prompts, sampled(model, prompts)).hidden is None


def test_takes_completions_that_are_not_contiguous(model):
    prompts = batch_of(PROMPTS)
    drawn = sampled(model, prompts)
    strided = Completions(*(part.transpose(0, 1).contiguous().transpose(0, 1) for part in drawn))
    assert not strided.tokens.is_contiguous()
    expected = response_logits(model, prompts, drawn).logits
    assert torch.equal(response_logits(model, prompts, strided).logits, expected)


def test_a_model_without_logits_to_keep(model, monkeypatch):
    prompts = batch_of(PROMPTS)
    drawn = sampled(model, prompts)
    expected = response_logits(model, prompts, drawn).logits
    monkeypatch.setattr(scoring, "keep_logits", lambda model, count: {})
    assert torch.allclose(response_logits(model, prompts, drawn).logits, expected, atol=1e-6)


def test_gradient_flows(model):
    prompts = batch_of(PROMPTS)
    response_logits(model, prompts, sampled(model, prompts)).logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# -- statistics ----------------------------------------------------------------------------------------------


def tiny_gemma2(vocab_size: int, *, seed: int = 0) -> Gemma2ForCausalLM:
    """Make a model that squashes its logits, so that its head alone does not give them."""
    config = Gemma2Config(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=0.5,
        initializer_range=0.2,
        max_position_embeddings=64,
        sliding_window=64,
        pad_token_id=PAD,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Gemma2ForCausalLM(config).float().eval()


BUILD = MODELS | {"gemma2": tiny_gemma2}


def by_row(policy, reference, prompts, drawn, temperature):
    """Return log-probs, reference log-probs and KL from a pass over each row alone."""
    found = [torch.zeros(drawn.tokens.shape) for _ in range(3)]
    for place, prompt in enumerate(PROMPTS):
        for sample in range(drawn.tokens.shape[1]):
            real = int(drawn.mask[place, sample].sum())
            response = drawn.tokens[place, sample, :real]
            row = torch.tensor([prompt + response.tolist()])
            span = slice(len(prompt) - 1, len(prompt) - 1 + real)
            ours, theirs = (model(input_ids=row, use_cache=False).logits[0, span] for model in (policy, reference))
            found[0][place, sample, :real] = token_log_probs(ours, response, temperature=temperature)
            found[1][place, sample, :real] = token_log_probs(theirs, response, temperature=temperature)
            found[2][place, sample, :real] = vocabulary_kl(ours, theirs, temperature=temperature)
    return found


def weighted(log_probs, kl):
    weights = torch.linspace(-1, 2, log_probs.numel()).view(log_probs.shape)
    return (weights * log_probs).sum() + (weights.flip(0) * kl).sum()


def gradients(model):
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    return found


@pytest.mark.parametrize("kind", BUILD)
@pytest.mark.parametrize("max_logits", [1, 5 * VOCABULARY, 2**25], ids=["one", "five", "all"])
@pytest.mark.parametrize("ends", [[2, 3, 9, 15], [99]], ids=["some finish", "none finishes"])
def test_statistics_and_their_gradient_equal_those_of_each_row_alone(kind, max_logits, ends):
    policy, reference = (BUILD[kind](VOCABULARY, seed=seed) for seed in (4, 5))
    prompts = batch_of(PROMPTS)
    noise = noise_of(prompts.index.tolist(), samples=3)
    drawn = sample_completions(policy, SamplingRequest(prompts.tokens, prompts.mask, noise, end_ids=ends, pad_id=PAD))
    assert drawn.mask.all() == (ends == [99])
    assert (scoring.output_head(policy) is None) == (kind == "gemma2")
    sizes = []
    if kind != "gemma2":
        policy.get_output_embeddings().register_forward_hook(lambda _, arguments, out: sizes.append(out.numel()))
    got = response_statistics(policy, reference, prompts, drawn, temperature=0.7, max_logits=max_logits)
    assert all(size <= max(max_logits, VOCABULARY) for size in sizes)
    expected = by_row(policy, reference, prompts, drawn, 0.7)
    for ours, theirs in zip(got[:3], expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    weighted(got.log_probs, got.kl).backward()
    ours = gradients(policy)
    weighted(expected[0], expected[2]).backward()
    for one, other in zip(ours, gradients(policy), strict=True):
        assert torch.allclose(one, other, atol=1e-4, rtol=1e-4)
    assert not got.reference_log_probs.requires_grad
    reference.zero_grad()


@pytest.mark.parametrize("kind", BUILD)
@pytest.mark.parametrize("max_logits", [1, 5 * VOCABULARY, 2**25], ids=["one", "five", "all"])
def test_log_probs_of_one_model_are_those_of_the_statistics(kind, max_logits):
    policy, reference = (BUILD[kind](VOCABULARY, seed=seed) for seed in (4, 5))
    prompts = batch_of(PROMPTS)
    drawn = sampled(policy, prompts)
    sizes = []
    if kind != "gemma2":
        assert scoring.output_head(policy) is not None
        policy.get_output_embeddings().register_forward_hook(lambda _, arguments, out: sizes.append(out.numel()))
    given = Responses(drawn.tokens, drawn.mask)
    got = response_log_probs(policy, prompts, given, temperature=0.7, max_logits=max_logits)
    assert all(size <= max(max_logits, VOCABULARY) for size in sizes)
    expected = response_statistics(policy, reference, prompts, drawn, temperature=0.7).log_probs
    assert torch.allclose(got, expected, atol=1e-6)
    weighted(got, torch.zeros_like(got)).backward()
    ours = gradients(policy)
    weighted(expected, torch.zeros_like(got)).backward()
    for one, other in zip(ours, gradients(policy), strict=True):
        assert torch.allclose(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [*MODELS, "gemma2"])
@pytest.mark.parametrize("max_logits", [1, 3 * VOCABULARY])
def test_chosen_tokens_of_whole_texts(kind, max_logits):
    model = BUILD[kind](VOCABULARY, seed=9)
    rows = [[3, 4, 5, 6, 2], [7, 8], [5, 5, 5]]
    tokens = torch.tensor([row + [PAD] * (5 - len(row)) for row in rows])
    mask = torch.tensor([[place < len(row) for place in range(5)] for row in rows])
    asked = mask & (tokens != 5)
    found = text_log_probs(model, tokens, mask, asked, max_logits=max_logits)
    for row, ids in enumerate(rows):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        for place in range(1, 5):
            right = 0.0
            if asked[row, place]:
                right = float(logits[place - 1].log_softmax(-1)[ids[place]])
            assert float(found[row, place - 1]) == pytest.approx(right, abs=1e-5)


def test_the_head_is_found_while_dropout_is_on():
    model = tiny_gpt2(VOCABULARY, seed=9).train()
    model.transformer.wte.eval()
    before = torch.get_rng_state()
    assert scoring.output_head(model) is model.lm_head
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and model.transformer.drop.training and not model.transformer.wte.training


def test_responses_without_tokens_have_probability_one(model):
    prompts = batch_of(PROMPTS)
    empty = Responses(torch.zeros(4, 2, 1, dtype=torch.long), torch.zeros(4, 2, 1, dtype=torch.bool))
    got = response_log_probs(model, prompts, empty)
    assert not got.any()
    got.sum().backward()
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_each_prompt_is_run_once(model):
    prompts = batch_of(PROMPTS)
    drawn = sampled(model, prompts)
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda _, arguments, out: seen.append(arguments[0].shape))
    response_logits(model, prompts, drawn)
    assert seen == [(4, 5), (12, drawn.tokens.shape[-1] - 1)]


def test_gradient_checkpointing_gives_the_same(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    prompts, reference = batch_of(PROMPTS), tiny_llama(VOCABULARY, seed=3)
    drawn = sampled(model, prompts)
    plain = response_statistics(model, reference, prompts, drawn, hidden=True)
    weighted(plain.log_probs, plain.kl).backward()
    expected = gradients(model)
    calls = []
    model.gradient_checkpointing_enable()
    model.get_input_embeddings().register_forward_hook(lambda _, arguments, out: calls.append(arguments[0].shape))
    again = response_statistics(model, reference, prompts, drawn, hidden=True)
    assert calls == [(12, 5 + drawn.tokens.shape[-1])], "checkpointed layers keep no cache"
    for ours, theirs in zip(again[:4], plain[:4], strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    weighted(again.log_probs, again.kl).backward()
    for one, other in zip(gradients(model), expected, strict=True):
        assert torch.allclose(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("max_logits", [5 * VOCABULARY, 2**25], ids=["five", "all"])
@pytest.mark.parametrize("width", [2, 7], ids=["shorter", "longer"])
def test_further_responses_share_the_pass(model, width, max_logits):
    """What is said of them, and of the policy's own, is what two passes say."""
    model.eval()
    prompts, reference = batch_of(PROMPTS), tiny_llama(VOCABULARY, seed=3)
    drawn = sampled(model, prompts)
    noise = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, width + 1, (4, 5), generator=noise)
    tokens = torch.randint(3, VOCABULARY, (4, 5, width), generator=noise)
    extra = Responses(tokens, torch.arange(width) < lengths[..., None])
    alone = response_statistics(model, reference, prompts, drawn, hidden=True, temperature=0.7)
    theirs = response_log_probs(model, prompts, extra, temperature=0.7)
    (weighted(alone.log_probs, alone.kl) + theirs.square().sum()).backward()
    expected = gradients(model)
    passes = []
    model.get_input_embeddings().register_forward_hook(lambda _, arguments, out: passes.append(arguments[0].shape))
    both = response_statistics(
        model, reference, prompts, drawn, hidden=True, temperature=0.7, extra=extra, max_logits=max_logits
    )
    assert passes == [(4, 5), (32, max(width, drawn.tokens.shape[-1]) - 1)]
    for ours, other in zip(both, [*alone[:4], theirs], strict=True):
        assert ours.shape == other.shape
        assert torch.allclose(ours, other, atol=1e-5)
    (weighted(both.log_probs, both.kl) + both.extra_log_probs.square().sum()).backward()
    for one, other in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_responses_of_one_token(model):
    prompts = batch_of(PROMPTS)
    noise = noise_of(prompts.index.tolist(), samples=3, length=1)
    drawn = sample_completions(model, SamplingRequest(prompts.tokens, prompts.mask, noise, end_ids=[2], pad_id=PAD))
    got = response_statistics(model, tiny_llama(VOCABULARY, seed=3), prompts, drawn)
    for ours, theirs in zip(got[:3], by_row(model, tiny_llama(VOCABULARY, seed=3), prompts, drawn, 1.0), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
