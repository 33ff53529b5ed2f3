"""The KL divergence of the policy from the reference, two ways, and a warning where it is negative."""

from __future__ import annotations

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from vbon_lightning.callbacks.rollout_metrics import RolloutMetrics
from vbon_lightning.metrics import KLSummary, SequenceKL
from vbon_lightning.types import Rollout


class KLMonitor(RolloutMetrics):
    """Log the KL divergence KL(policy || reference) over responses, in nats.

    Logs ``kl`` (exact over the vocabulary, summed over a response, averaged over responses), ``kl_per_token``
    and ``kl_sampled`` (the mean log-ratio of the sampled responses: the same in expectation). A KL divergence
    is never negative; where one is, sampling and scoring disagree, and the monitor says so once. Where the reference of
    training moves, training logs the KL to that, as ``anchor_kl`` and so on.

    Args:
        enabled: False to log nothing, in place of the callback that a module brings along.
    """

    compares = True

    def __init__(self, enabled: bool = True) -> None:
        super().__init__(enabled)
        self._warned = False

    def make_metrics(self, pl_module: LightningModule) -> dict[str, Metric]:
        """Make fresh metrics."""
        return {"kl": SequenceKL()}

    def update(self, metrics: dict[str, Metric], rollout: Rollout, stage: str) -> None:
        """Add a rollout to the metrics."""
        metrics["kl"].update(
            rollout.token_kl,
            rollout.log_probs,
            rollout.reference_log_probs,
            rollout.completions.mask & rollout.judged.unsqueeze(-1),
            rollout.prompts.valid,
        )

    def values(self, metrics: dict[str, Metric]) -> dict[str, Tensor]:
        """Compute what is to be logged."""
        summary: KLSummary = metrics["kl"].compute()
        if summary.responses == 0:
            return {}
        return {"kl": summary.kl, "kl_sampled": summary.sampled, "kl_per_token": summary.kl_per_token}

    def check(self, metrics: dict[str, Metric], pl_module: LightningModule, stage: str) -> None:
        """Warn once of a negative KL divergence."""
        summary: KLSummary = metrics["kl"].compute()
        if self._warned or summary.responses == 0:
            return
        threshold = -3 * summary.sampled_standard_error - 1e-3
        if summary.kl < -1e-4:
            found = f"exact KL {float(summary.kl):.3g} nats"
        elif summary.sampled < threshold:
            found = (
                f"mean log-ratio {float(summary.sampled):.3g} nats over {int(summary.responses)} responses, "
                f"standard error {float(summary.sampled_standard_error):.2g}"
            )
        else:
            return
        self._warned = True
        rank_zero_warn(
            f"{stage}: {found}. A negative KL means that sampling and scoring disagree: check that both use "
            "the same tokens, mask, temperature and precision, and that dropout is off."
        )
