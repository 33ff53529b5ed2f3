"""The KL divergence of Best-of-N from the reference, by cached rewards alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vbon_lightning.functional.best_of_n import bon_log_ratio
from vbon_lightning.functional.reward_cdf import reward_counts


def bon_kl(reference_rewards: Tensor, *, n: float) -> Tensor:
    """Estimate KL(Best-of-N || reference), the cached responses standing for the reference.

    ``sum_j w_j log(M w_j)``: the weights ``w_j = (F_le^N - F_lt^N) / (M (F_le - F_lt))`` are those of N draws
    with replacement from the M responses, and ``M w_j`` is the tie-aware ratio of Best-of-N to the reference.
    It is exact for the empirical distribution, hence between 0 and ``log N - (N-1)/N``, and low for a reward without
    ties: by less than 0.006 nats with ``M >= 4 N`` responses (0.003 from N = 4 on), by less than 0.002 with ``8 N``.

    Args:
        reference_rewards: ``[B, M]``.
        n: N of Best-of-N.

    Returns:
        ``[B]`` float64, in nats.
    """
    samples = reference_rewards.shape[1]
    below, at_or_below = reward_counts(reference_rewards, reference_rewards)
    log_ratio = bon_log_ratio(
        torch.full(below.shape, -math.log(samples), dtype=torch.float64, device=below.device),
        (below.double() / samples).log(),
        n=n,
        log_at_or_below=(at_or_below.double() / samples).log(),
    )
    weights = log_ratio.exp() / samples
    return torch.where(weights > 0, weights * log_ratio, 0.0).sum(-1)
