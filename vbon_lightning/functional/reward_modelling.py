"""Losses that a reward is learnt by."""

from __future__ import annotations

import torch
from torch import Tensor

from vbon_lightning.functional._validate import check_float, check_real, check_same_shape


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, *, centre: float = 0.0) -> Tensor:
    """Compute the negative log-likelihood of preferences, ``-log sigmoid(r_chosen - r_rejected)``.

    Rewards are learnt up to a constant only; ``centre`` adds ``centre (r_chosen + r_rejected)^2``, which draws their
    mean to zero. Bradley and Terry, Rank Analysis of Incomplete Block Designs, 1952; the centring is that of Helping
    or Herding?, https://arxiv.org/abs/2312.09244.

    Args:
        chosen: any shape, rewards of the preferred responses.
        rejected: the same shape, rewards of the others.
        centre: weight of the centring term, at least 0.

    Returns:
        The shape of ``chosen``, in nats.

    Raises:
        TypeError: on a wrong dtype or a ``centre`` that is not a number.
        ValueError: if the shapes differ or ``centre < 0``.
    """
    check_float("chosen", chosen)
    check_float("rejected", rejected)
    check_same_shape("rejected", rejected, "chosen", chosen)
    check_real("centre", centre, at_least=0.0)
    loss = torch.nn.functional.softplus(rejected - chosen)
    return loss + centre * (chosen + rejected).square() if centre else loss
