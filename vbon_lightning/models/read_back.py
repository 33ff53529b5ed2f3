"""Whether a model that was written is the one that was meant: it is loaded again and both read a few tokens."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vbon_lightning.finite import NotFiniteError
from vbon_lightning.models.errors import ModelError, shorten
from vbon_lightning.models.loading import evaluating
from vbon_lightning.models.value import ValueModel

TOKENS = 12
"""Length of the text that both read."""

EXACT, ROUNDED = 1e-3, 0.05
"""How far they may be apart, in float32 or with rounded weights: nats of KL a token, or a share of scores."""


class ReadBackError(ModelError):
    """A written model is another one than the model it was written from."""


@torch.no_grad()
def check_read_back(model: PreTrainedModel, directory: str | os.PathLike[str], *, vocabulary: int) -> None:
    """Load a model that was just written and compare it with the one in memory, on the CPU.

    What a saved model is depends on its config too: whether two weights are one, what is done to the logits.

    Args:
        model: The model in memory, with adapters or without; it is not changed.
        directory: What was written, a plain model of the same class.
        vocabulary: Tokens that the text may be of.

    Raises:
        NotFiniteError: If the model in memory says NaN, as one whose weights are too large does.
        ReadBackError: If they say different things, or it cannot be loaded.
    """
    tokens = _text(model, vocabulary)
    with evaluating(model):
        ours = _said(model, tokens.to(next(model.parameters()).device)).cpu()
    if not _are_numbers(model, ours):
        raise NotFiniteError(
            "the model is not exported: its weights are finite, and what it says of a few tokens is NaN or infinity. "
            "Lower the learning rate, or go back to an earlier checkpoint; what was there before stays as it is"
        )
    try:
        kind: Any = type(model)
        read, info = kind.from_pretrained(directory, dtype="auto", output_loading_info=True)
    except Exception as error:  # transformers raises many types here; every one means the same to a user
        raise ReadBackError(f"the export cannot be loaded again: {shorten(error)}") from error
    lacking = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in info.get(kind, ()))
    if lacking:
        raise ReadBackError(f"the export lacks {len(lacking)} weights, such as {', '.join(lacking[:3])}")
    theirs = _said(read.eval(), tokens)
    dtypes = {next(part.parameters()).dtype for part in (model, read)}
    limit, apart = EXACT if dtypes == {torch.float32} else ROUNDED, _apart(model, ours, theirs)
    if not apart <= limit:
        raise ReadBackError(
            "the export is another model than the one that was trained: on a few tokens they are "
            f"{apart:.3g} apart, and {limit:g} is allowed"
        )


def _text(model: PreTrainedModel, vocabulary: int) -> Tensor:
    config = model.config.get_text_config()
    size = min(vocabulary, getattr(config, "vocab_size", None) or vocabulary)
    longest = getattr(config, "max_position_embeddings", None) or TOKENS
    # Spread over the vocabulary, no token twice in a row.
    return (torch.arange(1, max(1, min(TOKENS, longest - 2)) + 1) * 7919 % size)[None]


def _said(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Return what a model says of tokens, in float64."""
    if isinstance(model, ValueModel):
        lengths = torch.arange(tokens.shape[1], device=tokens.device)[None]
        return model(tokens, lengths=lengths, use_cache=False).double()
    cache = {"use_cache": False} if model.can_generate() else {}
    return model(input_ids=tokens, **cache).logits.double()


def _are_numbers(model: PreTrainedModel, said: Tensor) -> bool:
    return not bool(said.log_softmax(-1).isnan().any()) if _is_distribution(model) else bool(said.isfinite().all())


def _is_distribution(model: PreTrainedModel) -> bool:
    return isinstance(model, ValueModel) or model.can_generate()


def _apart(model: PreTrainedModel, ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    if _is_distribution(model):
        first, second = ours.log_softmax(-1), theirs.log_softmax(-1)
        kl = torch.where(first.isneginf(), 0.0, first.exp() * (first - second))
        return float(kl.sum(-1).max())
    return float((ours - theirs).abs().max() / (1 + ours.abs().max()))
