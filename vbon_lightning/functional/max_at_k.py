"""Policy gradients of the best reward among k samples: max@k, and pass@k where rewards are 0 or 1."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from vbon_lightning.functional._validate import (
    check_dims,
    check_float,
    check_mask,
    check_same_shape,
    working_dtype,
)
from vbon_lightning.functional.best_of_n import subset_shares
from vbon_lightning.functional.policy_gradient import leave_one_out
from vbon_lightning.functional.sequences import masked

MaxAtKForm = Literal["plain", "marginal", "centred"]

MIN_K: dict[str, int] = {"plain": 1, "marginal": 2, "centred": 1}
"""The least k of a form: of one sample there is nothing to leave out that a maximum remains of."""


def samples_for_max_at_k(form: str, k: int) -> int:
    """Return how many samples of a prompt a form needs: k, and one more where two are left out."""
    return k + 1 if form == "centred" else k


@torch.no_grad()
def max_at_k_advantages(rewards: Tensor, *, k: int, form: MaxAtKForm = "centred", kept: Tensor | None = None) -> Tensor:
    r"""Compute advantages whose policy gradient is that of ``E[max of k]``, from G >= k samples a prompt.

    ``mean_i A_i grad log pi(y_i)`` has the gradient of max@k as its expectation, with each of

    - ``plain``: ``A_i = k U_i``, U_i the mean over the k-subsets that hold i of their maximum: the ``s_i`` of
      Walder and Karkhanis, "Pass@K Policy Optimization: Solving Harder Reinforcement Learning Problems", 2025
      (https://arxiv.org/abs/2505.15201), times G. The mean of ``A_i / k`` over the group is the unbiased estimate of
      max@k. It grows with the rewards' mean, and its variance with it;
    - ``marginal``: ``A_i = k mean_I (max_I - max_{I without i})`` over the k-subsets I that hold i, their form of least
      variance. At G = k the best sample has ``k (r_(k) - r_(k-1))`` and the others nothing: the
      leave-one-out advantage of Tang, Zheng, Synnaeve and Munos, "Optimizing Language Models for Inference Time
      Objectives using Reinforcement Learning", 2025 (https://arxiv.org/abs/2503.19595). Never negative, so a sample
      that is drawn becomes likelier or stays;
    - ``centred``: the same less what the others bring on average where i is left out, so that a group's advantages add
      up to 0: the leave-two-out baseline of Takashiro and others, "On Advantage Estimates for Max@K Policy Gradients",
      2026 (https://arxiv.org/abs/2606.06080). At k = 1 it is :func:`leave_one_out`.

    With the rewards in ascending order and ``d_t = r_(t+1) - r_(t)`` all are sums over gaps, derived here and compared
    with sums over all subsets in the tests: ``plain`` is ``k (r_(G) - sum_{t >= i} d_t C(t-1, k-1) / C(G-1, k-1))``,
    ``marginal`` ``k sum_{t < i} d_t C(t, k-1) / C(G-1, k-1)``, and ``centred`` k times the leave-one-out of
    ``sum_{t < i} d_t C(t-1, k-1) / C(G-2, k-1)``. So tied samples have one advantage, and only ``plain`` sees a
    constant that is added to all rewards; a factor of the rewards is one of the advantages. Binomials are never made,
    only their quotients.

    Args:
        rewards: ``[B, G]``.
        k: samples among which the best counts.
        form: ``plain``, ``marginal`` (k >= 2) or ``centred`` (G > k).
        kept: ``[B, G]`` bool: False for samples that are left out, whatever their rewards; None for none.

    Returns:
        ``[B, G]``; 0 for samples that are left out, and in groups that keep fewer than the form needs.

    Raises:
        TypeError: on a wrong dtype or a ``k`` that is not an integer.
        ValueError: if the shapes differ, the form is unknown, or k or G are too small for it.
    """
    check_float("rewards", rewards)
    check_dims("rewards", rewards, 2, "[B, G]")
    if form not in (known := get_args(MaxAtKForm)):
        raise ValueError(f"form must be one of {', '.join(known)}, got {form!r}")
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k counts samples and must be an integer, got {k!r} of type {type(k).__name__}")
    size = rewards.shape[1]
    if k < MIN_K[form]:
        raise ValueError(f"k must be at least {MIN_K[form]} for form {form!r}, got {k}")
    if size < (needed := samples_for_max_at_k(form, k)):
        raise ValueError(f"form {form!r} needs at least {needed} samples a prompt for k = {k}, got G = {size}")
    if kept is None:
        kept = torch.ones_like(rewards, dtype=torch.bool)
    check_mask("kept", kept)
    check_same_shape("kept", kept, "rewards", rewards)
    count = kept.sum(1, keepdim=True)
    # What is left out stands at the lower end, level with the worst that is kept: a gap of 0.
    worst = rewards.masked_fill(~kept, torch.inf).amin(1, keepdim=True)
    values, order = torch.where(kept, rewards, worst).to(working_dtype(rewards)).sort(1)
    values = torch.where(count > 0, values, 0.0)
    gaps = values.diff(dim=1)
    below = (torch.arange(1, size, device=rewards.device) - (size - count)).clamp(min=0)  # kept samples under each gap
    if form == "plain":
        # sum_{t >= i}: from the top down.
        above = (gaps * _shares(size - 1, k - 1, below - 1, count - 1)).flip(1).cumsum(1).flip(1)
        sums = values[:, -1:] - torch.nn.functional.pad(above, (0, 1))
    elif form == "marginal":
        sums = torch.nn.functional.pad((gaps * _shares(size - 1, k - 1, below, count - 1)).cumsum(1), (1, 0))
    else:
        sums = torch.nn.functional.pad((gaps * _shares(size - 2, k - 1, below - 1, count - 2)).cumsum(1), (1, 0))
    sums = torch.empty_like(sums).scatter_(1, order, sums)
    if form == "centred":
        sums = leave_one_out(sums, kept)
    told = kept & (count >= needed)
    return masked(k * sums, told).to(rewards.dtype)


def _shares(size: int, part: int, below: Tensor, of: Tensor) -> Tensor:
    """Return ``C(below, part) / C(of, part)``, both of tensors up to ``size``; 0 where there is no such subset."""
    table = subset_shares(size, part).to(below.device, working_dtype(below))
    shares, whole = table[below.clamp(min=0)], table[of.clamp(min=0)]
    return torch.where(whole > 0, shares / whole.clamp(min=torch.finfo(table.dtype).tiny), 0.0)
