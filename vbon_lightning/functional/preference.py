"""Losses on the best and the worst of N responses.

``D = log pi(y) - log ref(y)`` is the log-ratio of a whole response, summed over its tokens. Every loss averages over
pairs, so that equal shares of a batch on several processes average to the loss of the whole batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from vbon_lightning.functional._validate import check_float, check_real, check_same_shape


class PreferenceLoss(NamedTuple):
    """A loss on pairs of responses, and what to watch; only the loss has a gradient."""

    loss: Tensor
    """A scalar, averaged over pairs."""
    accuracy: Tensor
    """A scalar: the share of pairs whose better response has the higher log-ratio, equal ones counted one half."""
    margin: Tensor
    """A scalar: the mean difference of the implicit rewards, ``beta (D_best - D_worst)``."""


def dpo_loss(best_log_ratio: Tensor, worst_log_ratio: Tensor, *, beta: float) -> PreferenceLoss:
    """Compute the loss of direct preference optimisation, ``-mean log sigmoid(beta (D_best - D_worst))``.

    ``beta D`` is the implicit reward. Where preferences follow a Bradley-Terry model of a reward r, the optimum is that
    of KL-constrained RL, ``ref exp(r / beta) / Z``; the best and the worst of N by a deterministic reward have no such
    optimum, and the log-ratios grow for as long as one trains. https://arxiv.org/abs/2305.18290.

    Args:
        best_log_ratio: any shape, D of the better responses, differentiable.
        worst_log_ratio: the same shape, D of the worse ones.
        beta: weight of the KL to the reference that the implicit reward stands for, > 0.

    Returns:
        :class:`PreferenceLoss`.

    Raises:
        TypeError: on a wrong dtype or a ``beta`` that is not a number.
        ValueError: if the shapes differ or ``beta <= 0``.
    """
    check_real("beta", beta, above=0.0)
    gap = _gap(best_log_ratio, worst_log_ratio)
    return _with_diagnostics(-logsigmoid(beta * gap).mean(), gap, beta)


def bonbon_beta(n: int) -> float:
    """Compute the beta of BoNBoN, ``1 / (2 (n - 1) sum_{k=1..n-1} 1/k)``.

    ``1 / (2 beta)`` is the mean difference of ``log pi_bon/ref`` between the best and the worst of n, for a continuous
    reward: there ``log pi_bon/ref = log n + (n - 1) log F``, and log F is -1/n at the best of n and ``-sum_{k=1..n}
    1/k`` at the worst, on average. https://arxiv.org/abs/2406.00832.

    Args:
        n: number of samples of Best-of-N, an integer > 1.

    Returns:
        beta, > 0.

    Raises:
        TypeError: if ``n`` is not an integer.
        ValueError: if ``n <= 1``.
    """
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"n counts samples here and must be an integer, got {n!r} of type {type(n).__name__}")
    check_real("n", n, above=1.0)
    return 1 / (2 * (n - 1) * sum(1 / k for k in range(1, n)))


def bonbon_loss(
    best_log_prob: Tensor, best_log_ratio: Tensor, worst_log_ratio: Tensor, *, n: int, alpha: float = 0.005
) -> PreferenceLoss:
    """Compute the loss of BoNBoN alignment, cross-entropy on the best of n and a regression on the pair.

    ``alpha mean(-log pi(y_best)) + (1 - alpha) mean((D_best - D_worst - 1 / (2 beta_n))^2)`` with :func:`bonbon_beta`;
    https://arxiv.org/abs/2406.00832.

    Args:
        best_log_prob: any shape, log pi of the best responses, differentiable.
        best_log_ratio: the same shape, D of the best responses, differentiable.
        worst_log_ratio: the same shape, D of the worst ones.
        n: number of samples of Best-of-N, an integer > 1.
        alpha: weight of the cross-entropy, in [0, 1].

    Returns:
        :class:`PreferenceLoss`, its margin in units of ``beta_n``: 1/2 where the regression is met on average.

    Raises:
        TypeError: on a wrong dtype, an ``n`` that is not an integer or an ``alpha`` that is not a number.
        ValueError: if the shapes differ, ``n <= 1`` or ``alpha`` is not in [0, 1].
    """
    beta = bonbon_beta(n)
    check_real("alpha", alpha, at_least=0.0, at_most=1.0)
    gap = _gap(best_log_ratio, worst_log_ratio)
    check_float("best_log_prob", best_log_prob)
    check_same_shape("best_log_prob", best_log_prob, "best_log_ratio", best_log_ratio)
    regression = (gap - 1 / (2 * beta)).square().mean()
    return _with_diagnostics(-alpha * best_log_prob.mean() + (1 - alpha) * regression, gap, beta)


def _gap(best_log_ratio: Tensor, worst_log_ratio: Tensor) -> Tensor:
    check_float("best_log_ratio", best_log_ratio)
    check_float("worst_log_ratio", worst_log_ratio)
    check_same_shape("worst_log_ratio", worst_log_ratio, "best_log_ratio", best_log_ratio)
    return best_log_ratio - worst_log_ratio


def _with_diagnostics(loss: Tensor, gap: Tensor, beta: float) -> PreferenceLoss:
    gap = gap.detach()
    return PreferenceLoss(loss=loss, accuracy=((torch.sign(gap) + 1) / 2).mean(), margin=beta * gap.mean())
