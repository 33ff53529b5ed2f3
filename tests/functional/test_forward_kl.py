"""The forward KL to Best-of-N, enumerated over all draws of the reference."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.functional.test_targets import REFERENCE, REWARDS, K, best_of_n
from vbon_lightning.functional import bon_cross_entropy


def drawn(samples: int) -> list[tuple[Tensor, Tensor]]:
    """Return every tuple of draws of the reference and its probability."""
    tuples = [torch.tensor(places) for places in itertools.product(range(K), repeat=samples)]
    return [(places, REFERENCE[places].prod()) for places in tuples]


@REWARDS
@pytest.mark.parametrize(("n", "samples"), [(1, 2), (2, 2), (2, 4), (3, 4), (4, 4)])
def test_value_and_gradient_are_unbiased_at_every_number_of_responses(rewards: Tensor, n: int, samples: int) -> None:
    theta = torch.tensor([0.3, -0.4, 0.1, 0.9], dtype=torch.float64, requires_grad=True)
    log_policy = theta.log_softmax(-1)
    found = sum(
        chance * bon_cross_entropy(log_policy[places][None], rewards[places][None], n=n)
        for places, chance in drawn(samples)
    )
    exact = -(best_of_n(REFERENCE, rewards, n) * log_policy).sum()
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)
    got, want = (torch.autograd.grad(value, theta, retain_graph=True)[0] for value in (found, exact))
    assert want.abs().max() > 1e-2
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@REWARDS
def test_more_responses_make_less_noise(rewards: Tensor) -> None:
    log_policy = torch.tensor([0.3, -0.4, 0.1, 0.9], dtype=torch.float64).log_softmax(-1)

    def variance(samples: int) -> float:
        found = torch.stack([bon_cross_entropy(log_policy[p][None], rewards[p][None], n=2) for p, _ in drawn(samples)])
        chances = torch.stack([chance for _, chance in drawn(samples)])
        return float((chances * found.square()).sum() - (chances * found).sum() ** 2)

    assert variance(4) < 0.55 * variance(2)


def test_the_mean_is_over_prompts() -> None:
    log_probs = torch.tensor([[-1.0, -2.0], [-3.0, -5.0]])
    rewards = torch.tensor([[0.0, 1.0], [2.0, 2.0]])
    assert bon_cross_entropy(log_probs, rewards, n=2).item() == pytest.approx((2 + (3 + 5) / 2) / 2)


def test_refusals() -> None:
    pair = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"log_probs must have the shape of reference_rewards, \[1, 2\], got \[1, 3\]"):
        bon_cross_entropy(torch.zeros(1, 3), pair, n=2)
    with pytest.raises(ValueError, match="n must"):
        bon_cross_entropy(pair, pair, n=3)
    with pytest.raises(TypeError, match="n counts samples|integer"):
        bon_cross_entropy(pair, pair, n=1.5)  # type: ignore[arg-type]
    assert math.isnan(bon_cross_entropy(pair, torch.tensor([[0.0, math.nan]]), n=2).item())
