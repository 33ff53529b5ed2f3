"""The callbacks that every module brings along, unless the Trainer has ones of its own."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Callback, Trainer

from vbon_lightning.callbacks.finite_check import FiniteCheck
from vbon_lightning.callbacks.sample_table import SampleTable
from vbon_lightning.callbacks.whole_checkpoints import WholeCheckpoints

GUARDS: tuple[type[Callback], ...] = (FiniteCheck, WholeCheckpoints)
"""What every module brings along, whatever it learns from."""


def missing_callbacks(trainer: Trainer, kinds: Sequence[type[Callback]]) -> list[Callback]:
    """Make those callbacks, with their default options, that the Trainer was not given.

    For ``LightningModule.configure_callbacks``, whose callbacks Lightning would put in the place of the Trainer's: what
    the Trainer was given comes first here. Without a logger there is no :class:`SampleTable`, for want of a place.

    Args:
        trainer: The Trainer with the callbacks that it was given.
        kinds: Classes of callbacks; one that the Trainer has, or a subclass of it, is left out.
    """
    return [
        kind()
        for kind in kinds
        if not any(isinstance(own, kind) for own in trainer.callbacks)  # type: ignore[attr-defined]
        and (trainer.loggers or not issubclass(kind, SampleTable))
    ]
