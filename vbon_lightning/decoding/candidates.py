"""Whole responses to choose among: drawn, scored, and one of each group kept."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vbon_lightning.actors import Actors
from vbon_lightning.decoding.base import Decoded, DecodingCost
from vbon_lightning.decoding.noise_key import NoiseKey
from vbon_lightning.types import Completions, PromptBatch


class ScoredCandidates(NamedTuple):
    """G groups of n responses a prompt, and their rewards."""

    drawn: Completions
    """``[B, G n]``."""
    rewards: Tensor
    """``[B, G, n]``; NaN where a response has none."""


def draw_groups(actors: Actors, prompts: PromptBatch, *, n: int, key: NoiseKey) -> ScoredCandidates:
    """Draw n responses of the policy for each that is to be chosen, and score them.

    Args:
        actors: Loaded models.
        prompts: B prompts.
        n: Responses a group.
        key: How many are to be chosen for a prompt, and their noise.
    """
    drawn = actors.sample(actors.policy, prompts, **key.of_each(n)._asdict())
    ids = actors.token_ids(drawn)
    rewards = actors.score(prompts, actors.decode(ids, prompts), ids, drawn.finished)
    return ScoredCandidates(drawn, rewards.view(len(ids), key.num_samples, n))


def best_of(rewards: Tensor) -> Tensor:
    """Return the place of the highest reward, the first of those that tie: ``[..., n]`` to ``[...]``.

    One without a reward, NaN, is never the best, unless all are.
    """
    return rewards.nan_to_num(nan=-math.inf).argmax(-1)


def keep(candidates: ScoredCandidates, chosen: Tensor, *, kl_bound: float | None) -> Decoded:
    """Keep one response of each group.

    Args:
        candidates: ``[B, G, n]`` responses.
        chosen: ``[B, G]`` long: places within the groups.
        kl_bound: An upper bound of the KL that choosing so makes: log n for whichever of n is chosen. None for
            Best-of-N itself, whose KL is known.
    """
    drawn, rewards = candidates
    groups = torch.arange(rewards.shape[1], device=chosen.device)
    index = groups * rewards.shape[2] + chosen
    rows = torch.arange(len(chosen), device=chosen.device)[:, None]
    return Decoded(
        tokens=drawn.tokens[rows, index],
        mask=drawn.mask[rows, index],
        finished=drawn.finished[rows, index],
        token_kl=None,
        cost=DecodingCost(int(drawn.mask.sum()), 0, rewards.numel()),
        rewards=rewards.gather(-1, chosen.unsqueeze(-1)).squeeze(-1),
        kl_bound=kl_bound,
    )
