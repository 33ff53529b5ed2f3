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
        updates: Optimizer updates until N is the module's; training must go on for a rollout more.
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

    def check_length(
        self, n: float, updates: float, *, batches_per_update: int = 1, batches_per_rollout: int = 1
    ) -> None:
        """Warn where training ends before N is what the exported policy is said to be of.

        Args:
            n: The module's n.
            updates: Updates of the training; infinite, or -1, where nobody knows.
            batches_per_update: Batches whose gradients make an update.
            batches_per_rollout: Batches that learn from a rollout, whose N is that of the updates before it.
        """
        if not 0 < updates < math.inf:
            return
        last_batch = int(updates) * batches_per_update - 1
        sampled_at = last_batch // batches_per_rollout * batches_per_rollout // batches_per_update
        if not math.isclose(last := self.at(sampled_at, n), n):
            rank_zero_warn(
                f"model.n_schedule comes to model.n = {n:g} after {self.updates} updates, and the training ends after "
                f"{updates:g} (trainer.max_steps, or trainer.max_epochs): its last rollout, sampled after "
                f"{sampled_at}, is of n = {last:.3g}, while the export says {n:g}: train longer, or lower "
                "model.n_schedule.updates"
            )
