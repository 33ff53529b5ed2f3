"""Exact algebra of Best-of-N: distribution, bound, KL, win rate and order statistics.

Best-of-N draws N samples from a reference and returns the one with the highest reward, ties broken uniformly.
With ``a = F_lt``, ``b = F_le`` the reference's reward CDF at a response of reference probability ``p``,

    pi_bon(y) = p (b^n - a^n) / (b - a),

where ``b - a = p`` if no other response has the same reward. The formula makes sense for every real n > 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vbon_lightning.functional._validate import (
    check_count,
    check_dims,
    check_float,
    check_real,
    check_same_shape,
    working_dtype,
)
from vbon_lightning.functional.reward_cdf import check_rewards_pair, reward_counts

_LOG_HALF = -math.log(2.0)


def _log1mexp(x: Tensor) -> Tensor:
    """``log(1 - e^x)`` for x <= 0, accurate at both ends."""
    return torch.where(x > _LOG_HALF, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def log_mean_power(x: Tensor, n: float) -> Tensor:
    """``log((1 - e^{n x}) / (1 - e^x))`` for x <= 0: log n at x = 0, 0 at -inf."""
    tiny = max(n, 1.0) * x > -1e-8
    safe = torch.where(tiny, torch.full_like(x, -1.0), x)
    series = math.log(n) + (n - 1) / 2 * torch.where(tiny, x, torch.zeros_like(x))
    return torch.where(tiny, series, torch.log(torch.expm1(n * safe) / torch.expm1(safe)))


def _log_ratio(log_p: Tensor, log_a: Tensor, log_b: Tensor | None, n: float) -> Tensor:
    """``log((b^n - a^n) / (b - a))`` once the CDF agrees with p: ``a <= 1 - p`` and ``a + p <= b <= 1``."""
    log_a = torch.minimum(log_a, _log1mexp(log_p))
    log_a_plus_p = torch.logaddexp(log_a, log_p)
    log_b = log_a_plus_p if log_b is None else torch.maximum(log_b, log_a_plus_p)
    log_b = log_b.clamp(max=0.0)
    x = torch.where(log_b == -torch.inf, log_b, log_a - log_b)  # a = p = 0: not -inf + inf
    return (n - 1) * log_b + log_mean_power(x, n)


def _checked_log_ratio(log_reference: Tensor, log_below: Tensor, n: float, log_at_or_below: Tensor | None) -> Tensor:
    check_float("log_reference", log_reference)
    check_float("log_below", log_below)
    check_same_shape("log_below", log_below, "log_reference", log_reference)
    if log_at_or_below is not None:
        check_float("log_at_or_below", log_at_or_below)
        check_same_shape("log_at_or_below", log_at_or_below, "log_reference", log_reference)
    check_real("n", n, above=0.0)
    if n == 1:
        return torch.zeros_like(log_reference, dtype=working_dtype(log_reference))
    dtype = working_dtype(log_reference)
    log_b = None if log_at_or_below is None else log_at_or_below.to(dtype)
    return _log_ratio(log_reference.to(dtype).clamp(max=0.0), log_below.to(dtype), log_b, n)


def bon_log_ratio(
    log_reference: Tensor, log_below: Tensor, *, n: float, log_at_or_below: Tensor | None = None
) -> Tensor:
    """Compute the log-ratio of Best-of-N to the reference, ``log((F_le^n - F_lt^n) / (F_le - F_lt))``.

    Written as ``(n-1) log F_le + log(expm1(n x) / expm1(x))`` with ``x = log F_lt - log F_le``, which neither
    overflows nor loses digits for any n. Estimated CDFs are first made consistent with the response's own
    probability p: ``F_lt <= 1 - p`` and ``F_lt + p <= F_le <= 1``, so that Best-of-N stays a probability.

    From variational Best-of-N, https://arxiv.org/abs/2407.06057, here with ties.

    Args:
        log_reference: any shape, log p of each response under the reference.
        log_below: the same shape, log F_lt at the response's reward; ``-inf`` is allowed.
        n: number of samples of Best-of-N, any real > 0.
        log_at_or_below: the same shape, log F_le; None means that rewards do not tie, ``F_le = F_lt + p``.

    Returns:
        The same shape, in the dtype of ``log_reference``; exactly 0 for n = 1.

    Raises:
        TypeError: on a wrong dtype or an ``n`` that is not a number.
        ValueError: if the shapes differ or ``n <= 0``.
    """
    return _checked_log_ratio(log_reference, log_below, n, log_at_or_below).to(log_reference.dtype)


def bon_log_prob(
    log_reference: Tensor, log_below: Tensor, *, n: float, log_at_or_below: Tensor | None = None
) -> Tensor:
    """Compute log-probabilities under Best-of-N, ``log(p (F_le^n - F_lt^n) / (F_le - F_lt))``.

    Without ties this is ``log((F_lt + p)^n - F_lt^n)``, https://arxiv.org/abs/2407.06057. See
    :func:`bon_log_ratio` for the numerics.

    Args:
        log_reference: any shape, log p of each response under the reference.
        log_below: the same shape, log F_lt at the response's reward; ``-inf`` is allowed.
        n: number of samples of Best-of-N, any real > 0.
        log_at_or_below: the same shape, log F_le; None means that rewards do not tie.

    Returns:
        The same shape, in the dtype of ``log_reference``, at most 0; exactly ``log_reference`` for n = 1.

    Raises:
        TypeError: on a wrong dtype or an ``n`` that is not a number.
        ValueError: if the shapes differ or ``n <= 0``.
    """
    log_ratio = _checked_log_ratio(log_reference, log_below, n, log_at_or_below)
    # p = 0 stays 0, whatever the ratio.
    log_prob = torch.where(log_reference == -torch.inf, log_reference, log_reference + log_ratio)
    return log_prob.clamp(max=0.0).to(log_reference.dtype)


def bon_log_ratio_bound(log_below: Tensor, *, n: float) -> Tensor:
    """Compute the lower bound of the log-ratio of Best-of-N to the reference, ``log n + (n - 1) log F_lt``.

    It keeps the first term of the binomial sum; https://arxiv.org/abs/2407.06057, the bound of the vBoN
    objective.

    Args:
        log_below: any shape, log F_lt at each response's reward.
        n: number of samples of Best-of-N, any real >= 1 (below 1 this would be no lower bound).

    Returns:
        The shape and dtype of ``log_below``; exactly 0 for n = 1.

    Raises:
        TypeError: on a wrong dtype or an ``n`` that is not a number.
        ValueError: if ``n < 1``.
    """
    check_float("log_below", log_below)
    check_real("n", n, at_least=1.0)
    if n == 1:
        return torch.zeros_like(log_below)
    log_a = log_below.to(working_dtype(log_below)).clamp(max=0.0)
    return (math.log(n) + (n - 1) * log_a).to(log_below.dtype)


def bon_kl_bound(n: float) -> float:
    """Compute the upper bound of KL(Best-of-N || reference), ``log n - (n - 1) / n``.

    An equality in the limit of a continuous reward; https://arxiv.org/abs/2401.01879.

    Args:
        n: number of samples of Best-of-N, any real > 0.

    Returns:
        The bound in nats.

    Raises:
        TypeError: if ``n`` is not a number.
        ValueError: if ``n <= 0``.
    """
    check_real("n", n, above=0.0)
    return math.log(n) - (n - 1) / n


def bon_kl_estimate(log_reference: Tensor, *, n: float) -> Tensor:
    """Estimate KL(Best-of-N || reference) from the probability of the selected response.

    With ``e = p(y)`` of the response that Best-of-N returned,

        (1-e)^n (log n + (n-1) log(1-e) - (n-1)/n) + (1 - (1-e)^n) log((1 - (1-e)^n) / e);

    the mean over selected responses is the estimate. https://arxiv.org/abs/2401.01879. It knows nothing of the reward:
    of long responses, whose probabilities are all small, it is :func:`bon_kl_bound`, also where rewards tie.

    Args:
        log_reference: any shape, log p of the selected responses under the reference.
        n: number of samples of Best-of-N, any real >= 1.

    Returns:
        The shape and dtype of ``log_reference``, in nats.

    Raises:
        TypeError: on a wrong dtype or an ``n`` that is not a number.
        ValueError: if ``n < 1``.
    """
    check_float("log_reference", log_reference)
    check_real("n", n, at_least=1.0)
    if n == 1:
        return torch.zeros_like(log_reference)
    log_e = log_reference.to(working_dtype(log_reference)).clamp(max=0.0)
    log_miss = _log1mexp(log_e)  # log(1 - e)
    miss = torch.exp(n * log_miss)
    hit = -torch.expm1(n * log_miss)
    zero = torch.zeros_like(log_e)
    # Either weight can be exactly 0 while its logarithm is infinite; the product is then 0.
    spread = bon_kl_bound(n) + (n - 1) * torch.where(miss > 0, log_miss, zero)
    gain = torch.where(hit > 0, torch.log(torch.where(hit > 0, hit, zero + 1)) - log_e, zero)
    return (miss * spread + hit * gain).to(log_reference.dtype)


def bon_win_rate_bound(n: float) -> float:
    """Compute the upper bound of the win rate of Best-of-N over one reference sample, ``n / (n + 1)``.

    Ties count one half. An equality in the limit of a continuous reward.

    Args:
        n: number of samples of Best-of-N, any real > 0.

    Returns:
        The bound, in (0, 1).

    Raises:
        TypeError: if ``n`` is not a number.
        ValueError: if ``n <= 0``.
    """
    check_real("n", n, above=0.0)
    return n / (n + 1)


def kl_weight(n: float) -> float:
    """Compute the KL coefficient at which KL-regularised RL matches Best-of-N, ``beta = 1 / (n - 1)``.

    https://arxiv.org/abs/2407.06057.

    Args:
        n: number of samples of Best-of-N, any real > 1.

    Returns:
        The coefficient.

    Raises:
        TypeError: if ``n`` is not a number.
        ValueError: if ``n <= 1``, where Best-of-N is the reference itself and nothing is to be learnt.
    """
    check_real("n", n, above=1.0)
    return 1 / (n - 1)


def subset_shares(m: int, n: int) -> Tensor:
    """Compute the share of n-subsets that lie within the k smallest of m samples: ``C(k, n) / C(m, n)``, k = 0..m.

    Args:
        m: number of samples.
        n: size of the subsets, an integer with ``1 <= n <= m``.

    Returns:
        ``[m + 1]`` float64 on the CPU.
    """
    # C(k-1, n) = C(k, n) (k-n)/k, from k = m down: no factorial, no overflow, and exact zeros below n.
    k = torch.arange(m, 0, -1, dtype=torch.float64)
    falling = torch.cumprod((k - n).clamp(min=0) / k, 0)
    return torch.cat([falling.new_ones(1), falling]).flip(0)


def bon_order_weights(m: int, n: int) -> Tensor:
    """Compute the weight of each order statistic in the mean over all n-subsets of their maximum.

    ``w_j = C(j-1, n-1) / C(m, n)`` for the j-th smallest of m samples, j = 1..m.

    Args:
        m: number of samples at hand.
        n: number of samples of Best-of-N, an integer with ``1 <= n <= m``.

    Returns:
        ``[m]`` float64 on the CPU, non-negative, summing to 1.

    Raises:
        TypeError: if ``n`` or ``m`` is not an integer.
        ValueError: if ``n`` is out of range.
    """
    if isinstance(m, bool) or not isinstance(m, int):
        raise TypeError(f"m counts samples and must be an integer, got {m!r} of type {type(m).__name__}")
    check_count("n", n, at_most=m, of="the m samples at hand")
    j = torch.arange(1, m + 1, dtype=torch.float64)
    return subset_shares(m, n)[1:] * (n / j)


@torch.no_grad()
def bon_selection_weights(reference_rewards: Tensor, *, n: int) -> Tensor:
    """Compute the probability that Best-of-n of a random n-subset returns each cached response.

    ``(C(k_le, n) - C(k_lt, n)) / ((k_le - k_lt) C(M, n))`` with ``k_lt``, ``k_le`` the numbers of rewards
    below, and at or below, the response's own. The mean of any value of the selected response under these
    weights is unbiased.

    Args:
        reference_rewards: ``[B, M]``.
        n: number of samples of Best-of-N, an integer with ``1 <= n <= M``.

    Returns:
        ``[B, M]`` float64 (float32 on MPS), each row summing to 1; NaN in rows that hold a NaN.

    Raises:
        TypeError: on a wrong dtype or an ``n`` that is not an integer.
        ValueError: on a wrong shape or ``n`` out of range.
    """
    check_float("reference_rewards", reference_rewards)
    check_dims("reference_rewards", reference_rewards, 2, "[B, M]")
    m = reference_rewards.shape[1]
    check_count("n", n, at_most=m, of="M, the cached samples a prompt")
    below, at_or_below = reward_counts(reference_rewards, reference_rewards)
    shares = subset_shares(m, n).to(reference_rewards.device, working_dtype(reference_rewards))
    weights = (shares[at_or_below] - shares[below]) / (at_or_below - below)
    return weights.masked_fill(reference_rewards.isnan().any(-1, keepdim=True), torch.nan)


@torch.no_grad()
def bon_expected_reward(reference_rewards: Tensor, *, n: int) -> Tensor:
    """Estimate the expected reward of Best-of-N without bias, from M cached samples a prompt.

    The mean over all n-subsets of their maximum, ``sum_j C(j-1, n-1) / C(M, n) r_(j)``; its variance is lower
    than that of drawing n of the M.

    Args:
        reference_rewards: ``[B, M]``.
        n: number of samples of Best-of-N, an integer with ``1 <= n <= M``.

    Returns:
        ``[B]`` in the dtype of ``reference_rewards``.

    Raises:
        TypeError: on a wrong dtype or an ``n`` that is not an integer.
        ValueError: on a wrong shape or ``n`` out of range.
    """
    check_float("reference_rewards", reference_rewards)
    check_dims("reference_rewards", reference_rewards, 2, "[B, M]")
    m = reference_rewards.shape[1]
    check_count("n", n, at_most=m, of="M, the cached samples a prompt")
    dtype = working_dtype(reference_rewards)
    weights = bon_order_weights(m, n).to(reference_rewards.device, dtype)
    ordered = reference_rewards.sort(-1).values.to(dtype)
    return (ordered * weights).sum(-1).to(reference_rewards.dtype)


def _win_rate(count_below: Tensor, count_at_or_below: Tensor, m: int, n: int, like: Tensor) -> Tensor:
    shares = subset_shares(m, n).to(like.device, working_dtype(like))
    # Only the count below a NaN, which the callers overwrite, can lie out of range.
    return (shares[count_below.clamp(max=m)] + shares[count_at_or_below]) / 2


@torch.no_grad()
def bon_win_rate(rewards: Tensor, reference_rewards: Tensor, *, n: int) -> Tensor:
    """Estimate without bias the probability that each sample beats Best-of-N, from M cached samples a prompt.

    The share of n-subsets of the cached samples whose best is below the sample, ties counted one half:
    ``(C(k_lt, n) + C(k_le, n)) / (2 C(M, n))``. At the vBoN optimum its mean over policy samples is 1/2. For
    n = 1 it is the win rate over the reference. A NaN reward gives NaN.

    Args:
        rewards: ``[B, G]``, independent of the cached samples.
        reference_rewards: ``[B, M]``.
        n: number of samples of Best-of-N, an integer with ``1 <= n <= M``.

    Returns:
        ``[B, G]`` in the dtype of ``rewards``, in [0, 1].

    Raises:
        TypeError: on a wrong dtype or an ``n`` that is not an integer.
        ValueError: on shapes that do not fit or ``n`` out of range.
    """
    check_rewards_pair(rewards, reference_rewards)
    m = reference_rewards.shape[1]
    check_count("n", n, at_most=m, of="M, the cached samples a prompt")
    below, at_or_below = reward_counts(rewards, reference_rewards)
    unknown = rewards.isnan() | reference_rewards.isnan().any(-1, keepdim=True)
    return _win_rate(below, at_or_below, m, n, rewards).masked_fill(unknown, torch.nan).to(rewards.dtype)


@torch.no_grad()
def bon_self_win_rate(reference_rewards: Tensor, *, n: int) -> Tensor:
    """Estimate the win rate of Best-of-N over one more reference sample, without bias, from M cached samples.

    The mean over all ways to pick n samples and one other of them: ``1 - mean_i w_i`` with ``w_i`` the
    :func:`bon_win_rate` of sample i against the other M - 1. With no ties it is exactly ``n / (n + 1)``.

    Args:
        reference_rewards: ``[B, M]``.
        n: number of samples of Best-of-N, an integer with ``1 <= n <= M - 1``.

    Returns:
        ``[B]`` in the dtype of ``reference_rewards``, in [0, 1].

    Raises:
        TypeError: on a wrong dtype or an ``n`` that is not an integer.
        ValueError: on a wrong shape or ``n`` out of range.
    """
    check_float("reference_rewards", reference_rewards)
    check_dims("reference_rewards", reference_rewards, 2, "[B, M]")
    m = reference_rewards.shape[1]
    check_count("n", n, at_most=m - 1, of="M - 1, one of the M cached samples being the opponent")
    below, at_or_below = reward_counts(reference_rewards, reference_rewards)
    loses = _win_rate(below, at_or_below - 1, m - 1, n, reference_rewards)
    unknown = reference_rewards.isnan().any(-1)
    return (1 - loses.mean(-1)).masked_fill(unknown, torch.nan).to(reference_rewards.dtype)
