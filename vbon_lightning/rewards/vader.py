"""The sentiment of a text by the VADER lexicon."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from vbon_lightning.rewards.base import RewardError, RewardModel, check_rewards, check_text, join_texts


class VaderReward(RewardModel):
    """Score sentiment by VADER's compound score in [-1, 1] (Hutto and Gilbert, ICWSM 2014).

    A rule-based scorer that needs no weights. Texts without a word of the lexicon score exactly 0, so rewards
    tie.

    Args:
        text: ``prompt_and_response`` to score the two together, ``response`` to score the response alone.
    """

    def __init__(self, text: Literal["prompt_and_response", "response"] = "response") -> None:
        check_text(text)
        self.text = text
        self._analyzer: Any = None

    def __call__(
        self,
        prompts: Sequence[str],
        responses: Sequence[Sequence[str]],
        token_ids: Sequence[Sequence[Sequence[int]]] = (),
    ) -> Tensor:
        """Score responses; see :meth:`RewardModel.__call__`."""
        del token_ids
        if self._analyzer is None:
            self._analyzer = _load_analyzer()
        texts = join_texts(prompts, responses, self.text)
        scores = iter([self._analyzer.polarity_scores(text)["compound"] for text in texts])
        return check_rewards([[next(scores) for _ in row] for row in responses], prompts, responses)

    def identity(self) -> dict[str, str]:
        """Describe the reward by its text argument and the version of the lexicon."""
        try:
            version = importlib.metadata.version("vaderSentiment")
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        return {"class": "VaderReward", "text": self.text, "vaderSentiment": version}


def _load_analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise RewardError("VaderReward needs the vaderSentiment package: pip install vaderSentiment") from error
    return SentimentIntensityAnalyzer()
