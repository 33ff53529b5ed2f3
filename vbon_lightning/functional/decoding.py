"""How decoders choose among responses, and among next tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vbon_lightning.functional._validate import check_float, check_mask, check_real, check_same_shape


@torch.no_grad()
def soft_selection_probs(rewards: Tensor, *, temperature: float) -> Tensor:
    r"""Return the probabilities with which Soft Best-of-N picks each of n responses.

    .. math:: P(i) = \frac{\exp(r_i / \lambda)}{\sum_j \exp(r_j / \lambda)}

    C. Mayrink Verdun, A. Oesterling, H. Lakkaraju and F. P. Calmon, "Soft Best-of-n Sampling for Model Alignment"
    (2025). At temperature 0 it is Best-of-N, the first of those that tie; at infinity it is a sample of the policy.

    Args:
        rewards: ``[..., n]``; one that is NaN is never picked, unless all are: then each as often as another.
        temperature: lambda, from 0 to infinity, both included.

    Returns:
        ``[..., n]`` float64.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: on a temperature that is negative or NaN.
    """
    check_float("rewards", rewards)
    if temperature != math.inf:
        check_real("temperature", temperature, at_least=0)
    known = ~rewards.isnan()
    known = known | ~known.any(-1, keepdim=True)
    values = rewards.double().nan_to_num(nan=0.0).masked_fill(~known, -math.inf)
    if temperature == 0:
        return torch.nn.functional.one_hot(values.argmax(-1), values.shape[-1]).double()
    # The best one's reward comes off first: a difference divided by a small temperature is 0 there, not infinity.
    return ((values - values.amax(-1, keepdim=True)) / temperature).masked_fill(~known, -math.inf).softmax(-1)


@torch.no_grad()
def pessimistic_level(rewards: Tensor, *, beta: float) -> Tensor:
    r"""Solve for the level :math:`\lambda` of inference-time pessimism.

    .. math:: \frac{1}{N} \sum_i \max\left(\frac{r_i - \lambda}{\beta}, 0\right) = 1

    The mean is that of the density ratio of the optimum under a chi-squared penalty to the reference: A. Huang et al.,
    "Is Best-of-N the Best of Them? Coverage, Scaling, and Optimality in Inference-Time Alignment" (2025). With the k
    best above the level it is their mean less ``N beta / k``; the right k is the one whose level lies between its
    worst reward and the next one (as in projections onto the simplex).

    Args:
        rewards: ``[..., N]``; those that are NaN count nowhere.
        beta: The penalty's weight, > 0 and finite.

    Returns:
        ``[...]`` float64; NaN where all rewards are.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: on a beta that is not positive and finite.
    """
    check_float("rewards", rewards)
    check_real("beta", beta, above=0)
    count = (~rewards.isnan()).sum(-1, keepdim=True)
    ordered = rewards.double().nan_to_num(nan=-math.inf).sort(dim=-1, descending=True).values
    best = ordered[..., :1]
    gaps = ordered - best  # of small numbers the sums are exact enough, whatever the rewards' size
    places = torch.arange(1, rewards.shape[-1] + 1, device=rewards.device)
    levels = (gaps.cumsum(-1) - count * beta) / places
    above = ((gaps > levels) & (places <= count)).sum(-1, keepdim=True).clamp(min=1)
    return (best + levels.gather(-1, above - 1)).squeeze(-1).masked_fill(count.squeeze(-1) == 0, math.nan)


@torch.no_grad()
def pessimistic_acceptance(rewards: Tensor, level: Tensor, best: Tensor, *, beta: float) -> Tensor:
    r"""Return the probability with which inference-time pessimism accepts each fresh response.

    :math:`\min(w / M, 1)` with :math:`w = \max((r - \lambda) / \beta, 0)` and :math:`M = (R_{max} - \lambda) / \beta`:
    rejection sampling of the distribution ``ref w``, cut where a reward is above the bound. The beta of both cancels.

    Args:
        rewards: ``[..., N]``; NaN is never accepted.
        level: ``[...]`` of :func:`pessimistic_level`; where it is NaN nothing is accepted.
        best: ``[...]``, :math:`R_{max}`, above the level.
        beta: The penalty's weight, > 0.

    Returns:
        ``[..., N]`` float64.

    Raises:
        TypeError: on a wrong dtype.
    """
    check_float("rewards", rewards)
    check_float("level", level)
    check_float("best", best)
    check_real("beta", beta, above=0)
    weight = ((rewards.double() - level.double()[..., None]) / beta).clamp(min=0)
    most = (best.double() - level.double()) / beta
    # At the bound or above it. A small beta may round the level to the bound: the best are accepted then too.
    reached = rewards.double() >= torch.maximum(best, level).double()[..., None]
    return torch.where(reached, 1.0, weight / most[..., None]).nan_to_num(nan=0.0)


def realigned_logits(policy: Tensor, reference: Tensor, *, strength: float) -> Tensor:
    r"""Mix next-token logits: decoding-time realignment.

    .. math:: \lambda \log \pi(a \mid s) + (1 - \lambda) \log \pi_{ref}(a \mid s) + \text{const}

    T. Liu et al., "Decoding-time Realignment of Language Models" (2024). At 0 it is the reference's, at 1 the policy's,
    both to the last digit.

    Args:
        policy: ``[..., V]`` logits; a token that either says is impossible stays so.
        reference: ``[..., V]``.
        strength: lambda, any finite number; above 1 it goes on beyond the policy, below 0 away from it. The noise in
            the two models' logits is multiplied alike.

    Returns:
        ``[..., V]``, in float32 at the least: rounding, too, is multiplied. They are infinite, or NaN, where a strength
        is so large.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: on shapes that differ or a strength that is not finite.
    """
    check_float("policy", policy)
    check_float("reference", reference)
    check_same_shape("reference", reference, "policy", policy)
    check_real("strength", strength)
    if strength in (0, 1):
        return policy if strength else reference
    never = policy.isneginf() | reference.isneginf()
    exact = torch.promote_types(policy.dtype, torch.float32)
    return (strength * policy.to(exact) + (1 - strength) * reference.to(exact)).masked_fill(never, -math.inf)


def realignment_strength(n: float, wanted: float) -> float:
    r"""Return the strength that turns a policy for Best-of-n into one for another N.

    The optimum of vBoN's bound is ``ref F^(N-1)``: logarithms are linear in N - 1, so that
    :math:`\lambda = (N' - 1) / (N - 1)`. Exact for whole responses, approximate token by token, where each prefix has a
    normaliser of its own.

    Args:
        n: N that the policy was trained for, > 1.
        wanted: N', at least 1.

    Raises:
        ValueError: on other numbers.
    """
    check_real("n", n, above=1)
    check_real("wanted", wanted, at_least=1)
    return (wanted - 1) / (n - 1)


@torch.no_grad()
def implicit_reward(log_ratio: Tensor, mask: Tensor) -> Tensor:
    r"""Score partial responses by a preference-trained policy's implicit reward, earlier prefixes counting for more.

    .. math:: \sum_k w_k \log \frac{\pi_{dpo}(y_k \mid y_{<k})}{\pi_{ref}(y_k \mid y_{<k})}, \quad w_k = 1 / |y_{:k}|

    J. Qiu et al., "TreeBoN: Enhancing Inference-Time Alignment with Speculative Tree-Search and Best-of-N Sampling"
    (2024); the weights as they are quoted, k counting from 1.

    Args:
        log_ratio: ``[..., T]`` log-probability under the one less that under the other.
        mask: ``[..., T]`` bool: True on response tokens.

    Returns:
        ``[...]``.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: on shapes that differ.
    """
    check_float("log_ratio", log_ratio)
    check_mask("mask", mask)
    check_same_shape("mask", mask, "log_ratio", log_ratio)
    weights = 1 / torch.arange(1, log_ratio.shape[-1] + 1, device=log_ratio.device, dtype=log_ratio.dtype)
    return torch.where(mask, log_ratio * weights, 0.0).sum(-1)


@torch.no_grad()
def branch_places(scores: Tensor, finished: Tensor, *, branches: int) -> Tensor:
    """Deal the n places of a tree's next layer to its n nodes, in the order of their scores.

    A node that goes on gets ``branches`` places, the last of them what is left; one that has finished gets one, for
    copies of it would be a single leaf, and what it leaves goes to the next best.

    Args:
        scores: ``[..., n]``; NaN is below all others, and the first of those that tie comes first.
        finished: ``[..., n]`` bool.
        branches: Places of a node that goes on, >= 1.

    Returns:
        ``[..., n]`` long: whose each place is, in the nodes' order.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: on shapes that differ.
    """
    check_float("scores", scores)
    check_mask("finished", finished)
    check_same_shape("finished", finished, "scores", scores)
    order = scores.nan_to_num(nan=-math.inf).argsort(descending=True, stable=True)
    wanted = torch.where(finished, 1, branches).gather(-1, order)
    before = wanted.cumsum(-1) - wanted
    dealt = torch.minimum(wanted, (scores.shape[-1] - before).clamp(min=0))
    ends = torch.zeros_like(order).scatter(-1, order, dealt).cumsum(-1)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(ends).contiguous()
    return torch.searchsorted(ends, places, right=True)


@torch.no_grad()
def effective_samples(log_weights: Tensor) -> Tensor:
    r"""Return the effective number of weighted particles, :math:`(\sum w)^2 / \sum w^2`.

    Args:
        log_weights: ``[..., n]``, up to a constant; -inf is a weight of 0. Where all are, they count as equal.

    Returns:
        ``[...]`` float64, between 1 and n.

    Raises:
        TypeError: on a wrong dtype.
    """
    return 1 / particle_weights(log_weights).square().sum(-1)


@torch.no_grad()
def particle_weights(log_weights: Tensor) -> Tensor:
    """Normalise weights of particles; where all are 0 they count as equal.

    Args:
        log_weights: ``[..., n]``, up to a constant; -inf is a weight of 0.

    Returns:
        ``[..., n]`` float64, summing to 1.

    Raises:
        TypeError: on a wrong dtype.
    """
    check_float("log_weights", log_weights)
    none = log_weights.isneginf().all(-1, keepdim=True)
    return log_weights.double().masked_fill(none, 0.0).softmax(-1)
