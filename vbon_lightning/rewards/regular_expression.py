"""Responses of a certain form."""

from __future__ import annotations

import re
from typing import Any, Literal

from vbon_lightning.rewards.base import RewardError
from vbon_lightning.rewards.per_response import ResponseReward, compiled


class RegexReward(ResponseReward):
    """Score 1 where a regular expression matches the response, 0 elsewhere.

    Args:
        pattern: The expression.
        where: ``anywhere`` in the response, or the ``whole`` of it.
        ignore_case: Whether capitals are as good as small letters.
        dot_all: Whether ``.`` stands for line breaks too.
    """

    def __init__(
        self,
        pattern: str,
        where: Literal["anywhere", "whole"] = "anywhere",
        ignore_case: bool = False,
        dot_all: bool = False,
    ) -> None:
        super().__init__()
        if where not in ("anywhere", "whole"):
            raise RewardError(f"`where` is {where!r}, expected 'anywhere' or 'whole'")
        self.pattern, self.where, self.ignore_case, self.dot_all = pattern, where, ignore_case, dot_all
        compiled("pattern", pattern)

    def score(self, response: str, answer: Any) -> float:
        """Say whether a response has the form."""
        flags = (re.IGNORECASE if self.ignore_case else 0) | (re.DOTALL if self.dot_all else 0)
        expression = compiled("pattern", self.pattern, flags)
        matches = expression.search if self.where == "anywhere" else expression.fullmatch
        return float(matches(response) is not None)
