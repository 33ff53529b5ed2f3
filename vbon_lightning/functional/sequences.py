"""From tokens to masks, token log-probabilities and sequence log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vbon_lightning.functional._validate import (
    check_float,
    check_integer,
    check_mask,
    check_real,
    check_same_shape,
    check_shape,
    working_dtype,
)


def response_mask(tokens: Tensor, *, eos_id: int | Sequence[int]) -> Tensor:
    """Mark the tokens of each response, through the first end-of-sequence token.

    Padding is never looked at, so a pad id equal to an EOS id does no harm.

    Args:
        tokens: ``[..., T]`` integer token ids, padded on the right.
        eos_id: the id, or the ids, that end a response.

    Returns:
        ``[..., T]`` bool, True up to and including the first EOS; all True where there is none.

    Raises:
        TypeError: if ``tokens`` does not hold integers, or an id is not an int.
        ValueError: if ``tokens`` has no dimension, or no id is given.
    """
    check_integer("tokens", tokens)
    if tokens.dim() == 0:
        raise ValueError("tokens must have shape [..., T], got a scalar")
    ids = [eos_id] if isinstance(eos_id, int) else list(eos_id)
    if not ids:
        raise ValueError("eos_id must name at least one token id, got none")
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise TypeError(f"eos_id must be an int or a sequence of ints, got {token_id!r}")
    ends = tokens == ids[0]
    for token_id in ids[1:]:
        ends = ends | (tokens == token_id)
    ended_before = ends.long().cumsum(-1) - ends.long()
    return ended_before == 0


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """Zero what is outside the mask, whatever stands there, NaN too.

    Args:
        values: any shape.
        mask: bool, of the same shape.
    """
    return torch.where(mask, values, torch.zeros_like(values))


def scaled_logits(logits: Tensor, temperature: float) -> Tensor:
    """Return ``logits / temperature``, up to a constant a row, in float32 or wider; no copy where none is needed.

    The greatest logit is taken off before the division, so that what is rounded is small where the logits are large.
    """
    wide = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
    return wide if temperature == 1 else (wide - wide.detach().amax(-1, keepdim=True)) / temperature


def check_logits(logits: Tensor, tokens: Tensor, temperature: float) -> None:
    """Raise unless ``logits [..., V]``, ``tokens [...]`` and ``temperature`` fit together."""
    check_float("logits", logits)
    check_integer("tokens", tokens)
    check_shape("tokens", tokens, logits.shape[:-1], "logits.shape[:-1]")
    check_real("temperature", temperature, above=0.0)


def token_log_probs(logits: Tensor, tokens: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Compute token log-probabilities, ``z[token] - logsumexp(z)`` with ``z = logits / temperature``.

    Args:
        logits: ``[..., V]``, of any floating-point dtype; ``-inf`` entries have probability zero.
        tokens: ``[...]`` integer token ids.
        temperature: the temperature at which the tokens were sampled.

    Returns:
        ``[...]`` float32, also for half-precision logits (float64 for float64 logits).

    Raises:
        TypeError: on a wrong dtype.
        ValueError: if the shapes do not fit or ``temperature <= 0``.
    """
    check_logits(logits, tokens, temperature)
    # Not z[token] - logsumexp(z): of large logits that difference keeps few digits.
    log_probs = scaled_logits(logits, temperature).log_softmax(-1)
    return log_probs.gather(-1, tokens.long().unsqueeze(-1)).squeeze(-1)


def sequence_log_prob(token_log_probs: Tensor, mask: Tensor) -> Tensor:
    """Sum the token log-probabilities of each response: ``log p(y) = sum_t mask_t log p(y_t | y_<t)``.

    Args:
        token_log_probs: ``[..., T]``; whatever stands outside the mask, NaN and ``-inf`` too, is ignored.
        mask: ``[..., T]`` bool, True on response tokens.

    Returns:
        ``[...]`` in the dtype of ``token_log_probs``, summed in float64.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: if the shapes differ.
    """
    check_float("token_log_probs", token_log_probs)
    check_mask("mask", mask)
    check_same_shape("mask", mask, "token_log_probs", token_log_probs)
    kept = torch.where(mask, token_log_probs, torch.zeros_like(token_log_probs))
    return kept.sum(-1, dtype=working_dtype(kept)).to(token_log_probs.dtype)
