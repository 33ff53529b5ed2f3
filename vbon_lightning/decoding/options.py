"""Options that several decoders have, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence


def check_count(name: str, value: int, least: int = 1) -> int:
    """Return an integer that is no smaller than asked.

    Args:
        name: The option.
        value: What was given.
        least: The smallest there may be.

    Raises:
        ValueError: Naming the option.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    return value


def check_number(name: str, value: float, *, above: float = -math.inf, least: float = -math.inf,
                 below: float = math.inf) -> float:  # fmt: skip
    """Return a number within its bounds.

    Args:
        name: The option.
        value: What was given.
        above: What it must be above.
        least: The smallest it may be.
        below: What it must be below.

    Raises:
        ValueError: Naming the option and the bounds.
    """
    number = not isinstance(value, bool) and isinstance(value, int | float)
    if not number or not (above < value < below and value >= least):
        bounds = [f"> {above:g}"] if above > -math.inf else [f">= {least:g}"] if least > -math.inf else []
        bounds += [f"< {below:g}"] if below < math.inf else ["finite"]
        raise ValueError(f"{name} must be a number {' and '.join(bounds)}, got {value!r}")
    return value


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """Return one of some words.

    Args:
        name: The option.
        value: What was given.
        choices: The words.

    Raises:
        ValueError: Naming the option and the words.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value
