"""Rewards, lengths and the share of finished responses."""

from __future__ import annotations

from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import Metric

from vbon_lightning.callbacks.rollout_metrics import RolloutMetrics
from vbon_lightning.metrics import RewardStatistics, RewardSummary
from vbon_lightning.types import Rollout


class RewardMonitor(RolloutMetrics):
    """Log the rewards of the responses and how they end.

    Logs ``reward`` (mean), ``reward_std``, ``response_length`` (mean number of tokens, the EOS included) and
    ``finished`` (the share that ended with an EOS rather than at the length limit).
    """

    def make_metrics(self, pl_module: LightningModule) -> dict[str, Metric]:
        """Make fresh metrics."""
        return {"reward": RewardStatistics()}

    def update(self, metrics: dict[str, Metric], rollout: Rollout, stage: str) -> None:
        """Add a rollout to the metrics."""
        metrics["reward"].update(
            rollout.rewards, rollout.completions.mask, rollout.completions.finished, rollout.prompts.valid
        )

    def values(self, metrics: dict[str, Metric]) -> dict[str, Tensor]:
        """Compute what is to be logged."""
        summary: RewardSummary = metrics["reward"].compute()
        if summary.responses == 0:
            return {}
        values = {"reward": summary.mean, "response_length": summary.length, "finished": summary.finished}
        return values | ({"reward_std": summary.std} if summary.responses > 1 else {})
