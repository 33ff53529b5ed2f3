"""Baselines and surrogate losses of policy gradients.

Every loss sums over the tokens of a response and averages over responses, so that equal shares of a batch on
several processes average to the loss of the whole batch. A token mean would not. A response without a token in the
mask is left out: no loss or mean counts it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vbon_lightning.functional._validate import (
    check_dims,
    check_float,
    check_mask,
    check_real,
    check_same_shape,
    check_shape,
)
from vbon_lightning.functional.sequences import masked


def leave_one_out(values: Tensor, kept: Tensor | None = None) -> Tensor:
    """Subtract from each sample's value the mean of its siblings', ``v_i - mean_{j != i} v_j``.

    The baseline does not depend on sample i, so the policy gradient stays unbiased; RLOO,
    https://arxiv.org/abs/2402.14740.

    Args:
        values: ``[B, G, ...]`` with G samples a prompt.
        kept: ``[B, G]`` bool: False for samples that are left out of their group, whatever their values; None for none.

    Returns:
        The same shape; 0 for samples that are left out, and where a group keeps fewer than 2.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: if ``G < 2`` or the shapes do not fit.
    """
    check_float("values", values)
    check_dims("values", values, 2, "[B, G, ...]", at_least=True)
    group = values.shape[1]
    if group < 2:
        raise ValueError(f"leave-one-out needs G >= 2 samples a prompt, got G = {group} in {list(values.shape)}")
    if kept is None:
        return (values - values.mean(1, keepdim=True)) * (group / (group - 1))
    check_mask("kept", kept)
    check_shape("kept", kept, values.shape[:2], "[B, G]")
    kept = kept.view(*kept.shape, *[1] * (values.dim() - 2))
    count = kept.sum(1, keepdim=True).to(values.dtype)
    mean = masked(values, kept.expand_as(values)).sum(1, keepdim=True) / count.clamp(min=1)
    return masked((values - mean) * (count / (count - 1).clamp(min=1)), (kept & (count > 1)).expand_as(values))


def normalise_advantages(
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    eps: float = 1e-8,
    add_up: Callable[[Tensor], Tensor] = lambda part: part,
) -> Tensor:
    """Shift and scale advantages to mean 0 and standard deviation 1 over the batch.

    This changes the objective: the scale depends on the sampled batch, so the expected gradient is no longer
    that of the target. It is a heuristic against badly scaled rewards, and never applied unless asked for.

    Args:
        advantages: any shape.
        mask: the same shape, bool: only these entries count, the others become 0. None means all.
        eps: added to the standard deviation.
        add_up: adds a tensor up over the parts of the batch that other processes hold; the batch is whole by default.

    Returns:
        The same shape.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: if the shapes differ or ``eps < 0``.
    """
    check_float("advantages", advantages)
    check_real("eps", eps, at_least=0.0)
    if mask is None:
        mask = torch.ones_like(advantages, dtype=torch.bool)
    check_mask("mask", mask)
    check_same_shape("mask", mask, "advantages", advantages)
    zero = torch.zeros_like(advantages)
    total, count = add_up(torch.stack([torch.where(mask, advantages, zero).sum(), mask.sum().to(advantages.dtype)]))
    count = count.clamp(min=1)
    centred = torch.where(mask, advantages - total / count, zero)
    return centred / ((add_up(centred.square().sum()) / count).sqrt() + eps)


def cost_to_go(costs: Tensor) -> Tensor:
    """Sum the costs strictly after each position, ``out_t = sum_{s > t} costs_s``.

    Args:
        costs: ``[..., T]``, 0 outside the response.

    Returns:
        The same shape; 0 at the last position.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: if ``costs`` has no dimension.
    """
    check_float("costs", costs)
    check_dims("costs", costs, 1, "[..., T]", at_least=True)
    from_here = costs.flip(-1).cumsum(-1).flip(-1)
    return torch.cat([from_here[..., 1:], torch.zeros_like(costs[..., :1])], -1)


def _per_response(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over tokens, mean over the responses that have any."""
    return masked(values, mask).sum() / mask.any(-1).sum().clamp(min=1)


def _token_advantages(advantages: Tensor, mask: Tensor) -> Tensor:
    """Detach the advantages and lay them over the tokens."""
    check_float("advantages", advantages)
    if advantages.shape == mask.shape[:-1]:
        advantages = advantages.unsqueeze(-1)
    elif advantages.shape != mask.shape:
        raise ValueError(
            f"advantages must have the shape of the mask, {list(mask.shape)}, or of its responses, "
            f"{list(mask.shape[:-1])}, got {list(advantages.shape)}"
        )
    return masked(advantages.detach().expand(mask.shape), mask)


def _check_tokens(mask: Tensor, **tensors: Tensor) -> None:
    check_mask("mask", mask)
    check_dims("mask", mask, 1, "[..., T]", at_least=True)
    for name, tensor in tensors.items():
        check_float(name, tensor)
        check_same_shape(name, tensor, "mask", mask)


