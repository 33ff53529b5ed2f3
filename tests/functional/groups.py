"""A policy over a few responses to one prompt, of which every group of samples can be listed."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

THETA = torch.tensor([0.3, -0.4, 0.1, 0.9], dtype=torch.float64)
REFERENCE = torch.tensor([0.15, 0.4, 0.25, 0.2], dtype=torch.float64)
DISTINCT = torch.tensor([0.5, -1.0, 2.0, 1.0], dtype=torch.float64)
BINARY = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
TIED = torch.tensor([1.0, 0.0, 1.0, 2.0], dtype=torch.float64)


def groups(size: int) -> Tensor:
    """List all groups of samples ``[groups, size]``."""
    return torch.tensor(list(itertools.product(range(len(THETA)), repeat=size)))


def expected_gradient(advantages: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """Sum ``P(group) mean_i A_i grad log pi(y_i)`` over all groups, the advantages a function of them."""
    theta = THETA.clone().requires_grad_()
    log_probs = theta.log_softmax(-1)[groups(size)]
    surrogate = (advantages(groups(size)) * log_probs).mean(1)
    gradient: Tensor = torch.autograd.grad((log_probs.detach().sum(1).exp() * surrogate).sum(), theta)[0]
    return gradient


def gradient_of(objective: Callable[[Tensor], Tensor]) -> Tensor:
    """Differentiate an objective, a function of the policy's probabilities."""
    theta = THETA.clone().requires_grad_()
    gradient: Tensor = torch.autograd.grad(objective(theta.softmax(-1)), theta)[0]
    return gradient


def expected_maximum(rewards: Tensor, k: int) -> Callable[[Tensor], Tensor]:
    """Return ``E[max of k]`` as a function of the probabilities: a sum over all k-tuples."""

    def of(probs: Tensor) -> Tensor:
        tuples = groups(k)
        return (probs[tuples].prod(1) * rewards[tuples].amax(1)).sum()

    return of
