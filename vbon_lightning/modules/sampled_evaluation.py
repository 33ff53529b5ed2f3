"""Validation and test of a policy: by what it samples."""

from __future__ import annotations

from typing import Any

from vbon_lightning.modules.base import AlignmentModule
from vbon_lightning.types import PromptBatch, Rollout


class SampledEvaluation(AlignmentModule):
    """A policy that is validated and tested on responses of its own, with the same noise each time."""

    eval_samples: int
    """Responses a prompt."""
    reference_samples: int = 0
    """The reference's responses a prompt, for the win rate, where the batch brings none."""

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Sample and score responses; the callbacks do the rest."""
        return {"rollout": self._evaluate(batch, "val")}

    def test_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Sample and score responses; the callbacks do the rest."""
        return {"rollout": self._evaluate(batch, "test")}

    def _evaluate(self, batch: PromptBatch, stage: str) -> Rollout:
        rollout = self.loaded.rollout(
            batch,
            num_samples=self.eval_samples,
            seed=self.seed,
            stream=stage,
            step=0,
            reference_samples=self.reference_samples,
        )
        self.log_missing(rollout, stage)
        return rollout
