"""N on its way, against the formulas written out."""

from __future__ import annotations

import itertools
import math

import pytest

from vbon_lightning.functional import annealed_n

SHAPES = {
    "linear": lambda s: 1.5 + s * 14.5,
    "geometric": lambda s: 1.5 ** (1 - s) * 16**s,
    "cosine": lambda s: 16 - 14.5 * (1 + math.cos(math.pi * s)) / 2,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape(shape: str) -> None:
    way = [annealed_n(update, start=1.5, end=16.0, updates=8, shape=shape) for update in range(12)]
    assert way[:9] == pytest.approx([SHAPES[shape](update / 8) for update in range(9)])
    assert way[0] == pytest.approx(1.5, abs=1e-12)
    assert way[8:] == [16.0] * 4, "exactly, and for good"
    assert way == sorted(way)
    down = [annealed_n(update, start=16.0, end=1.5, updates=8, shape=shape) for update in range(9)]
    assert down == sorted(down, reverse=True)


def test_the_default_adds_the_same_to_log_n() -> None:
    way = [math.log(annealed_n(update, start=2.0, end=32.0, updates=4)) for update in range(5)]
    assert [b - a for a, b in itertools.pairwise(way)] == pytest.approx([math.log(2)] * 4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"update": -1}, ValueError, "update must be at least 0, got -1"),
        ({"start": 0.0}, ValueError, "start must be greater than 0, got 0.0"),
        ({"end": 0.0}, ValueError, "end must be greater than 0, got 0.0"),
        ({"end": math.inf}, ValueError, "end must be finite, got inf"),
        ({"updates": 0}, ValueError, "updates must be at least 1, got 0"),
        ({"start": "2"}, TypeError, "start must be a real number, got '2' of type str"),
        ({"shape": "x"}, ValueError, "shape must be one of linear, geometric, cosine, got 'x'"),
    ],
)
def test_what_is_refused(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        annealed_n(**({"update": 1, "start": 1.5, "end": 4.0, "updates": 3} | changes))
