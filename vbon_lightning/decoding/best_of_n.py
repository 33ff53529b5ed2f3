"""Best-of-N itself: draw n, keep the best."""

from __future__ import annotations

import math

import torch

from vbon_lightning.actors import Actors
from vbon_lightning.decoding.base import Decoded, Decoder, DecodingCost
from vbon_lightning.types import PromptBatch


class BestOfN(Decoder):
    """Draw n responses from the policy and keep the one with the highest reward, the first of those that tie.

    Samples are independent, so that the first of a tie is as good as one at random.

    Args:
        n: Responses drawn for each that is kept, an integer >= 1.
    """

    needs_reward = True

    def __init__(self, n: int = 4) -> None:
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"n must be an integer >= 1, got {n!r}")
        self.n: int = n

    @torch.no_grad()
    def __call__(
        self, actors: Actors, prompts: PromptBatch, *, num_samples: int, seed: int, stream: str, step: int
    ) -> Decoded:
        """Choose G responses a prompt, each the best of n."""
        actors.place()
        drawn = actors.sample(
            actors.policy, prompts, num_samples=num_samples * self.n, seed=seed, stream=stream, step=step
        )
        ids = actors.token_ids(drawn)
        rewards = actors.score(prompts, actors.decode(ids, prompts), ids, drawn.finished)
        batch = len(ids)
        # One without a reward is never the best, unless all are: then the choice has none either.
        known = rewards.nan_to_num(nan=-math.inf)
        found = known.view(batch, num_samples, self.n).max(-1)
        best = found.indices.unsqueeze(-1)
        index = (torch.arange(num_samples, device=best.device)[:, None] * self.n + best).squeeze(-1)
        rows = torch.arange(batch, device=best.device)[:, None]
        return Decoded(
            tokens=drawn.tokens[rows, index],
            mask=drawn.mask[rows, index],
            finished=drawn.finished[rows, index],
            token_kl=None,
            cost=DecodingCost(int(drawn.mask.sum()), 0, rewards.numel()),
            rewards=found.values.masked_fill(found.values.isinf(), math.nan),
        )
