"""What Best-of-N is worth by a reward distribution that is known at the edges of bins: no response is needed.

Within a bin the reward is taken to be spread as the pooled rewards are (``RewardBins.atoms``), and to be continuous;
a bin whose atoms are equal is one reward that ties with itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vbon_lightning.functional._validate import check_dims, check_float, check_real, working_dtype
from vbon_lightning.functional.reward_bins import RewardBins
from vbon_lightning.functional.reward_cdf import RewardCDF


@torch.no_grad()
def win_rate_by_cdf(cdf: RewardCDF, *, n: float) -> Tensor:
    """Compute the probability that each reward beats the best of n of the reference, a tie counting one half.

    ``(F_lt^n + F_le^n) / 2``; ties that both win are split evenly only for n = 1, as in :func:`bon_win_rate`.

    Args:
        cdf: where the rewards lie, ``[B, G]``.
        n: number of samples of Best-of-N, any real >= 1.

    Returns:
        ``[B, G]`` in the dtype of the CDF.

    Raises:
        ValueError: if ``n < 1``.
    """
    check_real("n", n, at_least=1.0)
    return ((n * cdf.log_below).exp() + (n * cdf.log_at_or_below).exp()) / 2


@torch.no_grad()
def binned_bon_reward(log_cdf: Tensor, bins: RewardBins, *, n: float) -> Tensor:
    """Compute Best-of-N's mean reward.

    Args:
        log_cdf: ``[B, K + 1]`` log of the CDF at the bins' edges.
        bins: the bins.
        n: number of samples, any real >= 1.

    Returns:
        ``[B]`` in double precision.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: on shapes that do not fit, or ``n < 1``.
    """
    cdf = _checked(log_cdf, bins, n)
    count = bins.atoms.shape[1]
    share = torch.arange(count + 1, dtype=cdf.dtype, device=cdf.device) / count
    # F at the quantiles within each bin, a straight line between its edges.
    fine = cdf[:, :-1, None] + (cdf[:, 1:] - cdf[:, :-1])[..., None] * share
    return ((fine[..., 1:] ** n - fine[..., :-1] ** n) * bins.atoms.to(cdf)).sum((-1, -2))


@torch.no_grad()
def binned_bon_win_rate(log_cdf: Tensor, bins: RewardBins, *, n: float, m: float = 1.0) -> Tensor:
    """Compute the win rate of Best-of-n over Best-of-m: ``n / (n + m)`` without ties, a tie counting one half.

    Args:
        log_cdf: ``[B, K + 1]`` log of the CDF at the bins' edges.
        bins: the bins.
        n: number of samples of the one, any real >= 1.
        m: of its opponent, any real >= 1.

    Returns:
        ``[B]`` in double precision.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: on shapes that do not fit, or ``n`` or ``m`` below 1.
    """
    check_real("m", m, at_least=1.0)
    cdf = _checked(log_cdf, bins, n)
    low, high = cdf[:, :-1], cdf[:, 1:]
    tied = (high**n - low**n) * (high**m + low**m) / 2
    spread = n / (n + m) * (high ** (n + m) - low ** (n + m))
    return torch.where(_atomic(bins).to(cdf.device), tied, spread).sum(-1)


@torch.no_grad()
def binned_bon_kl(log_cdf: Tensor, bins: RewardBins, *, n: float) -> Tensor:
    """Compute Best-of-N's KL from the reference: ``log n - (n - 1) / n`` without ties, less with them.

    The KL of the rewards, which is that of the responses: Best-of-N leaves the responses of one reward as they are.

    Args:
        log_cdf: ``[B, K + 1]`` log of the CDF at the bins' edges.
        bins: the bins.
        n: number of samples, any real >= 1.

    Returns:
        ``[B]`` in double precision, nats.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: on shapes that do not fit, or ``n < 1``.
    """
    cdf = _checked(log_cdf, bins, n)
    low, high = cdf[:, :-1], cdf[:, 1:]
    mass, chosen = high - low, high**n - low**n
    tied = torch.special.xlogy(chosen, chosen) - torch.special.xlogy(chosen, mass)
    # The integral of n u^(n-1) log(n u^(n-1)) from one edge to the other.
    rise = torch.special.xlogy(high**n, high) - torch.special.xlogy(low**n, low)
    spread = chosen * (math.log(n) - (n - 1) / n) + (n - 1) * rise
    return torch.where(_atomic(bins).to(cdf.device), tied, spread).sum(-1)


def _checked(log_cdf: Tensor, bins: RewardBins, n: float) -> Tensor:
    check_float("log_cdf", log_cdf)
    check_dims("log_cdf", log_cdf, 2, "[B, K + 1]")
    check_real("n", n, at_least=1.0)
    if log_cdf.shape[1] != bins.size + 1:
        raise ValueError(f"log_cdf must have shape [B, K + 1] with K = {bins.size} bins, got {list(log_cdf.shape)}")
    return log_cdf.to(working_dtype(log_cdf)).exp()


def _atomic(bins: RewardBins) -> Tensor:
    return bins.atoms[:, 0] == bins.atoms[:, -1]
