"""A right answer, to the letter."""

from __future__ import annotations

from typing import Any

from vbon_lightning.rewards.per_response import ResponseReward, compiled


class ExactMatchReward(ResponseReward):
    r"""Score 1 where the response is the answer, 0 elsewhere; white space around either does not count.

    Args:
        column: Column of the data set that holds the answer: text, a number, or a list of which any will do.
        extract: Regular expression for what counts of a text, such as ``####\s*(.+)`` for what stands behind four
            signs: the first group of its last match, or all of the match. A response without a match scores 0; an
            answer without one is taken whole.
        ignore_case: Whether capitals are as good as small letters.
    """

    def __init__(self, column: str = "answer", extract: str | None = None, ignore_case: bool = False) -> None:
        super().__init__(column)
        self.extract, self.ignore_case = extract, ignore_case
        if extract is not None:
            compiled("extract", extract)

    def score(self, response: str, answer: Any) -> float:
        """Say whether a response is the answer."""
        found = self._extracted(response)
        if found is None:
            return 0.0
        wanted = answer if isinstance(answer, list | tuple) else [answer]
        texts = (str(one) for one in wanted)
        return float(self._plain(found) in {self._plain(self._extracted(text) or text) for text in texts})

    def _extracted(self, text: str) -> str | None:
        if self.extract is None:
            return text
        matches = list(compiled("extract", self.extract).finditer(text))
        if not matches:
            return None
        return matches[-1].group(1 if matches[-1].re.groups else 0)

    def _plain(self, text: str) -> str:
        return text.strip().casefold() if self.ignore_case else text.strip()