def reinforce_loss(log_probs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Compute the REINFORCE surrogate, ``-mean_i sum_t A_it log pi(y_it | y_i<t)``.

    Args:
        log_probs: ``[B, G, T]`` under the policy, differentiable; anything outside the mask is ignored.
        advantages: ``[B, G]`` or ``[B, G, T]``; no gradient flows through them.
        mask: ``[B, G, T]`` bool, True on response tokens.

    Returns:
        A scalar: summed over tokens, averaged over responses.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: if the shapes do not fit.
    """
    _check_tokens(mask, log_probs=log_probs)
    return -_per_response(_token_advantages(advantages, mask) * masked(log_probs, mask), mask)


class SurrogateLoss(NamedTuple):
    """The clipped surrogate loss and what to watch while minimising it."""

    loss: Tensor
    """Scalar, differentiable."""
    clip_fraction: Tensor
    """Scalar: the share of response tokens whose gradient the clip cut off."""
    approx_kl: Tensor
    """Scalar: k3 estimate of KL(old policy || policy), mean over response tokens."""
    mean_ratio: Tensor
    """Scalar: mean of pi / pi_old over response tokens; 1 before any update."""


def clipped_surrogate_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
) -> SurrogateLoss:
    """Compute PPO's clipped surrogate, ``-mean_i sum_t min(rho A, clip(rho, 1 - c, 1 + c) A)``.

    ``rho = pi / pi_old`` token by token; https://arxiv.org/abs/1707.06347. At ``pi = pi_old`` its gradient is
    that of :func:`reinforce_loss`.

    Args:
        log_probs: ``[B, G, T]`` under the policy, differentiable; anything outside the mask is ignored.
        old_log_probs: ``[B, G, T]`` under the policy that sampled; no gradient flows through them.
        advantages: ``[B, G]`` or ``[B, G, T]``; no gradient flows through them.
        mask: ``[B, G, T]`` bool, True on response tokens.
        clip: c, greater than 0.
        clip_high: another c for the upper end, greater than 0, as DAPO has it, https://arxiv.org/abs/2503.14476: a
            larger one lets unlikely tokens rise. None for the same.

    Returns:
        :class:`SurrogateLoss` of scalars; the loss is summed over tokens and averaged over responses.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: if the shapes do not fit, or ``clip`` or ``clip_high`` is not positive.
    """
    _check_tokens(mask, log_probs=log_probs, old_log_probs=old_log_probs)
    check_real("clip", clip, above=0.0)
    clip_high = clip if clip_high is None else clip_high
    check_real("clip_high", clip_high, above=0.0)
    advantages = _token_advantages(advantages, mask)
    log_ratio = masked(log_probs - old_log_probs.detach(), mask)
    ratio = log_ratio.exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip, 1 + clip_high) * advantages
    with torch.no_grad():
        count = mask.sum().clamp(min=1)
        clip_fraction = (masked(clipped, mask) < masked(unclipped, mask)).sum() / count
        approx_kl = masked(torch.expm1(log_ratio) - log_ratio, mask).sum() / count
        mean_ratio = masked(ratio, mask).sum() / count
    loss = -_per_response(torch.minimum(unclipped, clipped), mask)
    return SurrogateLoss(loss, clip_fraction, approx_kl, mean_ratio)


class AdvantageEstimate(NamedTuple):
    """Advantages for the policy and regression targets for the critic."""

    advantages: Tensor
    """``[..., T]``, 0 outside the mask."""
    returns: Tensor
    """``[..., T]``: advantages plus values, 0 outside the mask."""


@torch.no_grad()
def generalized_advantage_estimation(
    token_rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> AdvantageEstimate:
    """Estimate advantages by GAE, ``A_t = sum_l (gamma lam)^l delta_{t+l}``.

    ``delta_t = r_t + gamma V_{t+1} - V_t``, with value 0 after the last token of the response;
    https://arxiv.org/abs/1506.02438.

    Args:
        token_rewards: ``[..., T]``; the score belongs on the last token inside the mask.
        values: ``[..., T]``, the critic's value before each token.
        mask: ``[..., T]`` bool, True on response tokens.
        gamma: discount, in [0, 1].
        lam: lambda, in [0, 1].

    Returns:
        :class:`AdvantageEstimate` of two ``[..., T]`` tensors without gradient.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: if the shapes differ or ``gamma`` or ``lam`` is out of range.
    """
    _check_tokens(mask, token_rewards=token_rewards, values=values)
    check_real("gamma", gamma, at_least=0.0, at_most=1.0)
    check_real("lam", lam, at_least=0.0, at_most=1.0)
    values = masked(values, mask)
    next_values = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], -1)
    delta = masked(token_rewards + gamma * next_values - values, mask)
    advantages = torch.zeros_like(delta)
    running = delta.new_zeros(delta.shape[:-1])
    for t in range(delta.shape[-1] - 1, -1, -1):
        running = delta[..., t] + gamma * lam * running
        advantages[..., t] = running
    return AdvantageEstimate(masked(advantages, mask), masked(advantages + values, mask))


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float = 0.2
) -> Tensor:
    """Compute PPO's clipped value loss, ``1/2 mean_i sum_t max((V - R)^2, (V_clip - R)^2)``.

    ``V_clip`` is V kept within ``clip`` of the value at sampling time.

    Args:
        values: ``[..., T]``, differentiable.
        old_values: ``[..., T]``, at sampling time; no gradient flows through them.
        returns: ``[..., T]``; no gradient flows through them.
        mask: ``[..., T]`` bool, True on response tokens.
        clip: greater than 0.

    Returns:
        A scalar: summed over tokens, averaged over responses.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: if the shapes differ or ``clip <= 0``.
    """
    _check_tokens(mask, values=values, old_values=old_values, returns=returns)
    check_real("clip", clip, above=0.0)
    values, old_values, returns = (masked(x, mask) for x in (values, old_values.detach(), returns.detach()))
    near = old_values + (values - old_values).clamp(-clip, clip)
    return _per_response(torch.maximum((values - returns).square(), (near - returns).square()), mask) / 2
