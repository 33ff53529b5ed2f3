"""Monitors of KL(policy || reference): k1, k2, k3 on sampled tokens, the exact sum over the vocabulary."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vbon_lightning.functional._validate import check_float, check_real, check_same_shape
from vbon_lightning.functional.sequences import check_logits, scaled_logits, token_log_probs


def _log_ratio(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    check_float("log_probs", log_probs)
    check_float("reference_log_probs", reference_log_probs)
    check_same_shape("reference_log_probs", reference_log_probs, "log_probs", log_probs)
    return log_probs - reference_log_probs


def kl_k1(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """Compute the estimator ``k1 = l`` with ``l = log pi - log ref``: unbiased, of either sign.

    In the *reward* it gives the right gradient of the KL; as a *loss* its gradient is ``grad log pi``, of
    mean zero.

    Args:
        log_probs: ``[...]`` log-probabilities under the policy of tokens sampled from it.
        reference_log_probs: ``[...]`` the same under the reference.

    Returns:
        ``[...]``.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: if the shapes differ.
    """
    return _log_ratio(log_probs, reference_log_probs)


def kl_k2(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """Compute the estimator ``k2 = l^2 / 2`` with ``l = log pi - log ref``: non-negative but biased.

    Args:
        log_probs: ``[...]`` log-probabilities under the policy of tokens sampled from it.
        reference_log_probs: ``[...]`` the same under the reference.

    Returns:
        ``[...]``.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: if the shapes differ.
    """
    return _log_ratio(log_probs, reference_log_probs).square() / 2


def kl_k3(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """Compute the estimator ``k3 = exp(-l) - 1 + l``, ``l = log pi - log ref``: unbiased and non-negative.

    A monitor: as a *loss* its gradient is that of KL(reference || policy), not of KL(policy || reference).

    Args:
        log_probs: ``[...]`` log-probabilities under the policy of tokens sampled from it.
        reference_log_probs: ``[...]`` the same under the reference.

    Returns:
        ``[...]``.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: if the shapes differ.
    """
    log_ratio = _log_ratio(log_probs, reference_log_probs)
    return torch.expm1(-log_ratio) + log_ratio


def _kl_of_log_softmax(log_policy: Tensor, log_reference: Tensor) -> Tensor:
    policy = log_policy.exp()
    # Where the policy puts nothing the term is 0, also if the reference puts nothing there (-inf minus -inf).
    log_ratio = torch.where(policy > 0, log_policy - log_reference, torch.zeros_like(policy))
    kl = (policy * log_ratio).sum(-1)
    return kl - kl.detach().clamp(max=0)  # rounding below zero goes, the gradient stays


def _check_reference_logits(logits: Tensor, reference_logits: Tensor) -> None:
    check_float("reference_logits", reference_logits)
    check_same_shape("reference_logits", reference_logits, "logits", logits)


def vocabulary_kl(logits: Tensor, reference_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Compute the exact KL(policy || reference) of the next token, ``sum_v pi_v (log pi_v - log ref_v)``.

    Summed over the positions of sampled responses it estimates the sequence KL with lower variance than k1 or
    k3; Better Estimation of the Kullback-Leibler Divergence Between Language Models, https://arxiv.org/abs/2504.10637.

    Args:
        logits: ``[..., V]`` of the policy; entries that are ``-inf`` in both have no part in it.
        reference_logits: ``[..., V]`` of the reference.
        temperature: the sampling temperature, applied to both.

    Returns:
        ``[...]`` float32 (float64 for float64 logits), non-negative and differentiable; ``inf`` where the
        policy puts probability on a token that the reference excludes.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: if the shapes differ or ``temperature <= 0``.
    """
    check_float("logits", logits)
    _check_reference_logits(logits, reference_logits)
    check_real("temperature", temperature, above=0.0)
    return _kl_of_log_softmax(
        scaled_logits(logits, temperature).log_softmax(-1),
        scaled_logits(reference_logits, temperature).log_softmax(-1),
    )


class TokenStatistics(NamedTuple):
    """What the two models say about each sampled token."""

    log_probs: Tensor
    """``[...]``: log-probability under the policy."""
    reference_log_probs: Tensor | None
    """``[...]``: the same under the reference; None without one."""
    kl: Tensor | None
    """``[...]``: exact KL(policy || reference) at the position; None without a reference."""


def token_statistics(
    logits: Tensor, reference_logits: Tensor | None, tokens: Tensor, *, temperature: float = 1.0
) -> TokenStatistics:
    """Compute token log-probabilities under both models and the exact KL at each position, in one pass.

    Equal to :func:`token_log_probs` of each and :func:`vocabulary_kl`, with the two log-softmaxes shared.

    Args:
        logits: ``[..., V]`` of the policy.
        reference_logits: ``[..., V]`` of the reference, or None.
        tokens: ``[...]`` integer token ids.
        temperature: the sampling temperature, applied to both.

    Returns:
        :class:`TokenStatistics` of ``[...]`` tensors.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: if the shapes do not fit or ``temperature <= 0``.
    """
    if reference_logits is None:
        return TokenStatistics(token_log_probs(logits, tokens, temperature=temperature), None, None)
    check_logits(logits, tokens, temperature)
    _check_reference_logits(logits, reference_logits)
    index = tokens.long().unsqueeze(-1)
    if not reference_logits.requires_grad:
        return TokenStatistics(
            *_TokenStatistics.apply(
                scaled_logits(logits, temperature), scaled_logits(reference_logits, temperature), index
            )
        )
    log_policy = scaled_logits(logits, temperature).log_softmax(-1)
    log_reference = scaled_logits(reference_logits, temperature).log_softmax(-1)
    return TokenStatistics(
        log_probs=log_policy.gather(-1, index).squeeze(-1),
        reference_log_probs=log_reference.gather(-1, index).squeeze(-1),
        kl=_kl_of_log_softmax(log_policy, log_reference),
    )


class _TokenStatistics(torch.autograd.Function):
    """The statistics with the gradient written out: two buffers of the logits' size live, not six.

    With ``p`` the policy's probabilities and ``d = log p - log q``, ``dKL/dz = p (d - KL)`` and
    ``dlog p[token]/dz = 1[token] - p``.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, reference_logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_policy, log_reference = logits.log_softmax(-1), reference_logits.log_softmax(-1)
        log_probs = log_policy.gather(-1, index).squeeze(-1)
        reference_log_probs = log_reference.gather(-1, index).squeeze(-1)
        probs = log_policy.exp()
        # Where the policy puts nothing the term is 0, also if the reference puts nothing there (-inf minus -inf).
        log_ratio = log_policy.sub_(log_reference).masked_fill_(probs == 0, 0.0)
        kl = torch.linalg.vecdot(probs, log_ratio)
        ctx.save_for_backward(probs, log_ratio, kl, index)
        ctx.mark_non_differentiable(reference_log_probs)
        return log_probs, reference_log_probs, kl.clamp(min=0)  # rounding below zero goes, the gradient stays

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, log_probs_grad: Tensor, _: Tensor, kl_grad: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        probs, log_ratio, kl, index = ctx.saved_tensors
        kl_grad, log_probs_grad = kl_grad.unsqueeze(-1), log_probs_grad.unsqueeze(-1)
        grad = probs * torch.addcmul(-log_probs_grad, log_ratio - kl.unsqueeze(-1), kl_grad)
        return grad.scatter_add(-1, index, log_probs_grad), None, None
