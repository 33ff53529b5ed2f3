"""The order of TensorBoard's custom scalars: reward, KL and win rate first, all runs in one chart."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

CURVES = {
    "reward": "reward",
    "KL to the reference (nats)": "kl",
    "win rate over the reference": "win_rate",
    "win rate over Best-of-N": r"win_rate_vs_bon\d+",
    "response length (tokens)": "response_length",
    "finished responses": "finished",
}
"""Titles of charts and what they show, as it is named behind ``train/`` and ``val/``; regular expressions."""

LOSSES = {
    "loss, training": "train/(loss|nll|objective|penalised_score)",
    "loss, validation": "val/(loss|nll)",
    "accuracy": "(train|val)/accuracy",
}


class TensorBoardLayout(Callback):
    """Write the layout of TensorBoard's CUSTOM SCALARS, where all runs are drawn in one chart a metric.

    Reward, KL and win rate on the validation prompts come first, then the same in training, then losses.

    Args:
        enabled: Whether to write it.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the layout to every TensorBoard logger."""
        if not (self.enabled and trainer.is_global_zero):
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars(tensorboard_layout())


def tensorboard_layout() -> dict[str, dict[str, list]]:
    """Return the categories and their charts, as ``SummaryWriter.add_custom_scalars`` takes them."""
    layout = {
        title: {name: ["Multiline", [f"{stage}/{tag}$"]] for name, tag in CURVES.items()}
        for title, stage in (("Policy, validation prompts", "val"), ("Policy, in training", "train"))
    }
    return layout | {"Losses": {name: ["Multiline", [f"{tags}$"]] for name, tags in LOSSES.items()}}
