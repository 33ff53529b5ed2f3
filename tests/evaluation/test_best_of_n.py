"""Best-of-N from the table, by enumeration."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from tests.evaluation.setting import best_of
from vbon_lightning.evaluation.best_of_n import bon_against_bon, selection_weights
from vbon_lightning.functional import bon_self_win_rate


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_selection_weights(table: torch.Tensor, n: int) -> None:
    weights = selection_weights(table, n=n)
    for row, found in zip(table.tolist(), weights.tolist(), strict=True):
        expected: Counter = Counter()
        for subset in itertools.combinations(range(6), n):
            expected.update(best_of(row, subset))
        assert found == pytest.approx([expected[i] / math.comb(6, n) for i in range(6)])


@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 1), (1, 3), (2, 4), (3, 3)])
def test_best_of_n_against_best_of_m(table: torch.Tensor, n: int, m: int) -> None:
    found = bon_against_bon(table, n=n, m=m).tolist()
    for row, value in zip(table.tolist(), found, strict=True):
        outcomes = []
        for mine in itertools.combinations(range(6), n):
            for theirs in itertools.combinations(sorted(set(range(6)) - set(mine)), m):
                ours, other = max(row[i] for i in mine), max(row[i] for i in theirs)
                outcomes.append((ours > other) + 0.5 * (ours == other))
        assert value == pytest.approx(np.mean(outcomes))


def test_two_routes_to_one_win_rate(table: torch.Tensor) -> None:
    for n in range(1, 6):
        ours = bon_against_bon(table, n=n, m=1).float()
        torch.testing.assert_close(ours, bon_self_win_rate(table, n=n))


def test_subsets_must_fit() -> None:
    with pytest.raises(ValueError, match="needs 7 cached responses"):
        bon_against_bon(torch.zeros(1, 6), n=4, m=3)
