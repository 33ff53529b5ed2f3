"""Best-of-N's next-token distribution over candidates, as a dense target for a policy."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vbon_lightning.functional._validate import check_float, check_real, check_same_shape


class Candidates(NamedTuple):
    """Tokens that stand for the reference's next-token distribution at a state."""

    tokens: Tensor
    """``[..., k]`` long."""
    log_mass: Tensor
    """``[..., k]``: log of the probability that each stands for."""
    log_rest: Tensor | None
    """``[...]``: log of the probability that none of them stands for, or None where they stand for all of it."""


@torch.no_grad()
def draw_candidates(log_reference: Tensor, *, top: int, draws: int = 0, uniforms: Tensor | None = None) -> Candidates:
    """Take the reference's most likely tokens, and draw some of the others.

    Each of the ``top`` stands for its own probability. The rest is stratified: draw j of d has a quantile in
    ``[j/d, (j+1)/d)`` of the rest's distribution, and stands for 1/d of its probability, so that
    ``sum_i mass_i f(a_i)`` is unbiased for ``E_ref[f(a)]``. Without draws the rest is left over, in one bin.

    Args:
        log_reference: ``[..., V]`` normalised log-probabilities.
        top: how many of the most likely to take, at least 0.
        draws: how many to draw of the others.
        uniforms: ``[..., draws]`` on [0, 1).

    Raises:
        TypeError: on a wrong dtype.
        ValueError: if no candidate is asked for, or the uniforms do not fit.
    """
    check_float("log_reference", log_reference)
    check_real("top", top, at_least=0)
    check_real("draws", draws, at_least=0)
    if top + draws < 1:
        raise ValueError("at least one candidate is needed: raise top or draws")
    top = min(top, log_reference.shape[-1])
    mass, tokens = log_reference.topk(top)
    if top == log_reference.shape[-1]:
        return Candidates(tokens, mass, None)
    rest = log_reference.exp()
    if top:
        rest = rest.scatter(-1, tokens, 0.0)
    total = rest.sum(-1, dtype=torch.float64)
    log_rest = total.log().to(log_reference.dtype)
    if not draws:
        return Candidates(tokens, mass, log_rest)
    if uniforms is None or uniforms.shape != (*log_reference.shape[:-1], draws):
        raise ValueError(
            f"uniforms must have shape {[*log_reference.shape[:-1], draws]}, got "
            f"{None if uniforms is None else list(uniforms.shape)}"
        )
    cumulative = rest.cumsum(-1, dtype=torch.float64)
    strata = (torch.arange(draws, device=uniforms.device) + uniforms.double()) / draws
    drawn = torch.searchsorted(cumulative, strata * cumulative[..., -1:], right=True)
    drawn = drawn.clamp_(max=log_reference.shape[-1] - 1)
    share = (log_rest - math.log(draws)).unsqueeze(-1).expand(drawn.shape)
    return Candidates(torch.cat([tokens, drawn], -1), torch.cat([mass, share], -1), None)


class Teacher(NamedTuple):
    """A next-token distribution: a multiple of the reference, corrected at the candidates."""

    correction: Tensor
    """``[..., k]``: what is added at each candidate; one that stands there twice gets both."""
    scale: Tensor
    """``[...]``: the factor of the reference's own distribution."""
    log_normaliser: Tensor
    """``[...]``: log of ``sum_i mass_i W_i`` (and of the rest): the state's own W as the candidates have it."""
    tilt: Tensor
    """``[...]``: ``E_t[log(t / ref)]`` in nats, the KL of the teacher to the reference at the state."""


