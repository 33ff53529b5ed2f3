"""The base of the callbacks that turn the rollouts of a step into logged numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric

from vbon_lightning.callbacks.rollout_callback import RolloutCallback
from vbon_lightning.types import Rollout


class RolloutMetrics(RolloutCallback, ABC):
    """Keep metrics over rollouts and log them: ``train/...`` by step, ``val/...`` and ``test/...`` by epoch.

    Each ``train/...`` value is over everything since the one before. ``compute`` gathers over the processes,
    so all of them must get there together: at a given ``global_step`` and at the end of an epoch, whether or
    not a process had any data.

    Args:
        enabled: False to log nothing, in place of the callback that a module brings along.
    """

    compares = False
    """Whether the values compare the policy with the reference: in training the anchor takes its place, if it moves."""

    def __init__(self, enabled: bool = True) -> None:
        super().__init__(enabled)
        self._metrics: dict[str, dict[str, Metric]] = {}  # by stage, then by name

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

    def begin(self, stage: str) -> None:
        """Start counting anew."""
        self._metrics.pop(stage, None)

    def see(self, trainer: Trainer, pl_module: LightningModule, stage: str, rollout: Rollout | None) -> None:
        """Count the rollout."""
        if rollout is not None:
            with torch.no_grad():
                self.update(self._stage(pl_module, stage), rollout, stage)

    def stepped(self, trainer: Trainer, pl_module: LightningModule, rollout: Rollout | None) -> None:
        """Log at every ``log_every_n_steps`` optimizer steps, when the logger writes."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every > 0 and trainer.global_step % every == 0:
            self.end(trainer, pl_module, "train")

    def end(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log what was counted."""
        metrics = self._stage(pl_module, stage)
        values = self.values(metrics)
        self.check(metrics, pl_module, stage)
        for metric in metrics.values():
            metric.reset()
        anchored = self.compares and stage == "train" and getattr(pl_module, "anchor_moves", False)
        for name, value in values.items():
            # Every process has the same value already; on an epoch Lightning asks for the (idle) reduction by
            # a warning.
            whole = f"{stage}/anchor_{name}" if anchored else f"{stage}/{name}"
            pl_module.log(whole, value.float(), batch_size=1, sync_dist=stage != "train")

    def _stage(self, pl_module: LightningModule, stage: str) -> dict[str, Metric]:
        if stage not in self._metrics:
            self._metrics[stage] = {
                name: metric.to(pl_module.device) for name, metric in self.make_metrics(pl_module).items()
            }
        return self._metrics[stage]
