"""Group-relative policy optimisation: advantages in units of a group's spread, and what a long response counts."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from vbon_lightning.functional._validate import (
    check_dims,
    check_float,
    check_mask,
    check_real,
    check_same_shape,
)
from vbon_lightning.functional.sequences import masked

LengthNorm = Literal["grpo", "dr_grpo", "dapo"]


@torch.no_grad()
def group_normalised_advantages(
    rewards: Tensor, *, kept: Tensor | None = None, scale: bool = True, eps: float = 1e-4
) -> Tensor:
    """Compute GRPO's advantages, ``A_i = (r_i - mean) / (std + eps)`` over the group of a prompt.

    Shao and others, "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models", 2024,
    https://arxiv.org/abs/2402.03300. The standard deviation is that of a sample (over G - 1), and eps 1e-4, as in TRL.

    Both make the expected gradient another than that of the expected reward. The mean counts the sample itself, which
    shrinks all advantages by (G - 1)/G. The division weighs prompts by the inverse of their spread, so that easy and
    hard prompts, whose rewards hardly differ, count most: ``scale=False`` leaves it out, as Liu and others do,
    "Understanding R1-Zero-Like Training: A Critical Perspective", 2025, https://arxiv.org/abs/2503.20783.

    Args:
        rewards: ``[B, G]``.
        kept: ``[B, G]`` bool: False for samples that are left out, whatever their rewards; None for none.
        scale: divide by the group's standard deviation.
        eps: added to the standard deviation.

    Returns:
        ``[B, G]``; 0 for samples that are left out, and where a group keeps fewer than 2.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: if the shapes differ, ``G < 2`` or ``eps < 0``.
    """
    check_float("rewards", rewards)
    check_dims("rewards", rewards, 2, "[B, G]")
    check_real("eps", eps, at_least=0.0)
    if rewards.shape[1] < 2:
        raise ValueError(f"a group's mean and spread need G >= 2 samples a prompt, got G = {rewards.shape[1]}")
    if kept is None:
        kept = torch.ones_like(rewards, dtype=torch.bool)
    check_mask("kept", kept)
    check_same_shape("kept", kept, "rewards", rewards)
    count = kept.sum(1, keepdim=True).to(rewards.dtype)
    mean = masked(rewards, kept).sum(1, keepdim=True) / count.clamp(min=1)
    centred = masked(rewards - mean, kept & (count > 1))
    if not scale:
        return centred
    variance = centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
    return centred / (variance.sqrt() + eps)


@torch.no_grad()
def length_weights(mask: Tensor, *, norm: LengthNorm, max_length: int) -> Tensor:
    """Compute the weight of each response in a loss that sums over its tokens and averages over responses.

    - ``grpo``: ``1 / |y|``, the mean over a response's tokens. Of two wrong responses the longer one is punished less a
      token: biased towards length.
    - ``dr_grpo``: ``1 / max_length``, the same for all: the sum over tokens in units of the longest response; Liu and
      others, 2025, https://arxiv.org/abs/2503.20783.
    - ``dapo``: responses over tokens of the batch: the mean over all its tokens; Yu and others, "DAPO: An Open-Source
      LLM Reinforcement Learning System at Scale", 2025, https://arxiv.org/abs/2503.14476.

    Args:
        mask: ``[B, G, T]`` bool, True on response tokens.
        norm: ``grpo``, ``dr_grpo`` or ``dapo``.
        max_length: the most tokens a response may have, at least 1.

    Returns:
        ``[B, G]`` float32.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: on a wrong shape, an unknown ``norm`` or ``max_length < 1``.
    """
    check_mask("mask", mask)
    check_dims("mask", mask, 3, "[B, G, T]")
    check_real("max_length", max_length, at_least=1)
    if norm not in (known := get_args(LengthNorm)):
        raise ValueError(f"norm must be one of {', '.join(known)}, got {norm!r}")
    lengths = mask.sum(-1).float()
    if norm == "grpo":
        return 1 / lengths.clamp(min=1)
    if norm == "dr_grpo":
        return torch.full_like(lengths, 1 / max_length)
    return torch.ones_like(lengths) * (mask.any(-1).sum() / lengths.sum().clamp(min=1))
