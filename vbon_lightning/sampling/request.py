"""What a sampler is asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel


class SamplingRequest(NamedTuple):
    """Prompts, the noise that decides their responses, and how these end."""

    prompt_tokens: Tensor
    """``[B, P]`` long, padded on the left."""
    prompt_mask: Tensor
    """``[B, P]`` bool."""
    noise: Tensor
    """``[B, G, T]`` float64 uniforms (:func:`~vbon_lightning.sampling.prompt_noise`); T limits the length."""
    end_ids: Sequence[int]
    """Token ids that end a response."""
    pad_id: int
    """What stands behind the end in the returned tokens (never read: masks come from the first end)."""
    temperature: float = 1.0
    """Sampling temperature, > 0."""


def check_request(model: PreTrainedModel, request: SamplingRequest) -> None:
    """Refuse what cannot be sampled.

    Raises:
        ValueError: On a temperature that is none, no end token, noise for no token, a prompt without tokens, or
            prompts and responses that do not fit the model's context.
    """
    if not 0 < request.temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {request.temperature}")
    if not request.end_ids:
        raise ValueError("end_ids must name at least one token that ends a response, got none")
    length = request.noise.shape[-1]
    if length < 1:
        raise ValueError(f"noise must hold at least one token a sample, got shape {tuple(request.noise.shape)}")
    shortest, longest_prompt = request.prompt_mask.sum(-1).aminmax()
    if not shortest:
        raise ValueError("every prompt needs at least one token, but a row of prompt_mask is all False")
    check_context(model, int(longest_prompt), length)


def check_context(model: PreTrainedModel, prompt_length: int, response_length: int) -> None:
    """Refuse prompts and responses that together exceed the model's context."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and 0 < limit < prompt_length + response_length:
        raise ValueError(
            f"a prompt of {prompt_length} tokens and a response of up to {response_length} exceed the model's "
            f"context of {limit} tokens: lower `max_prompt_tokens` or `max_new_tokens`"
        )
