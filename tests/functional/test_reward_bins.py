"""Bins of the reward by hand, and what Best-of-N makes of each in 80-digit arithmetic."""

from __future__ import annotations

import bisect
import math
from itertools import pairwise

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate
from torch import Tensor

from vbon_lightning.functional import (
    RewardBins,
    bin_labels,
    binned_reward_cdf,
    bon_bin_log_weights,
    edge_log_cdf,
    exponential_bin_log_weights,
    forecast_head,
    forecast_log_probs,
    predicted_log_cdf,
    reward_bins,
)


def float64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def vader_like(count: int = 2000) -> Tensor:
    """28% exact zeros among continuous rewards on (-1, 1), shuffled."""
    generator = torch.Generator().manual_seed(3)
    rewards = torch.rand(count, dtype=torch.float64, generator=generator) * 2 - 1
    rewards[torch.randperm(count, generator=generator)[: int(0.28 * count)]] = 0.0
    return rewards


# Eighths tie often, and exp keeps them apart.
TIED_REWARDS = st.lists(st.integers(-40, 40).map(lambda k: k / 8), min_size=2, max_size=60).filter(
    lambda rewards: min(rewards) < max(rewards)
)
WIDE_REWARDS = st.lists(
    st.floats(-1e6, 1e6, width=32, allow_subnormal=False), min_size=2, max_size=40, unique=True
).filter(lambda rewards: min(rewards) < max(rewards))

# --- the bins ---------------------------------------------------------------------------------------------


@given(st.one_of(TIED_REWARDS, WIDE_REWARDS), st.integers(2, 70), st.integers(2, 9))
@settings(max_examples=60, deadline=None)
def test_edges_lie_between_rewards_and_every_bin_holds_some(values: list[float], most: int, atoms: int) -> None:
    bins = reward_bins(float64(*values), bins=most, atoms=atoms)
    edges = bins.edges.tolist()
    assert bins.size == len(edges) + 1 >= 2
    assert bins.atoms.shape == (bins.size, atoms)
    assert bins.edges.dtype == bins.atoms.dtype == torch.float64
    assert all(low < high for low, high in pairwise([min(values), *edges, max(values)]))
    assert not set(edges) & set(values)
    held = [[v for v in values if low < v < high] for low, high in pairwise([-math.inf, *edges, math.inf])]
    assert all(held)
    middles = [(j + 0.5) / atoms for j in range(atoms)]
    for inside, found in zip(held, bins.atoms.tolist(), strict=True):
        assert found == pytest.approx(np.quantile(inside, middles).tolist(), rel=1e-12, abs=1e-9)
        assert all(low <= high for low, high in pairwise([min(inside), *found, max(inside)]))


@given(TIED_REWARDS, st.integers(2, 70))
@settings(max_examples=60, deadline=None)
def test_labels_do_not_change_under_an_increasing_transform(values: list[float], most: int) -> None:
    rewards = float64(*values)
    edges = reward_bins(rewards, bins=most).edges
    labels = bin_labels(rewards, edges)
    assert labels.tolist() == [bisect.bisect_left(edges.tolist(), v) for v in values]
    for moved in (rewards.exp(), 3 * rewards - 7, rewards**3):
        assert torch.equal(bin_labels(moved, reward_bins(moved, bins=most).edges), labels)


