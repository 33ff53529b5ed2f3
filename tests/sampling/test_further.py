"""Further draws in the place of responses that cannot be used."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from vbon_lightning.sampling.further import LEAST_DRAWS, TooManyMissingError, replace_missing


def drawing(
    values: Callable[[int, int, int], int], asked: list[tuple[int, list[int], int]]
) -> Callable[..., list[int]]:
    def draw(row: int, places: list[int], number: int) -> list[int]:
        asked.append((row, places, number))
        return [values(row, number, place) for place in places]

    return draw


def odd(value: int) -> bool:
    return value % 2 == 1


def test_what_cannot_be_used_is_replaced_where_it_stands() -> None:
    asked: list[tuple[int, list[int], int]] = []
    draw = drawing(lambda row, number, place: 100 * row + 10 * number + (place // 2 if number == 1 else 0), asked)
    groups = [[2, 4], [1, 6, 3], [8, 5]]
    found, spent = replace_missing(groups, odd, draw, str)
    assert found == [[2, 4], [110, 6, 120], [8, 210]]
    assert asked == [(1, [0, 2], 1), (1, [2], 2), (2, [1], 1)], "for those that are missing, round by round"
    assert spent == 4
    assert groups == [[2, 4], [1, 6, 3], [8, 5]]


def test_a_row_does_not_depend_on_the_others() -> None:
    draw = drawing(lambda row, number, place: number + place, [])
    alone, _ = replace_missing([[1, 1, 2, 3]], odd, draw, str)
    together, _ = replace_missing([[1, 1, 2, 3], [3, 3, 3, 3]], odd, draw, str)
    assert together[0] == alone[0]


@pytest.mark.parametrize("size", [2, 3, 40])
def test_there_is_an_end(size: int) -> None:
    asked: list[tuple[int, list[int], int]] = []
    with pytest.raises(TooManyMissingError, match=rf"row 0: {size} of its {size} responses have no reward"):
        replace_missing([[1] * size], odd, drawing(lambda *_: 1, asked), lambda row: f"row {row}")
    assert sum(len(places) for _, places, _ in asked) == max(size, LEAST_DRAWS)
    asked.clear()
    with pytest.raises(TooManyMissingError, match="nor have enough of 50 further ones"):
        replace_missing([[1] * size], odd, drawing(lambda *_: 1, asked), str, most=50)
    assert sum(len(places) for _, places, _ in asked) == 50


def test_what_is_left_is_distributed_as_without_the_others() -> None:
    source = random.Random(0)
    counts = dict.fromkeys((0, 2, 4), 0)
    for _ in range(4000):
        group = [source.choice([0, 0, 2, 4, 1]) for _ in range(3)]
        found, _ = replace_missing([group], odd, lambda row, at, n: source.choices([0, 0, 2, 4, 1], k=len(at)), str)
        for value in found[0]:
            counts[value] += 1
    shares = [count / 12000 for count in counts.values()]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.02)
