"""Rewards that look at one response at a time, and at what the data set says the answer is."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vbon_lightning.rewards.base import RewardError, RewardModel, check_columns


class ResponseReward(RewardModel):
    """Base of rewards of a single response: a subclass says what one is worth.

    Args:
        column: Column of the data set that holds the right answer; None where there is none to compare with. Of a row
            whose answer is null the reward says nothing.
    """

    reads_columns = True
    judges_alone = True

    def __init__(self, column: str | None = None) -> None:
        self.column = column

    @property
    def columns(self) -> Sequence[str]:  # type: ignore[override]
        """Return the column that holds the right answer."""
        return () if self.column is None else (self.column,)

    @abstractmethod
    def score(self, response: str, answer: Any) -> float | None:
        """Say what a response is worth; None where that cannot be said.

        Args:
            response: The response.
            answer: What the row holds in ``column``; None without one.
        """

    def __call__(
        self,
        prompts: Sequence[str],
        responses: Sequence[Sequence[str]],
        token_ids: Sequence[Sequence[Sequence[int]]] = (),
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> Tensor:
        """Score responses; see :meth:`RewardModel.__call__`."""
        del token_ids
        check_columns(type(self).__name__, self.columns, columns or {})
        answers = [None] * len(prompts) if self.column is None else (columns or {})[self.column]
        rewards = [
            [self._scored(response, answer) for response in row] for row, answer in zip(responses, answers, strict=True)
        ]
        return torch.tensor(rewards, dtype=torch.float32)

    def _scored(self, response: str, answer: Any) -> float:
        """Return a score, NaN where there is none: nor is there where the row lacks the answer."""
        value = None if self.column is not None and answer is None else self.score(response, answer)
        return math.nan if value is None else float(value)

    def identity(self) -> dict[str, str]:
        """Describe the reward by its class and arguments."""
        arguments = {name: str(value) for name, value in sorted(vars(self).items()) if not name.startswith("_")}
        return {"class": type(self).__name__} | arguments


def compiled(name: str, pattern: str, flags: int = 0) -> re.Pattern[str]:
    """Compile a regular expression of a configuration.

    Args:
        name: The option, for messages.
        pattern: The expression.
        flags: As in :mod:`re`.

    Raises:
        RewardError: If it is none.
    """
    try:
        return re.compile(pattern, flags)
    except re.error as problem:
        raise RewardError(f"`{name}` is {pattern!r}, which is no regular expression: {problem}") from problem
