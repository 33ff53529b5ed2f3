"""Best-of-N by bins against draws of rewards, closed forms, and enumeration where all rewards tie."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from vbon_lightning.functional import (
    RewardBins,
    RewardCDF,
    binned_bon_kl,
    binned_bon_reward,
    binned_bon_win_rate,
    bon_kl_bound,
    predicted_log_cdf,
    win_rate_by_cdf,
)


def tied(*rewards: float) -> RewardBins:
    """Return bins of which each is one reward."""
    values = torch.tensor(rewards, dtype=torch.float64)
    return RewardBins((values[1:] + values[:-1]) / 2, values[:, None].expand(-1, 4))


def spread(bins: int = 8, atoms: int = 500) -> RewardBins:
    """Return bins of a uniform reward on (0, 1)."""
    middles = (torch.arange(bins * atoms, dtype=torch.float64) + 0.5) / (bins * atoms)
    return RewardBins(torch.arange(1, bins, dtype=torch.float64) / bins, middles.view(bins, atoms))


def log_cdf(*probs: float) -> Tensor:
    return predicted_log_cdf(torch.tensor([probs], dtype=torch.float64).log())


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("m", [1, 2])
def test_tied_rewards_by_enumeration(n: int, m: int) -> None:
    rewards, probs = [-1.0, 0.5, 2.0], [0.5, 0.3, 0.2]

    def best_of(count: int) -> dict[float, float]:
        found = dict.fromkeys(rewards, 0.0)
        for drawn in itertools.product(range(3), repeat=count):
            found[max(rewards[k] for k in drawn)] += math.prod(probs[k] for k in drawn)
        return found

    one, other = best_of(n), best_of(m)
    bins, cdf = tied(*rewards), log_cdf(*probs)
    assert float(binned_bon_reward(cdf, bins, n=n)) == pytest.approx(sum(r * p for r, p in one.items()), abs=1e-12)
    kl = sum(p * math.log(p / q) for p, q in zip(one.values(), probs, strict=True))
    assert float(binned_bon_kl(cdf, bins, n=n)) == pytest.approx(kl, abs=1e-12)
    won = sum(p * q * (1.0 if a > b else 0.5 if a == b else 0.0) for a, p in one.items() for b, q in other.items())
    assert float(binned_bon_win_rate(cdf, bins, n=n, m=m)) == pytest.approx(won, abs=1e-12)


@pytest.mark.parametrize("n", [1.0, 2.0, 3.7, 16.0])
@pytest.mark.parametrize("probs", [[1 / 8] * 8, [0.3, 0.05, 0.05, 0.2, 0.1, 0.1, 0.15, 0.05]])
def test_without_ties_only_the_reward_depends_on_the_distribution(n: float, probs: list[float]) -> None:
    bins, cdf = spread(), log_cdf(*probs)
    assert float(binned_bon_kl(cdf, bins, n=n)) == pytest.approx(bon_kl_bound(n), abs=1e-12)
    assert float(binned_bon_win_rate(cdf, bins, n=n)) == pytest.approx(n / (n + 1), abs=1e-12)
    assert float(binned_bon_win_rate(cdf, bins, n=n, m=5.0)) == pytest.approx(n / (n + 5), abs=1e-12)
    # u is uniform: the largest of n has u = v^(1/n), its reward is F's inverse there.
    draws = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    at = draws ** (1 / n)
    edges = torch.tensor([0.0, *itertools.accumulate(probs)], dtype=torch.float64)
    place = torch.searchsorted(edges, at).clamp(1, 8) - 1
    rewards = (place + (at - edges[place]) / (edges[place + 1] - edges[place])) / 8
    assert float(binned_bon_reward(cdf, bins, n=n)) == pytest.approx(float(rewards.mean()), abs=2e-4)


@pytest.mark.parametrize("n", [2.0, 5.5])
def test_a_tie_among_spread_rewards(n: float) -> None:
    """28% zeros, as a sentiment score has: by fine sums over u, the reference's rank."""
    low, high = 0.4, 0.68
    atoms = torch.tensor([[-1.0, -0.5], [0.0, 0.0], [0.5, 1.0]], dtype=torch.float64)
    bins, cdf = RewardBins(torch.tensor([-0.1, 0.1], dtype=torch.float64), atoms), log_cdf(low, high - low, 1 - high)
    u = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    tied = (u > low) & (u < high)
    weight = torch.where(tied, (high**n - low**n) / (high - low), n * u ** (n - 1))
    assert float(binned_bon_kl(cdf, bins, n=n)) == pytest.approx(float((weight * weight.log()).mean()), abs=1e-5)
    for m in (1.0, 3.0):
        wins = torch.where(tied, (low**m + high**m) / 2, u**m)
        found = float(binned_bon_win_rate(cdf, bins, n=n, m=m))
        assert found == pytest.approx(float((weight * wins).mean()), abs=1e-5)


