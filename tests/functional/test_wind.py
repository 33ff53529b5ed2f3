"""WIND: the losses by hand, the iteration as their minimum, and the equilibrium as its end."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.functional.test_targets import REFERENCE, REWARDS, K
from vbon_lightning.functional import WIND_FITS, wind_log_ratio, wind_loss

FITS = pytest.mark.parametrize("fit", WIND_FITS)
BETA, STEP = 0.4, 2.0
ITERATE = torch.tensor([0.1, 0.3, 0.25, 0.35], dtype=torch.float64)


def win_rates(policy: Tensor, rewards: Tensor) -> Tensor:
    """The chance of each response to beat a draw of the policy, a tie counting half."""
    found = [policy[rewards < r].sum() + policy[rewards == r].sum() / 2 for r in rewards]
    return torch.stack(found)


def iterated(policy: Tensor, rewards: Tensor, step: float = STEP) -> Tensor:
    """The paper's update."""
    share = 1 / (1 + step * BETA)
    logits = share * policy.log() + (1 - share) * REFERENCE.log() + step * share * win_rates(policy, rewards)
    return logits.softmax(-1)


def equilibrium(rewards: Tensor) -> Tensor:
    policy = REFERENCE
    for _ in range(200):
        policy = iterated(policy, rewards)
    return policy


def expected_gradient(log_policy: Tensor, iterate: Tensor, rewards: Tensor, fit: str, samples: int) -> Tensor:
    """Gradient of the loss over every group of draws of the iterate, in the policy's logits."""
    theta = log_policy.detach().clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    log_ratio = wind_log_ratio(theta.log_softmax(-1), iterate.log(), REFERENCE.log(), beta=BETA, step_size=STEP)
    for places in itertools.product(range(K), repeat=samples):
        y = torch.tensor(places)
        total = total + iterate[y].prod() * wind_loss(log_ratio[y][None], rewards[y][None], fit=fit)  # type: ignore[arg-type]
    return torch.autograd.grad(total, theta)[0]


@pytest.mark.parametrize(("fit", "samples"), [("squared", 3), ("kl", 3), ("nce", 3), ("kl", 4)])
@REWARDS
def test_the_iteration_is_the_minimum_at_every_number_of_responses(rewards: Tensor, fit: str, samples: int) -> None:
    after = iterated(ITERATE, rewards)
    assert expected_gradient(after.log(), ITERATE, rewards, fit, samples).abs().max() < 1e-10
    assert expected_gradient(ITERATE.log(), ITERATE, rewards, fit, samples).abs().max() > 1e-2
    downhill = expected_gradient(ITERATE.log(), ITERATE, rewards, fit, samples) @ (ITERATE.log() - after.log())
    assert downhill > 0, "the loss is convex in the logits' differences"


@FITS
@REWARDS
def test_the_fixed_point_is_the_equilibrium(rewards: Tensor, fit: str) -> None:
    end = equilibrium(rewards)
    claimed = (REFERENCE.log() + win_rates(end, rewards) / BETA).softmax(-1)
    torch.testing.assert_close(end, claimed, rtol=0, atol=1e-12)
    assert (end - REFERENCE).abs().max() > 0.1
    torch.testing.assert_close(iterated(end, rewards, step=0.3), end, rtol=0, atol=1e-12)  # whatever the step
    assert expected_gradient(end.log(), end, rewards, fit, 3).abs().max() < 1e-10


LOSSES = {
    "squared": lambda p, t: (p - t) ** 2,
    "kl": lambda p, t: -t * p.log() - (1 - t) * (1 - p).log(),
    "nce": lambda p, t: (1 + 2 * t) * (1 + 2 * p).log() - 2 * t * (2 * p).log(),
}


def by_hand(log_ratio: list[float], rewards: list[float], fit: str) -> float:
    count, losses = len(rewards), []

    def wins(i: int, k: int) -> float:
        return float(rewards[i] > rewards[k]) + 0.5 * float(rewards[i] == rewards[k])

    for i, j in itertools.permutations(range(count), 2):
        others = [k for k in range(count) if k not in (i, j)]
        t = (1 + sum(wins(i, k) - wins(j, k) for k in others) / len(others)) / 2
        losses.append(along_the_tangent((1 + log_ratio[i] - log_ratio[j]) / 2, t, fit))
    return sum(losses) / len(losses)


