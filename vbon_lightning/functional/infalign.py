"""InfAlign's calibrated and transformed reward, for a policy that Best-of-N or worst-of-N is to decode."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from vbon_lightning.functional._validate import check_float, check_real, check_same_shape, working_dtype
from vbon_lightning.functional.reward_cdf import RewardCDF
from vbon_lightning.functional.targets import Target

InfAlignTransform = Literal["exp", "log"]
InfAlignTies = Literal["middle", "average", "below"]


def infalign_slope(n: float) -> float:
    r"""Derive t of the transform ``exp(t u)`` for Best-of-n: ``2 n - 1``.

    Let the policy's quantiles have the distribution function Q, those of the reference being uniform. Then Best-of-n of
    the policy beats Best-of-n of the reference with probability ``W = 1 - int n u^{n-1} Q(u)^n du``, whose derivative
    in the policy's density at u is, up to a constant, ``n^2 int_0^u v^{n-1} Q(v)^{n-1} dv``: the reward that a step of
    KL-regularised RL should see. At the reference, Q(v) = v, it is ``u^{2n-1}`` times a constant. Of that the
    exponential with the same slope at the top, in units of its value there, has t = 2n - 1: 7 at n = 4. (Where the
    policy is a Best-of-m of the reference already, Q(v) = v^m, the exponent is ``(n - 1)(m + 1) + 1``: 10 at n = 4 and
    m = 2.) A derivation of this package's: the paper is quoted with t of about 10 at n = 4, not with a rule.

    Args:
        n: n of Best-of-n, or of worst-of-n, at least 1.

    Raises:
        TypeError: if ``n`` is not a number.
        ValueError: if ``n < 1``.
    """
    check_real("n", n, at_least=1.0)
    return 2.0 * n - 1.0


@torch.no_grad()
def infalign_target(
    cdf: RewardCDF,
    *,
    beta: float,
    transform: InfAlignTransform = "exp",
    slope: float = 7.0,
    ties: InfAlignTies = "middle",
) -> Target:
    r"""Build the target of InfAlign-CTRL, ``max E[Phi(u)] - beta KL(policy || reference)``, u the reward's quantile.

    Calibrate and transform: u is the quantile of the reward under the reference, and ``Phi(u)`` one of

    - ``exp`` with a positive slope t, for Best-of-N: ``exp(-t (1 - u))``, which is ``exp(t u)`` in units of its largest
      value, so that no t overflows; the weight of the KL that belongs to ``exp(t u)`` itself is ``exp(t) beta``;
    - ``exp`` with a negative slope, for worst-of-N: ``-exp(t u)``, its mirror image: steep at the bottom;
    - ``log``: ``log u``, which with beta = 1 / (N - 1) and ``ties="below"`` is the lower bound of variational
      Best-of-N (:func:`vbon_target`), up to a constant that no gradient sees. With the other ``ties`` it is so where
      ``F_lt = F_le``, and above it elsewhere.

    Balashankar, Sun, Berant, Eisenstein, Collins, Hutter, Lee, Nagpal, Prost, Sinha, Suresh and Beirami, "InfAlign:
    Inference-aware language model alignment", 2025, https://arxiv.org/abs/2412.19792.

    Where rewards tie the quantile is anywhere between F_lt and F_le. ``middle`` takes the middle, a tie counting half a
    win. ``average`` takes the mean of Phi over the interval: the expectation of Phi where the quantile is drawn from
    it, which makes quantiles of the reference uniform; drawing them would add noise to the same gradient. Its mean
    under the reference is ``int_0^1 Phi``, whatever ties. ``below`` takes F_lt.

    Args:
        cdf: ``[B, G]`` log F_lt and log F_le at each response's reward.
        beta: the KL coefficient, greater than 0.
        transform: ``exp`` or ``log``.
        slope: t of ``exp``, any number but 0; :func:`infalign_slope` derives one from N.
        ties: ``middle``, ``average`` or ``below``.

    Returns:
        :class:`Target` with the transformed quantiles as score.

    Raises:
        TypeError: on a wrong dtype, or numbers that are none.
        ValueError: if shapes differ, ``beta <= 0``, ``slope`` is 0, or ``transform`` or ``ties`` is unknown.
    """
    check_float("cdf.log_below", cdf.log_below)
    check_float("cdf.log_at_or_below", cdf.log_at_or_below)
    check_same_shape("cdf.log_at_or_below", cdf.log_at_or_below, "cdf.log_below", cdf.log_below)
    check_real("beta", beta, above=0.0)
    check_real("slope", slope)
    if slope == 0:
        raise ValueError("slope must not be 0: exp(0 u) is the same for all rewards")
    for name, value, known in (
        ("transform", transform, get_args(InfAlignTransform)),
        ("ties", ties, get_args(InfAlignTies)),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    low, high = cdf.log_below, cdf.log_at_or_below
    if ties == "below":
        high = low
    elif ties == "middle":
        low = high = torch.logaddexp(low, high) - torch.log(torch.full_like(low, 2.0))
    score = _mean_log(low, high) if transform == "log" else _mean_exp(low.exp(), high.exp(), slope)
    return Target(score=score, kl_coef=beta)


def _mean_log(low: Tensor, high: Tensor) -> Tensor:
    """Return the mean of log u for u from exp(low) to exp(high): ``high + h / expm1(h) - 1``, h their distance."""
    width = (high - low).to(working_dtype(high))
    share = torch.where(width > 0, width / torch.expm1(width), 1.0)  # 0 where low is log 0
    return high + torch.where(width.isposinf(), 0.0, share).to(high.dtype) - 1


def _mean_exp(low: Tensor, high: Tensor, slope: float) -> Tensor:
    """Return the mean of ``exp(-t (1 - u))``, or of ``-exp(t u)`` for a negative t, for u from low to high."""
    width = abs(slope) * (high - low)
    share = torch.where(width > 0, -torch.expm1(-width) / width, 1.0)
    return torch.exp(-slope * (1 - high)) * share if slope > 0 else -torch.exp(slope * low) * share
