"""PF-PPO's filter against its ranks, all orders of ties listed."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tests.functional.groups import DISTINCT, expected_gradient, gradient_of
from vbon_lightning.functional import filter_counts, filter_probabilities, leave_one_out

STRATEGIES = ("best", "best_random", "best_worst")


def by_rank(rewards: list[float], strategy: str) -> list[float]:
    """The weights of the ranks, mean over the orders that ties may come in."""
    size = len(rewards)
    weights = {
        "best": [1.0] + [0.0] * (size - 1),
        "best_random": [0.5] + [0.5 / (size - 1)] * (size - 1),
        "best_worst": [0.5] + [0.0] * (size - 2) + [0.5],
    }[strategy]
    orders = [
        order
        for order in itertools.permutations(range(size))
        if all(rewards[a] >= rewards[b] for a, b in itertools.pairwise(order))
    ]
    found = [0.0] * size
    for order in orders:
        for weight, place in zip(weights, order, strict=True):
            found[place] += weight / len(orders)
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "rewards", [[0.3, 2.0, -1.0, 0.5], [1.0, 0.0, 1.0, 0.0], [2.0, 1.0, 1.0, 0.0], [1.0] * 4, [0.0, 1.0]]
)
def test_probabilities_by_rank(strategy: str, rewards: list[float]) -> None:
    found = filter_probabilities(torch.tensor([rewards], dtype=torch.float64), strategy=strategy)
    assert found[0].tolist() == pytest.approx(by_rank(rewards, strategy), abs=1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_left_out_is_never_drawn(strategy: str) -> None:
    rewards = torch.tensor([[0.1, math.nan, 3.0, 0.5], [math.nan, 1.0, math.nan, math.nan], [math.nan] * 4])
    kept = ~rewards.isnan()
    found = filter_probabilities(rewards, strategy=strategy, kept=kept)
    assert found[0, [0, 2, 3]].tolist() == pytest.approx(by_rank([0.1, 3.0, 0.5], strategy))
    assert found[1].tolist() == [0.0, 1.0, 0.0, 0.0]
    assert not found[~kept].any()
    counts = filter_counts(found, torch.tensor([0.1, 0.5, 0.9]), count=6)
    assert counts.sum(1).tolist() == [6, 6, 0]
    assert not counts[~kept].any()


def test_draws_are_as_many_as_asked_and_right_on_average() -> None:
    probabilities = filter_probabilities(torch.tensor([[0.3, 2.0, -1.0, 0.5, 0.4]]).double(), strategy="best_random")
    offsets = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    counts = filter_counts(probabilities.expand(1000, -1), offsets, count=5)
    assert (counts.sum(1) == 5).all()
    torch.testing.assert_close(counts.mean(0), 5 * probabilities[0], rtol=0, atol=2e-3)
    assert (counts - 5 * probabilities).abs().max() < 1


def test_what_the_filter_does_to_the_gradient() -> None:
    """It is another than the expected reward's, and no multiple of it."""
    exact = gradient_of(lambda probs: (probs * DISTINCT).sum())

    def filtered(strategy: str):
        def advantages(group: torch.Tensor) -> torch.Tensor:
            return 4 * filter_probabilities(DISTINCT[group], strategy=strategy) * leave_one_out(DISTINCT[group])

        return expected_gradient(advantages, 4)

    for strategy in STRATEGIES:
        found = filtered(strategy)
        rest = found - exact * (found @ exact) / (exact @ exact)
        assert rest.norm() > 1e-3 * exact.norm(), strategy


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: filter_probabilities(torch.zeros(3), strategy="best"),
            ValueError,
            r"rewards must have shape \[B, G\]",
        ),
        (
            lambda: filter_probabilities(torch.zeros(1, 3), strategy="x"),
            ValueError,
            "strategy must be one of best, bes",
        ),
        (
            lambda: filter_probabilities(torch.zeros(1, 3), strategy="best", kept=torch.ones(1, 2).bool()),
            ValueError,
            "kept must have the shape of rewards",
        ),
        (
            lambda: filter_counts(torch.zeros(3), torch.zeros(1), count=1),
            ValueError,
            r"probabilities must have shape \[B, G\]",
        ),
        (
            lambda: filter_counts(torch.ones(1, 3), torch.zeros(2), count=1),
            ValueError,
            r"offsets must have shape \[B\]",
        ),
        (
            lambda: filter_counts(torch.ones(1, 3), torch.zeros(1), count=0),
            ValueError,
            "count must be at least 1, got 0",
        ),
    ],
)
def test_what_is_refused(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        call()