@torch.no_grad()
def candidate_teacher(candidates: Candidates, log_values: Tensor, state_log_values: Tensor) -> Teacher:
    """Build ``ref(a | s) W(s a) / W(s)`` from the values of candidates.

    With ``m_i`` the mass of candidate i and ``t_i = m_i W_i / sum_j m_j W_j``, the teacher is
    ``ref + sum_i (t_i - m_i)``, the reference's part exact over the vocabulary; what its expectation over draws lacks
    of the exact one is the bias of a ratio, of order 1/k. Where a rest is left over it is worth what the state is, and
    the teacher is ``ref(a) W(s) / Z`` there and ``m_i W_i / Z`` at the candidates: a distribution.

    Args:
        candidates: k candidates a state.
        log_values: ``[..., k]``, log W after each.
        state_log_values: ``[...]``, log W of the state; read only where a rest is left over.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: if the shapes differ.
    """
    check_float("log_values", log_values)
    check_same_shape("log_values", log_values, "candidates.log_mass", candidates.log_mass)
    weighted = candidates.log_mass + log_values
    remaining: Tensor | float = 0.0
    if candidates.log_rest is None:
        normaliser = weighted.logsumexp(-1)
        scale = torch.ones_like(normaliser)
    else:
        check_float("state_log_values", state_log_values)
        check_same_shape("state_log_values", state_log_values, "candidates.log_rest", candidates.log_rest)
        rest = candidates.log_rest + state_log_values
        normaliser = torch.logaddexp(weighted.logsumexp(-1), rest)
        scale = (state_log_values - normaliser).exp()
        remaining = (rest - normaliser).exp() * (state_log_values - normaliser)
    share = (weighted - normaliser.unsqueeze(-1)).exp()
    correction = share - scale.unsqueeze(-1) * candidates.log_mass.exp()
    tilt = (share * (log_values - normaliser.unsqueeze(-1))).sum(-1) + remaining
    return Teacher(correction, scale, normaliser, tilt)


@torch.no_grad()
def teacher_probs(reference_probs: Tensor, tokens: Tensor, correction: Tensor, scale: Tensor) -> Tensor:
    """Lay a teacher over the vocabulary; it sums to 1, and with drawn candidates may be negative in places.

    Args:
        reference_probs: ``[..., V]``.
        tokens: ``[..., k]`` long.
        correction: ``[..., k]``.
        scale: ``[...]``.

    Returns:
        ``[..., V]``.
    """
    dense = reference_probs * scale.unsqueeze(-1).to(reference_probs.dtype)
    return dense.scatter_add_(-1, tokens, correction.to(dense.dtype))


def forward_divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    """Compute the cross-entropy ``-sum_a t(a) log pi(a)`` of a policy against a teacher.

    Its gradient is that of KL(teacher || policy). Linear in the teacher, so that an unbiased one gives an unbiased
    gradient.

    Args:
        logits: ``[..., V]`` of the policy, at the sampling temperature.
        teacher: ``[..., V]``, summing to 1.

    Returns:
        ``[...]``.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: if the shapes differ.
    """
    check_float("logits", logits)
    check_same_shape("teacher", teacher, "logits", logits)
    return -(teacher * logits.log_softmax(-1)).sum(-1)


def reverse_divergence(
    logits: Tensor, log_reference: Tensor, candidates: Candidates, log_values: Tensor, state_log_values: Tensor
) -> Tensor:
    """Compute KL(policy || teacher) with the teacher ``ref(a | s) W(s a) / W(s)``, over candidates of the policy.

        KL(pi || ref) - sum_i m_i (log W(s a_i) - log W(s)),

    the first exact over the vocabulary, the masses m_i those of candidates drawn from the policy
    (:func:`draw_candidates`). The gradient is unbiased over the draws: of each mass it is ``m_i grad log pi(a_i)``. It
    is what an actor with the critic log W gets when many actions at each state are asked for instead of one.

    Args:
        logits: ``[..., V]`` of the policy, at the sampling temperature.
        log_reference: ``[..., V]`` normalised log-probabilities.
        candidates: k candidates of the policy's own next-token distribution.
        log_values: ``[..., k]``, log W after each.
        state_log_values: ``[...]``, log W of the state; also what a rest that is left over is worth.

    Returns:
        ``[...]``, differentiable in the logits.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: if the shapes differ.
    """
    check_float("logits", logits)
    check_same_shape("log_reference", log_reference, "logits", logits)
    check_same_shape("log_values", log_values, "candidates.tokens", candidates.tokens)
    log_policy = logits.log_softmax(-1)
    kl = (log_policy.exp() * (log_policy - log_reference)).sum(-1)
    chosen = log_policy.gather(-1, candidates.tokens)
    mass = candidates.log_mass.exp() * (chosen - chosen.detach()).exp()
    return kl - (mass * (log_values - state_log_values.unsqueeze(-1))).sum(-1)
