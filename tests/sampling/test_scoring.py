"""Teacher-forced logits."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import tiny_gpt2, tiny_llama
from tests.sampling.test_decode import PAD, PROMPTS, VOCABULARY, batch_of, noise_of
from vbon_lightning.sampling import response_logits, sample_completions, scoring
from vbon_lightning.types import Completions

MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


@pytest.fixture(params=list(MODELS))
def model(request):
    return MODELS[request.param](VOCABULARY, seed=9)


def sampled(model, prompts) -> Completions:
    return sample_completions(
        model, prompts.tokens, prompts.mask, noise_of(prompts.index.tolist(), samples=3), end_ids=[2, 3], pad_id=PAD
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
