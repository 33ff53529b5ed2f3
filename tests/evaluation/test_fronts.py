"""Fronts, areas, closeness and break-even against brute force and cases worked by hand."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest

from vbon_lightning.evaluation.fronts import (
    break_even,
    equivalent_n,
    front_shares,
    gain_at,
    gain_share,
    hypervolume,
    on_front,
)


def random_points(seed: int, count: int) -> list[tuple[float, float]]:
    # Few levels, so that coordinates coincide.
    draw = random.Random(seed)
    return [(draw.randrange(12) / 4, draw.randrange(12) / 12) for _ in range(count)]


def grid_area(points: list[tuple[float, float]], reference: tuple[float, float]) -> float:
    """Count the cells of the grid of all coordinates whose middle some point dominates."""
    xs = sorted({reference[0], *(kl for kl, _ in points)})
    ys = sorted({reference[1], *(gain for _, gain in points)})
    area = 0.0
    for left, right in pairwise(xs):
        for low, high in pairwise(ys):
            x, y = (left + right) / 2, (low + high) / 2
            if x < reference[0] and y > reference[1] and any(kl < x and gain > y for kl, gain in points):
                area += (right - left) * (high - low)
    return area


@pytest.mark.parametrize("seed", range(20))
def test_front_against_a_sweep(seed: int) -> None:
    points = random_points(seed, 3 + seed)
    # Another route: in the order of KL, a point is on the front where its gain is the best at its KL and above all
    # gains at a smaller KL.
    expected = []
    for kl, gain in points:
        at = max(other for x, other in points if x == kl)
        before = max((other for x, other in points if x < kl), default=-math.inf)
        expected.append(gain == at and gain > before)
    assert on_front(points) == expected


def test_front_by_hand() -> None:
    points = [(1.0, 0.6), (2.0, 0.8), (2.0, 0.7), (3.0, 0.8), (1.0, 0.6), (0.5, 0.1)]
    assert on_front(points) == [True, True, False, False, True, True]
    assert on_front([]) == []


def test_shares_are_of_each_methods_own_points() -> None:
    a, b = [(1.0, 0.6), (2.0, 0.8)], [(1.5, 0.55), (2.5, 0.9), (2.5, 0.85), (3.0, 0.9)]
    assert front_shares({"a": a, "b": b}) == {"a": 1.0, "b": 0.25}
    assert front_shares({"b": b}) == {"b": 0.5}
    with pytest.raises(ValueError, match="no points of c"):
        front_shares({"a": a, "c": []})


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("reference", [(2.0, 0.25), (5.0, 0.0), (0.0, 0.5)])
def test_hypervolume_against_a_grid(seed: int, reference: tuple[float, float]) -> None:
    points = random_points(seed, 1 + seed)
    assert hypervolume(points, reference=reference) == pytest.approx(grid_area(points, reference), abs=1e-12)


def test_hypervolume_by_hand() -> None:
    # 2 x 0.2 + 1 x 0.1; the third is dominated, the others do not dominate the corner.
    points = [(1.0, 0.7), (2.0, 0.8), (2.5, 0.75), (4.0, 0.9), (0.5, 0.4)]
    assert hypervolume(points, reference=(3.0, 0.5)) == pytest.approx(0.5)
    assert hypervolume([], reference=(3.0, 0.5)) == 0


def test_gain_share_by_hand() -> None:
    assert gain_share(0.7, 0.8) == pytest.approx(2 / 3)
    assert gain_share(0.4, 0.9) == pytest.approx(-0.25)
    with pytest.raises(ValueError, match="gains nothing"):
        gain_share(0.6, 0.5)


def test_equivalent_n() -> None:
    curve = {4: 0.8, 16: 0.9, 2: 0.65}
    assert [equivalent_n(w, curve) for w in (0.65, 0.8, 0.9)] == pytest.approx([2, 4, 16])
    assert equivalent_n(0.85, curve) == pytest.approx(8)  # half way in log N
    assert equivalent_n(0.575, curve) == pytest.approx(math.sqrt(2))
    assert equivalent_n(0.5, curve) == equivalent_n(0.3, curve) == 1
    assert equivalent_n(0.901, curve) == math.inf


def test_break_even_is_where_the_costs_cross() -> None:
    # 100 of training and 1 a query against 5 a query: after 25 queries both have cost 125.
    assert break_even(100, n=5) == 25
    queries = break_even(90.0, n=4, response_cost=0.02)
    assert 90.0 + 0.02 * queries == pytest.approx(4 * 0.02 * queries)
    assert break_even(100, n=1) == math.inf
    with pytest.raises(ValueError, match="n >= 1"):
        break_even(100, n=0.5)
    with pytest.raises(ValueError, match="costs >= 0"):
        break_even(-1, n=2)


def test_gains_between_runs_follow_the_root_of_the_kl() -> None:
    runs = [(1.0, 0.7), (0.25, 0.6)]
    assert gain_at(runs, 0.0) == 0.5
    assert gain_at(runs, 0.25) == pytest.approx(0.6)
    # Roots: 0.25 is half of the first run's 0.5, 0.75 is halfway from there to 1.
    assert gain_at(runs, 0.125**2 * 4) == pytest.approx(0.55)
    assert gain_at(runs, 0.75**2) == pytest.approx(0.65)
    assert math.isnan(gain_at(runs, 1.01)), "nothing is known beyond"
    assert gain_at([(0.0, 0.5)], 0.0) == 0.5
    with pytest.raises(ValueError, match="0 points"):
        gain_at([], 1.0)
    with pytest.raises(ValueError, match="KL >= 0"):
        gain_at(runs, -0.1)
