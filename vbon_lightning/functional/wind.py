r"""WIND: the iterated, regularised game of win rates, one iteration as a regression.

With the win rate ``P(y) = P(y beats y' ~ pi_t)``, a tie counting half, an iteration of step size h and regularisation b
is

    pi_{t+1}  ~  pi_t^{1/(1+hb)} ref^{hb/(1+hb)} exp(h/(1+hb) P),

that is ``g(y) = b log(pi_{t+1}/ref) + 1/h log(pi_{t+1}/pi_t) = P(y) + c``, with a constant c of the prompt. Its fixed
point, whatever h, is ``pi ~ ref exp(P/b)``, the equilibrium of the game in which both players pay b times their KL to
the reference.

The paper: Yang, Mei, Dai, Wen, Cen, Schuurmans, Chi and Dai, "Faster WIND: Accelerating Iterative Best-of-N
Distillation for LLM Alignment", 2024, https://arxiv.org/abs/2410.20727. The fits are derived here from the iteration,
and need not be its authors'. In a pair of draws of ``pi_t`` the constant goes out: ``(1 + g_i - g_j)/2`` is fitted to
the mean of outcomes that lie in [0, 1], ``(1 + P_i - P_j)/2``, by a proper loss, so that the iteration is the minimiser
at every number of responses.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from vbon_lightning.functional._validate import check_dims, check_float, check_real, check_same_shape

Fit = Literal["squared", "kl", "nce"]
WIND_FITS: tuple[str, ...] = get_args(Fit)

_EDGE = 1e-2
"""Predictions beyond this distance from 0 and 1 lose along the tangent there, which is finite."""


def wind_log_ratio(
    log_probs: Tensor, anchor_log_probs: Tensor, reference_log_probs: Tensor, *, beta: float, step_size: float
) -> Tensor:
    """Compute ``g = beta log(pi/ref) + 1/step_size log(pi/anchor)``, which an iteration fits to win rates.

    Args:
        log_probs: Any shape, of responses under the policy, differentiable.
        anchor_log_probs: The same shape, under the iterate before, which sampled them.
        reference_log_probs: The same shape, under the reference.
        beta: Regularisation, > 0.
        step_size: Step size of an iteration, > 0.

    Returns:
        The same shape.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: if the shapes differ, or ``beta`` or ``step_size`` is not positive.
    """
    check_float("log_probs", log_probs)
    for name, other in (("anchor_log_probs", anchor_log_probs), ("reference_log_probs", reference_log_probs)):
        check_float(name, other)
        check_same_shape(name, other, "log_probs", log_probs)
    check_real("beta", beta, above=0.0)
    check_real("step_size", step_size, above=0.0)
    return beta * (log_probs - reference_log_probs) + (log_probs - anchor_log_probs) / step_size


def wind_loss(log_ratio: Tensor, rewards: Tensor, *, fit: Fit = "squared") -> Tensor:
    """Compute the loss of an iteration over all pairs of a prompt's responses, each judged by the others.

    For the pair (i, j), with ``w_ik`` 1 where i beats k, and 1/2 where they tie: ``t = (1 + mean_{k != i, j} (w_ik -
    w_jk))/2``, whose mean given the pair is ``(1 + P_i - P_j)/2``, and ``p = (1 + g_i - g_j)/2``. The losses are
    ``squared``, ``(p - t)^2``; ``kl``, the cross-entropy ``-t log p - (1 - t) log(1 - p)``; and ``nce``,
    noise-contrastive estimation, ``(1 + 2t) log(1 + 2p) - 2t log 2p``, in which draws of the iterate are the noise, and
    draws that win are the data, of density ratio 2p. Each is least where ``p`` is the mean of ``t``, for every pair at
    once.

    Args:
        log_ratio: ``[B, G]``, :func:`wind_log_ratio` of responses that the iterate before sampled, differentiable.
        rewards: ``[B, G]``, their rewards, G >= 3; a response whose reward is NaN is left out.
        fit: Which loss.

    Returns:
        A scalar, the mean over the pairs of a prompt, then over the prompts that have any.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: if the shapes differ, G < 3 or ``fit`` is unknown.
    """
    check_float("log_ratio", log_ratio)
    check_float("rewards", rewards)
    check_dims("rewards", rewards, 2, "[B, G]")
    check_same_shape("log_ratio", log_ratio, "rewards", rewards)
    if rewards.shape[1] < 3:
        raise ValueError(f"WIND judges a pair by a third response: rewards needs G >= 3, got {rewards.shape[1]}")
    if fit not in WIND_FITS:
        raise ValueError(f"fit must be one of {', '.join(WIND_FITS)}, got {fit!r}")
    with torch.no_grad():
        outcome, pairs = _outcomes(rewards)
    predicted = (1 + log_ratio[:, :, None] - log_ratio[:, None, :]) / 2
    losses = torch.where(pairs, _proper_loss(predicted, outcome.to(predicted.dtype), fit), 0.0)
    count = pairs.sum((1, 2))
    return (losses.sum((1, 2)) / count.clamp(min=1)).sum() / (count > 0).sum().clamp(min=1)


def _outcomes(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outcome of each ordered pair as the other responses judge it, and which pairs there are."""
    kept = ~rewards.isnan()
    both = kept[:, :, None] & kept[:, None, :] & ~torch.eye(rewards.shape[1], dtype=torch.bool, device=rewards.device)
    mine, theirs = rewards[:, :, None], rewards[:, None, :]
    wins = torch.where(both, (mine > theirs).to(rewards.dtype) + (mine == theirs).to(rewards.dtype) / 2, 0.0)
    total = wins.sum(-1)
    # Neither of the two is among the others.
    others = (total[:, :, None] - wins) - (total[:, None, :] - wins.transpose(1, 2))
    judges = (kept.sum(1) - 2)[:, None, None]
    return (1 + others / judges.clamp(min=1)) / 2, both & (judges > 0)


def _proper_loss(predicted: Tensor, outcome: Tensor, fit: str) -> Tensor:
    """Return a loss of predictions that is least in their mean where they equal that of the outcomes."""
    if fit == "squared":
        return (predicted - outcome).square()
    inside = predicted.clamp(_EDGE, 1 - _EDGE) if fit == "kl" else predicted.clamp(min=_EDGE)
    if fit == "kl":
        value = -outcome * inside.log() - (1 - outcome) * torch.log1p(-inside)
        slope = (inside - outcome) / (inside * (1 - inside))
    else:
        value = (1 + 2 * outcome) * torch.log1p(2 * inside) - 2 * outcome * (2 * inside).log()
        slope = 2 * (inside - outcome) / (inside * (1 + 2 * inside))
    return value + slope.detach() * (predicted - inside)
