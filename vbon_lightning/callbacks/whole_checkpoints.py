"""Checkpoints that are whole or absent, for every run."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info

from vbon_lightning.checkpoints import WholeCheckpointIO
from vbon_lightning.staging import check_writable, clear_leftovers


class WholeCheckpoints(Callback):
    """Give the Trainer a :class:`~vbon_lightning.checkpoints.WholeCheckpointIO`, unless it has a plugin of its own.

    As training starts, what killed runs left half-written beside the run's checkpoints is removed.

    Args:
        enabled: False to do nothing, in place of the callback that a module brings along.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the place of Lightning's default, before a checkpoint is read."""
        # A plugin that the user gave is of a type of its own.
        if self.enabled and type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpointIO()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove what killed runs left, never what a live one writes."""
        if not self.enabled or not trainer.is_global_zero:
            return
        for kept in trainer.checkpoint_callbacks:
            if isinstance(kept, ModelCheckpoint) and kept.dirpath is not None and "://" not in str(kept.dirpath):
                check_writable(Path(kept.dirpath), "checkpoints")
                for directory in _checkpoint_directories(Path(kept.dirpath)):
                    for path in clear_leftovers(directory):
                        rank_zero_info(f"Removed {path}, which a run that was killed left half-written")


def _checkpoint_directories(directory: Path) -> list[Path]:
    """Return a directory of checkpoints, and those of the other runs in the same place (``version_1``, ...)."""
    run = directory.parent
    root = run.parent if run.name.startswith("version_") else run
    return sorted({directory, root / directory.name, *root.glob(f"version_*/{directory.name}")})
