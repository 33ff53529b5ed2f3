"""A policy over a handful of responses: where a loss on all of them leads, and its gradient when it samples them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

LOG_P = torch.tensor([0.05, 0.3, 0.1, 0.2, 0.25, 0.1], dtype=torch.float64).log()
"""``[6]``: log-probabilities of the reference's responses."""
REWARDS = torch.tensor([2.0, -1.0, 0.5, 0.5, 0.0, 2.0], dtype=torch.float64)
"""``[6]``: their rewards, of which two and two tie."""

Loss = Callable[[Tensor, slice], Tensor]
"""A scalar loss of log-ratios ``[1, G]``, those of some of the responses."""


def quantile(reward: float, *, strictly: bool) -> float:
    """Probability of a lower reward, or of one that is no higher, by a sum."""
    lower = [r < reward if strictly else r <= reward for r in REWARDS.tolist()]
    return sum(p for p, counts in zip(LOG_P.exp().tolist(), lower, strict=True) if counts)


BELOW = torch.tensor([quantile(r, strictly=True) for r in REWARDS.tolist()], dtype=torch.float64)
AT_OR_BELOW = torch.tensor([quantile(r, strictly=False) for r in REWARDS.tolist()], dtype=torch.float64)


def minimum(loss: Loss, log_p: Tensor = LOG_P) -> Tensor:
    """Return the log-probabilities at which a loss on all responses alike is least, found by its gradient."""
    logits = torch.zeros_like(log_p, requires_grad=True)
    search = torch.optim.LBFGS(
        [logits], max_iter=400, tolerance_grad=1e-13, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        search.zero_grad()
        value = loss((logits.log_softmax(-1) - log_p)[None], slice(None))
        value.backward()
        return value

    search.step(closure)
    return logits.detach().log_softmax(-1)


def policy_logits() -> Tensor:
    """Logits of a policy that is not the reference."""
    return torch.tensor([0.3, -0.2, 1.0, -0.7, 0.1, 0.4], dtype=torch.float64, requires_grad=True)


def expected_gradient(loss: Loss) -> Tensor:
    """Return the mean gradient of a loss on responses that the policy samples, over all it may sample."""
    logits = policy_logits()
    log_pi = logits.log_softmax(-1)
    terms = [
        log_pi[k].detach().exp() * loss((log_pi - LOG_P)[None, k : k + 1], slice(k, k + 1)) for k in range(len(LOG_P))
    ]
    return torch.autograd.grad(torch.stack(terms).sum(), logits)[0]


def objective_gradient(objective: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the gradient of an objective of log-probabilities, each response counted by its probability."""
    logits = policy_logits()
    return torch.autograd.grad(objective(logits.log_softmax(-1)), logits)[0]


def tables(samples: int, log_p: Tensor = LOG_P) -> list[tuple[float, list[int]]]:
    """Return every table of so many responses, as places among them, and its probability."""
    places = range(len(log_p))
    return [(float(log_p[list(table)].sum().exp()), list(table)) for table in itertools.product(places, repeat=samples)]
