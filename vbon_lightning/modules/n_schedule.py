"""N that grows while a policy learns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from lightning.pytorch.utilities import rank_zero_warn

from vbon_lightning.functional import AnnealingShape, annealed_n
from vbon_lightning.modules.base import check_choice


@dataclass(frozen=True)
class NSchedule:
    """N at each update on the way to the module's own ``n``.

    Args:
        start: N at the first update, any real number > 1; above the module's ``n`` it falls to it.
        updates: Optimizer updates until N is the module's.
        shape: ``linear``, ``geometric`` (the same to log N at each update) or ``cosine``.
    """

    start: float = 1.5
    updates: int = 100
    shape: AnnealingShape = "geometric"

    def __post_init__(self) -> None:
        """Refuse what is no schedule, naming the option."""
        if isinstance(self.start, bool) or not 1 < self.start < math.inf:
            raise ValueError(f"model.n_schedule.start must be a number > 1, got {self.start!r}")
        if isinstance(self.updates, bool) or not isinstance(self.updates, int) or self.updates < 1:
            raise ValueError(f"model.n_schedule.updates must be an integer >= 1, got {self.updates!r}")
        check_choice("n_schedule.shape", self.shape, get_args(AnnealingShape))

    @classmethod
    def of(cls, given: NSchedule | Mapping[str, Any] | None) -> NSchedule | None:
        """Return the schedule of its fields, as a checkpoint keeps them."""
        return cls(**given) if isinstance(given, Mapping) else given

    def at(self, update: int, n: float) -> float:
        """Return N after a number of updates, on the way to n."""
        return annealed_n(update, start=self.start, end=n, updates=self.updates, shape=self.shape)

    def check_length(self, n: float, updates: float) -> None:
        """Warn where training ends before N is what the exported policy is said to be of.

        Args:
            n: The module's n.
            updates: Updates of the training; infinite, or -1, where nobody knows.
        """
        if 0 < updates < self.updates:
            rank_zero_warn(
                f"model.n_schedule ends after {self.updates} updates and the training after {updates:g} "
                f"(trainer.max_steps, or trainer.max_epochs): the last update is of n = "
                f"{self.at(int(updates) - 1, n):.3g}, not of model.n = {n:g}"
            )
