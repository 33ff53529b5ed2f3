"""What each method maximises, and the advantages that follow from it.

Every method here maximises ``E[score] - kl_coef KL(policy || reference)``; they differ in the score. A response without
a token in the mask is left out of its group: no baseline or mean counts it, whatever its score.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vbon_lightning.functional._validate import (
    check_float,
    check_mask,
    check_real,
    check_same_shape,
    check_shape,
)
from vbon_lightning.functional.best_of_n import bon_log_ratio, bon_log_ratio_bound, kl_weight
from vbon_lightning.functional.policy_gradient import cost_to_go, leave_one_out
from vbon_lightning.functional.reward_cdf import RewardCDF
from vbon_lightning.functional.sequences import masked


class Target(NamedTuple):
    """The objective ``E[score] - kl_coef KL(policy || reference)``, to be maximised."""

    score: Tensor
    """``[B, G]``: the score of each response."""
    kl_coef: float
    """The coefficient of KL(policy || reference)."""


@torch.no_grad()
def vbon_target(
    log_reference: Tensor,
    cdf: RewardCDF,
    *,
    n: float,
    bound: Literal["exact", "lower", "untied"] = "exact",
    log_ratio_floor: float | None = None,
) -> Target:
    """Build the target of variational Best-of-N, ``min KL(policy || pi_bon)``, in its beta form.

    ``-KL(policy || pi_bon) = E[log pi_bon - log p] - KL(policy || reference)``; everything is divided by n -
    1, so that the objective is ``-KL(policy || pi_bon) / (n - 1)`` and the KL coefficient ``beta = 1 / (n -
    1)``. With ``bound="lower"`` the log-ratio is replaced by ``log n + (n - 1) log F_lt``: KL-regularised RL
    with reward log F; with ``bound="untied"`` it is the paper's, which takes rewards never to tie. Where they do, as
    with a reward of 0 and 1, both call the tied responses far less likely under Best-of-N than they are.
    https://arxiv.org/abs/2407.06057.

    The log-ratio has no lower end: the worst responses, which Best-of-N as good as never returns, dominate the
    variance of the gradient while the policy still samples them. With a floor of -L nats it becomes ``max(log pi_bon
    - log p, -L)``, and the optimum ``max(pi_bon, exp(-L) p)``, normalised: within ``exp(-L)`` of pi_bon in total
    variation, so at most that much below it in win rate.

    Args:
        log_reference: ``[B, G]``, log-probability of each response under the reference.
        cdf: ``[B, G]`` log F_lt and log F_le at each response's reward.
        n: number of samples of Best-of-N, any real > 1.
        bound: ``"exact"`` for the log-ratio with ties, ``"untied"`` for the one without, ``"lower"`` for its lower
            bound.
        log_ratio_floor: negative nats to which lower log-ratios are raised, for ``"exact"``; None for none.

    Returns:
        :class:`Target` with ``kl_coef = 1 / (n - 1)``.

    Raises:
        TypeError: on a wrong dtype or an ``n`` that is not a number.
        ValueError: if the shapes differ, ``n <= 1``, ``bound`` is unknown, or the floor is not negative or not of the
            exact target.
    """
    weight = kl_weight(n)
    if log_ratio_floor is not None:
        check_real("log_ratio_floor", log_ratio_floor, below=0.0)
        if bound != "exact":
            raise ValueError(
                f"log_ratio_floor bounds what it costs for bound='exact' only, got {bound!r}: the other log-ratios are "
                "not those of a distribution"
            )
    check_float("log_reference", log_reference)
    if bound == "exact":
        log_ratio = bon_log_ratio(log_reference, cdf.log_below, n=n, log_at_or_below=cdf.log_at_or_below)
    elif bound == "untied":
        log_ratio = bon_log_ratio(log_reference, cdf.log_below, n=n)
    elif bound == "lower":
        check_float("cdf.log_below", cdf.log_below)
        check_same_shape("cdf.log_below", cdf.log_below, "log_reference", log_reference)
        log_ratio = bon_log_ratio_bound(cdf.log_below, n=n)
    else:
        raise ValueError(f"bound must be 'exact', 'untied' or 'lower', got {bound!r}")
    if log_ratio_floor is not None:
        log_ratio = log_ratio.clamp(min=log_ratio_floor)
    return Target(score=weight * log_ratio, kl_coef=weight)


def kl_rl_target(rewards: Tensor, *, beta: float) -> Target:
    """Build the target of KL-regularised RL, ``max E[r] - beta KL(policy || reference)``.

    Args:
        rewards: ``[B, G]``.
        beta: the KL coefficient, at least 0.

    Returns:
        :class:`Target` with the rewards as score.

    Raises:
        TypeError: on a wrong dtype or a ``beta`` that is not a number.
        ValueError: if ``beta < 0``.
    """
    check_float("rewards", rewards)
    check_real("beta", beta, at_least=0.0)
    return Target(score=rewards.detach(), kl_coef=beta)


def _check(target: Target, mask: Tensor, **tensors: Tensor) -> None:
    check_mask("mask", mask)
    check_float("target.score", target.score)
    if mask.dim() != 3:
        raise ValueError(f"mask must have shape [B, G, T], got {list(mask.shape)}")
    check_shape("target.score", target.score, mask.shape[:-1], "[B, G]")
    for name, tensor in tensors.items():
        check_float(name, tensor)
        check_same_shape(name, tensor, "mask", mask)


@torch.no_grad()
def token_rewards(target: Target, log_probs: Tensor, reference_log_probs: Tensor, mask: Tensor) -> Tensor:
    """Spread the target over tokens, for a critic: ``-kl_coef log(pi / ref)`` on each, the score on the last.

    Args:
        target: score ``[B, G]`` and KL coefficient.
        log_probs: ``[B, G, T]`` under the policy that sampled.
        reference_log_probs: ``[B, G, T]`` under the reference.
        mask: ``[B, G, T]`` bool, True on response tokens, at least one a response.

    Returns:
        ``[B, G, T]``, 0 outside the mask; each response sums to ``score - kl_coef log(pi / ref)``.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: if the shapes do not fit.
    """
    _check(target, mask, log_probs=log_probs, reference_log_probs=reference_log_probs)
    rewards = -target.kl_coef * masked(log_probs - reference_log_probs, mask)
    position = mask.long().cumsum(-1)
    last = mask & (position == position[..., -1:])
    return rewards + masked(target.score.to(rewards.dtype).unsqueeze(-1).expand(mask.shape), last)


@torch.no_grad()
def sampled_kl_advantages(target: Target, log_probs: Tensor, reference_log_probs: Tensor, mask: Tensor) -> Tensor:
    """Compute advantages with the KL in the reward, as sampled: ``score_i - kl_coef sum_t log(pi / ref)``.

    Less the mean of the siblings' (:func:`leave_one_out`), the same for all tokens of a response. With
    :func:`reinforce_loss` the expected gradient is that of the target.

    Args:
        target: score ``[B, G]`` and KL coefficient.
        log_probs: ``[B, G, T]`` under the policy.
        reference_log_probs: ``[B, G, T]`` under the reference.
        mask: ``[B, G, T]`` bool, True on response tokens.

    Returns:
        ``[B, G, T]`` without gradient, 0 outside the mask.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: if the shapes do not fit or ``G < 2``.
    """
    _check(target, mask, log_probs=log_probs, reference_log_probs=reference_log_probs)
    log_ratio = masked(log_probs - reference_log_probs, mask).sum(-1)
    advantages = leave_one_out(target.score - target.kl_coef * log_ratio, mask.any(-1))
    return masked(advantages.unsqueeze(-1).expand(mask.shape), mask)


@torch.no_grad()
def rao_blackwell_advantages(
    target: Target, token_kl: Tensor, mask: Tensor, *, log_ratio: Tensor | None = None
) -> Tensor:
    """Compute advantages with the exact KL of later tokens: ``score_i - kl_coef sum_{s > t} KL_s``.

    Less the mean of the siblings' at the same position (:func:`leave_one_out`). The KL of token t itself is
    missing here: add ``kl_coef *`` :func:`kl_penalty` to :func:`reinforce_loss`, which carries its exact
    gradient. Together the expected gradient is that of the target, and no KL is estimated from the sampled
    token; Better Estimation of the Kullback-Leibler Divergence Between Language Models,
    https://arxiv.org/abs/2504.10637.

    With ``log_ratio`` the baseline becomes the value that the prefix has at the optimum: there
    ``score - kl_coef log(pi / ref)`` is the same for all responses, so the score to expect is that constant,
    taken from the siblings, plus ``kl_coef`` times the log-ratio so far. It depends on the prefix and the
    siblings only, so the gradient stays unbiased. The advantage is then that of :func:`sampled_kl_advantages`
    with the KL from token t on exchanged for its expectation,
    ``A_i + kl_coef (sum_{s >= t} log(pi_s / ref_s) - sum_{s > t} KL_s)``.

    Which of the three has the least variance depends on the policy. Near the optimum it is the sampled KL,
    whose noise cancels that of the score: there its advantages are all zero.

    Args:
        target: score ``[B, G]`` and KL coefficient.
        token_kl: ``[B, G, T]``, exact KL(policy || reference) over the vocabulary at each position.
        mask: ``[B, G, T]`` bool, True on response tokens.
        log_ratio: ``[B, G, T]``, ``log pi - log ref`` of the sampled tokens, to use the prefix baseline.

    Returns:
        ``[B, G, T]`` without gradient, 0 outside the mask.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: if the shapes do not fit or ``G < 2``.
    """
    _check(target, mask, token_kl=token_kl)
    later_kl = cost_to_go(masked(token_kl, mask))
    if log_ratio is None:
        return masked(leave_one_out(target.score.unsqueeze(-1) - target.kl_coef * later_kl, mask.any(-1)), mask)
    _check(target, mask, log_ratio=log_ratio)
    kept = masked(log_ratio, mask)
    sampled = leave_one_out(target.score - target.kl_coef * kept.sum(-1), mask.any(-1)).unsqueeze(-1)
    return masked(sampled + target.kl_coef * (kept + cost_to_go(kept) - later_kl), mask)


def kl_penalty(token_kl: Tensor, mask: Tensor) -> Tensor:
    """Compute the mean KL of a response, ``mean_i sum_t KL_it``: the other half of the Rao-Blackwell loss.

    Args:
        token_kl: ``[..., T]``, differentiable.
        mask: ``[..., T]`` bool, True on response tokens.

    Returns:
        A scalar: summed over tokens, averaged over the responses that have any.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: if the shapes differ.
    """
    check_float("token_kl", token_kl)
    check_mask("mask", mask)
    check_same_shape("mask", mask, "token_kl", token_kl)
    return masked(token_kl, mask).sum() / mask.any(-1).sum().clamp(min=1)
