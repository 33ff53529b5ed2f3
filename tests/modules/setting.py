"""A tiny model, data and reward to train on, and the trainers to do it with."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from tests.helpers import save_tiny_model
from vbon_lightning import (
    BOND,
    DPO,
    GRPO,
    JBOND,
    KLRL,
    PFPPO,
    QRPO,
    RLOO,
    SFT,
    WIND,
    AlignmentDataModule,
    AStarPO,
    BoNDistillation,
    BoNRegression,
    BoNSFT,
    InfAlignCTRL,
    MaxAtK,
    ReferenceSampler,
    TextSource,
    ValueModelling,
    VBoN,
)
from vbon_lightning.modules import NSchedule
from vbon_lightning.rewards import RewardModel

torch.set_num_threads(1)  # threads cost such small models far more than they bring

ALPHABET = "abcdefgh"
PROMPTS = ["a", "ab", "abc", "bcd", "cde", "d", "ef", "fgh", "gab", "hhh"]


class VowelReward(RewardModel):
    """The share of a response's tokens that stand for a or e, minus a little for each token: it seldom ties."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def __call__(
        self,
        prompts: Sequence[str],
        responses: Sequence[Sequence[str]],
        token_ids: Sequence[Sequence[Sequence[int]]],
    ) -> Tensor:
        return torch.tensor(
            [
                [
                    self.scale * (sum(char in "ae" for char in text) - 0.1 * len(ids))
                    for text, ids in zip(texts, rows, strict=True)
                ]
                for texts, rows in zip(responses, token_ids, strict=True)
            ]
        )

    def identity(self) -> dict[str, str]:
        return {"class": "VowelReward", "scale": str(self.scale)}


class Picky(VowelReward):
    """Says nothing of responses that begin with one of some letters (or texts: all do with an empty one)."""

    def __init__(self, letters: Sequence[str] = "h", scale: float = 1.0) -> None:
        super().__init__(scale)
        self.letters = letters

    def __call__(self, prompts: Any, responses: Any, token_ids: Any) -> Tensor:
        silent = torch.tensor([[text.startswith(tuple(self.letters)) for text in row] for row in responses])
        return super().__call__(prompts, responses, token_ids).masked_fill(silent, torch.nan)

    def identity(self) -> dict[str, str]:
        return super().identity() | {"class": "Picky", "letters": "".join(self.letters)}


