"""From the rewards of reference samples to estimates of the reference's reward distribution."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vbon_lightning.functional._validate import check_dims, check_float, check_real, check_same_shape, working_dtype


class RewardCDF(NamedTuple):
    """The reference's reward distribution at the reward of each sample, as logarithms.

    The two differ where rewards tie: ``F_lt(r) = P(r' < r)`` and ``F_le(r) = P(r' <= r)`` for ``r'`` the
    reward of a reference sample.
    """

    log_below: Tensor
    """``[B, G]``: log F_lt."""
    log_at_or_below: Tensor
    """``[B, G]``: log F_le, never less than ``log_below``."""


def _jeffreys(k: Tensor, m: int) -> Tensor:
    return torch.log((k + 0.5) / (m + 1))


def _add_one(k: Tensor, m: int) -> Tensor:
    return torch.log((k + 1) / (m + 1))


def _laplace(k: Tensor, m: int) -> Tensor:
    return torch.log((k + 1) / (m + 2))


def _digamma(k: Tensor, m: int) -> Tensor:
    return torch.digamma(k + 0.5) - float(torch.digamma(torch.tensor(m + 1.0, dtype=torch.float64)))


CDF_ESTIMATORS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "jeffreys": _jeffreys,
    "add_one": _add_one,
    "laplace": _laplace,
    "digamma": _digamma,
}


def reward_counts(rewards: Tensor, reference_rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Count the reference rewards below, and at or below, each reward.

    Sorts and bisects, so memory stays ``O(B (G + M))``. Values are only compared, which makes the counts
    exact under any strictly increasing map of the rewards.

    Args:
        rewards: ``[B, G]``.
        reference_rewards: ``[B, M]``.

    Returns:
        ``(k_lt, k_le)``, each ``[B, G]`` long.
    """
    common = torch.promote_types(torch.promote_types(rewards.dtype, reference_rewards.dtype), torch.float32)
    ordered = reference_rewards.to(common).sort(-1).values
    values = rewards.to(common).contiguous()
    return torch.searchsorted(ordered, values), torch.searchsorted(ordered, values, right=True)


def check_rewards_pair(rewards: Tensor, reference_rewards: Tensor) -> None:
    """Raise unless ``rewards [B, G]`` and ``reference_rewards [B, M]`` fit together."""
    check_float("rewards", rewards)
    check_float("reference_rewards", reference_rewards)
    check_dims("rewards", rewards, 2, "[B, G]")
    check_dims("reference_rewards", reference_rewards, 2, "[B, M]")
    if rewards.shape[0] != reference_rewards.shape[0]:
        raise ValueError(
            "rewards [B, G] and reference_rewards [B, M] must agree on B, "
            f"got {list(rewards.shape)} and {list(reference_rewards.shape)}"
        )
    if reference_rewards.shape[1] == 0:
        raise ValueError("reference_rewards must hold at least one sample a prompt, got M = 0")


class OtherCounts(NamedTuple):
    """How many of the other reference rewards lie below, and at or below, each reward."""

    below: Tensor
    """``[B, G]`` float64 (float32 on MPS), NaN where it is not known."""
    at_or_below: Tensor
    """``[B, G]``, likewise."""
    samples: int
    """How many others there are."""


def counts_of_others(rewards: Tensor, reference_rewards: Tensor, *, included: bool) -> OtherCounts:
    """Count the reference rewards below, and at or below, each reward, its own left out.

    Args:
        rewards: ``[B, G]``.
        reference_rewards: ``[B, M]``.
        included: whether each of the rewards is one of the M of its row.

    Returns:
        :class:`OtherCounts`; NaN for a NaN reward, or a row of reference rewards that holds one.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: on shapes that do not fit, or if there is no other.
    """
    check_rewards_pair(rewards, reference_rewards)
    own = int(included)
    samples = reference_rewards.shape[1] - own
    if samples < 1:
        raise ValueError("reference_rewards must hold another sample beside the response itself, got M = 1")
    unknown = rewards.isnan() | reference_rewards.isnan().any(-1, keepdim=True)
    counts = [count.to(working_dtype(rewards)) for count in reward_counts(rewards, reference_rewards)]
    below, at_or_below = (count.masked_fill(unknown, torch.nan) for count in (counts[0], counts[1] - own))
    return OtherCounts(below, at_or_below, samples)


@torch.no_grad()
def reward_cdf(rewards: Tensor, reference_rewards: Tensor, *, estimator: str = "jeffreys") -> RewardCDF:
    """Estimate the log of the reference's reward CDF at each reward, from M reference rewards a prompt.

    With ``k`` the number of reference rewards below (for F_lt) or at or below (for F_le) the reward:

    - ``"jeffreys"``: ``(k + 1/2) / (M + 1)``, the smallest bias of log F of the four;
    - ``"add_one"``: ``min(1, (k + 1) / (M + 1))``, as in variational Best-of-N,
    https://arxiv.org/abs/2407.06057;
    - ``"laplace"``: ``(k + 1) / (M + 2)``;
    - ``"digamma"``: ``log F = psi(k + 1/2) - psi(M + 1)``, the posterior mean of log F under Jeffreys' prior.

    Only the ranks matter. A NaN reward, or a row of reference rewards that holds one, gives NaN rather than a
    rank.

    Args:
        rewards: ``[B, G]`` rewards of the samples to place.
        reference_rewards: ``[B, M]`` rewards of reference samples for the same prompts.
        estimator: the name of an estimator.

    Returns:
        :class:`RewardCDF` of two ``[B, G]`` tensors in the dtype of ``rewards``, finite and at most 0.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: on shapes that do not fit, M = 0 or an unknown estimator.
    """
    check_rewards_pair(rewards, reference_rewards)
    if estimator not in CDF_ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(CDF_ESTIMATORS)}, got {estimator!r}")
    estimate = CDF_ESTIMATORS[estimator]
    m = reference_rewards.shape[1]
    unknown = rewards.isnan() | reference_rewards.isnan().any(-1, keepdim=True)
    logs = [
        estimate(count.to(working_dtype(rewards)), m).masked_fill(unknown, torch.nan).to(rewards.dtype)
        for count in reward_counts(rewards, reference_rewards)
    ]
    return RewardCDF(log_below=logs[0], log_at_or_below=logs[1])


@torch.no_grad()
def mixed_log_cdf(log_cdf: Tensor, prior: Tensor, *, samples: int, prior_samples: float) -> Tensor:
    """Mix a CDF that was estimated from M samples with one that is predicted: ``(M F + c F_prior) / (M + c)``.

    The posterior mean of a distribution function under a Dirichlet process of concentration c around the prediction
    (Ferguson, 1973), but for what the estimator of F itself adds to the counts.

    Args:
        log_cdf: log F, any shape.
        prior: log of the predicted F at the same rewards.
        samples: M.
        prior_samples: c, how many samples the prediction counts for; 0 for none.

    Returns:
        The log of the mixture, shaped as ``log_cdf``.

    Raises:
        ValueError: if ``samples < 1``, ``prior_samples < 0`` or the shapes differ.
    """
    check_real("samples", samples, at_least=1)
    check_real("prior_samples", prior_samples, at_least=0.0)
    check_same_shape("prior", prior, "log_cdf", log_cdf)
    if prior_samples == 0:
        return log_cdf
    whole = samples + prior_samples
    mixed = torch.logaddexp(log_cdf + math.log(samples / whole), prior.to(log_cdf) + math.log(prior_samples / whole))
    return mixed.clamp(max=0.0)
