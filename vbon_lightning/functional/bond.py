"""The target of BOND: Best-of-N Distillation."""

from __future__ import annotations

import torch
from torch import Tensor

from vbon_lightning.functional._validate import check_float, check_same_shape
from vbon_lightning.functional.best_of_n import kl_weight
from vbon_lightning.functional.reward_cdf import RewardCDF
from vbon_lightning.functional.targets import Target, vbon_target


@torch.no_grad()
def bond_target(log_anchor: Tensor, cdf: RewardCDF, *, n: float, second_term: bool = True) -> Target:
    """Build the target of BOND's backward KL, with ``r = log F_le + 1/(n-1) log sum_{i=1..n} (F_lt/F_le)^{i-1}``.

    The KL coefficient is ``1/(n-1)``, the reference the anchor. With both terms ``(n-1) r`` is the log-ratio of
    Best-of-N to the anchor, ties included, so that this is :func:`~vbon_lightning.functional.vbon_target`, and the
    optimum Best-of-N of the anchor. Without the second, which lies between 0 and ``log(n)/(n-1)`` and is left out in
    practice, the optimum is ``anchor F_le^(n-1)``, normalised: the same where rewards do not tie and each response is
    rare.

    Sessa, Dadashi, Hussenot et al., "BOND: Aligning LLMs with Best-of-N Distillation", 2024, its reward by
    quantiles; https://arxiv.org/abs/2407.14622.

    Args:
        log_anchor: ``[B, G]``, log-probability of each response under the anchor.
        cdf: ``[B, G]``, log F_lt and log F_le of the anchor's rewards at each response's reward.
        n: N of Best-of-N, any real > 1.
        second_term: Whether to keep the second term.

    Returns:
        :class:`~vbon_lightning.functional.Target` with ``kl_coef = 1 / (n - 1)``.

    Raises:
        TypeError: on a wrong dtype or an ``n`` that is not a number.
        ValueError: if the shapes differ or ``n <= 1``.
    """
    check_float("log_anchor", log_anchor)
    if second_term:
        return vbon_target(log_anchor, cdf, n=n)
    check_float("cdf.log_at_or_below", cdf.log_at_or_below)
    check_same_shape("cdf.log_at_or_below", cdf.log_at_or_below, "log_anchor", log_anchor)
    return Target(score=cdf.log_at_or_below.clamp(max=0.0), kl_coef=kl_weight(n))
