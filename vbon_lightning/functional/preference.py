"""Losses on the best and the worst of N responses.

``D = log pi(y) - log ref(y)`` is the log-ratio of a whole response, summed over its tokens. Every loss averages over
pairs, so that equal shares of a batch on several processes average to the loss of the whole batch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from vbon_lightning.functional._validate import check_float, check_mask, check_real, check_same_shape
from vbon_lightning.functional.reward_cdf import reward_counts


class PreferenceLoss(NamedTuple):
    """A loss on pairs of responses, and what to watch; only the loss has a gradient."""

    loss: Tensor
    """A scalar, averaged over pairs."""
    accuracy: Tensor
    """A scalar: the share of pairs whose better response has the higher log-ratio, equal ones counted one half."""
    margin: Tensor
    """A scalar: the mean difference of the implicit rewards, ``beta (D_best - D_worst)``."""


def dpo_loss(
    best_log_ratio: Tensor, worst_log_ratio: Tensor, *, beta: float, told_apart: Tensor | None = None
) -> PreferenceLoss:
    """Compute the loss of direct preference optimisation, ``-mean log sigmoid(beta (D_best - D_worst))``.

    ``beta D`` is the implicit reward. Where preferences follow a Bradley-Terry model of a reward r, the optimum is that
    of KL-constrained RL, ``ref exp(r / beta) / Z``; the best and the worst of N by a deterministic reward have no such
    optimum, and the log-ratios grow for as long as one trains. https://arxiv.org/abs/2305.18290.

    Args:
        best_log_ratio: any shape, D of the better responses, differentiable.
        worst_log_ratio: the same shape, D of the worse ones.
        beta: weight of the KL to the reference that the implicit reward stands for, > 0.
        told_apart: the same shape, bool: False for pairs of equal rewards, of which nothing is to be learnt; they count
            nowhere but in the number of pairs. None for all.

    Returns:
        :class:`PreferenceLoss`.

    Raises:
        TypeError: on a wrong dtype or a ``beta`` that is not a number.
        ValueError: if the shapes differ or ``beta <= 0``.
    """
    check_real("beta", beta, above=0.0)
    gap = _gap(best_log_ratio, worst_log_ratio)
    return _with_diagnostics(_mean_of(-logsigmoid(beta * gap), told_apart), gap, beta, told_apart)


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


class BonbonGap(NamedTuple):
    """How far Best-of-n tells the best and the worst of n apart, on average."""

    mean: Tensor
    """``[B]`` float64: mean difference of ``log pi_bon/ref``, groups whose rewards all tie counted with 0."""
    tied: Tensor
    """``[B]`` float64: the share of groups whose rewards all tie."""

    @property
    def told_apart(self) -> Tensor:
        """``[B]`` float64: the mean difference over groups that do not tie; 0 where all do."""
        return torch.where(self.tied < 1, self.mean / (1 - self.tied), 0.0)


def bonbon_gap(reference_rewards: Tensor, *, n: int) -> BonbonGap:
    """Compute BoNBoN's regression goal for rewards that may tie.

    Without ties the mean difference is ``1 / (2 beta_n)`` of :func:`bonbon_beta`, whatever the rewards. Rewards of M
    reference responses that tie are a level of the reward, and its log-ratio is ``log((F_le^n - F_lt^n) / (F_le -
    F_lt))``; one that ties with none stands for the continuous reward between its neighbours.

    Args:
        reference_rewards: ``[B, M]``, rewards of reference responses.
        n: number of samples of Best-of-N, an integer > 1.

    Returns:
        :class:`BonbonGap`.

    Raises:
        TypeError: on a wrong dtype or if ``n`` is not an integer.
        ValueError: if ``n <= 1``.
    """
    bonbon_beta(n)  # checks n
    check_float("reference_rewards", reference_rewards)
    samples = reference_rewards.shape[1]
    below, at_or_below = (count.double() for count in reward_counts(reference_rewards, reference_rewards))
    ties, low, high = at_or_below - below, below / samples, at_or_below / samples
    best, worst = high**n - low**n, (1 - low) ** n - (1 - high) ** n
    level = (best - worst) * (best / (high - low)).log()
    single = _of_continuous(high, n) - _of_continuous(low, n)
    tied = torch.where(ties > 1, (high - low) ** n, 0.0)
    # Every response of a level brings the level's term.
    mean = (torch.where(ties > 1, level, single) / ties).sum(-1)
    return BonbonGap(mean, (tied / ties).sum(-1))


def _of_continuous(u: Tensor, n: int) -> Tensor:
    """Integrate the densities of best less worst, times log n + (n - 1) log F, from F = 0 to u."""
    log_u, rest = u.clamp(min=1e-300).log(), 1 - u
    best = u**n * log_u - u**n / n
    harmonic = sum((1 - rest**k) / k for k in range(1, n + 1))
    worst = (1 - rest**n) * log_u - harmonic
    return (u**n - 1 + rest**n) * math.log(n) + (n - 1) * (best - worst)


def bonbon_loss(
    best_log_prob: Tensor,
    best_log_ratio: Tensor,
    worst_log_ratio: Tensor,
    *,
    n: int,
    alpha: float = 0.005,
    goal: Tensor | None = None,
    told_apart: Tensor | None = None,
) -> PreferenceLoss:
    """Compute the loss of BoNBoN alignment, cross-entropy on the best of n and a regression on the pair.

    ``alpha mean(-log pi(y_best)) + (1 - alpha) mean((D_best - D_worst - 1 / (2 beta_n))^2)`` with :func:`bonbon_beta`,
    https://arxiv.org/abs/2406.00832, which takes rewards never to tie; ``goal`` and ``told_apart`` are for such as do.

    Args:
        best_log_prob: any shape, log pi of the best responses, differentiable.
        best_log_ratio: the same shape, D of the best responses, differentiable.
        worst_log_ratio: the same shape, D of the worst ones.
        n: number of samples of Best-of-N, an integer > 1.
        alpha: weight of the cross-entropy, in [0, 1].
        goal: what the regression is towards in place of ``1 / (2 beta_n)``, broadcast against the pairs
            (:attr:`BonbonGap.told_apart`).
        told_apart: the same shape as the pairs, bool: False for those of equal rewards, which are not regressed on.

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
    regression = _mean_of((gap - (1 / (2 * beta) if goal is None else goal)).square(), told_apart)
    return _with_diagnostics(-alpha * best_log_prob.mean() + (1 - alpha) * regression, gap, beta, told_apart)


def _gap(best_log_ratio: Tensor, worst_log_ratio: Tensor) -> Tensor:
    check_float("best_log_ratio", best_log_ratio)
    check_float("worst_log_ratio", worst_log_ratio)
    check_same_shape("worst_log_ratio", worst_log_ratio, "best_log_ratio", best_log_ratio)
    return best_log_ratio - worst_log_ratio


def _mean_of(losses: Tensor, told_apart: Tensor | None) -> Tensor:
    """Return the mean over all pairs, those that tell nothing counted with 0: shares of a batch then average."""
    if told_apart is None:
        return losses.mean()
    check_mask("told_apart", told_apart)
    check_same_shape("told_apart", told_apart, "best_log_ratio", losses)
    return torch.where(told_apart, losses, 0.0).mean()


def _with_diagnostics(loss: Tensor, gap: Tensor, beta: float, told_apart: Tensor | None) -> PreferenceLoss:
    gap = gap.detach()
    kept = torch.ones_like(gap) if told_apart is None else told_apart.to(gap.dtype)
    count = kept.sum().clamp(min=1)
    right = (torch.sign(gap) + 1) / 2
    return PreferenceLoss(loss, accuracy=(kept * right).sum() / count, margin=beta * (kept * gap).sum() / count)
