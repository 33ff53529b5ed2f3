"""How many tokens the towers of tilted models read while responses are made, while somebody asks."""

from __future__ import annotations

from contextlib import AbstractContextManager
from contextvars import ContextVar

from torch import Tensor
from transformers import PreTrainedModel

from vbon_lightning.models.tilted import TiltedLM
from vbon_lightning.sampling.memory import asking


class TowerMeter:
    """Adds up the tokens that towers read, of those that :func:`note_read` was told of."""

    def __init__(self) -> None:
        self.tokens = 0


_METER: ContextVar[TowerMeter | None] = ContextVar("towers", default=None)


def metered_towers() -> AbstractContextManager[TowerMeter]:
    """Count what towers read in what runs inside; one inside another counts for itself."""
    return asking(_METER, TowerMeter())


def note_read(model: PreTrainedModel, tokens: int | Tensor) -> None:
    """Say that a model has read tokens; only of a tilted one, which has a tower, something comes of it.

    Args:
        model: The model.
        tokens: How many, or a mask of them; prompts once for all the responses that share them.
    """
    if (meter := _METER.get()) is not None and isinstance(model, TiltedLM):
        meter.tokens += int(tokens.sum()) if isinstance(tokens, Tensor) else tokens
