"""A trainer of which only what a training step asks for is there, as one of two ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor


class FakeTrainer:
    """Answers for a rank whose sibling brings ``other`` to every sum.

    Args:
        other: What the other rank adds.
        attributes: What else is read of a trainer.
    """

    def __init__(self, other: float = 0.0, **attributes: Any) -> None:
        self.world_size, self.global_rank, self.accumulate_grad_batches, self.datamodule = 2, 0, 1, None
        self.other, self.reductions = other, list[str]()
        self.strategy = SimpleNamespace(reduce=self._reduce)
        self.__dict__.update(attributes)

    def _reduce(self, part: Tensor, reduce_op: str = "mean") -> Tensor:
        self.reductions.append(reduce_op)
        return part.add_(torch.as_tensor(self.other).to(part.dtype))  # in place, as gloo does


def attach(module: LightningModule, trainer: FakeTrainer) -> dict[str, tuple[float, dict[str, Any]]]:
    """Put a module into a fake trainer, and return where its logged values and their options will stand."""
    logged: dict[str, tuple[float, dict[str, Any]]] = {}

    def log(name: str, value: Any, **options: Any) -> None:
        logged[name] = (float(value), options)

    def log_dict(values: dict[str, Any], **options: Any) -> None:
        for name, value in values.items():
            log(name, value, **options)

    module._trainer = trainer  # type: ignore[assignment]
    module.log, module.log_dict = log, log_dict  # type: ignore[method-assign]
    return logged
