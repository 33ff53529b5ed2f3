"""N of Best-of-N as a function of the updates made so far."""

from __future__ import annotations

import math
from typing import Literal, get_args

from vbon_lightning.functional._validate import check_real

AnnealingShape = Literal["linear", "geometric", "cosine"]


def annealed_n(update: int, *, start: float, end: float, updates: int, shape: AnnealingShape = "geometric") -> float:
    """Compute N at an update on the way from ``start`` to ``end``, where it stays.

    With ``s = min(update / updates, 1)``: ``linear`` is ``start + s (end - start)``, ``geometric``
    ``start^{1-s} end^s``, which adds the same to log N at each update and so about the same to Best-of-N's KL, and
    ``cosine`` ``end + (start - end) (1 + cos(pi s)) / 2``, level at both ends.

    Args:
        update: updates made so far, at least 0.
        start: N at the first update, greater than 0.
        end: N from update ``updates`` on, greater than 0.
        updates: how many updates it takes, at least 1.
        shape: ``linear``, ``geometric`` or ``cosine``.

    Returns:
        N, between the two; ``end`` exactly from update ``updates`` on.

    Raises:
        TypeError: if a number is none.
        ValueError: if a number is out of range or the shape unknown.
    """
    check_real("update", update, at_least=0)
    check_real("start", start, above=0.0)
    check_real("end", end, above=0.0)
    check_real("updates", updates, at_least=1)
    if shape not in (known := get_args(AnnealingShape)):
        raise ValueError(f"shape must be one of {', '.join(known)}, got {shape!r}")
    if update >= updates:
        return end
    share = update / updates
    if shape == "linear":
        return start + share * (end - start)
    if shape == "geometric":
        return math.exp((1 - share) * math.log(start) + share * math.log(end))
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
