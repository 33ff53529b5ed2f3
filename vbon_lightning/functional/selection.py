"""Which of M cached responses to learn from, as functions of given noise."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vbon_lightning.functional._validate import (
    check_count,
    check_dims,
    check_float,
    check_integer,
    check_same_shape,
    check_shape,
)


class GroupExtremes(NamedTuple):
    """The best and the worst response of each group, as places among the M; never the same one where n > 1."""

    best: Tensor
    """``[B, K]`` long."""
    worst: Tensor
    """``[B, K]`` long."""


@torch.no_grad()
def group_extremes(rewards: Tensor, order: Tensor, *, n: int, groups: int) -> GroupExtremes:
    """Put samples into groups of n and find the best and the worst of each.

    The first n places of the order are the first group, the next n the second, and so on. Of tied samples the first in
    the order is the best and the last the worst: a random order breaks ties at random, and makes each group a random
    n-subset.

    Args:
        rewards: ``[B, M]``.
        order: ``[B, M]`` long, a permutation of the M places in each row.
        n: samples a group, an integer with ``1 <= n <= M``.
        groups: K, an integer with ``1 <= K <= M // n``.

    Returns:
        :class:`GroupExtremes`.

    Raises:
        TypeError: on a wrong dtype, or an ``n`` or ``groups`` that is not an integer.
        ValueError: on shapes that do not fit, or ``n`` or ``groups`` out of range.
    """
    check_float("rewards", rewards)
    check_integer("order", order)
    check_dims("rewards", rewards, 2, "[B, M]")
    check_same_shape("order", order, "rewards", rewards)
    samples = rewards.shape[1]
    check_count("n", n, at_most=samples, of="M, the cached samples a prompt")
    check_count("groups", groups, at_most=samples // n, of=f"M // n = {samples} // {n}")
    members = order[:, : groups * n]
    values = rewards.gather(1, members).unflatten(1, (groups, n))
    members = members.unflatten(1, (groups, n))
    first_best = values.argmax(-1, keepdim=True)
    last_worst = n - 1 - values.flip(-1).argmin(-1, keepdim=True)
    return GroupExtremes(members.gather(-1, first_best).squeeze(-1), members.gather(-1, last_worst).squeeze(-1))


@torch.no_grad()
def systematic_resampling(weights: Tensor, offsets: Tensor, *, count: int) -> Tensor:
    """Draw samples in proportion to their weights, by one uniform number a row.

    The places in the cumulative weights at which ``(k + u) / K`` lie, k = 0..K-1. For a uniform u each sample is drawn
    ``K w_j`` times on average, and never more than one time off.

    Args:
        weights: ``[B, M]``, non-negative; each row is divided by its sum.
        offsets: ``[B]``, u in [0, 1).
        count: K, an integer >= 1.

    Returns:
        ``[B, K]`` long, ascending in each row; samples of weight 0 are not among them.

    Raises:
        TypeError: on a wrong dtype or a ``count`` that is not an integer.
        ValueError: on shapes that do not fit or ``count < 1``.
    """
    check_float("weights", weights)
    check_float("offsets", offsets)
    check_dims("weights", weights, 2, "[B, M]")
    check_shape("offsets", offsets, weights.shape[:1], "[B]")
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"count must be an integer, got {count!r} of type {type(count).__name__}")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    cumulative = weights.cumsum(-1)
    cumulative = cumulative / cumulative[:, -1:]
    steps = torch.arange(count, device=weights.device)
    places = (steps + offsets.to(weights)[:, None]) / count
    # Rounding must not reach 1, behind which there is no sample.
    places = places.clamp(max=1 - torch.finfo(weights.dtype).eps)
    return torch.searchsorted(cumulative, places, right=True)
