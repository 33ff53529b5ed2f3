"""Masks and log-probabilities of tokens and sequences."""

from __future__ import annotations

import math

import pytest
import torch

from vbon_lightning.functional import response_mask, sequence_log_prob, token_log_probs


def test_mask_runs_through_the_first_eos_even_if_pad_is_eos() -> None:
    tokens = torch.tensor([[5, 6, 2, 2, 2], [2, 2, 2, 2, 2], [5, 6, 7, 8, 9], [5, 2, 6, 2, 7]])
    got = response_mask(tokens, eos_id=2)
    assert got.dtype == torch.bool
    assert got.sum(-1).tolist() == [3, 1, 5, 2]
    assert got.int().diff(dim=-1).max().item() <= 0  # a prefix


def test_mask_knows_several_eos_ids() -> None:
    tokens = torch.tensor([[[5, 3, 6, 2], [5, 6, 2, 3]]])
    assert response_mask(tokens, eos_id=(2, 3)).sum(-1).tolist() == [[2, 3]]
    assert response_mask(tokens, eos_id=[2]).sum(-1).tolist() == [[4, 3]]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3])
def test_token_log_probs_against_probabilities(temperature: float) -> None:
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 3, 4, 7, dtype=torch.float64) * 4, torch.randint(7, (2, 3, 4))
    got = token_log_probs(logits, tokens, temperature=temperature)
    weights = (logits / temperature).exp()
    want = (weights / weights.sum(-1, keepdim=True)).log()
    for index in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)).tolist():
        assert got[tuple(index)].item() == pytest.approx(want[(*index, tokens[tuple(index)])].item(), abs=1e-12)


def test_half_precision_logits_give_float32() -> None:
    torch.manual_seed(0)
    logits, tokens = (torch.randn(5, 300) * 3).bfloat16(), torch.randint(300, (5,))
    got = token_log_probs(logits, tokens)
    assert got.dtype == torch.float32
    want = token_log_probs(logits.double(), tokens)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-5)


def test_token_log_probs_has_the_softmax_gradient_and_survives_masked_tokens() -> None:
    logits = torch.tensor([[1.0, -math.inf, 0.5], [1e4, 0.0, -1e4]], dtype=torch.float64, requires_grad=True)
    got = token_log_probs(logits, torch.tensor([2, 0]), temperature=2.0)
    assert got.isfinite().all()
    got.sum().backward()
    one_hot = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    want = (one_hot - (logits.detach() / 2).softmax(-1)) / 2
    torch.testing.assert_close(logits.grad, want, rtol=0, atol=1e-15)


def test_sequence_log_prob_ignores_what_is_outside_the_mask() -> None:
    values = torch.tensor([[-1.0, -2.0, math.nan], [-0.5, -math.inf, math.inf]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    got = sequence_log_prob(values, mask)
    assert got.tolist() == [-3.0, -0.5]
    got.sum().backward()
    assert torch.equal(values.grad, mask.float())


def test_sequence_log_prob_sums_in_float64() -> None:
    values = torch.full((1, 100_000), -0.1)
    got = sequence_log_prob(values, torch.ones(1, 100_000, dtype=torch.bool))
    assert got.dtype == torch.float32
    assert got.item() == torch.tensor(values[0, 0].double().item() * 100_000).item()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: response_mask(torch.zeros(2), eos_id=1), TypeError, "tokens must hold integers.*float32"),
        (lambda: response_mask(torch.zeros(2).long(), eos_id=[]), ValueError, "at least one token id"),
        (lambda: response_mask(torch.zeros(2).long(), eos_id=["</s>"]), TypeError, "got '</s>'"),
        (lambda: response_mask(torch.tensor(1), eos_id=1), ValueError, "got a scalar"),
        (
            lambda: token_log_probs(torch.zeros(2, 3), torch.zeros(3).long()),
            ValueError,
            r"tokens must have shape logits.shape\[:-1\] = \[2\], got \[3\]",
        ),
        (
            lambda: token_log_probs(torch.zeros(2, 3), torch.zeros(2).long(), temperature=0.0),
            ValueError,
            "temperature must be greater than 0, got 0.0",
        ),
        (lambda: token_log_probs(torch.zeros(2, 3), torch.zeros(2)), TypeError, "tokens must hold integers"),
        (
            lambda: sequence_log_prob(torch.zeros(2, 3), torch.ones(2, 3)),
            TypeError,
            "mask must be a bool tensor",
        ),
        (
            lambda: sequence_log_prob(torch.zeros(2, 3), torch.ones(2).bool()),
            ValueError,
            "mask must have the shape",
        ),
    ],
)
def test_refusals_say_what_came_and_what_was_expected(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_sequence_is_summed_over_its_tokens_whatever_stands_before_them() -> None:
    values = torch.arange(24.0).view(2, 3, 4)
    got = sequence_log_prob(values, torch.ones(2, 3, 4, dtype=torch.bool))
    assert got.tolist() == [[6.0, 22.0, 38.0], [54.0, 70.0, 86.0]]
