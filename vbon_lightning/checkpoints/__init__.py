"""Checkpoints that are whole or absent, and that know what they hold."""

from vbon_lightning.checkpoints.io import WholeCheckpointIO, read_checkpoint
from vbon_lightning.checkpoints.sealing import CheckpointError

__all__ = ["CheckpointError", "WholeCheckpointIO", "read_checkpoint"]
