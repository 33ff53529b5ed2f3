"""Sampling a batch in passes of so many rows, which bounds its memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vbon_lightning.sampling.request import SamplingRequest
from vbon_lightning.types import Completions


class Sampler(Protocol):
    """What samples responses: see :func:`~vbon_lightning.sampling.sample_completions`.

    One that samples with another program than the model itself may have an attribute ``mismatch``: the mean absolute
    difference between that program's log-probabilities and the model's in the last call.
    """

    def __call__(self, model: PreTrainedModel, request: SamplingRequest) -> Completions:
        """Sample responses."""
        ...


class InPasses:
    """Sample at most so many rows at once; the noise belongs to the rows, so that samples do not depend on the split.

    Args:
        sampler: What samples.
        max_rows: Most rows a pass.
    """

    def __init__(self, sampler: Sampler, max_rows: int) -> None:
        self.sampler, self.max_rows = sampler, max_rows
        self.mismatch: float | None = None

    def __call__(self, model: PreTrainedModel, request: SamplingRequest) -> Completions:
        """Sample responses."""
        found = [part for _, part in self.by_prompts(model, request)]
        return join_completions(found, dim=0, pad_id=request.pad_id)

    def by_prompts(self, model: PreTrainedModel, request: SamplingRequest) -> Iterator[tuple[list[int], Completions]]:
        """Sample responses pass by pass, so that something can be done with one while the next is sampled.

        Yields:
            Some prompts' rows and all of their responses.
        """
        tokens, mask, noise = request.prompt_tokens, request.prompt_mask, request.noise
        batch, samples, _ = noise.shape
        prompts, a_prompt = max(1, self.max_rows // samples), min(samples, self.max_rows)
        weighted, counted = 0.0, 0
        self.mismatch = None
        for some in torch.arange(batch, device=tokens.device).split(prompts):
            width = max(1, int(mask[some].sum(-1).max()))  # padding that only other passes need costs time
            these = request._replace(prompt_tokens=tokens[some, -width:], prompt_mask=mask[some, -width:])
            parts = []
            for part in noise[some.to(noise.device)].split(a_prompt, dim=1):
                found = self.sampler(model, these._replace(noise=part))
                parts.append(found)
                mismatch = getattr(self.sampler, "mismatch", None)
                if mismatch is not None:
                    count = int(found.mask.sum())
                    weighted, counted = weighted + mismatch * count, counted + count
            self.mismatch = weighted / counted if counted else None
            yield some.tolist(), join_completions(parts, dim=1, pad_id=request.pad_id)


def join_completions(parts: list[Completions], *, dim: int, pad_id: int) -> Completions:
    """Put completions side by side, padded to the longest response.

    Args:
        parts: The completions.
        dim: 0 for other prompts, 1 for further responses to the same.
        pad_id: What to fill up with.
    """
    if len(parts) == 1:
        return parts[0]
    longest = max(part.tokens.shape[-1] for part in parts)

    def joined(values: list[Tensor], fill: float) -> Tensor:
        return torch.cat(
            [torch.nn.functional.pad(value, (0, longest - value.shape[-1]), value=fill) for value in values], dim=dim
        )

    return Completions(
        tokens=joined([part.tokens for part in parts], pad_id),
        mask=joined([part.mask for part in parts], False),
        finished=torch.cat([part.finished for part in parts], dim=dim),
        log_probs=joined([part.log_probs for part in parts], 0.0),
    )
