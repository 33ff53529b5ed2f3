"""Best-of-N itself: draw n, keep the best."""

from __future__ import annotations

from vbon_lightning.actors import Actors
from vbon_lightning.decoding.base import Decoded, Decoder
from vbon_lightning.decoding.candidates import best_of, draw_groups, keep
from vbon_lightning.decoding.noise_key import NoiseKey
from vbon_lightning.decoding.options import check_counts
from vbon_lightning.types import PromptBatch


class BestOfN(Decoder):
    """Draw n responses from the policy and keep the one with the highest reward, the first of those that tie.

    Samples are independent, so that the first of a tie is as good as one at random.

    Args:
        n: Responses drawn for each that is kept, an integer >= 1.
    """

    needs_reward = True

    def __init__(self, n: int = 4) -> None:
        check_counts(n=n)
        self.n: int = n

    def decode(self, actors: Actors, prompts: PromptBatch, key: NoiseKey) -> Decoded:
        """Choose G responses a prompt, each the best of n."""
        found = draw_groups(actors, prompts, n=self.n, key=key)
        return keep(found, best_of(found.rewards), kl_bound=None)
