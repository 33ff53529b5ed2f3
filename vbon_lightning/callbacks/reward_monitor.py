"""Rewards, lengths and the share of finished responses."""

from __future__ import annotations

from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from vbon_lightning.callbacks.rollout_metrics import RolloutMetrics
from vbon_lightning.metrics import RewardStatistics, RewardSummary
from vbon_lightning.types import Rollout


class RewardMonitor(RolloutMetrics):
    """Log the rewards of the responses and how they end.

    Logs ``reward`` (mean), ``reward_std``, ``response_length`` (mean number of tokens, the EOS included), ``finished``
    (the share that ended with an EOS rather than at the length limit) and ``tied_groups`` (the share of prompts whose
    responses all have one reward, of which a policy gradient learns nothing). Of a reward with several parts, a
    :class:`~vbon_lightning.rewards.WeightedReward`, also ``reward/NAME``, the mean of each where it applies.

    Args:
        enabled: False to log nothing, in place of the callback that a module brings along.
    """

    def make_metrics(self, pl_module: LightningModule) -> dict[str, Metric]:
        """Make fresh metrics."""
        reward = getattr(getattr(pl_module, "actors", None), "reward", None)
        parts = {_PART + name: MeanMetric(nan_strategy="ignore") for name in getattr(reward, "part_names", ())}
        return {"reward": RewardStatistics(), "tied": MeanMetric(), **parts}

    def update(self, metrics: dict[str, Metric], rollout: Rollout, stage: str) -> None:
        """Add a rollout to the metrics."""
        metrics["reward"].update(
            rollout.rewards, rollout.completions.mask, rollout.completions.finished, rollout.prompts.valid
        )
        valid, rewards = rollout.prompts.valid, rollout.rewards
        # Of those that are left: the least equals the largest. One response alone ties with nothing.
        kept, nothing = rollout.judged, float("inf")
        tied = rewards.masked_fill(~kept, nothing).amin(1) == rewards.masked_fill(~kept, -nothing).amax(1)
        metrics["tied"].update(tied[valid & (kept.sum(1) > 1)].float())
        for name, part in (rollout.reward_parts or {}).items():
            metrics[_PART + name].update(part[valid].float())

    def values(self, metrics: dict[str, Metric]) -> dict[str, Tensor]:
        """Compute what is to be logged."""
        summary: RewardSummary = metrics["reward"].compute()
        if summary.responses == 0:
            return {}
        values = {"reward": summary.mean, "response_length": summary.length, "finished": summary.finished}
        values |= {"reward_std": summary.std} if summary.responses > 1 else {}
        found = {"tied_groups": metrics["tied"], **{name: part for name, part in metrics.items() if _PART in name}}
        # What was never counted (one response a prompt, a part that applied to nothing) has no mean.
        means = {name: metric.compute() for name, metric in found.items()}
        return values | {name: mean for name, mean in means.items() if not bool(mean.isnan())}


_PART = "reward/"
