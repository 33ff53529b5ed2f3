"""The base of the callbacks that turn the rollouts of a step into logged numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric

from vbon_lightning.types import Rollout


def rollout_of(outputs: Any) -> Rollout | None:
    """Return the rollout in a step's outputs, None where there is none (supervised fine-tuning)."""
    return outputs.get("rollout") if isinstance(outputs, Mapping) else None


class RolloutMetrics(Callback, ABC):
    """Keep metrics over rollouts and log them: ``train/...`` by step, ``val/...`` and ``test/...`` by epoch.

    Each ``train/...`` value is over everything since the one before. ``compute`` gathers over the processes,
    so all of them must get there together: at a given ``global_step`` and at the end of an epoch, whether or
    not a process had any data.

    Args:
        enabled: False to log nothing, in place of the callback that a module brings along.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._metrics: dict[str, dict[str, Metric]] = {}  # by stage, then by name
        self._last_step = -1

    @abstractmethod
    def make_metrics(self, pl_module: LightningModule) -> dict[str, Metric]:
        """Make fresh metrics."""

    @abstractmethod
    def update(self, metrics: dict[str, Metric], rollout: Rollout, stage: str) -> None:
        """Add a rollout to the metrics; ``stage`` is ``train``, ``val`` or ``test``."""

    @abstractmethod
    def values(self, metrics: dict[str, Metric]) -> dict[str, Tensor]:
        """Compute what is to be logged; called by all processes together, empty where nothing was counted."""

    def check(self, metrics: dict[str, Metric], pl_module: LightningModule, stage: str) -> None:
        """Look at computed metrics for signs of trouble; does nothing unless a subclass says otherwise."""

    # -- Lightning
    # ----------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting anew."""
        self._metrics.pop("train", None)
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the rollout, and log at every ``log_every_n_steps`` optimizer steps."""
        self._count(pl_module, "train", outputs)
        # Several batches may share one optimizer step; the logger writes only after the last of them.
        stepped = trainer.global_step != self._last_step
        self._last_step = trainer.global_step
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if stepped and every > 0 and trainer.global_step % every == 0:
            self._log(trainer, pl_module, "train")

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting anew."""
        self._metrics.pop("val", None)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the rollout."""
        self._count(pl_module, "val", outputs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log over the epoch."""
        self._log(trainer, pl_module, "val")

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting anew."""
        self._metrics.pop("test", None)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the rollout."""
        self._count(pl_module, "test", outputs)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log over the epoch."""
        self._log(trainer, pl_module, "test")

    # -- counting and logging
    # -----------------------------------------------------------------------------------

    def _stage(self, pl_module: LightningModule, stage: str) -> dict[str, Metric]:
        if stage not in self._metrics:
            self._metrics[stage] = {
                name: metric.to(pl_module.device) for name, metric in self.make_metrics(pl_module).items()
            }
        return self._metrics[stage]

    def _count(self, pl_module: LightningModule, stage: str, outputs: Any) -> None:
        rollout = rollout_of(outputs)
        if rollout is not None and self.enabled:
            with torch.no_grad():
                self.update(self._stage(pl_module, stage), rollout, stage)

    def _log(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self.enabled:
            return
        metrics = self._stage(pl_module, stage)
        values = self.values(metrics)
        self.check(metrics, pl_module, stage)
        for metric in metrics.values():
            metric.reset()
        for name, value in values.items():
            # Every process has the same value already; on an epoch Lightning asks for the (idle) reduction by
            # a warning.
            pl_module.log(f"{stage}/{name}", value.float(), batch_size=1, sync_dist=stage != "train")
