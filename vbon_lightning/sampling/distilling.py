"""The divergence of a policy from Best-of-N at every token of given responses, over candidates of the reference."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from vbon_lightning.functional import (
    Candidates,
    Teacher,
    candidate_teacher,
    draw_candidates,
    forward_divergence,
    reverse_divergence,
    teacher_probs,
)
from vbon_lightning.functional.sequences import scaled_logits
from vbon_lightning.sampling.decode import forget_casts
from vbon_lightning.sampling.scoring import MAX_LOGITS, States, base_states, response_states
from vbon_lightning.types import Completions, PromptBatch, Responses


class CandidateRequest(NamedTuple):
    """Which candidates stand for a next-token distribution."""

    top: int
    """How many of its most likely tokens."""
    draws: int
    """How many drawn from the others; with 0 they are one bin."""


class Scorer(Protocol):
    """What values candidates: see :class:`~vbon_lightning.prefix_scorer.PrefixScorer`."""

    def candidate_log_values(
        self,
        prompts: PromptBatch,
        responses: Completions | Responses,
        candidates: Tensor,
        log_weights: Tensor,
    ) -> Tensor:
        """Return log W after each candidate, ``[B, G, R, k]``."""
        ...


class Distilled(NamedTuple):
    """What distillation says of each response token; 0 outside the mask."""

    divergence: Tensor
    """``[B, G, T]``: what is to be minimised, differentiable: a cross-entropy, or KL(policy || teacher)."""
    teacher_kl: Tensor
    """``[B, G, T]``: the KL between policy and teacher that this is, in nats, without gradient. Drawn candidates are a
    noisy teacher, and forward the noise is in it."""


def distil(
    policy: PreTrainedModel,
    reference: Callable[[], AbstractContextManager[PreTrainedModel]],
    scorer: Scorer,
    prompts: PromptBatch,
    responses: Completions | Responses,
    log_weights: Tensor,
    log_values: Tensor,
    request: CandidateRequest,
    *,
    ends: Tensor | None = None,
    uniforms: Tensor | None = None,
    temperature: float = 1.0,
    reverse: bool = False,
    max_logits: int = MAX_LOGITS,
) -> Distilled:
    """Compare a policy with ``ref(a | s) W(s a) / W(s)`` at each position of the responses.

    Args:
        policy: The policy; gradients flow to it where they are enabled.
        reference: A context that gives the reference.
        scorer: Values candidates.
        prompts: ``[B, P]`` prompts.
        responses: ``[B, G, T]`` responses.
        log_weights: ``[B, K]``: log w of the bins.
        log_values: ``[B, G, T + 1]``: log W of the responses' own prefixes, with the constant that the scorer's have.
        request: Which candidates.
        ends: ``[B, G]``: log W of the whole responses, where their rewards are known: that of their last tokens among
            the candidates.
        uniforms: ``[B, G, T, draws]`` on [0, 1).
        temperature: The sampling temperature, of policy and reference alike.
        reverse: KL(policy || teacher), over candidates of the policy, instead of the teacher's cross-entropy, over
            candidates of the reference.
        max_logits: Logits of each model that live at once.
    """
    ours = response_states(policy, prompts, responses)
    with torch.no_grad(), reference() as model:
        theirs = base_states(model, ours) or response_states(model, prompts, responses)
    mask = responses.mask
    real = mask.reshape(-1).nonzero().squeeze(-1)
    pieces = real.split(max(1, max_logits // theirs.vocabulary))
    with torch.no_grad():
        flat = None if uniforms is None else uniforms.flatten(0, -2)
        # Forward, the reference's tokens are weighed; in reverse, those that the policy would take.
        source = ours if reverse else theirs
        candidates = join_candidates([_candidates(source, rows, request, flat, temperature) for rows in pieces])
        everywhere = candidates.tokens.new_zeros(mask.numel(), candidates.tokens.shape[-1])
        everywhere[real] = candidates.tokens
        after = scorer.candidate_log_values(prompts, responses, everywhere.view(*mask.shape, -1), log_weights)
        after = after.flatten(0, -2)[real]
        before = log_values[..., :-1].reshape(-1)[real]
        if ends is not None:
            last = torch.arange(mask.shape[-1], device=mask.device) == mask.sum(-1, keepdim=True) - 1
            known = last.reshape(-1)[real, None] & (candidates.tokens == responses.tokens.reshape(-1)[real, None])
            whole = ends.unsqueeze(-1).expand(mask.shape).reshape(-1)[real, None]
            after = torch.where(known, whole.to(after.dtype), after)
        teacher = None if reverse else candidate_teacher(candidates, after, before)
    again = len(pieces) > 1 and torch.is_grad_enabled()
    done, at = [], 0
    for rows in pieces:
        part = slice(at, at + len(rows))
        at += len(rows)
        if teacher is None:
            chunk: Callable[..., tuple[Tensor, Tensor]] = _reverse_chunk
            given: tuple[Any, ...] = (_part(candidates, part), after[part], before[part])
        else:
            chunk, given = _forward_chunk, (_part(candidates, part), _part(teacher, part))
        arguments = (ours, ours.features[rows], theirs, rows, temperature, *given)
        done.append(checkpoint(chunk, *arguments, use_reentrant=False) if again else chunk(*arguments))

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(mask.numel()).index_copy(0, real, values).view(mask.shape)

    return Distilled(
        spread(torch.cat([divergence for divergence, _ in done])),
        spread(torch.cat([kl for _, kl in done])),
    )


def join_candidates(parts: list[Candidates]) -> Candidates:
    """Lay the candidates of some rows end to end."""
    rest = [part.log_rest for part in parts if part.log_rest is not None]
    return Candidates(
        torch.cat([part.tokens for part in parts]),
        torch.cat([part.log_mass for part in parts]),
        torch.cat(rest) if rest else None,
    )


def _part(record: Any, rows: slice) -> Any:
    return type(record)(*(None if value is None else value[rows] for value in record))


def _log_probs(states: States, rows: Tensor, temperature: float) -> Tensor:
    features = states.features[rows]
    logits = features if states.head is None else states.head(features)
    return scaled_logits(logits, temperature).log_softmax(-1)


def _candidates(
    source: States, rows: Tensor, request: CandidateRequest, uniforms: Tensor | None, temperature: float
) -> Candidates:
    chosen = None if uniforms is None else uniforms[rows]
    log_probs = _log_probs(source, rows, temperature)
    return draw_candidates(log_probs, top=request.top, draws=request.draws, uniforms=chosen)


def _policy_logits(ours: States, features: Tensor, temperature: float) -> Tensor:
    forget_casts(features.device)
    return scaled_logits(features if ours.head is None else ours.head(features), temperature)


def _forward_chunk(
    ours: States,
    features: Tensor,
    theirs: States,
    rows: Tensor,
    temperature: float,
    candidates: Candidates,
    teacher: Teacher,
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        log_reference = _log_probs(theirs, rows, temperature)
        target = teacher_probs(log_reference.exp(), candidates.tokens, teacher.correction, teacher.scale)
    divergence = forward_divergence(_policy_logits(ours, features, temperature), target)
    # KL(teacher || policy) = E_t[log t/ref] + E_t[log ref/pi], each as the candidates have it.
    return divergence, divergence.detach() + (target * log_reference).sum(-1) + teacher.tilt


def _reverse_chunk(
    ours: States,
    features: Tensor,
    theirs: States,
    rows: Tensor,
    temperature: float,
    candidates: Candidates,
    after: Tensor,
    before: Tensor,
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        log_reference = _log_probs(theirs, rows, temperature)
    logits = _policy_logits(ours, features, temperature)
    divergence = reverse_divergence(logits, log_reference, candidates, after, before)
    return divergence, divergence.detach()
