"""Right results, however they are written."""

from __future__ import annotations

import logging
import threading
from typing import Any

from vbon_lightning.rewards.base import RewardError
from vbon_lightning.rewards.per_response import ResponseReward


class MathReward(ResponseReward):
    r"""Score 1 where the response comes to the answer, 0 elsewhere: ``1/2``, ``0.5`` and ``\boxed{\frac12}`` are one.

    Read and compared by Hugging Face's ``math-verify`` (the extra ``verify``): numbers, LaTeX, sets and intervals, the
    last boxed result first.

    Args:
        column: Column of the data set that holds the answer.
    """

    def __init__(self, column: str = "answer") -> None:
        super().__init__(column)
        try:
            import math_verify  # noqa: F401
        except ImportError as error:
            raise RewardError(
                "MathReward needs the package math-verify: pip install 'vbon_lightning[verify]'"
            ) from error

    def score(self, response: str, answer: Any) -> float:
        """Say whether a response comes to the answer."""
        from math_verify import parse, verify

        # Its time limits are signals, which only the main thread gets; elsewhere it warns of that at every call.
        limit = 5 if threading.current_thread() is threading.main_thread() else None
        if limit is None:
            logging.getLogger("math_verify").setLevel(logging.ERROR)
        wanted = parse(str(answer), parsing_timeout=limit)
        if not wanted:
            raise RewardError(f"the answer {answer!r} (column {self.column!r}) is nothing that math-verify reads")
        return float(verify(wanted, parse(response, parsing_timeout=limit), timeout_seconds=limit))
