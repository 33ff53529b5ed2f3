"""The reward and the baseline of J-BOND."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vbon_lightning.functional._validate import check_dims, check_float, check_mask, check_shape
from vbon_lightning.functional.best_of_n import subset_shares
from vbon_lightning.functional.reward_cdf import check_rewards_pair, reward_counts
from vbon_lightning.functional.sequences import masked


@torch.no_grad()
def j_bond_rewards(rewards: Tensor, anchor_rewards: Tensor) -> Tensor:
    """Compute J-BOND's reward: ``-log 16`` for a response that loses to both of two of the anchor's, 0 for others.

    It stands for ``log F_le``, whose mean over ranks, -1, it comes near: ``E[(1 - F)^2] log 16 = 0.92``. Of M >= 2
    responses of the anchor it is the mean over all pairs, ``-log 16 C(k, 2) / C(M, 2)`` with k the number of better
    ones: the same in expectation, with less noise. A tie is no loss.

    Sessa, Dadashi, Hussenot et al., "BOND: Aligning LLMs with Best-of-N Distillation", 2024, Algorithm 2;
    https://arxiv.org/abs/2407.14622.

    Args:
        rewards: ``[B, G]``, of the policy's responses.
        anchor_rewards: ``[B, M]``, of the anchor's, M >= 2.

    Returns:
        ``[B, G]``, in the dtype of ``rewards``.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: on shapes that do not fit, or M < 2.
    """
    check_float("anchor_rewards", anchor_rewards)
    check_rewards_pair(rewards, anchor_rewards)
    samples = anchor_rewards.shape[1]
    if samples < 2:
        raise ValueError(f"J-BOND compares with pairs of the anchor's: anchor_rewards needs M >= 2, got {samples}")
    better = samples - reward_counts(rewards, anchor_rewards)[1]
    shares = subset_shares(samples, 2).to(rewards.device, rewards.dtype)
    lost = shares[better].masked_fill(rewards.isnan(), torch.nan)
    return -math.log(16.0) * lost


@torch.no_grad()
def leave_one_out_of_all(
    values: Tensor, kept: Tensor, *, add_up: Callable[[Tensor], Tensor] = lambda part: part
) -> Tensor:
    """Subtract from each response's value the mean of all other responses', those of other prompts as well.

    The others do not depend on it, so the policy gradient stays unbiased; it is noisier than
    :func:`~vbon_lightning.functional.leave_one_out` by what prompts differ, and does with one response a prompt.

    Args:
        values: ``[B, G, T]``.
        kept: ``[B, G]`` bool: False for responses that are left out.
        add_up: Adds a tensor up over the parts of the batch that other processes hold; the batch is whole by default.

    Returns:
        ``[B, G, T]``; 0 for responses that are left out, and where fewer than 2 are kept.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: if the shapes do not fit.
    """
    check_float("values", values)
    check_dims("values", values, 3, "[B, G, T]")
    check_mask("kept", kept)
    check_shape("kept", kept, values.shape[:2], "[B, G]")
    counted = kept[..., None].expand_as(values)
    count = add_up(kept.sum().to(values.dtype))
    mean = add_up(masked(values, counted).sum((0, 1))) / count.clamp(min=1)
    return masked((values - mean) * (count / (count - 1).clamp(min=1)), counted & (count > 1))
