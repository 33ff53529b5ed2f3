"""Speculative Rejection: begin many, drop those that look bad on the way."""

from __future__ import annotations

import math

from vbon_lightning.actors import Actors
from vbon_lightning.checks import check_without_effect
from vbon_lightning.decoding.base import Decoded, Decoder
from vbon_lightning.decoding.candidates import best_of
from vbon_lightning.decoding.growing import check_every, checkpoints, grove
from vbon_lightning.decoding.noise_key import NoiseKey
from vbon_lightning.decoding.options import check_counts
from vbon_lightning.functional._validate import check_real
from vbon_lightning.types import PromptBatch


class SpeculativeRejection(Decoder):
    """Begin n responses, score them every few tokens, go on with the better ones, and return the best of the last.

    H. Sun et al., "Fast Best-of-N Decoding via Speculative Rejection" (2024): of m responses ``round((1 - alpha) m)``
    are kept, one at the least; those that have finished stay in the ranking. The paper scores when the memory is full,
    here it is every so many tokens, so that what is decoded does not depend on the machine. With alpha 0 it is
    Best-of-N, of the same responses.

    Args:
        n: Responses begun for each that is kept, an integer >= 1.
        alpha: Share that is rejected each time, in [0, 1).
        every: Tokens from one time to the next, fewer than a response may have; a quarter of these by default.
    """

    needs_reward = True

    def __init__(self, n: int = 16, alpha: float = 0.5, every: int | None = None) -> None:
        check_counts(n=n, every=every)
        check_real("alpha", alpha, at_least=0, below=1)
        self.n: int = n
        self.alpha, self.every, self.rows = alpha, every, n
        if alpha == 0:
            check_without_effect(type(self), "alpha=0", {"every": every})
        elif n > 1 and self._kept(n) == n:
            raise ValueError(
                f"alpha={alpha:g} rejects none of n={n} responses, which is Best-of-N: raise one of them, or take "
                "BestOfN or alpha: 0"
            )

    def check_fits(self, *, longest: int, max_rows: int | None) -> None:
        """Refuse to judge no response before it is whole as well."""
        super().check_fits(longest=longest, max_rows=max_rows)
        if self.alpha and self.n > 1:
            check_every(self._every(longest), longest, instead="Best-of-N, which is BestOfN or alpha: 0")

    def _kept(self, responses: int) -> int:
        return max(1, round((1 - self.alpha) * responses))

    def _every(self, longest: int) -> int:
        return math.ceil(longest / 4) if self.every is None else self.every

    def decode(self, actors: Actors, prompts: PromptBatch, key: NoiseKey) -> Decoded:
        """Choose G responses a prompt."""
        with grove(actors, prompts, n=self.n, key=key) as rows:
            left = self.n
            for length in checkpoints(actors.max_new_tokens, self._every(actors.max_new_tokens)):
                rows.growing.grow(length)
                kept = self._kept(left)
                if kept < left:
                    ranked = rows.rewards().nan_to_num(nan=-math.inf).argsort(dim=-1, descending=True, stable=True)
                    rows.select(ranked[..., :kept].sort(dim=-1).values)
                    left = kept
            rows.growing.grow()
            # One of n samples, whichever: no response is more than n times as likely as before.
            return rows.chosen(best_of(rows.rewards()), kl_bound=math.log(self.n) if left < self.n else None)