@given(WIDE_REWARDS.filter(lambda values: len(values) >= 4), st.integers(2, 12))
@settings(max_examples=60, deadline=None)
def test_distinct_rewards_share_their_weight_equally(values: list[float], most: int) -> None:
    most = min(most, len(values) // 2)
    bins = reward_bins(float64(*values), bins=most)
    counts = bin_labels(float64(*values), bins.edges).bincount(minlength=bins.size).tolist()
    assert bins.size == most
    assert all(abs(count - len(values) / most) <= 1 for count in counts)


@pytest.mark.parametrize("most", [2, 3, 10, 1000])
@pytest.mark.parametrize("ones", [1, 30, 50, 99])
def test_a_reward_of_zero_and_one_has_two_bins(most: int, ones: int) -> None:
    rewards = torch.cat([torch.ones(ones), torch.zeros(100 - ones)])
    bins = reward_bins(rewards.reshape(4, 25), bins=most, atoms=3)
    assert bins.edges.tolist() == [0.5]
    assert bins.atoms.tolist() == [[0.0] * 3, [1.0] * 3]
    assert torch.equal(bin_labels(rewards, bins.edges), rewards.long())


@pytest.mark.parametrize("most", [4, 7, 10, 16, 32])
def test_a_long_run_of_equal_rewards_has_a_bin_of_its_own(most: int) -> None:
    rewards = vader_like()
    bins = reward_bins(rewards, bins=most)
    labels = bin_labels(rewards, bins.edges)
    (of_zeros,) = labels[rewards == 0].unique().tolist()
    assert (rewards[labels == of_zeros] == 0).all()
    assert (bins.atoms[of_zeros] == 0).all()
    counts = labels.bincount(minlength=bins.size)
    assert (counts > 0).all()
    assert counts[torch.arange(bins.size) != of_zeros].max() <= len(rewards) / most * 1.5
    assert ((bins.atoms[1:, 0] - bins.atoms[:-1, -1]) > 0).all()


def test_enough_bins_tell_all_rewards_apart() -> None:
    rewards = float64(2, -1, 0.5, 2, 2, 0.5, 7, -1)
    bins = reward_bins(rewards, bins=1000, atoms=2)
    assert bins.edges.tolist() == [-0.25, 1.25, 4.5]
    assert bins.atoms.tolist() == [[-1, -1], [0.5, 0.5], [2, 2], [7, 7]]


def test_a_cut_moves_to_the_nearer_end_of_a_short_run() -> None:
    # Ten rewards in two bins: the cut at 5 falls into the run of two at places 4 and 5, or 5 and 6.
    assert reward_bins(float64(0, 1, 2, 3, 4, 4, 6, 7, 8, 9), bins=2).edges.tolist() == [3.5]
    assert reward_bins(float64(0, 1, 2, 3, 4, 5, 5, 7, 8, 9), bins=2).edges.tolist() == [4.5]
    # Thirty in two: a run from 9 to 15, a run from 14 to 20.
    rising = torch.arange(30, dtype=torch.float64)
    late, early = rising.clone(), rising.clone()
    late[9:16], early[14:21] = 9.0, 14.0
    assert reward_bins(late, bins=2).edges.tolist() == [12.5]
    assert reward_bins(early, bins=2).edges.tolist() == [13.5]


def test_bins_do_not_depend_on_the_dtype_or_the_order() -> None:
    rewards = vader_like(200).float()
    wide, narrow = reward_bins(rewards.double(), bins=8), reward_bins(rewards.flip(0), bins=8)
    assert torch.equal(wide.edges, narrow.edges)
    assert torch.equal(wide.atoms, narrow.atoms)
    assert torch.equal(bin_labels(rewards, wide.edges), bin_labels(rewards.double(), wide.edges))


def test_a_reward_at_an_edge_is_in_the_lower_bin() -> None:
    labels = bin_labels(float64(-9, 0, 0.5, 1, 1.5, 9).reshape(2, 3), float64(0, 1))
    assert labels.tolist() == [[0, 0, 1], [1, 2, 2]]


# --- the CDF at the edges ---------------------------------------------------------------------------------

COUNTED = {
    "jeffreys": lambda k, m: mpmath.log((k + 0.5) / (m + 1)),
    "add_one": lambda k, m: mpmath.log(min(1, (k + 1) / (m + 1))),
    "laplace": lambda k, m: mpmath.log((k + 1) / (m + 2)),
    "digamma": lambda k, m: min(0, mpmath.digamma(k + 0.5) - mpmath.digamma(m + 1)),
}


@pytest.mark.parametrize("estimator", COUNTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_edge_log_cdf_counts_the_rewards_up_to_each_edge(estimator: str, dtype: torch.dtype) -> None:
    rows = [[0.5, 0.0, 2.0, 0.0, 1.0], [3.0, 3.0, 3.0, 3.0, 3.0], [-1.0, -2.0, -1.0, -3.0, -1.0]]
    edges = [-1.5, -1.0, 0.25, 1.0, 1.5]  # two of them at a reward, which counts as passed
    found = edge_log_cdf(torch.tensor(rows, dtype=dtype), float64(*edges), estimator=estimator)
    assert found.dtype == torch.float64
    for row, got in zip(rows, found.tolist(), strict=True):
        counts = [sum(reward <= edge for reward in row) for edge in edges]
        assert got[0] == -math.inf
        assert got[-1] == 0.0
        assert got[1:-1] == pytest.approx([float(COUNTED[estimator](k, 5)) for k in counts], abs=1e-13)


def test_edge_log_cdf_agrees_with_the_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(0, 7, (3, 50), generator=generator).double()
    edges = float64(0, 1, 2.5, 5)  # at rewards as well as between them
    labels = bin_labels(rewards, edges)
    up_to = torch.stack([(labels <= k).sum(-1) for k in range(4)], -1)
    want = ((up_to.double() + 0.5) / 51).log()
    torch.testing.assert_close(edge_log_cdf(rewards, edges)[:, 1:-1], want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_predicted_log_cdf_adds_the_bins_up(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(2, 3, 6, dtype=dtype, generator=generator)
    found = predicted_log_cdf(logits.log_softmax(-1))
    assert found.shape == (2, 3, 7)
    assert found.dtype == torch.float64
    assert (found[..., 0] == -math.inf).all()
    assert (found[..., -1] == 0).all()
    assert (found <= 0).all()
    want = logits.double().softmax(-1)
    torch.testing.assert_close(found.exp().diff(dim=-1), want, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-6)


def test_predicted_log_cdf_keeps_the_digits_of_a_small_bin() -> None:
    log_probs = float64(-800, -30, math.log1p(-math.exp(-30)), -math.inf)
    found = predicted_log_cdf(log_probs)
    assert found.tolist() == pytest.approx([-math.inf, -800, -30, 0, 0], abs=1e-12)


def test_predicted_log_cdf_never_passes_one() -> None:
    log_probs = torch.tensor([1e-7, -30.0, -30.0])  # as float32 rounds them
    assert predicted_log_cdf(log_probs).tolist() == [-math.inf, 0.0, 0.0, 0.0]


# --- what Best-of-N and KL-RL make of a bin ---------------------------------------------------------------


def high_precision_log_weight(log_a: float, log_b: float, n: float) -> float:
    """Log of the mean of ``n F^{n-1}`` between two values of F, in 80 digits."""
    with mpmath.workdps(80):
        a, b = mpmath.exp(mpmath.mpf(log_a)), mpmath.exp(mpmath.mpf(log_b))
        return float(mpmath.log(n * b ** (n - 1) if a == b else (b**n - a**n) / (b - a)))


@pytest.mark.parametrize("n", [1, 1.5, 2, 3.5, 64, 1e5])
def test_bin_weights_keep_their_digits(n: float) -> None:
    log_cdf = [-math.inf, -300.0, -20.0, -20.0, -2.0, -2.0 + 1e-6, -0.7, -0.5, -1e-3, -1e-3 + 1e-12, -1e-9, 0.0, 0.0]
    found = bon_bin_log_weights(float64(*log_cdf), n=n)
    assert found.dtype == torch.float64
    want = [high_precision_log_weight(low, high, n) for low, high in pairwise(log_cdf)]
    assert found.tolist() == pytest.approx(want, rel=1e-11, abs=1e-11)


def test_bin_weights_by_hand() -> None:
    found = bon_bin_log_weights(float64(0, 0.25, 0.5, 1).log(), n=2).exp()
    assert found.tolist() == pytest.approx([0.25, 0.75, 1.5], abs=1e-14)  # F_k + F_{k+1}
    of_one = bon_bin_log_weights(float64(0, 0, 0.5, 1).log(), n=1)  # the reference itself
    assert of_one.tolist() == pytest.approx([0, 0, 0], abs=1e-15)


@pytest.mark.parametrize("n", [1.5, 2, 16, 1e5])
def test_a_bin_without_mass_has_the_limit_of_its_weight(n: float) -> None:
    cdf = float64(0, 0, 0.3, 0.3, 0.3, 1, 1)
    found = bon_bin_log_weights(cdf.log(), n=n).tolist()
    assert found[0] == -math.inf
    limit = math.log(n) + (n - 1) * math.log(0.3)
    assert found[2:4] == pytest.approx([limit, limit], rel=1e-13)
    assert found[5] == pytest.approx(math.log(n), rel=1e-13)
    assert not any(math.isnan(value) for value in found)
    # A bin of almost no mass is continuous with it.
    near = bon_bin_log_weights(float64(-math.inf, math.log(0.3), math.log(0.3) + 1e-13 / n, 0), n=n)[1].item()
    assert near == pytest.approx(limit, rel=1e-9)


SHARES = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1.0)), min_size=2, max_size=12).filter(lambda s: sum(s) > 0)


@given(SHARES, st.one_of(st.sampled_from([1, 1.0, 2, 8, 1e5]), st.floats(1.0, 1e4)))
@settings(max_examples=150, deadline=None)
def test_weighted_by_their_bins_the_weights_sum_to_one(shares: list[float], n: float) -> None:
    mass = float64(*shares)
    cdf = torch.cat([float64(0), mass.cumsum(0)]) / mass.sum()
    cdf[-1] = 1.0
    weights = bon_bin_log_weights(cdf.log(), n=n).exp()
    assert (cdf.diff() * weights).sum().item() == pytest.approx(1, abs=1e-9)
    assert (weights[1:] >= weights[:-1] * (1 - 1e-9)).all()


def test_weights_of_a_batch_are_those_of_its_rows() -> None:
    generator = torch.Generator().manual_seed(2)
    log_cdf = predicted_log_cdf(torch.randn(2, 3, 5, dtype=torch.float64, generator=generator).log_softmax(-1))
    batch = bon_bin_log_weights(log_cdf, n=3.5)
    assert batch.shape == (2, 3, 5)
    for i in range(2):
        for j in range(3):
            cdf = log_cdf[i, j].exp().tolist()
            want = [(high**3.5 - low**3.5) / (high - low) for low, high in pairwise(cdf)]
            assert batch[i, j].exp().tolist() == pytest.approx(want, rel=1e-11)


@pytest.mark.parametrize("beta", [0.1, 1, 2.5])
def test_exponential_weights_are_the_mean_of_each_bin(beta: float) -> None:
    atoms = float64(-1, -0.5, 0.25, 0.3, 0.3, 0.3, 0.7, 1, 2).reshape(3, 3)
    found = exponential_bin_log_weights(atoms, beta=beta).tolist()
    want = [math.log(sum(math.exp(r / beta) for r in row) / 3) for row in atoms.tolist()]
    assert found == pytest.approx(want, abs=1e-13)
    assert found[1] == pytest.approx(0.3 / beta, abs=1e-13)


def test_exponential_weights_neither_overflow_nor_vanish() -> None:
    found = exponential_bin_log_weights(torch.tensor([[-1e4, -1e4], [1e4, 1e4 + 1]]), beta=1e-3)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([-1e7, 1e7 + 1e3 - math.log(2)], rel=1e-12)


# --- rewards within the bins ------------------------------------------------------------------------------


def test_in_bins_of_equal_rewards_the_cdf_is_that_of_the_edges() -> None:
    pooled = float64(0, 0, 1, 2, 2, 2, 5)
    bins = reward_bins(pooled, bins=100)
    assert bins.size == 4
    cdf = float64(0, 0.1, 0.3, 0.35, 1, 0, 0.25, 0.5, 0.75, 1).reshape(2, 5)
    found = binned_reward_cdf(float64(5, 0, 2, 1, 1, 2, 0, 0).reshape(2, 4), cdf.log(), bins)
    below = [[0.35, 0.0, 0.3, 0.1], [0.25, 0.5, 0.0, 0.0]]
    at_or_below = [[1.0, 0.1, 0.35, 0.3], [0.5, 0.75, 0.25, 0.25]]
    for got, want in ((found.log_below, below), (found.log_at_or_below, at_or_below)):
        for row, wanted in zip(got.exp().tolist(), want, strict=True):
            assert row == pytest.approx(wanted, abs=1e-14)


def test_within_a_bin_the_pooled_rewards_say_how_far_up() -> None:
    bins = RewardBins(float64(10), float64(1, 2, 4, 8, 11, 11, 11, 11).reshape(2, 4))
    cdf = float64(0, 0.4, 1)
    rewards = float64(0, 1, 3, 4, 5, 9.5, 11)
    found = binned_reward_cdf(rewards[None], cdf.log()[None], bins)
    # Quantiles below, one half for one that is met, and at least half a quantile from either edge.
    shares = [0.5, 0.5, 2, 2.5, 3, 3.5]
    assert found.log_below.exp()[0].tolist() == pytest.approx([0.4 * s / 4 for s in shares] + [0.4], abs=1e-14)
    assert found.log_at_or_below.exp()[0].tolist() == pytest.approx([0.4 * s / 4 for s in shares] + [1], abs=1e-14)
    narrow = binned_reward_cdf(rewards.float()[None], cdf.log()[None], bins)
    assert narrow.log_below.dtype == narrow.log_at_or_below.dtype == torch.float32
    torch.testing.assert_close(narrow.log_below.double(), found.log_below, rtol=0, atol=1e-6)


def test_a_uniform_reward_is_its_own_cdf() -> None:
    pooled = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    bins = reward_bins(pooled, bins=10, atoms=20)
    log_cdf = torch.cat([float64(0), bins.edges, float64(1)]).log()
    rewards = torch.linspace(0, 1, 333, dtype=torch.float64)
    found = binned_reward_cdf(rewards[None], log_cdf[None], bins).log_below.exp()[0]
    assert (found - rewards).abs().max().item() <= 0.5 / (10 * 20) + 1e-3
    assert (found.diff() >= 0).all()


@given(TIED_REWARDS, st.integers(2, 30), SHARES, st.lists(st.integers(-50, 50), min_size=2, max_size=30))
@settings(max_examples=80, deadline=None)
def test_the_binned_cdf_rises_with_the_reward(
    pooled: list[float], most: int, shares: list[float], placed: list[int]
) -> None:
    bins = reward_bins(float64(*pooled), bins=most, atoms=5)
    mass = float64(*(shares * bins.size)[: bins.size]) + 1e-9
    log_cdf = predicted_log_cdf((mass / mass.sum()).log())
    rewards = float64(*sorted(k / 9 for k in placed))
    found = binned_reward_cdf(rewards[None], log_cdf[None], bins)
    below, at_or_below = found.log_below[0], found.log_at_or_below[0]
    assert (below <= at_or_below).all()
    assert (at_or_below <= 0).all()
    assert at_or_below.isfinite().all()
    for log_f in (below.exp(), at_or_below.exp()):
        assert (log_f.diff() >= -1e-15).all()
    labels = [bisect.bisect_left(bins.edges.tolist(), r) for r in rewards.tolist()]
    cdf = log_cdf.exp().tolist()
    for k, low, high in zip(labels, below.exp().tolist(), at_or_below.exp().tolist(), strict=True):
        assert cdf[k] - 1e-12 <= low <= high <= cdf[k + 1] + 1e-12
        if bins.atoms[k, 0] != bins.atoms[k, -1]:
            assert low == high


# --- forecasts --------------------------------------------------------------------------------------------


def test_a_forecast_is_a_logistic_distribution_in_bins_times_free_factors() -> None:
    rewards = vader_like(300)
    bins = reward_bins(rewards, bins=6)
    outputs = torch.randn(5, bins.size + 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    outputs[1, -1], outputs[2, -1], outputs[3, -2] = -4.0, 3.0, 40.0  # narrow, wide, far off
    found = forecast_log_probs(outputs, bins)
    centre, spread = np.mean(bins.atoms.numpy()), np.std(bins.atoms.numpy(), ddof=1)
    edges = ((bins.edges.numpy() - centre) / spread).tolist()
    for row, got in zip(outputs.tolist(), found.tolist(), strict=True):
        with mpmath.workdps(600):
            passed = [1 / (1 + mpmath.exp(-(e - mpmath.mpf(row[-2])) / mpmath.exp(row[-1]))) for e in edges]
            odds = [mpmath.exp(o) * (b - a) for o, (a, b) in zip(row, pairwise([0, *passed, 1]), strict=False)]
            want = [float(mpmath.log(odd / sum(odds))) for odd in odds]
        assert got == pytest.approx(want, rel=1e-11, abs=1e-11)
    with pytest.raises(ValueError, match=f"K \\+ 2 = {bins.size + 2} entries, got {bins.size}"):
        forecast_log_probs(outputs[:, : bins.size], bins)


# --- refusals ---------------------------------------------------------------------------------------------

SOME = float64(0, 1, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: reward_bins(float64(0, 1, math.nan), bins=2), ValueError, "rewards must be finite"),
        (lambda: reward_bins(float64(0, 1, math.inf), bins=2), ValueError, "rewards must be finite"),
        (lambda: reward_bins(float64(0, 1, -math.inf), bins=2), ValueError, "rewards must be finite"),
        (lambda: reward_bins(torch.zeros(0), bins=2), ValueError, "at least one"),
        (lambda: reward_bins(float64(3, 3, 3), bins=2), ValueError, "all 3 rewards are 3"),
        (lambda: reward_bins(SOME, bins=1), ValueError, "bins must be at least 2, got 1"),
        (lambda: reward_bins(SOME, bins=2, atoms=1), ValueError, "atoms must be at least 2, got 1"),
        (lambda: reward_bins(SOME.long(), bins=2), TypeError, "rewards must have a floating-point dtype"),
        (lambda: bin_labels(SOME.long(), SOME), TypeError, "rewards must have a floating-point dtype"),
        (lambda: bin_labels(SOME, SOME[None]), ValueError, r"edges must have shape \[K - 1\]"),
        (lambda: edge_log_cdf(SOME, SOME), ValueError, r"reference_rewards must have shape \[B, M\]"),
        (lambda: edge_log_cdf(SOME[None].long(), SOME), TypeError, "reference_rewards must have a floating-point"),
        (lambda: edge_log_cdf(SOME[None], SOME[None]), ValueError, r"edges must have shape \[K - 1\]"),
        (lambda: edge_log_cdf(SOME[None], SOME, estimator="mean"), ValueError, "estimator must be one of"),
        (lambda: predicted_log_cdf(SOME.long()), TypeError, "bin_log_probs must have a floating-point dtype"),
        (lambda: bon_bin_log_weights(-SOME, n=0.5), ValueError, "n must be at least 1, got 0.5"),
        (lambda: bon_bin_log_weights(-SOME, n="2"), TypeError, "n must be a real number"),
        (lambda: exponential_bin_log_weights(SOME[None], beta=0), ValueError, "beta must be greater than 0"),
        (lambda: exponential_bin_log_weights(SOME, beta=1), ValueError, r"atoms must have shape \[K, Q\]"),
        (
            lambda: binned_reward_cdf(SOME[None], torch.zeros(1, 3), RewardBins(SOME, SOME.expand(4, 3))),
            ValueError,
            r"log_cdf must have shape \[B, K \+ 1\] = \[1, 5\], got \[1, 3\]",
        ),
        (
            lambda: binned_reward_cdf(SOME, torch.zeros(1, 5), RewardBins(SOME, SOME.expand(4, 3))),
            ValueError,
            r"rewards must have shape \[B, G\]",
        ),
    ],
)
def test_refusals_say_what_came_and_what_was_expected(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def _ridge_by_least_squares(features: np.ndarray, values: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
    # A ridge is a regression on rows of sqrt(penalty), one a feature, whose values are 0.
    centred = features - features.mean(0)
    size = penalty * (centred**2).sum(0).mean()
    rows = np.concatenate([centred, np.sqrt(size) * np.eye(features.shape[1])])
    targets = np.concatenate([values - values.mean(), np.zeros(features.shape[1])])
    slope = np.linalg.lstsq(rows, targets, rcond=None)[0]
    return slope, float(values.mean() - features.mean(0) @ slope)


@pytest.mark.parametrize("ridge", [None, 0.5])
@pytest.mark.parametrize(("bins", "scale"), [(2, 1.0), (8, 1.0), (8, 0.01)])
def test_a_fitted_head_is_two_regressions(bins: int, scale: float, ridge: float | None) -> None:
    rng = np.random.default_rng(0)
    samples = 3000
    features = scale * rng.normal(size=(samples, 3)) + 2
    rewards = (
        1
        + features @ np.array([2.0, -1.0, 0.5]) / scale
        + np.exp(features[:, 0] / scale / 3) * rng.normal(size=samples)
    )
    fit = rng.random(samples) < 0.6
    cut = reward_bins(torch.tensor(rewards), bins=bins)
    options = {} if ridge is None else {"ridge": ridge}
    weight, bias = forecast_head(torch.tensor(features), torch.tensor(rewards), cut, fit=torch.tensor(fit), **options)

    penalty = 1e-3 if ridge is None else ridge
    atoms = cut.atoms.numpy()
    spread = atoms.std(ddof=1)
    values = (rewards - atoms.mean()) / spread
    slope, offset = _ridge_by_least_squares(features[fit], values[fit], penalty)
    missed = np.abs(values - (features @ slope + offset))
    edges = cut.edges.numpy()
    finest = max(1e-3, (edges[-1] - edges[0]) / spread / bins / 4)
    assert (missed < finest).any()
    scale_slope, scale_offset = _ridge_by_least_squares(features, np.log(np.maximum(missed, finest)), penalty)
    by_scale = missed / np.exp(features @ scale_slope + scale_offset)
    # E|x| of a logistic distribution of scale 1, by quadrature.
    mean = integrate.quad(lambda x: 2 * x * np.exp(-x) / (1 + np.exp(-x)) ** 2, 0, 60)[0]
    assert cut.size == bins
    assert torch.equal(weight[:bins], torch.zeros(bins, 3).double())
    assert torch.equal(bias[:bins], torch.zeros(bins).double())
    want = [slope, scale_slope], [offset, scale_offset + np.log(by_scale.mean() / mean)]
    torch.testing.assert_close(weight[bins:], torch.tensor(np.stack(want[0])), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(bias[bins:], torch.tensor(want[1]), rtol=1e-6, atol=1e-6)


def test_a_head_on_features_that_tell_nothing_is_the_mean() -> None:
    rewards = torch.tensor([0.0, 1.0, 2.0, 3.0])
    weight, bias = forecast_head(torch.ones(4, 2), rewards, reward_bins(rewards, bins=2), fit=torch.ones(4).bool())
    assert torch.equal(weight, torch.zeros_like(weight))
    assert bias[2].item() == pytest.approx(0.0, abs=1e-12)


def test_rounding_lifts_no_cdf_above_one() -> None:
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(500, 30, generator=generator).log_softmax(-1)
    log_probs = torch.cat([log_probs, torch.full((500, 1), -60.0)], -1)
    assert (log_probs.double().logcumsumexp(-1)[:, :-1] > 0).any()  # or this shows nothing
    assert (predicted_log_cdf(log_probs) <= 0).all()


def test_a_scale_goes_no_further_than_it_may() -> None:
    bins = RewardBins(torch.tensor([0.0, 1.0]).double(), torch.tensor([[-1.0, -0.5], [0.2, 0.8], [1.5, 2.0]]).double())
    outputs = torch.tensor([[0.1, -0.2, 0.3, 0.4, scale] for scale in (-100.0, -7.0, 7.0, 100.0)]).double()
    found = forecast_log_probs(outputs, bins)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[3])
    assert not torch.equal(found[1], forecast_log_probs(torch.tensor([[0.1, -0.2, 0.3, 0.4, -6.5]]).double(), bins)[0])


def test_sixteen_quantiles_a_bin_unless_others_are_asked_for() -> None:
    assert reward_bins(torch.arange(100.0), bins=4).atoms.shape == (4, 16)
    assert reward_bins(torch.arange(100.0), bins=4, atoms=5).atoms.shape == (4, 5)


def test_more_bins_than_rewards_are_a_bin_a_reward() -> None:
    found = reward_bins(torch.tensor([2.0, 0.0, 1.0]), bins=32)
    assert found.edges.tolist() == [0.5, 1.5]
    assert found.atoms[:, 0].tolist() == [0.0, 1.0, 2.0]


def test_neighbouring_numbers_are_told_apart() -> None:
    for steps in (1, 2):  # one of the two means rounds down, the other up
        low = 1 + steps * 2.0**-52
        rewards = torch.tensor([low, low + 2.0**-52], dtype=torch.float64)
        assert bin_labels(rewards, reward_bins(rewards, bins=2).edges).tolist() == [0, 1]


def test_only_a_bin_whose_rewards_are_all_equal_is_an_atom() -> None:
    atoms = [[0.0, 0.0, 1.0], [2.0, 3.0, 3.0], [4.0, 4.0, 4.0]]
    bins = RewardBins(float64(1.5, 3.5), torch.tensor(atoms).double())
    cdf = float64(0.0, 0.2, 0.5, 1.0)
    found = binned_reward_cdf(float64(0.0, 3.0, 4.0)[None], cdf.log()[None], bins)
    # Of three quantiles two are at or below 0, none below: a third of the bin's mass; of 3.0 one below and all at it.
    middle = [0.2 * 1 / 3, 0.2 + 0.3 * 2 / 3]
    torch.testing.assert_close(found.log_below[0].exp(), float64(*middle, 0.5))
    torch.testing.assert_close(found.log_at_or_below[0].exp(), float64(*middle, 1.0))
