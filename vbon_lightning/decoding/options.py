"""Options that count something, checked."""

from __future__ import annotations


def check_counts(**counts: int | None) -> None:
    """Refuse numbers that are no integers from 1 upwards; None is left out.

    Raises:
        ValueError: Naming the first.
    """
    for name, count in counts.items():
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ValueError(f"{name} must be an integer >= 1, got {count!r}")
