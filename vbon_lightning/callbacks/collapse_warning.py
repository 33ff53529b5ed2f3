"""A warning where a run has come to nothing although all its numbers are finite."""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from vbon_lightning.callbacks.late_numbers import LateNumbers
from vbon_lightning.callbacks.rollout_callback import RolloutCallback
from vbon_lightning.types import Rollout

EXPECTED = 10
"""How many finished responses there would have to be, as at the start, for none of them to be more than chance."""


class _Seen(NamedTuple):
    kl: float
    distinct: float
    finished: float
    responses: float


class CollapseWarning(RolloutCallback):
    """Warn, once each, where the policy is far from the reference, says one thing only, or never ends.

    Means over the last rollouts of training, and over each validation, are compared with the bounds.

    Args:
        max_kl: The most KL to the reference, in nats a response; null for no bound.
        min_distinct: The least share of prompts with two different responses (where several are sampled); 0 for none.
        min_finished: The least share of responses that end by themselves, as a part of what it was at the start; 0 for
            none. A run whose responses are cut from the start on is never warned of.
        rollouts: How many rollouts of training a mean is over.
        enabled: False to do nothing, in place of the callback that a module brings along.
    """

    def __init__(
        self,
        max_kl: float | None = 100.0,
        min_distinct: float = 0.02,
        min_finished: float = 0.02,
        rollouts: int = 5,
        enabled: bool = True,
    ) -> None:
        super().__init__(enabled)
        if max_kl is not None and not max_kl > 0:
            raise ValueError(f"CollapseWarning's max_kl must be a positive number of nats, got {max_kl}")
        for name, share in (("min_distinct", min_distinct), ("min_finished", min_finished)):
            if not 0 <= share <= 1:
                raise ValueError(f"CollapseWarning's {name} must be a share, from 0 to 1, got {share}")
        if rollouts < 1:
            raise ValueError(f"CollapseWarning's rollouts must be at least 1, got {rollouts}")
        self.max_kl, self.min_distinct, self.min_finished, self.rollouts = max_kl, min_distinct, min_finished, rollouts
        self._said: set[str] = set()
        self._finished_at_first: dict[str, float] = {}
        self._training: deque[_Seen] = deque(maxlen=rollouts)
        self._validation: list[_Seen] = []
        self._late: LateNumbers[str] = LateNumbers(self._take)

    def begin(self, stage: str) -> None:
        """Begin anew with a stage."""
        if stage == "train":
            self._said, self._finished_at_first = set(), {}
            self._training.clear()
            self._late.forget()
        self._validation = []

    def see(self, trainer: Trainer, pl_module: LightningModule, stage: str, rollout: Rollout | None) -> None:
        """Look at a rollout of training, or gather those of a validation."""
        if rollout is None or trainer.sanity_checking or stage == "test":
            return
        self._step, self._anchored = trainer.global_step, getattr(pl_module, "anchor_moves", False)
        self._late.put(_numbers(rollout), stage)

    def _take(self, numbers: Tensor, stage: str) -> None:
        seen = _Seen(*numbers.tolist())
        if stage == "train":
            self._training.append(seen)
            if len(self._training) == self.rollouts:
                self._judge(list(self._training), "train")
        else:
            self._validation.append(seen)

    def end(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Judge a validation."""
        self._late.settle()
        if stage == "val" and self._validation:
            self._judge(self._validation, "val")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge a run that had fewer rollouts than a mean is over."""
        self._late.settle()
        if self.enabled and 0 < len(self._training) < self.rollouts:
            self._judge(list(self._training), "train")

    def _judge(self, seen: list[_Seen], stage: str) -> None:
        kl, distinct, finished, responses = (_mean(values) for values in zip(*seen, strict=True))
        first = self._finished_at_first.setdefault(stage, finished)
        expected = first * responses * len(seen)
        whose = "anchor" if stage == "train" and self._anchored else "reference"
        if self.max_kl is not None and kl > self.max_kl:
            self._warn(
                "max_kl",
                f"the policy is {kl:.4g} nats a response from the {whose} (the bound is {self.max_kl:g}), where "
                f"hardly anything that it says is what the {whose} would",
                stage,
            )
        if distinct < self.min_distinct:
            self._warn(
                "min_distinct",
                f"{distinct:.1%} of the prompts have two different responses (the bound is {self.min_distinct:.1%}): "
                "the policy says one thing only, of which nothing can be learnt",
                stage,
            )
        if finished < self.min_finished * first and expected >= EXPECTED:
            self._warn(
                "min_finished",
                f"{finished:.1%} of the responses end by themselves, and at the start {first:.1%} did (the bound is "
                f"{self.min_finished:.1%} of that): the policy has unlearnt to end",
                stage,
            )

    def _warn(self, bound: str, what: str, stage: str) -> None:
        if bound in self._said:
            return
        self._said.add(bound)
        rank_zero_warn(
            f"THE RUN HAS COLLAPSED at step {self._step} ({stage}): {what}. Lower the learning rate, or go back to an "
            f"earlier checkpoint (BestPolicy keeps the best); CollapseWarning's {bound} sets the bound."
        )


def _numbers(rollout: Rollout) -> Tensor:
    """Return ``[4]``: mean KL, shares of prompts with two different responses and of responses that end, responses."""
    valid, done = rollout.prompts.valid, rollout.completions
    count = valid.sum().clamp(min=1)
    kl = rollout.token_kl.float().sum(-1).mean(-1)
    tokens = torch.where(done.mask, done.tokens, -1)
    # One response a prompt cannot be compared.
    differ = (tokens != tokens[:, :1]).flatten(1).any(1).float() if tokens.shape[1] > 1 else torch.ones_like(kl)
    finished = done.finished.float().mean(-1)
    means = [torch.where(valid, values, 0.0).sum() / count for values in (kl, differ, finished)]
    return torch.stack([*means, valid.sum() * tokens.shape[1]])


def _mean(values: tuple[float, ...]) -> float:
    return math.fsum(values) / len(values)
