"""Win rates of the policy over the reference and over Best-of-N."""

from __future__ import annotations

from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from vbon_lightning.callbacks.rollout_metrics import RolloutMetrics
from vbon_lightning.metrics import WinRate
from vbon_lightning.types import Rollout


class BestOfNWinRate(RolloutMetrics):
    """Log how often a response of the policy beats responses of the reference, ties counted one half.

    Logs ``win_rate`` (against one reference sample; at most about N/(N+1) for a policy that imitates
    Best-of-N) and ``win_rate_vs_bon{n}`` (against the best of n; 1/2 for a policy that equals Best-of-n).
    Both are means over M cached reference rewards a prompt, which Best-of-n needs at least n of, and better 4n:
    unbiased on prompts that training does not see. On those that it does (``train/``), the rewards that judge are those
    that the target was made of, and the rates are too high, the more, the smaller M / n. Where the reference of
    training moves, they are against that, and called ``anchor_win_rate`` and so on.

    Args:
        n: The Best-of-n opponents. By default the one with the module's own ``n``, if it has one and there are as many
            reference rewards.
        enabled: False to log nothing, in place of the callback that a module brings along.
    """

    compares = True

    def __init__(self, n: list[int] | None = None, enabled: bool = True) -> None:
        super().__init__(enabled)
        if n is not None and any(isinstance(value, bool) or int(value) != value or value < 1 for value in n):
            raise ValueError(f"BestOfNWinRate needs integers n >= 1, got {n}")
        self.n = None if n is None else sorted({int(value) for value in n})
        self._opponents: list[int] = []
        self._warned = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the module's n where none was given."""
        if self.n is not None:
            self._opponents = self.n
            return
        own: Any = getattr(pl_module, "n", None)
        whole = isinstance(own, (int, float)) and not isinstance(own, bool) and own >= 1 and int(own) == own
        self._opponents = [int(own)] if whole else []

    def make_metrics(self, pl_module: LightningModule) -> dict[str, Metric]:
        """Make fresh metrics."""
        metrics: dict[str, Metric] = {"win_rate": WinRate(1)}
        return metrics | {f"win_rate_vs_bon{n}": WinRate(n) for n in self._opponents if n > 1}

    def update(self, metrics: dict[str, Metric], rollout: Rollout, stage: str) -> None:
        """Add a rollout to the metrics."""
        if rollout.reference_rewards is None:
            self._warn(
                "no win rate is logged: it needs reference rewards, from a reference table (data.reference_table) or "
                "sampled (model.reference_samples)"
            )
            return
        samples = rollout.reference_rewards.shape[-1]
        self._check_samples(samples)
        for metric in metrics.values():
            if cast(WinRate, metric).n <= samples:
                metric.update(rollout.rewards, rollout.reference_rewards, rollout.prompts.valid)

    def values(self, metrics: dict[str, Metric]) -> dict[str, Tensor]:
        """Compute what is to be logged."""
        summaries = {name: metric.compute() for name, metric in metrics.items()}
        return {name: summary.mean for name, summary in summaries.items() if summary.prompts > 0}

    def _check_samples(self, samples: int) -> None:
        largest = max(self._opponents, default=1)
        if samples < largest and self.n is not None:
            raise ValueError(
                f"the win rate against Best-of-{largest} needs at least {largest} reference rewards a "
                f"prompt, but there are {samples}: sample more of them, or set BestOfNWinRate's `n` to "
                f"at most {samples}"
            )
        if samples < largest:
            self._warn(
                f"no win rate against Best-of-{largest} is logged: it needs as many reference rewards a prompt, and "
                f"there are {samples}"
            )
        elif samples < 4 * largest and largest > 1:
            self._warn(
                f"{samples} reference rewards a prompt make a noisy win rate against Best-of-{largest}: "
                f"{4 * largest} or more are better"
            )

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            rank_zero_warn(message)
