"""NaN and infinity are found in every kind of tensor."""

from __future__ import annotations

import math

import pytest
import torch

from vbon_lightning.finite import first_not_finite, largest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_bad_one_is_named(bad: float, dtype: torch.dtype) -> None:
    values = {name: torch.ones(7, 3, dtype=dtype) for name in "abcd"}
    assert first_not_finite(values.items()) is None
    for name in "cb":
        values[name][5, 1] = bad
        assert first_not_finite(values.items()) == name


def test_large_numbers_are_finite() -> None:
    assert first_not_finite([("a", torch.full((9,), 6e4, dtype=torch.float16)), ("b", torch.full((9,), 3e38))]) is None


def test_what_holds_no_such_numbers_is_passed_over() -> None:
    others = [torch.empty(0), torch.arange(3), torch.ones(2, dtype=torch.bool), torch.empty(3, device="meta")]
    assert first_not_finite(enumerate(others)) is None
    assert first_not_finite([]) is None
    assert first_not_finite([*enumerate(others), ("x", torch.tensor([math.nan, math.inf]))]) == "x"


def test_the_largest_of_each() -> None:
    found = largest([torch.tensor([1.0, -3.0]), torch.tensor([[math.nan, 9.0]]), torch.tensor([2.0, -math.inf])])
    assert found.dtype == torch.float32
    assert found[0] == 3 and found[1].isnan() and found[2] == math.inf
