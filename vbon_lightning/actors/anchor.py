"""The anchor: a reference that moves, a frozen copy of the policy that follows it.

It is the policy with other values of what is trained: a second set of adapters on the same base, a second tower beside
the same base, or a second model. What is frozen in the policy is one and the same in both.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vbon_lightning.models import ModelError


def make_anchor(policy: PreTrainedModel, reference: PreTrainedModel | None) -> PreTrainedModel:
    """Copy a policy, sharing what is frozen in it, and give the copy the reference's weights: it starts as that.

    Args:
        policy: A policy before its training.
        reference: The reference where it is a model of its own; None where it is the policy with its adapters or its
            tilt off, which is what the policy is before its training.

    Raises:
        ModelError: If the reference's weights are not those of the policy's kind of model.
    """
    shared = {id(parameter): parameter for parameter in policy.parameters() if not parameter.requires_grad}
    anchor: PreTrainedModel = copy.deepcopy(policy, shared)
    anchor.requires_grad_(False)
    if reference is not None:
        try:
            anchor.load_state_dict(reference.state_dict(), strict=True)
        except RuntimeError as problem:
            raise ModelError(
                "an anchor starts as the reference and follows the policy, so that both must have the same weights, of "
                "the same shapes: leave data.reference out, or name one of the policy's own kind and without adapters "
                f"({str(problem).splitlines()[-1].strip()})"
            ) from problem
    return anchor


@torch.no_grad()
def replace_anchor(anchor: PreTrainedModel, policy: PreTrainedModel) -> None:
    """Give an anchor the policy's weights.

    Args:
        anchor: A copy of the policy.
        policy: The policy.
    """
    for theirs, ours in _pairs(anchor, policy):
        theirs.copy_(ours)


@torch.no_grad()
def average_anchor(anchor: PreTrainedModel, policy: PreTrainedModel, rate: float) -> None:
    """Move an anchor's weights towards the policy's, ``anchor <- (1 - rate) anchor + rate policy``.

    With adapters it is their own two matrices that are averaged.

    Args:
        anchor: A copy of the policy.
        policy: The policy.
        rate: In (0, 1].
    """
    for theirs, ours in _pairs(anchor, policy):
        theirs.lerp_(ours, rate)


def _pairs(anchor: PreTrainedModel, policy: PreTrainedModel) -> Iterator[tuple[Tensor, Tensor]]:
    """Give the weights that anchor and policy do not share."""
    for theirs, ours in zip(anchor.parameters(), policy.parameters(), strict=True):
        if theirs is not ours:
            yield theirs, ours
