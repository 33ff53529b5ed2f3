"""PF-PPO's filter: which of a prompt's responses an update is made on."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from vbon_lightning.functional._validate import check_dims, check_float, check_mask, check_same_shape
from vbon_lightning.functional.selection import systematic_resampling

FilterStrategy = Literal["best", "best_random", "best_worst"]


@torch.no_grad()
def filter_probabilities(rewards: Tensor, *, strategy: FilterStrategy, kept: Tensor | None = None) -> Tensor:
    """Compute with which probability PF-PPO's resampling draws each response of a prompt, by the rank of its reward.

    ``best``: 1 for the best. ``best_random``: 1/2 for the best, the rest in equal shares of 1/2. ``best_worst``: 1/2
    each for the best and the worst. Where rewards tie their order is random, and these are the probabilities over it:
    tied responses have the same, and where all tie all have ``1 / G``. Zhang, Shen, Zhao, Zhang, Xu, Dou and Bian,
    "Policy Filtration for RLHF to Mitigate Noise in Reward Models", 2024, https://arxiv.org/abs/2409.06957; the weights
    are the authors' code's.

    Args:
        rewards: ``[B, G]``.
        strategy: ``best``, ``best_random`` or ``best_worst``.
        kept: ``[B, G]`` bool: False for responses that are left out, whatever their rewards; None for none.

    Returns:
        ``[B, G]``, each row summing to 1; 0 for responses that are left out, and all 0 where all are.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: if the shapes differ or ``strategy`` is unknown.
    """
    check_float("rewards", rewards)
    check_dims("rewards", rewards, 2, "[B, G]")
    if strategy not in (known := get_args(FilterStrategy)):
        raise ValueError(f"strategy must be one of {', '.join(known)}, got {strategy!r}")
    if kept is None:
        kept = torch.ones_like(rewards, dtype=torch.bool)
    check_mask("kept", kept)
    check_same_shape("kept", kept, "rewards", rewards)
    best = _shared(kept & (rewards == rewards.masked_fill(~kept, -torch.inf).amax(1, keepdim=True)), rewards)
    if strategy == "best":
        return best
    if strategy == "best_worst":
        worst = _shared(kept & (rewards == rewards.masked_fill(~kept, torch.inf).amin(1, keepdim=True)), rewards)
        return (best + worst) / 2
    # One that is not the best is drawn from those that are not; of one alone there is no other.
    others = (kept.sum(1, keepdim=True) - 1).to(rewards.dtype)
    rest = torch.where(others > 0, (kept.to(rewards.dtype) - best) / others.clamp(min=1), best)
    return (best + rest) / 2


def _shared(chosen: Tensor, like: Tensor) -> Tensor:
    share = chosen.to(like.dtype)
    return share / share.sum(1, keepdim=True).clamp(min=1)


@torch.no_grad()
def filter_counts(probabilities: Tensor, offsets: Tensor, *, count: int) -> Tensor:
    """Count how often each response is among a number of draws, by :func:`systematic_resampling`.

    Args:
        probabilities: ``[B, G]``, as :func:`filter_probabilities` makes them.
        offsets: ``[B]``, uniform in [0, 1).
        count: draws a prompt, an integer >= 1.

    Returns:
        ``[B, G]``, each row summing to ``count``; ``count`` times the probability on average, and never more than one
        off. 0 in rows without any probability.

    Raises:
        TypeError: on a wrong dtype or a ``count`` that is not an integer.
        ValueError: if the shapes do not fit or ``count < 1``.
    """
    check_float("probabilities", probabilities)
    check_dims("probabilities", probabilities, 2, "[B, G]")
    some = probabilities.sum(1, keepdim=True) > 0
    places = systematic_resampling(torch.where(some, probabilities, 1.0), offsets, count=count)
    counts = torch.zeros_like(probabilities).scatter_add_(1, places, torch.ones_like(places, dtype=probabilities.dtype))
    return torch.where(some, counts, 0.0)
