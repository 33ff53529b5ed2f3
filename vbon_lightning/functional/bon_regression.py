"""Regression on Best-of-N's own log-ratio to the reference, which needs no normaliser: Z = 1 for every N.

QRPO with the Best-of-N weight in place of ``exp(q / beta) / Z``; what Best-of-N is with ties:
:mod:`vbon_lightning.functional.best_of_n`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vbon_lightning.functional._validate import check_real
from vbon_lightning.functional.best_of_n import bon_log_ratio
from vbon_lightning.functional.log_ratio_regression import RegressionLoss, log_ratio_regression
from vbon_lightning.functional.reward_cdf import RewardCDF, counts_of_others


@torch.no_grad()
def pooled_reward_cdf(rewards: Tensor, reference_rewards: Tensor, *, included: bool = False) -> RewardCDF:
    """Estimate log F_lt and log F_le at each reward from a pool of reference rewards, its own among them.

    With k of the other m rewards below, and l at or below, ``F_lt = k / (m + 1)`` and ``F_le = (l + 1) / (m + 1)``.
    Over the responses of a pool the Best-of-N weights ``(F_le^n - F_lt^n) / (F_le - F_lt)`` then have mean 1 exactly,
    for every n, M and pattern of ties: what is learnt from a table is Best-of-N of the table, drawn with replacement.

    Args:
        rewards: ``[B, G]``.
        reference_rewards: ``[B, M]``.
        included: whether each response is one of the M; if not, it joins them.

    Returns:
        :class:`~vbon_lightning.functional.RewardCDF` in the dtype of ``rewards``; log F_lt is ``-inf`` for the lowest
        reward of its pool. NaN for a NaN reward, or a row of reference rewards that holds one.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: on shapes that do not fit, or if there is no other reference reward.
    """
    others = counts_of_others(rewards, reference_rewards, included=included)
    shares = (others.below / (others.samples + 1), (others.at_or_below + 1) / (others.samples + 1))
    return RewardCDF(*(share.log().to(rewards.dtype) for share in shares))


def bon_regression_loss(
    log_ratio: Tensor,
    cdf: RewardCDF,
    *,
    n: float,
    log_ratio_floor: float | None = None,
    learnt: Tensor | None = None,
) -> RegressionLoss:
    """Compute the loss of the Best-of-N regression, ``mean (D - log w_n)^2``.

    ``w_n = (F_le^n - F_lt^n) / (F_le - F_lt)`` is Best-of-N's probability ratio to the reference, ties included, and
    its mean under the reference is 1 for every n: the minimum is Best-of-N's distribution. On responses of the policy
    itself the expected gradient is twice that of ``KL(policy || Best-of-N)``, variational Best-of-N's.

    A logarithm of estimated quantiles has no unbiased estimate: for the worst responses ``log w_n`` falls without end,
    and M rewards tell of no quantile below some ``1 / M``. Their goals are too high on average, and so noisy that they
    outweigh the others. A floor of -L ends that tail; what then is regressed on is ``max(w_n, exp(-L))``, whose mean
    under the reference is at most ``exp(-L)`` above 1.

    Args:
        log_ratio: ``[B, G]``, D of each response, differentiable.
        cdf: ``[B, G]`` log F_lt and log F_le at each response's reward.
        n: number of samples of Best-of-N, any real > 1.
        log_ratio_floor: negative nats to which lower goals are raised; None for none.
        learnt: ``[B, G]`` bool: False for responses that are left out. None for all.

    Returns:
        :class:`~vbon_lightning.functional.RegressionLoss`.

    Raises:
        TypeError: on a wrong dtype, or an ``n`` or floor that is not a number.
        ValueError: if the shapes differ, ``n <= 1`` or the floor is not negative.
    """
    check_real("n", n, above=1.0)
    # What the level of a reward holds is all in the CDF: nothing is added for the response's own probability.
    none = torch.full_like(cdf.log_below, -torch.inf)
    goal = bon_log_ratio(none, cdf.log_below, n=n, log_at_or_below=cdf.log_at_or_below)
    if log_ratio_floor is not None:
        check_real("log_ratio_floor", log_ratio_floor, below=0.0)
        goal = goal.clamp(min=log_ratio_floor)
    return log_ratio_regression(log_ratio, goal, learnt=learnt)
