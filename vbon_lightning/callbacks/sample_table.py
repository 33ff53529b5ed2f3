"""Prompts, responses and rewards to read: tables for TensorBoard and other loggers, and a JSON Lines file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from vbon_lightning._markdown import markdown_cell, markdown_table, reward_cell
from vbon_lightning.callbacks.rollout_callback import RolloutCallback
from vbon_lightning.data.conversations import shown_prompts
from vbon_lightning.loggers import log_table
from vbon_lightning.types import Rollout, known_rewards
from vbon_lightning.whole_files import atomic_file

_COLUMNS = ("step", "prompt", "response", "reward", "tokens", "finished")
_SHOWN_STEPS = 5


class SampleTable(RolloutCallback):
    """Write some responses of the policy with their rewards at each validation and test, for people to read.

    They go to ``samples/{stage}-{step}.jsonl`` below the log directory, as text to TensorBoard, where a prompt's
    responses of several validations stand side by side (the first and the last four), and as tables to
    Weights & Biases and MLflow. The prompts are the first ones of rank zero; conversations are shown turn by turn.

    Args:
        every_n_steps: Also at every so many training steps; 0 for not in training.
        prompts: How many prompts.
        samples: How many responses a prompt.
        directory: Where to write; ``samples`` in the log directory by default.
        enabled: False to write nothing, in place of the callback that a module brings along.
    """

    def __init__(
        self,
        every_n_steps: int = 0,
        prompts: int = 4,
        samples: int = 1,
        directory: str | None = None,
        enabled: bool = True,
    ) -> None:
        super().__init__(enabled)
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
        self._earlier: dict[int, list[dict[str, Any]]] = {}  # of validations, by step
        self._target: Path | None = None
        self._warned = False

    def state_dict(self) -> dict[str, Any]:
        """Return what earlier validations showed, for a resumed run to stand beside its own."""
        return {"earlier": self._earlier}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what earlier validations showed."""
        self._earlier = state_dict["earlier"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask for the log directory, which all processes must do together."""
        log_dir = trainer.log_dir
        dry = trainer.fast_dev_run  # type: ignore[attr-defined]
        if dry or (self.directory is None and log_dir is None):
            self._target = None
        else:
            self._target = Path(self.directory) if self.directory is not None else Path(str(log_dir), "samples")

    def begin(self, stage: str) -> None:
        """Start collecting anew."""
        self._rows = []

    def see(self, trainer: Trainer, pl_module: LightningModule, stage: str, rollout: Rollout | None) -> None:
        """Collect responses of validation and test until there are enough."""
        if stage != "train":
            self._collect(trainer, rollout)

    def stepped(self, trainer: Trainer, pl_module: LightningModule, rollout: Rollout | None) -> None:
        """Write the batch's first responses at every ``every_n_steps`` optimizer steps."""
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._rows = []
            self._collect(trainer, rollout)
            self.end(trainer, pl_module, "train")

    def _collect(self, trainer: Trainer, rollout: Rollout | None) -> None:
        if rollout is None:
            if not self._warned and not trainer.sanity_checking:
                self._warned = True
                rank_zero_warn("SampleTable found no rollout in the step's outputs: this module brings no responses")
            return
        if trainer.is_global_zero and not trainer.sanity_checking and len(self._rows) < self.prompts:
            self._rows += _rows(rollout, self.prompts - len(self._rows), self.samples)

    def end(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write what was collected."""
        rows, self._rows = self._rows, []
        if not rows or not trainer.is_global_zero or self._target is None:
            return
        step = trainer.global_step
        self._target.mkdir(parents=True, exist_ok=True)
        with atomic_file(self._target / f"{stage}-{step:08d}.jsonl") as stream:
            for row in rows:
                line = json.dumps({"stage": stage, "step": step, **row}, ensure_ascii=False)
                stream.write(f"{line}\n".encode())
        shown = {step: rows}
        if stage == "val" and trainer.state.fn == TrainerFn.FITTING:
            self._earlier = _first_and_last(self._earlier | shown)
            shown = self._earlier
        table = [
            [step, row["prompt"], response["text"], response["reward"], response["tokens"], response["finished"]]
            for row in rows
            for response in row["responses"]
        ]
        for logger in trainer.loggers:
            log_table(logger, f"{stage}/samples", _COLUMNS, table, markdown=sample_markdown(shown), step=step)


def _first_and_last(by_step: dict[int, list[dict[str, Any]]]) -> dict[int, list[dict[str, Any]]]:
    steps = sorted(by_step)
    kept = steps if len(steps) <= _SHOWN_STEPS else [steps[0], *steps[1 - _SHOWN_STEPS :]]
    return {step: by_step[step] for step in kept}


def _rows(rollout: Rollout, prompts: int, samples: int) -> list[dict[str, Any]]:
    valid = rollout.prompts.valid.tolist()
    chosen = [row for row, counts in enumerate(valid) if counts][:prompts]
    index, rewards = rollout.prompts.index.tolist(), known_rewards(rollout.rewards)
    lengths, finished = rollout.completions.mask.sum(-1).tolist(), rollout.completions.finished.tolist()
    texts = shown_prompts(rollout.prompts.text, rollout.prompts.messages)
    return [
        {
            "index": index[row],
            "prompt": texts[row],
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


def sample_markdown(by_step: dict[int, list[dict[str, Any]]]) -> str:
    """Format collected rows as Markdown: of each prompt a table with a column a step.

    Args:
        by_step: The rows of each step; the prompts are those of the last.
    """
    steps = sorted(by_step)
    sections = []
    for place, row in enumerate(by_step[steps[-1]]):
        same = [_at(by_step[step], place, row["prompt"]) for step in steps]
        header = [f"step {step}" for step, responses in zip(steps, same, strict=True) if responses]
        lines = []
        for sample in range(len(row["responses"])):
            shown = [responses[sample] if sample < len(responses) else None for responses in same if responses]
            lines.append(["(none)" if one is None else _cell(one) for one in shown])
        table = markdown_table(header, lines, align="l" * len(header))
        sections.append(f"**{markdown_cell(row['prompt'])}**\n\n{table}")
    return "\n".join(sections)


def _at(rows: list[dict[str, Any]], place: int, prompt: str) -> list[dict[str, Any]]:
    """Return the responses to a prompt, none where another stood in its place."""
    same = place < len(rows) and rows[place]["prompt"] == prompt
    responses: list[dict[str, Any]] = rows[place]["responses"] if same else []
    return responses


def _cell(response: dict[str, Any]) -> str:
    text = markdown_cell(response["text"]) + ("" if response["finished"] else " […]")
    return f"{text}<br>*reward {reward_cell(response['reward'])}, {response['tokens']} tokens*"