def make_files(directory: Path) -> Path:
    """Write two models, one with dropout, and prompts to a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    save_tiny_model(directory / "llama", alphabet=ALPHABET, seed=1, spread=2.0)
    save_tiny_model(directory / "gpt2", "gpt2", alphabet=ALPHABET, seed=2)
    (directory / "train.txt").write_text("\n".join(PROMPTS) + "\n")
    (directory / "val.txt").write_text("ba\nca\nhd\n")
    (directory / "texts.txt").write_text("\n".join((text * 3)[: 2 + i] for i, text in enumerate(PROMPTS)) + "\n")
    return directory


def make_data(directory: Path, **changes: Any) -> AlignmentDataModule:
    arguments: dict[str, Any] = {
        "policy": str(directory / "llama"),
        "reward": VowelReward(),
        "train": TextSource(path=str(directory / "train.txt")),
        "val": TextSource(path=str(directory / "val.txt")),
        "max_new_tokens": 4,
        "batch_size": 4,
        "eval_batch_size": 2,
    }
    return AlignmentDataModule(**(arguments | changes))


def make_table(directory: Path, samples: int = 16, **changes: Any) -> str:
    """Fill ``table`` in the directory with responses to the prompts of :func:`make_data`, and return its path."""
    table = str(directory / "table")
    data = make_data(directory, reference_table=table, **changes)
    make_trainer(directory, callbacks=[], enable_checkpointing=False).predict(
        ReferenceSampler(data.actors, samples=samples), data, return_predictions=False
    )
    return table


def as_made_in(precision: str, table: Path, directory: Path) -> str:
    """Copy a table to a directory as if its reference had sampled in a precision, and return its path."""
    copied = Path(shutil.copytree(table, directory / f"table-{precision}", dirs_exist_ok=True))
    made_of = json.loads((copied / "fingerprint.json").read_text())
    (copied / "fingerprint.json").write_text(json.dumps(made_of | {"precision": precision}))
    return str(copied)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


def cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)


REGRESSIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "qrpo": (QRPO, {"beta": 0.2}),
    "astarpo": (AStarPO, {"beta2": 0.2}),
    "bonregression": (BoNRegression, {"n": 4.0}),
}
"""What regresses log-ratios, and its options."""
SIBLINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "maxatk": (MaxAtK, {"k": 2}),
    "grpo": (GRPO, {"beta": 0.2, "epochs_per_rollout": 2, "minibatches": 2, "length_norm": "dapo"}),
    "rloo": (RLOO, {"beta": 0.2}),
    "pfppo": (PFPPO, {"beta": 0.2, "epochs_per_rollout": 2}),
}
"""Methods that need no reference rewards, by their options here."""


def make_module(kind: str, data: AlignmentDataModule, **changes: Any) -> LightningModule:
    """Make one of ``vbon``, ``clipped``, ``ppo``, ``klrl``, ``bonsft``, ``dpo``, ``sft`` and those of value models.

    ``qrpo`` and ``bonregression`` learn from the table's responses, with a 2 behind it from the policy's, as
    ``astarpo`` does. ``forward`` and ``jeffreys`` are vBoN's divergences; the anchors of ``bond``, ``jbond`` and
    ``wind`` move. ``valuemodelling`` trains one; ``distillation`` and ``valuecritic`` read the one that the data names.
    ``annealed`` is vBoN whose N grows, and ``infalign``, ``maxatk``, ``grpo``, ``rloo`` and ``pfppo`` are its siblings.
    """
    online = {"samples_per_prompt": 4, "reference_samples": 16}
    several = {"epochs_per_rollout": 2, "minibatches": 2}
    common: dict[str, Any] = {"actors": data.actors, "optimizer": adam, "lr_scheduler": cosine}
    if kind == "vbon":
        return VBoN(**(common | online | {"n": 4} | changes))
    if kind == "annealed":
        return VBoN(**(common | online | {"n": 4, "n_schedule": NSchedule(1.5, 4)} | changes))
    if kind == "infalign":
        return InfAlignCTRL(**(common | online | {"n": 4} | changes))
    if kind in SIBLINGS:
        return SIBLINGS[kind][0](**(common | {"samples_per_prompt": 4} | SIBLINGS[kind][1] | changes))
    if kind in ("forward", "jeffreys"):
        return VBoN(**(common | online | {"n": 4, "divergence": kind, "forward_responses": 2} | changes))
    if kind == "bond":
        return BOND(**(common | online | {"n": 2, "anchor_every": 2} | changes))
    if kind == "jbond":
        return JBOND(**(common | {"anchor_rate": 0.3, "regularisation": 0.5} | changes))
    if kind == "wind":
        return WIND(**(common | {"samples_per_prompt": 4, "reference_samples": 4, "anchor_every": 2} | changes))
    if kind == "clipped":
        return VBoN(**(common | online | several | {"n": 4, "estimator": "clipped"} | changes))
    if kind == "ppo":
        return KLRL(**(common | {"samples_per_prompt": 4} | several | {"beta": 0.2, "estimator": "ppo"} | changes))
    if kind == "klrl":
        return KLRL(**(common | {"samples_per_prompt": 4, "beta": 0.2} | changes))
    if kind == "bonsft":
        return BoNSFT(**(common | {"n": 4, "responses_per_prompt": 3, "eval_samples": 4} | changes))
    if kind == "dpo":
        return DPO(**(common | {"n": 4, "pairs_per_prompt": 2, "eval_samples": 4} | changes))
    if kind.removesuffix("2") in REGRESSIONS:
        cls, options = REGRESSIONS[kind.removesuffix("2")]
        own = {"responses": "policy"} if kind.endswith("2") else {}
        return cls(**(common | {"responses_per_prompt": 3, "eval_samples": 4} | options | own | changes))
    if kind == "valuemodelling":
        return ValueModelling(**(common | {"bins": 6, "responses_per_prompt": 3} | changes))
    if kind == "distillation":
        few = {"responses_per_prompt": 3, "top": 4, "draws": 4, "eval_samples": 4}
        return BoNDistillation(**(common | {"n": 4.0} | few | changes))
    if kind == "valuecritic":
        return VBoN(**(common | {"samples_per_prompt": 4, "n": 4, "value_model": True} | changes))
    return SFT(**(common | changes))


def prepared(kind: str, data: Any, **changes: Any) -> Any:
    """Make a module away from its reference."""
    module: Any = make_module(kind, data, **changes)
    module.configure_model()
    with torch.no_grad():
        for index, parameter in enumerate(module.policy.parameters()):
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    return module


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


class KillAt(Callback):
    """Stop without warning before a training batch, or in the validation that follows it.

    Args:
        batch: How many training batches this process may do.
        validation: Stop in the validation after them instead.
        sigkill: End the process by a signal instead of an exception.
    """

    def __init__(self, batch: int, validation: bool = False, sigkill: bool = False) -> None:
        self.batch, self.validation, self.sigkill = batch, validation, sigkill
        self.seen = 0

    def _kill(self) -> None:
        if self.sigkill:
            os.kill(os.getpid(), signal.SIGKILL)
        raise Killed

    def on_train_batch_start(self, *_: Any) -> None:
        if self.seen == self.batch:
            self._kill()
        self.seen += 1

    def on_validation_batch_end(self, *_: Any) -> None:
        if self.validation and self.seen == self.batch:
            self._kill()


def make_trainer(directory: Path, *callbacks: Callback, steps: int = 7, **arguments: Any) -> Trainer:
    """Make a trainer that keeps a checkpoint of every step."""
    checkpoint = ModelCheckpoint(dirpath=directory, every_n_train_steps=1, save_last=True)
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": steps,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "callbacks": [checkpoint, *callbacks],
    }
    return Trainer(**(options | arguments))


def weights(module: LightningModule) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def nan_reward(prompts: Sequence[str], responses: Sequence[Sequence[str]]) -> list[list[float]]:
    """Give the last response no number."""
    rewards = [[0.0 for _ in row] for row in responses]
    rewards[-1][-1] = float("nan")
    return rewards


def short_reward(prompts: Sequence[str], responses: Sequence[Sequence[str]]) -> list[list[float]]:
    """Forget a response of each prompt."""
    return [[0.0 for _ in row[1:]] for row in responses]
