"""CDF estimates against direct counting."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vbon_lightning.functional import CDF_ESTIMATORS, RewardCDF, bon_log_prob, mixed_log_cdf, reward_cdf

FORMULAS = {
    "jeffreys": lambda k, m: math.log((k + 0.5) / (m + 1)),
    "add_one": lambda k, m: min(0.0, math.log((k + 1) / (m + 1))),
    "laplace": lambda k, m: math.log((k + 1) / (m + 2)),
    "digamma": lambda k, m: min(0.0, float(mpmath.digamma(k + 0.5) - mpmath.digamma(m + 1))),
}
ESTIMATORS = pytest.mark.parametrize("estimator", sorted(FORMULAS))


def test_every_estimator_is_tested() -> None:
    assert set(FORMULAS) == set(CDF_ESTIMATORS)


@ESTIMATORS
def test_estimates_equal_counting(estimator: str) -> None:
    torch.manual_seed(1)
    rewards = torch.randint(-3, 8, (4, 6)).double()  # many ties, some outside the reference's range
    reference = torch.randint(0, 5, (4, 9)).double()
    got = reward_cdf(rewards, reference, estimator=estimator)
    assert isinstance(got, RewardCDF)
    for b in range(4):
        for g in range(6):
            below = sum(r < rewards[b, g] for r in reference[b]).item()
            at_or_below = sum(r <= rewards[b, g] for r in reference[b]).item()
            assert got.log_below[b, g].item() == pytest.approx(FORMULAS[estimator](below, 9), abs=1e-14)
            want = FORMULAS[estimator](at_or_below, 9)
            assert got.log_at_or_below[b, g].item() == pytest.approx(want, abs=1e-14)


def test_the_default_is_jeffreys() -> None:
    rewards, reference = torch.tensor([[0.5]]), torch.tensor([[0.0, 1.0]])
    assert torch.equal(reward_cdf(rewards, reference).log_below, torch.tensor([[0.5]]).log())


finite = st.floats(-1e6, 1e6, width=32)


@ESTIMATORS
@given(rewards=st.lists(finite, min_size=1, max_size=6), reference=st.lists(finite, min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_estimates_are_finite_ordered_and_monotone(estimator: str, rewards: list, reference: list) -> None:
    values = torch.tensor([sorted(rewards)])
    log_below, log_at_or_below = reward_cdf(values, torch.tensor([reference]), estimator=estimator)
    assert log_below.isfinite().all()
    assert (log_below <= log_at_or_below).all()
    assert (log_at_or_below <= 0).all()
    assert (log_below.diff(dim=-1) >= 0).all()
    assert (log_at_or_below.diff(dim=-1) >= 0).all()


@ESTIMATORS
@pytest.mark.parametrize(
    "transform",
    [lambda r: 3 * r - 7, lambda r: r**3, torch.exp, torch.atan],
    ids=["affine", "cube", "exp", "atan"],
)
def test_increasing_transforms_of_the_rewards_change_nothing(estimator: str, transform) -> None:
    """Exactly: Best-of-N depends on ranks only, so its estimate must too, bit for bit."""
    torch.manual_seed(2)
    rewards = torch.randint(-6, 7, (3, 8)).double() / 4
    reference = torch.randint(-6, 7, (3, 50)).double() / 4
    log_p = -torch.rand(3, 8).double() * 30
    before = reward_cdf(rewards, reference, estimator=estimator)
    after = reward_cdf(transform(rewards), transform(reference), estimator=estimator)
    assert torch.equal(before.log_below, after.log_below)
    assert torch.equal(before.log_at_or_below, after.log_at_or_below)
    assert torch.equal(
        *(bon_log_prob(log_p, c.log_below, n=8, log_at_or_below=c.log_at_or_below) for c in (before, after))
    )


def test_estimated_best_of_n_never_exceeds_one_for_likely_responses() -> None:
    """F_hat + p > 1 before it is corrected: the best reward seen, and a response of probability .9."""
    cdf = reward_cdf(torch.tensor([[9.0]]), torch.arange(8.0)[None])
    log_p = torch.tensor([[0.9]]).log()
    got = bon_log_prob(log_p, cdf.log_below, n=4, log_at_or_below=cdf.log_at_or_below)
    assert got.item() == pytest.approx(math.log(1 - 0.1**4), abs=1e-6)


def test_jeffreys_has_the_least_bias_of_log_f() -> None:
    """Exact expectation over k ~ Binomial(32, F), averaged over a grid of F: the reason for the default."""
    m, grid = 32, torch.linspace(0.02, 0.98, 97, dtype=torch.float64)
    k = torch.arange(m + 1, dtype=torch.float64)
    law = torch.distributions.Binomial(m, grid[:, None]).log_prob(k[None]).exp()
    bias = {
        name: ((law * estimate(k, m)).sum(-1) - grid.log()).mean().abs().item()
        for name, estimate in CDF_ESTIMATORS.items()
    }
    assert min(bias, key=bias.get) == "jeffreys"


def test_memory_does_not_grow_with_the_product() -> None:
    """G x M = 10^10 comparisons would not fit; sorting and bisecting does."""
    rewards, reference = torch.rand(1, 100_000), torch.rand(1, 100_000)
    got = reward_cdf(rewards, reference)
    assert (got.log_below.exp() - rewards).abs().max().item() < 0.02


def test_dtypes_mix_and_nan_stays_nan() -> None:
    got = reward_cdf(torch.tensor([[0.5, math.nan]], dtype=torch.bfloat16), torch.tensor([[0.0, 1.0]]).double())
    assert got.log_below.dtype == torch.bfloat16
    assert got.log_below.isnan().tolist() == [[False, True]]
    poisoned = reward_cdf(torch.tensor([[0.5]]), torch.tensor([[0.0, math.nan]]))
    assert poisoned.log_below.isnan().all()
    assert poisoned.log_at_or_below.isnan().all()


def test_no_gradient_flows() -> None:
    rewards = torch.zeros(1, 2, requires_grad=True)
    assert not reward_cdf(rewards, torch.zeros(1, 3)).log_below.requires_grad


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (
            (torch.zeros(1, 2), torch.zeros(1, 3)),
            {"estimator": "mean"},
            ValueError,
            "estimator must be one of jeffreys, add_one, laplace, digamma, got 'mean'",
        ),
        ((torch.zeros(2), torch.zeros(1, 3)), {}, ValueError, r"rewards must have shape \[B, G\], got \[2\]"),
        ((torch.zeros(1, 2), torch.zeros(3)), {}, ValueError, r"reference_rewards must have shape \[B, M\]"),
        ((torch.zeros(2, 2), torch.zeros(3, 3)), {}, ValueError, r"agree on B, got \[2, 2\] and \[3, 3\]"),
        ((torch.zeros(1, 2), torch.zeros(1, 0)), {}, ValueError, "at least one sample a prompt, got M = 0"),
        ((torch.zeros(1, 2).long(), torch.zeros(1, 3)), {}, TypeError, "rewards must have a floating-point"),
    ],
)
def test_refusals_say_what_came_and_what_was_expected(arguments, options, error, message) -> None:
    with pytest.raises(error, match=message):
        reward_cdf(*arguments, **options)


def test_a_mixture_with_a_prediction_by_hand() -> None:
    known = torch.tensor([[0.25, 0.5], [1.0, 0.0]], dtype=torch.float64)
    ahead = torch.tensor([[0.75, 0.5], [0.2, 0.1]], dtype=torch.float64)
    found = mixed_log_cdf(known.log(), ahead.log(), samples=6, prior_samples=2.0).exp()
    assert torch.allclose(found, torch.tensor([[0.375, 0.5], [0.8, 0.025]], dtype=torch.float64))
    assert torch.equal(mixed_log_cdf(known.log(), ahead.log(), samples=6, prior_samples=0), known.log())
    ends = torch.tensor([-torch.inf, 0.0])
    assert torch.equal(mixed_log_cdf(ends, ends, samples=3, prior_samples=4.0), ends), "0 and 1 stay 0 and 1"


def test_what_a_mixture_refuses() -> None:
    with pytest.raises(ValueError, match="prior_samples"):
        mixed_log_cdf(torch.zeros(2), torch.zeros(2), samples=3, prior_samples=-1.0)
    with pytest.raises(ValueError, match="samples"):
        mixed_log_cdf(torch.zeros(2), torch.zeros(2), samples=0, prior_samples=1.0)
    with pytest.raises(ValueError, match="shape"):
        mixed_log_cdf(torch.zeros(2), torch.zeros(3), samples=2, prior_samples=1.0)


def test_a_mixture_is_a_probability_and_keeps_its_dtype() -> None:
    highest = torch.zeros(1, 1, dtype=torch.float64)
    for samples in range(1, 40):
        for prior in (0.3, 1.0, 7.0, 11.1):
            mixed = mixed_log_cdf(highest, highest, samples=samples, prior_samples=prior)
            assert mixed.item() <= 0
            assert mixed.item() == pytest.approx(0, abs=1e-12)
    assert mixed_log_cdf(highest.float(), highest, samples=3, prior_samples=1.0).dtype == torch.float32
