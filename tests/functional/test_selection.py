"""Picking from cached responses, against the enumeration of all orders and all subsets."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from vbon_lightning.functional import bon_selection_weights, group_extremes, systematic_resampling

TABLES = {
    "distinct": [0.1, 2.0, -1.0, 0.5, 1.0],
    "tied": [1.0, 0.0, 1.0, 0.0, 1.0],
    "partly": [2.0, 1.0, 1.0, 0.0, 0.5],
    "constant": [3.0] * 5,
}
REWARDS = pytest.mark.parametrize("rewards", TABLES.values(), ids=TABLES.keys())


def best_of_subsets(rewards: list[float], n: int, *, worst: bool = False) -> list[float]:
    """How often each place is the best (or worst) of an n-subset, a draw among those that tie."""
    shares = [0.0] * len(rewards)
    for subset in itertools.combinations(range(len(rewards)), n):
        extreme = (min if worst else max)(rewards[i] for i in subset)
        tied = [i for i in subset if rewards[i] == extreme]
        for i in tied:
            shares[i] += 1 / len(tied) / math.comb(len(rewards), n)
    return shares


def frequencies(places: Tensor, m: int) -> list[float]:
    return (torch.bincount(places.flatten(), minlength=m).double() / places.numel()).tolist()


@REWARDS
@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_selection_weights_against_all_subsets(rewards: list[float], n: int, dtype: torch.dtype) -> None:
    weights = bon_selection_weights(torch.tensor([rewards, rewards[::-1]]).to(dtype), n=n)
    assert weights[0].tolist() == pytest.approx(best_of_subsets(rewards, n), abs=1e-12)
    assert weights[1].tolist() == pytest.approx(best_of_subsets(rewards, n)[::-1], abs=1e-12)


def test_selection_weights_of_a_row_without_numbers() -> None:
    weights = bon_selection_weights(torch.tensor([[0.0, math.nan], [0.0, 1.0]]), n=2)
    assert weights[0].isnan().all()
    assert weights[1].tolist() == [0.0, 1.0]


@REWARDS
@pytest.mark.parametrize(("n", "groups"), [(1, 5), (2, 1), (2, 2), (3, 1), (5, 1)])
def test_groups_over_all_orders(rewards: list[float], n: int, groups: int) -> None:
    orders = torch.tensor(list(itertools.permutations(range(5))))
    found = group_extremes(torch.tensor(rewards).expand(len(orders), 5), orders, n=n, groups=groups)
    assert found.best.shape == found.worst.shape == (120, groups)
    # Whatever its place, each group is a random n-subset.
    for group in range(groups):
        assert frequencies(found.best[:, group], 5) == pytest.approx(best_of_subsets(rewards, n))
        assert frequencies(found.worst[:, group], 5) == pytest.approx(best_of_subsets(rewards, n, worst=True))
    assert bool((found.best != found.worst).all()) == (n > 1)


def test_groups_are_disjoint_and_taken_in_order() -> None:
    rewards = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0, 0.0, 9.0]])
    found = group_extremes(rewards, torch.tensor([[3, 0, 4, 5, 1, 2, 6]]), n=3, groups=2)
    assert found.best.tolist() == [[0, 1]]
    assert found.worst.tolist() == [[4, 5]]


def grid(count: int) -> Tensor:
    """Offsets in the middle of equal pieces, at whose ends alone a pick can change."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


@REWARDS
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_systematic_resampling_over_all_offsets(rewards: list[float], n: int, count: int) -> None:
    weights = bon_selection_weights(torch.tensor([rewards]), n=n)
    offsets = grid(60)  # all weights here are multiples of 1/60
    assert (weights * 60).sub((weights * 60).round()).abs().max() < 1e-9
    picked = systematic_resampling(weights.expand(60, 5), offsets, count=count)
    assert frequencies(picked, 5) == pytest.approx(weights[0].tolist(), abs=1e-12)
    times = torch.stack([torch.bincount(row, minlength=5) for row in picked])
    assert ((times - count * weights).abs() < 1 + 1e-9).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_systematic_resampling_at_the_ends(dtype: torch.dtype) -> None:
    weights = torch.tensor([[0.0, 0.1, 0.0, 0.2, 0.7, 0.0]] * 2, dtype=dtype)
    offsets = torch.tensor([0.0, 1 - torch.finfo(torch.float64).eps / 2], dtype=torch.float64)
    for count in (1, 2, 3, 10, 1000):
        picked = systematic_resampling(weights, offsets, count=count)
        assert set(picked.flatten().tolist()) <= {1, 3, 4}
        assert (picked.diff(dim=-1) >= 0).all()


def test_the_expected_loss_is_the_weighted_cross_entropy() -> None:
    rewards = torch.tensor([TABLES["partly"]])
    log_probs = torch.randn(1, 5, dtype=torch.float64)
    weights = bon_selection_weights(rewards, n=3)
    picked = systematic_resampling(weights.expand(60, 5), grid(60), count=4)
    losses = -log_probs.expand(60, 5).gather(1, picked).mean(-1)
    assert losses.mean().item() == pytest.approx(-(weights * log_probs).sum().item(), abs=1e-12)
    orders = torch.tensor(list(itertools.permutations(range(5))))
    groups = group_extremes(rewards.expand(120, 5), orders, n=3, groups=1)
    by_groups = -log_probs.expand(120, 5).gather(1, groups.best).mean(-1)
    assert by_groups.mean().item() == pytest.approx(losses.mean().item(), abs=1e-12)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda r, o: group_extremes(r, o, n=6, groups=1), ValueError, r"1 <= n <= 5 \(M, the cached samples"),
        (lambda r, o: group_extremes(r, o, n=2, groups=3), ValueError, r"1 <= groups <= 2 \(M // n = 5 // 2\)"),
        (lambda r, o: group_extremes(r, o, n=2.0, groups=1), TypeError, "n counts samples here and must be an integer"),
        (lambda r, o: group_extremes(r, o[:, :4], n=2, groups=1), ValueError, "order must have the shape of rewards"),
        (lambda r, o: group_extremes(r, r, n=2, groups=1), TypeError, "order must hold integers"),
        (lambda r, o: group_extremes(r[0], o[0], n=2, groups=1), ValueError, r"rewards must have shape \[B, M\]"),
        (lambda r, o: systematic_resampling(r, torch.zeros(2), count=1), ValueError, "offsets must have shape"),
        (lambda r, o: systematic_resampling(r, torch.zeros(1), count=0), ValueError, "count must be at least 1"),
        (lambda r, o: systematic_resampling(r, torch.zeros(1), count=1.0), TypeError, "count must be an integer"),
        (lambda r, o: systematic_resampling(o, torch.zeros(1), count=1), TypeError, "weights must have a floating"),
        (lambda r, o: bon_selection_weights(r, n=6), ValueError, "cache more samples or lower n"),
        (lambda r, o: bon_selection_weights(r, n=2.5), TypeError, "n counts samples here and must be an integer"),
    ],
)
def test_bad_arguments(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.rand(1, 5), torch.arange(5)[None])


def test_weights_need_not_be_normalised() -> None:
    weights, offsets = torch.tensor([[0.1, 0.2, 0.3, 0.4]]), torch.tensor([0.3])
    found = systematic_resampling(weights, offsets, count=10)
    assert found.tolist() == [[0, 1, 1, 2, 2, 2, 3, 3, 3, 3]]
    for scale in (0.5, 7.0):
        assert torch.equal(systematic_resampling(scale * weights, offsets, count=10), found)