def test_bins_that_nothing_falls_into() -> None:
    cdf = log_cdf(0.0, 0.4, 0.0, 0.6, 0.0)
    held = log_cdf(0.4, 0.6)
    for function in (binned_bon_kl, binned_bon_reward, binned_bon_win_rate):
        assert torch.allclose(function(cdf, tied(0, 1, 2, 3, 4), n=3), function(held, tied(1, 3), n=3))


@pytest.mark.parametrize("n", [1, 4])
def test_win_rates_where_rewards_lie(n: int) -> None:
    below, at = torch.tensor([[0.2, 0.5]]), torch.tensor([[0.6, 0.5]])
    found = win_rate_by_cdf(RewardCDF(below.log(), at.log()), n=n)
    assert torch.allclose(found, (below**n + at**n) / 2)


def test_what_is_refused() -> None:
    bins, cdf = tied(0, 1), log_cdf(0.5, 0.5)
    for function in (binned_bon_kl, binned_bon_reward, binned_bon_win_rate):
        with pytest.raises(ValueError, match="n must"):
            function(cdf, bins, n=0.5)
        with pytest.raises(ValueError, match=r"K = 2 bins, got \[1, 4\]"):
            function(log_cdf(0.2, 0.3, 0.5), bins, n=2)
    with pytest.raises(ValueError, match="m must"):
        binned_bon_win_rate(cdf, bins, n=2, m=0.0)
    with pytest.raises(TypeError):
        binned_bon_kl(torch.zeros(1, 3, dtype=torch.long), bins, n=2)
    with pytest.raises(ValueError, match="n must"):
        win_rate_by_cdf(RewardCDF(cdf, cdf), n=0)


def test_rows_stand_for_themselves_and_two_equal_quantiles_are_no_atom() -> None:
    # Three quantiles a bin, whose thirds no binary fraction is; of the second bin the first two are equal.
    atoms = torch.tensor([[0.0, 1.0, 2.0], [3.0, 3.0, 5.0], [6.0, 6.0, 6.0]], dtype=torch.float64)
    bins = RewardBins(torch.tensor([2.5, 5.5], dtype=torch.float64), atoms)
    shares = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.4, 0.0]], dtype=torch.float64)
    log_cdf = torch.nn.functional.pad(shares.cumsum(-1), (1, 0)).clamp(max=1.0).log()
    n, m = 3, 2

    def power_gap(low: float, high: float, k: int) -> float:
        return high**k - low**k

    for row in range(2):
        edges = [0.0, *shares[row].cumsum(-1).clamp(max=1.0).tolist()]
        reward = sum(
            atoms[k, q].item()
            * power_gap(
                edges[k] + (edges[k + 1] - edges[k]) * q / 3, edges[k] + (edges[k + 1] - edges[k]) * (q + 1) / 3, n
            )
            for k in range(3)
            for q in range(3)
        )
        win = sum(n / (n + m) * power_gap(edges[k], edges[k + 1], n + m) for k in range(2))
        win += power_gap(edges[2], edges[3], n) * (edges[3] ** m + edges[2] ** m) / 2
        found = binned_bon_reward(log_cdf, bins, n=n), binned_bon_win_rate(log_cdf, bins, n=n, m=m)
        assert found[0][row].item() == pytest.approx(reward, abs=1e-12)
        assert found[1][row].item() == pytest.approx(win, abs=1e-12)
        alone = binned_bon_kl(log_cdf[row : row + 1], bins, n=n)
        assert binned_bon_kl(log_cdf, bins, n=n)[row].item() == pytest.approx(alone.item(), abs=1e-12)
    assert binned_bon_kl(log_cdf, bins, n=n).shape == (2,)
