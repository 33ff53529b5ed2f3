"""Numbers that sum up many policies in the plane of KL and gain: fronts, areas, closeness to Best-of-N, its price."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

Point = tuple[float, float]
"""KL in nats, less is better, and a gain such as the win rate or the reward, more is better."""


def on_front(points: Sequence[Point]) -> list[bool]:
    """Tell which points no other point dominates: none has at most the KL and at least the gain, one of them better.

    Args:
        points: The points.

    Returns:
        One value a point; equal points are all on the front or all off it.
    """

    def dominates(one: Point, other: Point) -> bool:
        return one[0] <= other[0] and one[1] >= other[1] and one != other

    return [not any(dominates(other, point) for other in points) for point in points]


def front_shares(points: Mapping[str, Sequence[Point]]) -> dict[str, float]:
    """Compute which share of each method's points is on the Pareto front of all methods' points.

    Args:
        points: Points by method, at least one each.

    Raises:
        ValueError: If a method has no points.
    """
    if empty := [method for method, own in points.items() if not own]:
        raise ValueError(f"no points of {', '.join(empty)}")
    whose = [method for method, own in points.items() for _ in own]
    kept = on_front([point for own in points.values() for point in own])
    return {
        method: sum(keep for keep, owner in zip(kept, whose, strict=True) if owner == method) / len(own)
        for method, own in points.items()
    }


def hypervolume(points: Sequence[Point], *, reference: Point) -> float:
    """Compute the area that points dominate: the union of ``[kl, reference kl] x [reference gain, gain]``.

    Args:
        points: The points; those that do not dominate the reference point add nothing.
        reference: The corner, a KL and a gain that are worse than what is of interest.

    Returns:
        The area in nats times the gain's unit.
    """
    largest, least = reference
    area, height = 0.0, least
    # By KL, each point raises the height from its own KL on to the corner.
    for kl, gain in sorted(points):
        if kl < largest and gain > height:
            area += (largest - kl) * (gain - height)
            height = gain
    return area


def gain_at(points: Sequence[Point], kl: float) -> float:
    """Read the win rate that a method has at a KL off its runs, linear in the root of the KL between the two nearest.

    A tilt's gain grows as its strength and its KL as the strength squared: Best-of-N's own gains in win rate, from N =
    1 to 8, are within a tenth of a straight line in the root of its KL.

    Args:
        points: The method's runs at several strengths; the reference, no KL and a win rate of 1/2, is added.
        kl: Where to read, in nats.

    Returns:
        The win rate; NaN beyond the largest KL of the runs, where nothing is known.

    Raises:
        ValueError: If ``kl`` is negative or there is no point.
    """
    if kl < 0 or not points:
        raise ValueError(f"expected points and a KL >= 0, got {len(points)} points and {kl}")
    known = sorted([(0.0, 0.5), *points])
    for (low, below), (high, above) in pairwise(known):
        if low <= kl <= high:
            part = (kl**0.5 - low**0.5) / (high**0.5 - low**0.5) if high > low else 1.0
            return (1 - part) * below + part * above
    return math.nan


def gain_share(win_rate: float, bon_win_rate: float) -> float:
    """Compute which share of Best-of-N's gain in win rate a policy keeps: ``(w - 1/2) / (w_bon - 1/2)``.

    Args:
        win_rate: The policy's, against one response of the reference.
        bon_win_rate: Best-of-N's, above 1/2.

    Raises:
        ValueError: If Best-of-N gains nothing.
    """
    if bon_win_rate <= 0.5:
        raise ValueError(f"Best-of-N with a win rate of {bon_win_rate} gains nothing to keep a share of")
    return (win_rate - 0.5) / (bon_win_rate - 0.5)


def equivalent_n(win_rate: float, curve: Mapping[int, float]) -> float:
    """Find the N whose Best-of-N has a given win rate, linear in log N between the N that were measured.

    Args:
        win_rate: The win rate to reach.
        curve: Best-of-N's win rates by N, rising with N; 1 with 1/2 is added.

    Returns:
        N; 1 at or below 1/2, and infinity above the largest measured win rate.
    """
    known = sorted(({1: 0.5} | dict(curve)).items())
    if win_rate <= known[0][1]:
        return 1.0
    for (low, below), (high, above) in pairwise(known):
        if below < win_rate <= above:
            part = (win_rate - below) / (above - below)
            return math.exp((1 - part) * math.log(low) + part * math.log(high))
    return math.inf


def break_even(training_cost: float, *, n: float, response_cost: float = 1.0) -> float:
    """Compute after how many queries training has paid for itself: ``training / ((N - 1) response)``.

    A query costs N responses with Best-of-N and one with a trained policy.

    Args:
        training_cost: What training took: sampled responses, seconds, ...
        n: N of the Best-of-N that the policy replaces, at least 1.
        response_cost: What one response takes, in the same unit.

    Returns:
        Queries; infinity for n = 1, which saves nothing.

    Raises:
        ValueError: If n < 1 or a cost is negative.
    """
    if n < 1 or training_cost < 0 or response_cost < 0:
        raise ValueError(f"expected n >= 1 and costs >= 0, got n={n}, {training_cost} and {response_cost}")
    saved = (n - 1) * response_cost
    return training_cost / saved if saved > 0 else math.inf
