"""A module that replays rollouts made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.rollouts import make_rollout
from vbon_lightning.types import Rollout


class Replay(LightningModule):
    """Return rollout number i in step i of each stage; without rollouts, as supervised fine-tuning does."""

    def __init__(
        self,
        train: list[Rollout] | None = None,
        val: list[Rollout] | None = None,
        n: float | None = None,
        steps: int | None = None,
        test: list[Rollout] | None = None,
    ) -> None:
        super().__init__()
        self.rollouts = {"train": train, "val": val, "test": test}
        self.steps = steps or len(train or val or test or [])
        self.weight = nn.Parameter(torch.zeros(()))
        if n is not None:
            self.n = n

    def _outputs(self, stage: str, batch_idx: int) -> dict[str, Any]:
        rollouts = self.rollouts[stage]
        number = batch_idx * self.trainer.world_size + self.global_rank
        return {} if rollouts is None else {"rollout": rollouts[number]}

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return {"loss": self.weight * 1.0, **self._outputs("train", batch_idx)}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return self._outputs("val", batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return self._outputs("test", batch_idx)

    def _loader(self, stage: str) -> DataLoader:
        rollouts = self.rollouts[stage]
        return DataLoader(TensorDataset(torch.zeros(self.steps if rollouts is None else len(rollouts))))

    def train_dataloader(self) -> DataLoader:
        return self._loader("train")

    def val_dataloader(self) -> DataLoader:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        return self._loader("test")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_trainer(directory: Path, *callbacks: Callback, **arguments: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": TensorBoardLogger(str(directory), name="run", version="0"),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    return Trainer(callbacks=list(callbacks), **defaults | arguments)


def logged(directory: Path, tag: str) -> dict[int, float]:
    """Read a scalar back from the TensorBoard files, by step."""
    events = EventAccumulator(str(directory / "run" / "0")).Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def valid(rollout: Rollout, values: Tensor) -> Tensor:
    return values[rollout.prompts.valid].double()


def stream(count: int, seed: int = 0, **arguments) -> list[Rollout]:
    sizes = [2, 4, 3]
    return [
        make_rollout(prompts=sizes[i % 3], seed=seed + i, fillers=i % 2, first=4 * i, **arguments) for i in range(count)
    ]


def pooled(rollouts: list[Rollout], get) -> Tensor:
    return torch.cat([valid(rollout, get(rollout)) for rollout in rollouts])
