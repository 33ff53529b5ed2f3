"""GRPO's advantages and lengths against loops, and what is biased about them."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

from tests.functional.groups import DISTINCT, expected_gradient, gradient_of
from vbon_lightning.functional import group_normalised_advantages, kl_k3, length_weights


def by_hand(rewards: list[float], scale: bool) -> list[float]:
    """As TRL documents it: the standard deviation over G - 1, and 1e-4 beside it."""
    mean, spread = statistics.fmean(rewards), statistics.stdev(rewards) + 1e-4 if scale else 1.0
    return [(reward - mean) / spread for reward in rewards]


@pytest.mark.parametrize("scale", [True, False])
def test_advantages_by_hand(scale: bool) -> None:
    rewards = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 2
    expected = torch.tensor([by_hand(row, scale) for row in rewards.tolist()], dtype=torch.float64)
    torch.testing.assert_close(group_normalised_advantages(rewards, scale=scale), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [True, False])
def test_what_is_left_out(scale: bool) -> None:
    left = [[0, 1, 3], [2, 3], [1], []]
    rewards = torch.full((4, 4), math.nan, dtype=torch.float64)
    for row, places in enumerate(left):
        rewards[row, places] = torch.arange(len(places), dtype=torch.float64) ** 2
    kept = ~rewards.isnan()
    found = group_normalised_advantages(rewards, kept=kept, scale=scale)
    assert not found[~kept].any()
    for row, places in enumerate(left):
        expected = by_hand(rewards[row, places].tolist(), scale) if len(places) > 1 else [0.0] * len(places)
        assert found[row, places].tolist() == pytest.approx(expected, abs=1e-12)


def test_rewards_that_all_tie_have_no_advantage() -> None:
    assert not group_normalised_advantages(torch.full((2, 3), 0.7)).any()


def test_without_the_division_only_the_size_is_biased() -> None:
    """A mean that holds the sample itself shrinks the gradient by (G - 1)/G; the division turns it."""
    exact = gradient_of(lambda probs: (probs * DISTINCT).sum())
    plain = expected_gradient(lambda group: group_normalised_advantages(DISTINCT[group], scale=False), 3)
    torch.testing.assert_close(plain, exact * 2 / 3, rtol=0, atol=1e-12)
    scaled = expected_gradient(lambda group: group_normalised_advantages(DISTINCT[group]), 3)
    assert torch.cosine_similarity(scaled, exact, dim=0) < 0.999


def test_k3_as_a_loss_has_the_gradient_of_the_other_kl() -> None:
    from tests.functional.groups import REFERENCE, THETA

    theta = THETA.clone().requires_grad_()
    log_probs = theta.log_softmax(-1)
    loss = (log_probs.exp().detach() * kl_k3(log_probs, REFERENCE.log())).sum()
    found = torch.autograd.grad(loss, theta)[0]
    forward = gradient_of(lambda probs: (REFERENCE * (REFERENCE / probs).log()).sum())
    backward = gradient_of(lambda probs: (probs * (probs / REFERENCE).log()).sum())
    torch.testing.assert_close(found, forward, rtol=0, atol=1e-12)
    assert (forward - backward).abs().max() > 1e-2


MASK = torch.arange(4) < torch.tensor([[4, 1, 2], [0, 3, 3]])[..., None]


def token_means(values: Tensor, norm: str) -> float:
    """The three losses as they are written, of responses that have a token."""
    rows = [row[keep].tolist() for group, mask in zip(values, MASK, strict=True)
            for row, keep in zip(group, mask, strict=True) if keep.any()]  # fmt: skip
    if norm == "grpo":
        return statistics.fmean(statistics.fmean(row) for row in rows)
    if norm == "dr_grpo":
        return sum(map(sum, rows)) / (len(rows) * 6)
    return statistics.fmean([value for row in rows for value in row])


@pytest.mark.parametrize("norm", ["grpo", "dr_grpo", "dapo"])
def test_weights_make_a_sum_over_tokens_the_mean_that_is_asked_for(norm: str) -> None:
    values = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    weights = length_weights(MASK, norm=norm, max_length=6)
    responses = MASK.any(-1).sum()
    found = (torch.where(MASK, values, 0.0).sum(-1) * weights).sum() / responses
    assert found.item() == pytest.approx(token_means(values, norm), abs=1e-6)
    assert length_weights(torch.zeros_like(MASK), norm=norm, max_length=6).isfinite().all()
    one = torch.ones(1, 1, 1, dtype=torch.bool)
    assert length_weights(one, norm=norm, max_length=1).item() == 1, "a token alone is its own mean"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: group_normalised_advantages(torch.zeros(3, 1)), ValueError, "a group's mean and spread need G >= 2"),
        (lambda: group_normalised_advantages(torch.zeros(3)), ValueError, r"rewards must have shape \[B, G\]"),
        (lambda: group_normalised_advantages(torch.zeros(3, 2), eps=-1.0), ValueError, "eps must be at least 0"),
        (
            lambda: group_normalised_advantages(torch.zeros(3, 2), kept=torch.ones(3, 3).bool()),
            ValueError,
            r"kept must have the shape of rewards, \[3, 2\]",
        ),
        (lambda: length_weights(MASK, norm="x", max_length=4), ValueError, "norm must be one of grpo, dr_grpo, dapo"),
        (lambda: length_weights(MASK, norm="grpo", max_length=0), ValueError, "max_length must be at least 1"),
        (lambda: length_weights(MASK[0], norm="grpo", max_length=4), ValueError, r"mask must have shape \[B, G, T\]"),
    ],
)
def test_what_is_refused(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        call()
