"""KL(Best-of-N || reference) of cached rewards, by enumerating the draws."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch

from tests.evaluation.setting import TABLES
from vbon_lightning.functional import bon_kl, bon_kl_bound


@pytest.fixture(params=TABLES)
def table(request: pytest.FixtureRequest) -> torch.Tensor:
    return torch.tensor(TABLES[request.param])


@pytest.mark.parametrize("n", [1, 2, 4, 9])
def test_kl_of_the_empirical_distribution(table: torch.Tensor, n: int) -> None:
    """Enumerate N draws with replacement from the levels of reward; ties are broken uniformly."""
    for row, found in zip(table.tolist(), bon_kl(table, n=n).tolist(), strict=True):
        levels = sorted(Counter(row).items())
        drawn: Counter = Counter()
        for draws in itertools.combinations_with_replacement(range(len(levels)), n):
            ways = math.factorial(n) / math.prod(math.factorial(c) for c in Counter(draws).values())
            drawn[max(draws)] += ways * math.prod(levels[i][1] / 6 for i in draws)
        expected = sum(p * math.log(p / (levels[i][1] / 6)) for i, p in drawn.items())
        assert found == pytest.approx(expected, abs=1e-9)


def test_kl_is_near_its_limit_for_many_distinct_rewards() -> None:
    rewards = torch.rand(2, 64, generator=torch.Generator().manual_seed(0))
    for n in (2, 4, 8, 16):
        short = bon_kl_bound(n) - bon_kl(rewards, n=n)
        assert ((short > 0) & (short < 0.003)).all()
