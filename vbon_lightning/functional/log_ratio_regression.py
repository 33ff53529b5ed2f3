"""What QRPO, A*-PO and the Best-of-N regression share: least squares on the log-ratio of a response.

A target ``pi*`` whose normaliser is known says the log-ratio ``D*(y) = log pi*(y) - log ref(y)`` of every response, and
regressing ``D = log pi - log ref`` on it needs no pairs, no baseline and no sampling:

    L = E_{y ~ mu}[(D(y) - D*(y))^2],

whose minimum is ``pi*`` for whatever distribution mu of responses covers them all. Under the policy itself (samples
taken as they are: no gradient through the sampling) the expected gradient is ``2 grad KL(pi || pi*)``, for ``E_pi[grad
log pi] = 0``: that of a policy gradient with the exact normaliser as its baseline.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vbon_lightning.functional._validate import check_float, check_mask, check_real, check_same_shape


class RegressionLoss(NamedTuple):
    """A loss on responses, and what to watch; only the loss has a gradient."""

    loss: Tensor
    """A scalar, averaged over the responses that are learnt."""
    log_ratio: Tensor
    """A scalar: their mean log-ratio ``D`` of policy to reference, in nats."""
    goal: Tensor
    """A scalar: the mean ``D*`` that it is to come to."""


def log_ratio_regression(
    log_ratio: Tensor, goal: Tensor, *, scale: float = 1.0, learnt: Tensor | None = None
) -> RegressionLoss:
    """Compute ``mean (scale (D - D*))^2``.

    Args:
        log_ratio: any shape, D of each response, summed over its tokens, differentiable.
        goal: the same shape, ``D*``; no gradient flows to it.
        scale: weight of a nat, > 0: the temperature of a method that regresses rewards.
        learnt: the same shape, bool: False for responses that are left out, whatever their goal. None for all.

    Returns:
        :class:`RegressionLoss`, in the dtype of ``log_ratio``; zeros where nothing is learnt.

    Raises:
        TypeError: on a wrong dtype or a ``scale`` that is not a number.
        ValueError: if the shapes differ or ``scale <= 0``.
    """
    check_real("scale", scale, above=0.0)
    check_float("log_ratio", log_ratio)
    check_float("goal", goal)
    check_same_shape("goal", goal, "log_ratio", log_ratio)
    goal = goal.detach().to(log_ratio.dtype)
    if learnt is None:
        learnt = torch.ones_like(goal, dtype=torch.bool)
    check_mask("learnt", learnt)
    check_same_shape("learnt", learnt, "log_ratio", log_ratio)
    # Left out before anything is computed: the gradient of a NaN is NaN, also times zero.
    log_ratio, goal = torch.where(learnt, log_ratio, 0.0), torch.where(learnt, goal, 0.0)
    count = learnt.sum().clamp(min=1)
    squares = (scale * (log_ratio - goal)).square()
    return RegressionLoss(squares.sum() / count, log_ratio.detach().sum() / count, goal.sum() / count)
