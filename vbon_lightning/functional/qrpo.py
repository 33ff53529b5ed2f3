"""Quantile Reward Policy Optimization: regression on the quantile of the reward, whose normaliser is known.

S. Matrenok, S. Moalla, C. Gulcehre, "Quantile Reward Policy Optimization: Alignment with Pointwise Regression and Exact
Partition Functions", 2025, https://arxiv.org/abs/2507.08068.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vbon_lightning.functional._validate import check_float, check_real, check_same_shape, working_dtype
from vbon_lightning.functional.log_ratio_regression import RegressionLoss, log_ratio_regression
from vbon_lightning.functional.reward_cdf import counts_of_others

Ties = Literal["exact", "upper", "mid"]


class Quantiles(NamedTuple):
    """Where the reward of each response lies among the reference's; the two differ where rewards tie."""

    below: Tensor
    """``[B, G]``: share of the reference's responses with a lower reward, ``F_lt``."""
    at_or_below: Tensor
    """``[B, G]``: share of those with a lower reward or the same, ``F_le``."""


@torch.no_grad()
def reward_quantiles(rewards: Tensor, reference_rewards: Tensor, *, included: bool = False) -> Quantiles:
    """Estimate the quantile of each reward under the reference, from M reference rewards a prompt.

    The share of the *other* reference rewards that are lower (or no higher): unbiased for ``F_lt`` and ``F_le`` of the
    response, whatever M. A regression on a noisy goal has its minimum at the goal's mean, so that an unbiased quantile
    leaves QRPO's optimum where it is. A response counted among the M by itself would not: its quantile would be
    ``(1 - F) / M`` too high on average.

    Args:
        rewards: ``[B, G]``.
        reference_rewards: ``[B, M]``.
        included: whether each response is one of the M: it then is left out, and the share is one of M - 1.

    Returns:
        :class:`Quantiles` in the dtype of ``rewards``, in [0, 1]; NaN for a NaN reward, or a row of reference rewards
        that holds one.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: on shapes that do not fit, or if there is no other reference reward.
    """
    others = counts_of_others(rewards, reference_rewards, included=included)
    return Quantiles(*((count / others.samples).to(rewards.dtype) for count in (others.below, others.at_or_below)))


def qrpo_log_partition(beta: float) -> float:
    """Compute ``log Z = log(beta (e^{1/beta} - 1))``, the log of ``E_ref[exp(q / beta)]``.

    The quantile q of a reward that does not tie is uniform in [0, 1] under the reference, whatever the reward and the
    prompt: eq. for ``Z_q`` of https://arxiv.org/abs/2507.08068. Written as ``1/beta + log(beta (1 - e^{-1/beta}))``,
    which does not overflow where beta is small.

    Args:
        beta: weight of the KL to the reference, > 0.

    Returns:
        log Z, between ``1 / (2 beta)`` and ``1 / beta``.

    Raises:
        TypeError: if ``beta`` is not a number.
        ValueError: if ``beta <= 0``.
    """
    check_real("beta", beta, above=0.0)
    return 1 / beta + math.log(-math.expm1(-1 / beta) * beta)


@torch.no_grad()
def qrpo_goal(quantiles: Quantiles, *, beta: float, ties: Ties = "exact") -> Tensor:
    """Compute the log-ratio of QRPO's optimum to the reference, ``q / beta - log Z``.

    Without ties ``q = F_le``. Responses of one reward share the quantiles from ``F_lt`` to ``F_le``, and

    - ``"exact"`` breaks the tie at random, as Best-of-N does: ``q = beta log mean exp(u / beta)`` over the u between
      the two, so that ``E_ref[exp(q / beta)] = Z`` holds with ties as well, and the goals are those of a distribution.
      A prompt whose rewards all tie has the goal 0: the reference. (Derived here.)
    - ``"upper"`` takes ``F_le``, as the paper defines q. Where rewards tie, Z is too low for it, and the goals are
      higher than those of any distribution: all responses of a prompt whose rewards tie are to become more likely.
    - ``"mid"`` takes the middle, ``(F_lt + F_le) / 2``. Z then is too high, by far less.

    Args:
        quantiles: ``F_lt`` and ``F_le`` of each response.
        beta: weight of the KL to the reference, > 0, in quantiles a nat.
        ties: what the quantile of rewards that tie is.

    Returns:
        The shape and dtype of the quantiles.

    Raises:
        TypeError: on a wrong dtype or a ``beta`` that is not a number.
        ValueError: if the shapes differ, ``beta <= 0`` or ``ties`` is unknown.
    """
    log_partition = qrpo_log_partition(beta)
    check_float("quantiles.below", quantiles.below)
    check_float("quantiles.at_or_below", quantiles.at_or_below)
    check_same_shape("quantiles.below", quantiles.below, "quantiles.at_or_below", quantiles.at_or_below)
    low, high = (part.to(working_dtype(part)) for part in quantiles)
    if ties == "exact":
        width = (high - low) / beta
        tied = width > 0
        safe = torch.where(tied, width, 1.0)
        scaled = high / beta + torch.where(tied, torch.log(-torch.expm1(-safe) / safe), 0.0)
    elif ties == "upper":
        scaled = high / beta
    elif ties == "mid":
        scaled = (low + high) / (2 * beta)
    else:
        raise ValueError(f"ties must be 'exact', 'upper' or 'mid', got {ties!r}")
    return (scaled - log_partition).to(quantiles.below.dtype)


def qrpo_loss(
    log_ratio: Tensor, quantiles: Quantiles, *, beta: float, ties: Ties = "exact", learnt: Tensor | None = None
) -> RegressionLoss:
    """Compute QRPO's loss, ``mean (q - beta log Z - beta D)^2``.

    Its minimum is ``ref exp(q / beta) / Z``, the optimum of ``E[q] - beta KL(policy || reference)``, where the goals
    are those of a distribution (:func:`qrpo_goal`); https://arxiv.org/abs/2507.08068.

    Args:
        log_ratio: ``[B, G]``, D of each response, differentiable.
        quantiles: ``[B, G]`` each, where their rewards lie among the reference's.
        beta: weight of the KL to the reference, > 0.
        ties: what the quantile of rewards that tie is.
        learnt: ``[B, G]`` bool: False for responses that are left out. None for all.

    Returns:
        :class:`~vbon_lightning.functional.RegressionLoss`.

    Raises:
        TypeError: on a wrong dtype or a ``beta`` that is not a number.
        ValueError: if the shapes differ, ``beta <= 0`` or ``ties`` is unknown.
    """
    return log_ratio_regression(log_ratio, qrpo_goal(quantiles, beta=beta, ties=ties), scale=beta, learnt=learnt)
