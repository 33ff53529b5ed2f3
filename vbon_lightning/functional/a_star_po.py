"""A*-PO: regression on the optimal advantage, the optimal value being known from reference responses.

K. Brantley, M. Chen, Z. Gao, J. D. Lee, W. Sun, W. Zhan, X. Zhang, "Accelerating RL for LLM Reasoning with Optimal
Advantage Regression", 2025, https://arxiv.org/abs/2505.20686.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vbon_lightning.functional._validate import check_dims, check_float, check_real, check_shape, working_dtype
from vbon_lightning.functional.log_ratio_regression import RegressionLoss, log_ratio_regression


@torch.no_grad()
def optimal_value(reference_rewards: Tensor, *, beta: float) -> Tensor:
    """Estimate the value of KL-constrained RL's optimum, ``V* = beta log E_ref[exp(r / beta)]``, from M rewards.

    ``beta`` times the log of the mean of ``exp(r / beta)``; https://arxiv.org/abs/2505.20686. The mean is unbiased, its
    logarithm too low (Jensen), the more, the smaller beta is to the spread of the rewards: never above the highest of
    the M. It falls from there to their mean as beta grows.

    Args:
        reference_rewards: ``[B, M]``.
        beta: the temperature, > 0.

    Returns:
        ``[B]`` in the dtype of ``reference_rewards``; NaN for a row that holds a NaN.

    Raises:
        TypeError: on a wrong dtype or a ``beta`` that is not a number.
        ValueError: on a wrong shape, M = 0 or ``beta <= 0``.
    """
    check_real("beta", beta, above=0.0)
    check_float("reference_rewards", reference_rewards)
    check_dims("reference_rewards", reference_rewards, 2, "[B, M]")
    samples = reference_rewards.shape[1]
    if samples == 0:
        raise ValueError("reference_rewards must hold at least one sample a prompt, got M = 0")
    scaled = reference_rewards.to(working_dtype(reference_rewards)) / beta
    return (beta * (scaled.logsumexp(-1) - math.log(samples))).to(reference_rewards.dtype)


def a_star_po_loss(
    log_ratio: Tensor, rewards: Tensor, values: Tensor, *, beta: float, learnt: Tensor | None = None
) -> RegressionLoss:
    """Compute A*-PO's loss, ``mean (beta D - (r - V*))^2``.

    With V* of the same beta its minimum is the optimum of ``E[r] - beta KL(policy || reference)``. On responses of the
    policy itself the expected gradient is ``-2 beta`` times that of this objective for any V*, a baseline there: V* of
    another temperature changes the noise of the update, and not where it leads. https://arxiv.org/abs/2505.20686.

    Args:
        log_ratio: ``[B, G]``, D of each response, differentiable.
        rewards: ``[B, G]``.
        values: ``[B]``, V* of each prompt.
        beta: weight of the KL to the reference, > 0.
        learnt: ``[B, G]`` bool: False for responses that are left out. None for all.

    Returns:
        :class:`~vbon_lightning.functional.RegressionLoss`.

    Raises:
        TypeError: on a wrong dtype or a ``beta`` that is not a number.
        ValueError: if the shapes do not fit or ``beta <= 0``.
    """
    check_real("beta", beta, above=0.0)
    check_float("rewards", rewards)
    check_float("values", values)
    check_dims("rewards", rewards, 2, "[B, G]")
    check_shape("values", values, rewards.shape[:1], "[B]")
    goal = (rewards - values.unsqueeze(-1)) / beta
    return log_ratio_regression(log_ratio, goal, scale=beta, learnt=learnt)
