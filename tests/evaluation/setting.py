"""Rewards small enough to enumerate what Best-of-N returns."""

from __future__ import annotations

TABLES = {
    "distinct": [[0.3, 0.1, 0.7, 0.2, 0.9, -1.0], [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]],
    "tied": [[0.0, 0.0, 1.0, 1.0, 1.0, 2.0], [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]],
    "constant": [[0.5] * 6, [0.0] * 6],
}


def best_of(row: list[float], chosen: tuple[int, ...]) -> dict[int, float]:
    """Probability that each chosen response is returned, ties broken uniformly."""
    top = max(row[i] for i in chosen)
    winners = [i for i in chosen if row[i] == top]
    return {i: winners.count(i) / len(winners) for i in set(winners)}
