"""Prompts, responses and rewards to read: a table for TensorBoard and a JSON Lines file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from vbon_lightning._markdown import markdown_cell, markdown_table, reward_cell
from vbon_lightning.callbacks.rollout_metrics import rollout_of
from vbon_lightning.reference_table.shards import atomic_file
from vbon_lightning.types import Rollout, known_rewards


class SampleTable(Callback):
    """Write some responses of the policy with their rewards at each validation and test, for people to read.

    They go to ``samples/{stage}-{step}.jsonl`` below the log directory, and as text to loggers that take
    text, such as TensorBoard. The prompts are the first ones of rank zero.

    Args:
        every_n_steps: Also at every so many training steps; 0 for not in training.
        prompts: How many prompts.
        samples: How many responses a prompt.
        directory: Where to write; ``samples`` in the log directory by default.
    """

    def __init__(
        self, every_n_steps: int = 0, prompts: int = 4, samples: int = 1, directory: str | None = None
    ) -> None:
        if every_n_steps < 0:
            raise ValueError(f"SampleTable's every_n_steps must be >= 0, got {every_n_steps}")
        for name, value in (("prompts", prompts), ("samples", samples)):
            if value < 1:
                raise ValueError(f"SampleTable's {name} must be at least 1, got {value}")
        self.every_n_steps, self.prompts, self.samples, self.directory = (
            every_n_steps,
            prompts,
            samples,
            directory,
        )
        self._rows: list[dict[str, Any]] = []
        self._target: Path | None = None
        self._last_step = -1
        self._warned = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask for the log directory, which all processes must do together."""
        log_dir = trainer.log_dir
        dry = trainer.fast_dev_run  # type: ignore[attr-defined]
        if dry or (self.directory is None and log_dir is None):
            self._target = None
        else:
            self._target = Path(self.directory) if self.directory is not None else Path(str(log_dir), "samples")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where training starts."""
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the batch's first responses at every ``every_n_steps`` optimizer steps."""
        step = trainer.global_step
        stepped, self._last_step = step != self._last_step, step
        if self.every_n_steps and stepped and step % self.every_n_steps == 0:
            self._rows = []
            self._collect(trainer, outputs)
            self._write(trainer, "train")

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start collecting anew."""
        self._rows = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect responses until there are enough."""
        self._collect(trainer, outputs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write them."""
        self._write(trainer, "val")

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start collecting anew."""
        self._rows = []

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect responses until there are enough."""
        self._collect(trainer, outputs)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write them."""
        self._write(trainer, "test")

    def _collect(self, trainer: Trainer, outputs: Any) -> None:
        rollout = rollout_of(outputs)
        if rollout is None:
            if not self._warned and not trainer.sanity_checking:
                self._warned = True
                rank_zero_warn("SampleTable found no rollout in the step's outputs: this module brings no responses")
            return
        if trainer.is_global_zero and not trainer.sanity_checking and len(self._rows) < self.prompts:
            self._rows += _rows(rollout, self.prompts - len(self._rows), self.samples)

    def _write(self, trainer: Trainer, stage: str) -> None:
        rows, self._rows = self._rows, []
        if not rows or not trainer.is_global_zero or self._target is None:
            return
        step = trainer.global_step
        self._target.mkdir(parents=True, exist_ok=True)
        with atomic_file(self._target / f"{stage}-{step:08d}.jsonl") as stream:
            for row in rows:
                line = json.dumps({"stage": stage, "step": step, **row}, ensure_ascii=False)
                stream.write(f"{line}\n".encode())
        table = sample_markdown(rows)
        for logger in trainer.loggers:
            add_text = getattr(getattr(logger, "experiment", None), "add_text", None)
            if callable(add_text):
                add_text(f"{stage}/samples", table, global_step=step)


def _rows(rollout: Rollout, prompts: int, samples: int) -> list[dict[str, Any]]:
    valid = rollout.prompts.valid.tolist()
    chosen = [row for row, counts in enumerate(valid) if counts][:prompts]
    index, rewards = rollout.prompts.index.tolist(), known_rewards(rollout.rewards)
    lengths, finished = rollout.completions.mask.sum(-1).tolist(), rollout.completions.finished.tolist()
    return [
        {
            "index": index[row],
            "prompt": rollout.prompts.text[row],
            "responses": [
                {
                    "text": rollout.responses[row][sample],
                    "reward": rewards[row][sample],
                    "tokens": lengths[row][sample],
                    "finished": finished[row][sample],
                }
                for sample in range(min(samples, len(rollout.responses[row])))
            ],
        }
        for row in chosen
    ]


def sample_markdown(rows: list[dict[str, Any]]) -> str:
    """Format collected rows as a Markdown table, a line a response."""
    lines = [
        [
            markdown_cell(row["prompt"]),
            markdown_cell(response["text"] + ("" if response["finished"] else " […]")),
            reward_cell(response["reward"]),
            str(response["tokens"]),
        ]
        for row in rows
        for response in row["responses"]
    ]
    return markdown_table(["prompt", "response", "reward", "tokens"], lines, align="llrr")
