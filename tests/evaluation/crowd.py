"""A comparison of many, made up."""

from __future__ import annotations

import math
import random

from vbon_lightning.evaluation import Estimate, PolicyReport
from vbon_lightning.evaluation.reports import BEST_OF_N, REFERENCE

FAMILIES = ("vBoN", "BOND", "WIND", "reward", "table", "decoding", "tilted", "games", "others")


def crowd(count: int = 25) -> list[PolicyReport]:
    """Return the reference, Best-of-N, and so many others, most of them at one sample's cost and some at more."""
    draw = random.Random(0)

    def report(name: str, method: str, kl: float, win_rate: float, tokens: float, n: int | None = None) -> PolicyReport:
        return PolicyReport(
            name=name,
            method=method,
            prompts=48,
            samples=32,
            reward=Estimate(3 * win_rate - 2, 0.15),
            kl=Estimate(kl, 0.03),
            kl_estimator="",
            win_rate=Estimate(win_rate, 0.02),
            length=Estimate(11.0 if n else tokens, 0.1),
            n=n,
            cost={"generated_tokens": tokens, "seconds": tokens * draw.uniform(0.9, 1.1) / 1000},
        )

    best = [
        report(REFERENCE if n == 1 else f"Best-of-{n}", REFERENCE if n == 1 else BEST_OF_N,
               math.log(n) - (n - 1) / n, n / (n + 1), 11.0 * n, n)
        for n in (1, 2, 4, 8, 16)
    ]  # fmt: skip
    others = [
        report(
            f"what is compared as number {place}",
            FAMILIES[place % len(FAMILIES)],
            draw.uniform(0.5, 0.8),
            draw.uniform(0.66, 0.78),
            11.0 * (1 if place % 5 else draw.choice([2, 4, 8])) + draw.uniform(-0.2, 0.2),
        )
        for place in range(count)
    ]
    return [*best, *others]
