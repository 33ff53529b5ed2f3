"""Lightning's hooks, as the few things that happen to rollouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from vbon_lightning.types import Rollout


def rollout_of(outputs: Any) -> Rollout | None:
    """Return the rollout in a step's outputs, None where there is none (supervised fine-tuning)."""
    return outputs.get("rollout") if isinstance(outputs, Mapping) else None


class RolloutCallback(Callback):
    """Call :meth:`begin`, :meth:`see`, :meth:`stepped` and :meth:`end`, for ``train``, ``val`` and ``test`` alike.

    Args:
        enabled: False to do nothing, in place of the callback that a module brings along.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._last_step = -1

    def begin(self, stage: str) -> None:
        """Begin with a stage: an epoch of validation or test, or a fit."""

    def see(self, trainer: Trainer, pl_module: LightningModule, stage: str, rollout: Rollout | None) -> None:
        """Look at what a step has brought; None where it has no rollout."""

    def stepped(self, trainer: Trainer, pl_module: LightningModule, rollout: Rollout | None) -> None:
        """Look at an optimizer step that was made, on this rollout and those that came before it."""

    def end(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Come to the end of an epoch of validation or test."""

    # -- Lightning ---------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with training."""
        self._last_step = trainer.global_step
        self.begin("train")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at a training step; several batches may share one optimizer step."""
        if not self.enabled:
            return
        self.see(trainer, pl_module, "train", rollout_of(outputs))
        made, self._last_step = trainer.global_step != self._last_step, trainer.global_step
        if made:
            self.stepped(trainer, pl_module, rollout_of(outputs))

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with a validation."""
        self.begin("val")

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any, **__: Any
    ) -> None:
        """Look at a validation step."""
        if self.enabled:
            self.see(trainer, pl_module, "val", rollout_of(outputs))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a validation."""
        if self.enabled:
            self.end(trainer, pl_module, "val")

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with a test."""
        self.begin("test")

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any, **__: Any
    ) -> None:
        """Look at a test step."""
        if self.enabled:
            self.see(trainer, pl_module, "test", rollout_of(outputs))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a test."""
        if self.enabled:
            self.end(trainer, pl_module, "test")
