"""Data with a table to learn from, what training logs, and a response's log-probability by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from tests.modules.setting import make_data
from vbon_lightning.types import TableBatch

TEMPERATURE = 0.7


def table_data(files: Path, **changes: Any) -> Any:
    return make_data(files, **({"temperature": TEMPERATURE, "reference_table": str(files / "table")} | changes))


def table_batch(data: Any) -> TableBatch:
    return data._collate_responses([(i, True, row) for i, row in enumerate(data.prompts("train")[:4])])


class Record(Callback):
    """Keep what each training step logs."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert set(outputs) == {"loss"}
        metrics = trainer.callback_metrics
        self.logged.append({name.removeprefix("train/"): float(metrics[name]) for name in metrics})


def by_hand(model: Any, batch: TableBatch, place: int, sample: int) -> Tensor:
    """Return the log-probability of one response, run by itself."""
    prompt = batch.prompts.tokens[place][batch.prompts.mask[place]]
    response = batch.responses.tokens[place, sample][batch.responses.mask[place, sample]]
    logits = model(input_ids=torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
    return (logits / TEMPERATURE).log_softmax(-1).gather(-1, response[:, None]).sum()


def assert_gradients_equal(module: Any, loss: Tensor, hand: Tensor) -> None:
    assert loss.item() == pytest.approx(hand.item(), rel=1e-5)
    parameters = list(module.policy.parameters())
    expected = torch.autograd.grad(hand, parameters)
    assert max(float(part.abs().max()) for part in expected) > 1e-3
    for ours, theirs in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
