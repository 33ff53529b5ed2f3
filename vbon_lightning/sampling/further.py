"""Further draws in the place of responses that cannot be used, where their number is fixed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")

LEAST_DRAWS = 16
"""Further draws that a prompt may take at least, however few its responses are."""


class TooManyMissingError(ValueError):
    """A prompt whose responses cannot be used, however many are drawn."""


def replace_missing(
    groups: list[list[_T]],
    missing: Callable[[_T], bool],
    draw: Callable[[int, list[int], int], list[_T]],
    describe: Callable[[int], str],
    *,
    most: int | None = None,
) -> tuple[list[list[_T]], int]:
    """Draw again, prompt by prompt, until each has as many responses that can be used as it had in all.

    What is left is distributed as draws among those that can be used: as if the others had been left out. Each prompt
    may take as many further draws as it has responses, and at least :data:`LEAST_DRAWS`. They depend on the prompt and
    its own responses alone.

    Args:
        groups: B lists of G responses.
        missing: Whether a response is to be replaced.
        draw: Draws for a row (first argument) a response for each of some places (second), by the noise of its n-th
            further round (third, from 1).
        describe: Names a row, for the message.
        most: How many further draws a prompt may take, if not as many as it has responses.

    Returns:
        The groups with the replacements, and how many further responses were drawn.

    Raises:
        TooManyMissingError: If a prompt's draws are used up.
    """
    filled, spent = [], 0
    for row, group in enumerate(groups):
        allowed = max(len(group) if most is None else most, LEAST_DRAWS)
        kept, left, number = list(group), allowed, 0
        while places := [place for place, one in enumerate(kept) if missing(one)]:
            if not left:
                raise TooManyMissingError(
                    f"{describe(row)}: {len(places)} of its {len(group)} responses have no reward, nor have enough of "
                    f"{allowed} further ones that were drawn in their place: leave the prompt out "
                    "of the data, or give the reward something to say of it"
                )
            number, count = number + 1, min(left, len(places))
            for place, one in zip(places, draw(row, places[:count], number), strict=False):
                kept[place] = one
            left, spent = left - count, spent + count
        filled.append(kept)
    return filled, spent
