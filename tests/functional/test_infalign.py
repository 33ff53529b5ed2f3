"""InfAlign's target against its definitions: quantiles, transforms, ties, and where its slope comes from."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.functional.groups import DISTINCT, REFERENCE, TIED, expected_gradient, gradient_of, groups
from vbon_lightning.functional import (
    RewardCDF,
    infalign_slope,
    infalign_target,
    leave_one_out,
    reward_cdf,
    vbon_target,
)


def exact_cdf(rewards: Tensor) -> RewardCDF:
    below = (rewards[None, :] < rewards[:, None]).double() @ REFERENCE
    at_or_below = (rewards[None, :] <= rewards[:, None]).double() @ REFERENCE
    return RewardCDF(below.log(), at_or_below.clamp(max=1).log())


def phi(u: Tensor, transform: str, slope: float) -> Tensor:
    """The transforms as they are written in the docstring."""
    if transform == "log":
        return u.log()
    return torch.exp(-slope * (1 - u)) if slope > 0 else -torch.exp(slope * u)


TRANSFORMS = pytest.mark.parametrize(("transform", "slope"), [("exp", 7.0), ("exp", 0.5), ("exp", -3.0), ("log", 7.0)])


@TRANSFORMS
@pytest.mark.parametrize("rewards", [DISTINCT, TIED], ids=["distinct", "tied"])
def test_each_way_with_ties(transform: str, slope: float, rewards: Tensor) -> None:
    cdf = exact_cdf(rewards)
    low, high = cdf.log_below.exp(), cdf.log_at_or_below.exp()
    scores = {
        ties: infalign_target(cdf, beta=0.3, transform=transform, slope=slope, ties=ties).score
        for ties in ("middle", "average", "below")
    }
    torch.testing.assert_close(scores["below"], phi(low, transform, slope), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scores["middle"], phi((low + high) / 2, transform, slope), rtol=1e-12, atol=1e-12)
    # The expectation of the transform where the quantile is drawn from the tie: a fine sum.
    places = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    drawn = torch.stack([phi(a + places * (b - a), transform, slope).mean() for a, b in zip(low, high, strict=True)])
    torch.testing.assert_close(scores["average"], drawn, rtol=1e-5, atol=1e-5)
    # So that the mean under the reference is the integral of the transform, whatever ties.
    whole = -1.0 if transform == "log" else math.copysign((1 - math.exp(-abs(slope))) / abs(slope), slope)
    assert (REFERENCE * scores["average"]).sum().item() == pytest.approx(whole, abs=1e-12)


def test_an_average_over_nothing_is_the_value_there() -> None:
    log_u = torch.tensor([-0.5, -3.0], dtype=torch.float64)
    for transform in ("exp", "log"):
        scores = [
            infalign_target(RewardCDF(log_u, log_u), beta=1.0, transform=transform, ties=ties).score
            for ties in ("average", "below")
        ]
        torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=0)
        single = RewardCDF(log_u.float() - 1, log_u.float())
        score = infalign_target(single, beta=1.0, transform=transform, ties="average").score
        assert score.dtype == torch.float32


@pytest.mark.parametrize("n", [1.5, 4, 32])
def test_the_log_is_the_lower_bound_of_variational_best_of_n(n: float) -> None:
    noise = torch.Generator().manual_seed(0)
    rewards, reference = torch.randn(3, 5, generator=noise), torch.randn(3, 64, generator=noise).round(decimals=1)
    cdf = reward_cdf(rewards.round(decimals=1), reference)
    bound = vbon_target(torch.zeros(3, 5), cdf, n=n, bound="lower")
    ours = infalign_target(cdf, beta=1 / (n - 1), transform="log", ties="below")
    assert ours.kl_coef == bound.kl_coef
    apart = bound.score - ours.score
    torch.testing.assert_close(apart, torch.full_like(apart, math.log(n) / (n - 1)), rtol=1e-5, atol=1e-5)


@TRANSFORMS
@pytest.mark.parametrize("ties", ["middle", "average"])
def test_the_expected_gradient_is_that_of_the_objective(transform: str, slope: float, ties: str) -> None:
    target = infalign_target(exact_cdf(TIED), beta=0.3, transform=transform, slope=slope, ties=ties)

    def objective(probs: Tensor) -> Tensor:
        return (probs * target.score).sum() - 0.3 * (probs * (probs / REFERENCE).log()).sum()

    def advantages(group: Tensor) -> Tensor:
        from tests.functional.groups import THETA

        log_ratio = THETA.log_softmax(-1) - REFERENCE.log()
        return leave_one_out((target.score - target.kl_coef * log_ratio)[group])

    assert len(groups(2)) == 16
    found, expected = expected_gradient(advantages, 2), gradient_of(objective)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def win_rate_gradient(n: int, worst: bool, at: float = 1.0, size: int = 2000) -> Tensor:
    """Differentiate P(Best-of-n of the policy beats Best-of-n of the reference) in the policy's probabilities.

    The reference is uniform over ``size`` ordered responses; the policy is a Best-of-``at`` of it.
    """
    edges = torch.linspace(0, 1, size + 1, dtype=torch.float64) ** at
    probs = edges.diff().requires_grad_()
    cumulative = torch.cat([probs.new_zeros(1), probs.cumsum(0)])
    middle = (torch.arange(size, dtype=torch.float64) + 0.5) / size  # a reference sample below each response
    if worst:
        chosen = (1 - cumulative[:-1]) ** n - (1 - cumulative[1:]) ** n
        beats = 1 - (1 - middle) ** n
    else:
        chosen = cumulative[1:] ** n - cumulative[:-1] ** n
        beats = middle**n
    gradient: Tensor = torch.autograd.grad((chosen * beats).sum(), probs)[0]
    return gradient


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("worst", [False, True], ids=["best", "worst"])
def test_the_slope_is_that_of_the_win_rate_at_the_reference(n: int, worst: bool) -> None:
    """Up to a constant, the derivative is ``u^{2n-1}`` or minus its mirror image, whose steep end Phi has."""
    gradient = win_rate_gradient(n, worst)
    u = (torch.arange(len(gradient), dtype=torch.float64) + 0.5) / len(gradient)
    power = 2 * n - 1
    shape = -((1 - u) ** power) if worst else u**power
    scale = (gradient[-1] - gradient[0]) / (shape[-1] - shape[0])
    torch.testing.assert_close(gradient - gradient[0], scale * (shape - shape[0]), rtol=0, atol=5e-3 * scale.item())
    steep = slice(0, 2) if worst else slice(-2, None)
    scaled = phi(u, "exp", -infalign_slope(n) if worst else infalign_slope(n))
    assert (scaled[steep].diff() / (shape[steep].diff())).item() == pytest.approx(1, rel=2e-2)


def test_a_policy_that_is_a_best_of_two_has_the_quoted_slope_of_ten() -> None:
    gradient = win_rate_gradient(4, False, at=2.0)
    u = (torch.arange(len(gradient), dtype=torch.float64) + 0.5) / len(gradient)
    centred = gradient - gradient[0]
    torch.testing.assert_close(centred / centred[-1], (u / u[-1]) ** 10, rtol=0, atol=5e-3)
    assert infalign_slope(4) == 7.0


def test_no_slope_overflows() -> None:
    log_u = torch.tensor([[-1e-3, -0.7, -5.0]])
    for slope in (1e4, -1e4):
        score = infalign_target(RewardCDF(log_u, log_u), beta=1.0, slope=slope).score
        assert score.isfinite().all() and score.abs().max() <= 1


CDF = RewardCDF(torch.full((2, 3), -1.0), torch.full((2, 3), -0.5))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"beta": 0.0}, ValueError, "beta must be greater than 0, got 0.0"),
        ({"slope": 0.0}, ValueError, r"slope must not be 0: exp\(0 u\) is the same for all rewards"),
        ({"slope": math.inf}, ValueError, "slope must be finite"),
        ({"transform": "x"}, ValueError, "transform must be one of exp, log, got 'x'"),
        ({"ties": "x"}, ValueError, "ties must be one of middle, average, below, got 'x'"),
        ({"cdf": CDF._replace(log_below=CDF.log_below.long())}, TypeError, "cdf.log_below must have a floating-point"),
        ({"cdf": CDF._replace(log_at_or_below=CDF.log_below.long())}, TypeError, "cdf.log_at_or_below must have a fl"),
        (
            {"cdf": CDF._replace(log_below=torch.zeros(2, 2))},
            ValueError,
            "cdf.log_at_or_below must have the shape of cdf.log_below",
        ),
    ],
)
def test_what_is_refused(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        infalign_target(**({"cdf": CDF, "beta": 0.5} | changes))


def test_a_slope_needs_a_sample() -> None:
    with pytest.raises(ValueError, match="^n must be at least 1, got 0.5"):
        infalign_slope(0.5)
