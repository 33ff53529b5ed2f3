"""Best-of-N against brute force over all N-tuples, and its numerics against 600-digit arithmetic."""

from __future__ import annotations

import itertools
import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vbon_lightning.functional import (
    bon_expected_reward,
    bon_kl_bound,
    bon_kl_estimate,
    bon_log_prob,
    bon_log_ratio,
    bon_log_ratio_bound,
    bon_order_weights,
    bon_self_win_rate,
    bon_win_rate,
    bon_win_rate_bound,
    kl_weight,
)

PROBS = torch.tensor([0.1, 0.35, 0.2, 0.05, 0.3], dtype=torch.float64)
DISTINCT = torch.tensor([0.3, -1.0, 2.5, 7.0, 0.31], dtype=torch.float64)
TIED = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
PARTLY_TIED = torch.tensor([1.0, 0.0, 1.0, 3.0, 2.0], dtype=torch.float64)
ALL_REWARDS = pytest.mark.parametrize("rewards", [DISTINCT, TIED, PARTLY_TIED], ids=["distinct", "binary", "some"])


def exact_cdf(probs: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Log F_lt and log F_le at each atom."""
    below = (rewards[None, :] < rewards[:, None]).to(probs.dtype) @ probs
    at_or_below = (rewards[None, :] <= rewards[:, None]).to(probs.dtype) @ probs
    return below.log(), at_or_below.clamp(max=1).log()


def brute_force_bon(probs: Tensor, rewards: Tensor, n: int) -> Tensor:
    """Enumerate all N-tuples; the winner among the best is drawn uniformly."""
    out = [0.0] * len(probs)
    p, r = probs.tolist(), rewards.tolist()
    for draw in itertools.product(range(len(p)), repeat=n):
        best = max(r[i] for i in draw)
        winners = [i for i in draw if r[i] == best]
        for i in winners:
            out[i] += math.prod(p[j] for j in draw) / len(winners)
    return torch.tensor(out, dtype=torch.float64)


@ALL_REWARDS
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_log_prob_equals_enumeration_of_all_draws(rewards: Tensor, n: int) -> None:
    below, at_or_below = exact_cdf(PROBS, rewards)
    got = bon_log_prob(PROBS.log(), below, n=n, log_at_or_below=at_or_below).exp()
    torch.testing.assert_close(got, brute_force_bon(PROBS, rewards, n), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_log_prob_without_ties_needs_only_the_cdf_below(n: int) -> None:
    below, _ = exact_cdf(PROBS, DISTINCT)
    got = bon_log_prob(PROBS.log(), below, n=n).exp()
    torch.testing.assert_close(got, brute_force_bon(PROBS, DISTINCT, n), rtol=1e-12, atol=1e-15)


@ALL_REWARDS
@pytest.mark.parametrize("n", [0.3, 1, 1.5, 2, 4, 7, 250.5])
def test_probabilities_sum_to_one_for_every_real_n(rewards: Tensor, n: float) -> None:
    below, at_or_below = exact_cdf(PROBS, rewards)
    total = bon_log_prob(PROBS.log(), below, n=n, log_at_or_below=at_or_below).exp().sum().item()
    assert total == pytest.approx(1.0, abs=1e-13)


@ALL_REWARDS
def test_ratio_and_log_prob_agree_and_n_one_is_the_reference(rewards: Tensor) -> None:
    below, at_or_below = exact_cdf(PROBS, rewards)
    ratio = bon_log_ratio(PROBS.log(), below, n=4, log_at_or_below=at_or_below)
    log_prob = bon_log_prob(PROBS.log(), below, n=4, log_at_or_below=at_or_below)
    torch.testing.assert_close(ratio, log_prob - PROBS.log(), rtol=0, atol=1e-14)
    assert torch.equal(bon_log_prob(PROBS.log(), below, n=1, log_at_or_below=at_or_below), PROBS.log())
    assert torch.equal(bon_log_ratio(PROBS.log(), below, n=1), torch.zeros_like(PROBS))


# --- numerics ---------------------------------------------------------------------------------------------


def high_precision_log_ratio(log_p: float, log_a: float, n: float, log_b: float | None) -> mpmath.mpf:
    """``log((b^n - a^n) / (b - a))`` with the same consistency rules, in 600 digits."""
    with mpmath.workdps(600):
        p, a = mpmath.exp(mpmath.mpf(log_p)), mpmath.exp(mpmath.mpf(log_a))
        a = min(a, 1 - p)
        b = a + p if log_b is None else min(mpmath.mpf(1), max(mpmath.exp(mpmath.mpf(log_b)), a + p))
        return mpmath.log((b**n - a**n) / (b - a))


LOG_BELOW = [-math.inf, -800.0, -40.0, -2.0, -0.5, -0.01, -1e-6, -1e-12, -1e-17, 0.0]


@pytest.mark.parametrize("n", [0.5, 1, 1.5, 2, 10, 1030, 1_000_000])
@pytest.mark.parametrize("log_p", [-500.0, -60.0, -20.0, -1.0, -0.01, -1e-9])
def test_log_ratio_keeps_its_digits(n: float, log_p: float) -> None:
    want = [float(high_precision_log_ratio(log_p, log_a, n, None)) for log_a in LOG_BELOW]
    got = bon_log_ratio(
        torch.full((len(LOG_BELOW),), log_p, dtype=torch.float64),
        torch.tensor(LOG_BELOW, dtype=torch.float64),
        n=n,
    ).tolist()
    # Relative error of a few ulps of the terms that are added: log F_le times n - 1, and log a.
    for log_a, g, w in zip(LOG_BELOW, got, want, strict=True):
        assert g == pytest.approx(w, rel=1e-11, abs=1e-9 if n == 1_000_000 else 1e-12), (log_a, g, w)


@pytest.mark.parametrize("n", [0.5, 2, 10, 1030, 1_000_000])
@pytest.mark.parametrize("log_p", [-500.0, -20.0, -1.0])
@pytest.mark.parametrize(
    ("log_a", "log_b"),
    [
        (-math.inf, -0.5),
        (-math.inf, 0.0),
        (-1.0, -0.5),
        (-0.5, -0.5),
        (-2e-3, -1e-3),
        (-1e-4, 0.0),
        (-3.0, -9.0),
    ],
)
def test_log_ratio_with_ties_keeps_its_digits(n: float, log_p: float, log_a: float, log_b: float) -> None:
    want = float(high_precision_log_ratio(log_p, log_a, n, log_b))
    tensors = [torch.tensor([x], dtype=torch.float64) for x in (log_p, log_a, log_b)]
    got = bon_log_ratio(tensors[0], tensors[1], n=n, log_at_or_below=tensors[2]).item()
    assert got == pytest.approx(want, rel=1e-11, abs=1e-9)


def test_impossible_responses_stay_impossible() -> None:
    log_p = torch.tensor([-math.inf, -math.inf, -math.inf])
    log_a = torch.tensor([-math.inf, -1.0, 0.0])
    for n in (0.5, 1, 3, 1e6):
        assert torch.equal(bon_log_prob(log_p, log_a, n=n), log_p)
        assert not bon_log_ratio(log_p, log_a, n=n).isnan().any()


def test_a_certain_response_stays_certain() -> None:
    """p = 1 leaves no room below it: whatever the estimate of F, Best-of-N returns it with probability 1."""
    zero = torch.zeros(3)
    got = bon_log_prob(zero, torch.tensor([-math.inf, -1.0, 0.0]), n=50)
    assert torch.equal(got, zero)


def test_float32_is_computed_in_float64() -> None:
    log_p, log_a = torch.tensor([-30.0, -200.0]), torch.tensor([-0.3, -0.001])
    got = bon_log_ratio(log_p, log_a, n=1000)
    want = bon_log_ratio(log_p.double(), log_a.double(), n=1000)
    assert got.dtype == torch.float32
    assert torch.equal(got, want.float())


log_below_values = st.one_of(st.just(-math.inf), st.floats(-50, 0))
orders = st.floats(1.0, 1e5)


@given(log_p=st.floats(-600, 0), log_a=log_below_values, log_b=st.one_of(st.none(), st.floats(-50, 0)), n=orders)
@settings(max_examples=300, deadline=None)
def test_estimated_best_of_n_is_a_probability(log_p: float, log_a: float, log_b: float | None, n: float) -> None:
    p, a = torch.tensor([log_p], dtype=torch.float64), torch.tensor([log_a], dtype=torch.float64)
    b = None if log_b is None else torch.tensor([log_b], dtype=torch.float64)
    log_prob = bon_log_prob(p, a, n=n, log_at_or_below=b).item()
    log_ratio = bon_log_ratio(p, a, n=n, log_at_or_below=b).item()
    assert log_prob <= 0
    assert not math.isnan(log_ratio)
    assert log_ratio <= math.log(n) + 1e-12
    # The clamp at zero must only ever remove rounding.
    assert log_p + log_ratio <= 1e-9


@given(log_p=st.floats(-600, -1e-3), share=st.floats(0.0, 1.0), n=orders)
@settings(max_examples=300, deadline=None)
def test_bound_is_below_the_exact_ratio(log_p: float, share: float, n: float) -> None:
    a = share * -math.expm1(log_p)  # 0 <= F_lt <= 1 - p
    log_a = torch.tensor([math.log(a) if a > 0 else -math.inf], dtype=torch.float64)
    exact = bon_log_ratio(torch.tensor([log_p], dtype=torch.float64), log_a, n=n).item()
    bound = bon_log_ratio_bound(log_a, n=n).item()
    assert bound <= exact + 1e-9 * max(1.0, abs(exact))


@given(log_p=st.floats(-600, -0.7), lower=st.floats(-30, 0), higher=st.floats(-30, 0), n=orders)
@settings(max_examples=300, deadline=None)
def test_ratio_grows_with_the_cdf(log_p: float, lower: float, higher: float, n: float) -> None:
    lower, higher = min(lower, higher), max(lower, higher)
    p = torch.full((2,), log_p, dtype=torch.float64)
    low, high = bon_log_ratio(p, torch.tensor([lower, higher], dtype=torch.float64), n=n).tolist()
    assert low <= high + 1e-9 * max(1.0, abs(low))


def test_bound_values() -> None:
    log_a = torch.tensor([-math.inf, -2.0, 0.0], dtype=torch.float64)
    got = bon_log_ratio_bound(log_a, n=5)
    want = torch.tensor([-math.inf, math.log(5) - 8.0, math.log(5)], dtype=torch.float64)
    torch.testing.assert_close(got, want)
    assert torch.equal(bon_log_ratio_bound(log_a, n=1), torch.zeros(3, dtype=torch.float64))


# --- KL, win rate, beta -----------------------------------------------------------------------------------


@ALL_REWARDS
@pytest.mark.parametrize("n", [1, 2, 4, 7])
def test_kl_and_win_rate_bounds_hold_on_a_categorical_reference(rewards: Tensor, n: int) -> None:
    below, at_or_below = exact_cdf(PROBS, rewards)
    ratio = bon_log_ratio(PROBS.log(), below, n=n, log_at_or_below=at_or_below)
    bon = PROBS * ratio.exp()
    assert (bon * ratio).sum().item() <= bon_kl_bound(n) + 1e-12
    win_rate = (bon * (below.exp() + at_or_below.exp()) / 2).sum().item()
    assert win_rate <= bon_win_rate_bound(n) + 1e-12


@pytest.mark.parametrize("n", [2, 4, 7.5])
def test_bounds_are_reached_by_a_fine_reference(n: float) -> None:
    size = 20_000
    log_p = torch.full((size,), -math.log(size), dtype=torch.float64)
    below = (torch.arange(size, dtype=torch.float64) / size).log()
    ratio = bon_log_ratio(log_p, below, n=n)
    bon = (log_p + ratio).exp()
    assert (bon * ratio).sum().item() == pytest.approx(bon_kl_bound(n), abs=1e-4)
    assert (bon * (below.exp() + 0.5 / size)).sum().item() == pytest.approx(bon_win_rate_bound(n), abs=1e-4)


@pytest.mark.parametrize("n", [1, 2, 10, 1030, 1_000_000])
def test_kl_estimate_against_high_precision(n: int) -> None:
    log_probs = [-500.0, -40.0, -14.0, -1.0, -0.01, -1e-9]
    want = []
    with mpmath.workdps(600):
        for log_p in log_probs:
            e = mpmath.exp(mpmath.mpf(log_p))
            miss = (1 - e) ** n
            spread = mpmath.log(n) + (n - 1) * mpmath.log(1 - e) - mpmath.mpf(n - 1) / n
            want.append(float(miss * spread + (1 - miss) * mpmath.log((1 - miss) / e)))
    got = bon_kl_estimate(torch.tensor(log_probs, dtype=torch.float64), n=n).tolist()
    assert got == pytest.approx(want, rel=1e-11, abs=1e-12)


@given(log_p=st.floats(-800, 0), n=orders)
@settings(max_examples=300, deadline=None)
def test_kl_estimate_is_at_most_the_bound(log_p: float, n: float) -> None:
    got = bon_kl_estimate(torch.tensor([log_p], dtype=torch.float64), n=n).item()
    assert got <= bon_kl_bound(n) + 1e-9


def test_kl_estimate_at_the_ends() -> None:
    got = bon_kl_estimate(torch.tensor([-math.inf, 0.0], dtype=torch.float64), n=16).tolist()
    assert got == pytest.approx([bon_kl_bound(16), 0.0], abs=1e-15)


def test_kl_weight() -> None:
    assert kl_weight(5) == 0.25
    assert kl_weight(1.5) == 2.0


# --- order statistics -------------------------------------------------------------------------------------

REFERENCE = torch.tensor(
    [[0.5, 2.0, -1.0, 0.5, 3.0, 2.0, 7.0], [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0], [1, 2, 3, 4, 5, 6, 7.0]],
    dtype=torch.float64,
)
COUNTS = pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 7])


@COUNTS
def test_order_weights_are_subset_frequencies(n: int) -> None:
    subsets = list(itertools.combinations(range(7), n))
    want = [sum(max(s) == j for s in subsets) / len(subsets) for j in range(7)]
    assert bon_order_weights(7, n).tolist() == pytest.approx(want, abs=1e-15)


@COUNTS
def test_expected_reward_is_the_mean_over_subsets(n: int) -> None:
    want = []
    for row in REFERENCE.tolist():
        best = [max(s) for s in itertools.combinations(row, n)]
        want.append(sum(best) / len(best))
    assert bon_expected_reward(REFERENCE, n=n).tolist() == pytest.approx(want, abs=1e-14)


@COUNTS
def test_win_rate_is_the_mean_over_subsets(n: int) -> None:
    rewards = torch.tensor([[0.5, 2.5, 8.0, -3.0], [1.0, 0.0, 0.5, 2.0], [7.0, 3.0, 0.0, 6.5]], dtype=torch.float64)
    want = []
    for row, values in zip(REFERENCE.tolist(), rewards.tolist(), strict=True):
        best = [max(s) for s in itertools.combinations(row, n)]
        want.append([sum((v > b) + 0.5 * (v == b) for b in best) / len(best) for v in values])
    got = bon_win_rate(rewards, REFERENCE, n=n)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_self_win_rate_is_the_mean_over_subsets_and_opponents(n: int) -> None:
    want = []
    for row in REFERENCE.tolist():
        scores = []
        for opponent in range(7):
            others = [row[j] for j in range(7) if j != opponent]
            for subset in itertools.combinations(others, n):
                scores.append((max(subset) > row[opponent]) + 0.5 * (max(subset) == row[opponent]))
        want.append(sum(scores) / len(scores))
    assert bon_self_win_rate(REFERENCE, n=n).tolist() == pytest.approx(want, abs=1e-14)
    assert bon_self_win_rate(REFERENCE, n=n)[2].item() == pytest.approx(n / (n + 1), abs=1e-14)


def test_win_rate_has_the_right_expectation_where_the_plug_in_has_not() -> None:
    """Over all reference samples of size 4 from a 3-point law, the mean estimate is the true win rate."""
    p, r, n, reward = [0.5, 0.3, 0.2], [0.0, 1.0, 2.0], 3, 1.0
    mean, plug_in = 0.0, 0.0
    for draw in itertools.product(range(3), repeat=4):
        weight = math.prod(p[i] for i in draw)
        sample = torch.tensor([[r[i] for i in draw]], dtype=torch.float64)
        mean += weight * bon_win_rate(torch.tensor([[reward]], dtype=torch.float64), sample, n=n).item()
        low, high = (sample < reward).double().mean().item(), (sample <= reward).double().mean().item()
        plug_in += weight * (low**n + high**n) / 2
    truth = (0.5**n + 0.8**n) / 2
    assert mean == pytest.approx(truth, abs=1e-13)
    assert abs(plug_in - truth) > 0.01


def test_order_statistics_at_scale() -> None:
    """m = 100,000: no overflow, weights sum to one; checked against log-gamma."""
    m, n = 100_000, 1030
    weights = bon_order_weights(m, n)
    assert weights.sum().item() == pytest.approx(1.0, abs=1e-9)
    j = 99_000
    log_choose = lambda a, b: math.lgamma(a + 1) - math.lgamma(b + 1) - math.lgamma(a - b + 1)  # noqa: E731
    want = math.exp(log_choose(j - 1, n - 1) - log_choose(m, n))
    assert weights[j - 1].item() == pytest.approx(want, rel=1e-8)


def test_win_rate_takes_only_ranks_and_keeps_the_dtype() -> None:
    torch.manual_seed(0)
    rewards, reference = torch.randn(3, 5), torch.randn(3, 40)
    got = bon_win_rate(rewards, reference, n=8)
    assert got.dtype == torch.float32
    assert torch.equal(got, bon_win_rate(rewards.double().exp(), reference.double().exp(), n=8).float())
    assert bon_expected_reward(reference, n=8).dtype == torch.float32


def test_nan_rewards_are_not_ranked() -> None:
    reference = torch.tensor([[1.0, 2.0, 3.0], [1.0, math.nan, 3.0]])
    got = bon_win_rate(torch.tensor([[math.nan, 2.5], [0.0, 4.0]]), reference, n=2)
    assert got.isnan().tolist() == [[True, False], [True, True]]
    assert bon_self_win_rate(reference, n=2).isnan().tolist() == [False, True]


# --- what is refused --------------------------------------------------------------------------------------

ONE = torch.zeros(1, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bon_log_prob(ONE, ONE, n=0), ValueError, "n must be greater than 0, got 0"),
        (lambda: bon_log_prob(ONE, ONE, n=True), TypeError, "n must be a real number, got True"),
        (lambda: bon_log_prob(ONE, ONE, n="4"), TypeError, "got '4' of type str"),
        (lambda: bon_log_prob(ONE, ONE, n=math.inf), ValueError, "n must be finite"),
        (
            lambda: bon_log_prob(ONE, ONE[0], n=2),
            ValueError,
            r"log_below must have the shape.*\[1, 4\], got \[4\]",
        ),
        (
            lambda: bon_log_ratio(ONE.long(), ONE, n=2),
            TypeError,
            "log_reference must have a floating-point dtype",
        ),
        (lambda: bon_log_ratio(ONE, [0.0], n=2), TypeError, "log_below must be a tensor, got list"),
        (
            lambda: bon_log_ratio(ONE, ONE, n=2, log_at_or_below=ONE[0]),
            ValueError,
            "log_at_or_below must have",
        ),
        (lambda: bon_log_ratio_bound(ONE, n=0.5), ValueError, "n must be at least 1, got 0.5"),
        (lambda: bon_kl_estimate(ONE, n=0.5), ValueError, "n must be at least 1"),
        (lambda: kl_weight(1), ValueError, "n must be greater than 1, got 1"),
        (lambda: bon_kl_bound(-1), ValueError, "n must be greater than 0"),
        (lambda: bon_win_rate_bound(0), ValueError, "n must be greater than 0"),
        (lambda: bon_expected_reward(ONE, n=5), ValueError, r"1 <= n <= 4 \(M, the cached samples.*got 5"),
        (lambda: bon_expected_reward(ONE, n=2.0), TypeError, "must be an integer, got 2.0 of type float"),
        (lambda: bon_expected_reward(ONE[0], n=2), ValueError, r"must have shape \[B, M\], got \[4\]"),
        (lambda: bon_win_rate(ONE, ONE, n=0), ValueError, "1 <= n <= 4"),
        (lambda: bon_win_rate(ONE, torch.zeros(2, 4), n=2), ValueError, "must agree on B"),
        (lambda: bon_self_win_rate(ONE, n=4), ValueError, r"1 <= n <= 3 \(M - 1, one of.*got 4"),
        (lambda: bon_order_weights(4, 5), ValueError, "1 <= n <= 4"),
        (lambda: bon_order_weights(4.0, 2), TypeError, "m counts samples"),
    ],
)
def test_refusals_say_what_came_and_what_was_expected(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