def along_the_tangent(p: float, t: float, fit: str) -> float:
    """The loss of a prediction, beyond 1/100 and, where it has another end, 99/100 by the slope it has there."""
    low, high = {"squared": (-math.inf, math.inf), "kl": (0.01, 0.99), "nce": (0.01, math.inf)}[fit]
    inside = torch.tensor(min(max(p, low), high), dtype=torch.float64, requires_grad=True)
    value = LOSSES[fit](inside, t)
    (slope,) = torch.autograd.grad(value, inside)
    return value.item() + slope.item() * (p - inside.item())


@FITS
def test_the_loss_by_hand(fit: str) -> None:
    log_ratio = torch.tensor([[0.1, -0.3, 0.5, 0.2], [0.0, 0.4, -0.2, 0.1]], dtype=torch.float64)
    rewards = torch.tensor([[1.0, 0.0, 1.0, 3.0], [2.0, 1.0, 0.0, 5.0]], dtype=torch.float64)
    want = [by_hand(g, r, fit) for g, r in zip(log_ratio.tolist(), rewards.tolist(), strict=True)]
    assert wind_loss(log_ratio, rewards, fit=fit).item() == pytest.approx(sum(want) / 2)  # type: ignore[arg-type]
    assert wind_loss(log_ratio.float(), rewards, fit=fit).dtype == torch.float32  # type: ignore[arg-type]
    # A response without a reward is left out, prompts count alike, and one that keeps fewer than three does not.
    rewards[0, 1] = math.nan
    kept = by_hand(log_ratio[0, [0, 2, 3]].tolist(), rewards[0, [0, 2, 3]].tolist(), fit)
    both = wind_loss(log_ratio, rewards, fit=fit).item()  # type: ignore[arg-type]
    assert both == pytest.approx((kept + want[1]) / 2)
    rewards[1, :2] = math.nan
    assert wind_loss(log_ratio, rewards, fit=fit).item() == pytest.approx(kept)  # type: ignore[arg-type]


@FITS
@pytest.mark.parametrize("spread", [3.0, -3.0])
def test_predictions_beyond_all_win_rates_are_pulled_back(fit: str, spread: float) -> None:
    log_ratio = torch.tensor([[0.0, spread, 0.0]], dtype=torch.float64, requires_grad=True)
    loss = wind_loss(log_ratio, torch.zeros(1, 3, dtype=torch.float64), fit=fit)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(loss, log_ratio)
    assert loss.item() == pytest.approx(by_hand([0.0, spread, 0.0], [0.0] * 3, fit))
    ranked = wind_loss(log_ratio.detach(), torch.tensor([[1.0, 0.0, 2.0]]), fit=fit)  # type: ignore[arg-type]
    assert ranked.item() == pytest.approx(by_hand([0.0, spread, 0.0], [1.0, 0.0, 2.0], fit))
    assert gradient[0, 1] * spread > 0
    torch.testing.assert_close(gradient.sum(), torch.zeros((), dtype=torch.float64), atol=1e-12, rtol=0)
    nearer = wind_loss(log_ratio.detach() / 2, torch.zeros(1, 3, dtype=torch.float64), fit=fit)  # type: ignore[arg-type]
    assert nearer < loss


def test_what_is_fitted_by_hand() -> None:
    ours, anchor, reference = (torch.tensor([[value]]) for value in (-2.0, -3.0, -5.0))
    assert wind_log_ratio(ours, anchor, reference, beta=0.5, step_size=4.0).item() == pytest.approx(0.5 * 3 + 1 / 4)


def test_refusals() -> None:
    three = torch.zeros(1, 3)
    with pytest.raises(ValueError, match="G >= 3, got 2"):
        wind_loss(torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="fit must be one of squared, kl, nce, got 'x'"):
        wind_loss(three, three, fit="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="log_ratio must have the shape of rewards"):
        wind_loss(torch.zeros(2, 3), three)
    for name in ("beta", "step_size"):
        with pytest.raises(ValueError, match=f"{name} must be greater than 0, got 0"):
            wind_log_ratio(three, three, three, **({"beta": 1.0, "step_size": 1.0} | {name: 0.0}))
    with pytest.raises(ValueError, match="anchor_log_probs must have the shape of log_probs"):
        wind_log_ratio(three, torch.zeros(1, 2), three, beta=1.0, step_size=1.0)
