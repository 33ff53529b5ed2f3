"""The records that travel between the parts, each field with its shape.

B prompts, G samples a prompt, P prompt tokens (left-padded), T response tokens (right-padded),
M reference rewards a prompt. Log-probabilities are in nats.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class PromptBatch(NamedTuple):
    """A batch of prompts, ready to be sampled from."""

    index: Tensor  # type: ignore[assignment]
    """``[B]`` long: the prompt's row in its split; with the seed and the step it fixes the sampling noise."""
    valid: Tensor
    """``[B]`` bool: False for rows that only even out the last batch over several processes."""
    tokens: Tensor
    """``[B, P]`` long: prompt token ids, padded on the left."""
    mask: Tensor
    """``[B, P]`` bool: True on prompt tokens, False on padding."""
    text: list[str]
    """B prompts as text, special tokens left out."""
    reference_rewards: Tensor | None = None
    """``[B, M]`` float32: rewards of M reference responses, from the reference table."""
    columns: dict[str, list[Any]] | None = None
    """B values of each column of the data set that the reward reads beside the prompt, such as the right answer."""
    messages: list[list[dict[str, Any]]] | None = None
    """B prompts as lists of messages, where they are conversations."""

    @property
    def beside(self) -> dict[str, list[Any]] | None:
        """B values of each thing that is known beside the text: the columns, and the ``messages`` of conversations."""
        return self.columns if self.messages is None else {**(self.columns or {}), "messages": self.messages}


class TextBatch(NamedTuple):
    """A batch of texts for supervised fine-tuning, padded on the right."""

    tokens: Tensor
    """``[B, L]`` long."""
    mask: Tensor
    """``[B, L]`` bool: True on real tokens (prompt, response and EOS)."""
    loss_mask: Tensor
    """``[B, L]`` bool: True on what is to be predicted: the response and its EOS, or plain text but its first token."""
    valid: Tensor
    """``[B]`` bool, as in :class:`PromptBatch`."""


class JudgedBatch(NamedTuple):
    """A batch of texts to learn a reward from, padded on the right: K = 1 labelled text a row, or K = 2 to compare."""

    tokens: Tensor
    """``[B, K, L]`` long; of two texts the preferred one comes first."""
    mask: Tensor
    """``[B, K, L]`` bool: True on real tokens."""
    labels: Tensor | None
    """``[B]`` long: the label of each text; None where texts are compared."""
    valid: Tensor
    """``[B]`` bool, as in :class:`PromptBatch`."""


class Completions(NamedTuple):
    """Responses as they were sampled."""

    tokens: Tensor
    """``[B, G, T]`` long: response token ids, the EOS included, then padding."""
    mask: Tensor
    """``[B, G, T]`` bool: True up to and including the first EOS."""
    finished: Tensor
    """``[B, G]`` bool: True where an EOS was sampled, False where the length limit cut the response."""
    log_probs: Tensor
    """``[B, G, T]`` float32: log-probability of each token at the sampling temperature, 0 outside the mask."""


class Responses(NamedTuple):
    """Given responses: what scoring needs to know of them."""

    tokens: Tensor
    """``[B, G, T]`` long: response token ids, then padding."""
    mask: Tensor
    """``[B, G, T]`` bool: True on response tokens."""


class TableBatch(NamedTuple):
    """A batch of prompts with the reference table's responses to them, to learn from without sampling."""

    prompts: PromptBatch
    """B prompts; their ``reference_rewards`` are the responses' rewards."""
    responses: Responses
    """``[B, M, T]``: the M cached responses, as they were sampled: an EOS only where one was."""


class ScoredResponses(NamedTuple):
    """Responses and their rewards, before any model said how likely they are."""

    prompts: PromptBatch
    completions: Completions
    responses: list[list[str]]
    """B lists of G decoded responses, special tokens left out."""
    rewards: Tensor
    """``[B, G]`` float32: rewards, the missing-EOS penalty included; NaN where a response has none and is left out."""
    reference_rewards: Tensor | None
    """``[B, M]`` float32: rewards of reference responses, from the table or sampled on the spot."""
    reference_log_cdf: Tensor | None = None
    """``[B, K + 1]``: log of the reference's reward distribution at a value model's bin edges, predicted from the
    prompt; only where there are no reference rewards and a value model is named."""
    reward_parts: dict[str, Tensor] | None = None
    """``[B, G]`` of each part of a reward that has several, by name; NaN where one does not apply."""
    extra: Responses | None = None
    """``[B, K, T]``: further responses, not the policy's own, whose log-likelihood the loss has a term of."""

    @property
    def judged(self) -> Tensor:
        """Return ``[B, G]`` bool: False where a response has no reward and is left out of its group."""
        return ~self.rewards.isnan()


class Rollout(NamedTuple):
    """What a training or evaluation step learned about its prompts; callbacks read only this."""

    prompts: PromptBatch
    completions: Completions
    responses: list[list[str]]
    """B lists of G decoded responses, special tokens left out."""
    rewards: Tensor
    """``[B, G]`` float32: rewards, the missing-EOS penalty included; NaN where a response has none and is left out."""
    log_probs: Tensor
    """``[B, G, T]`` float32: policy log-probabilities at the sampling temperature, 0 outside the mask."""
    reference_log_probs: Tensor
    """``[B, G, T]`` float32: the same under the reference."""
    token_kl: Tensor
    """``[B, G, T]`` float32: KL(policy || reference) over the whole vocabulary at each token, 0 outside the mask."""
    reference_rewards: Tensor | None
    """``[B, M]`` float32: rewards of reference responses, from the table or sampled on the spot."""
    reference_log_cdf: Tensor | None = None
    """``[B, K + 1]``: log of the reference's reward distribution at a value model's bin edges, predicted from the
    prompt; only where there are no reference rewards and a value model is named."""
    reward_parts: dict[str, Tensor] | None = None
    """``[B, G]`` of each part of a reward that has several, by name; NaN where one does not apply."""
    extra: Responses | None = None
    """``[B, K, T]``: further responses, not the policy's own, whose log-likelihood the loss has a term of."""
    extra_log_probs: Tensor | None = None
    """``[B, K, T]`` float32: the policy's log-probabilities of the further responses' tokens, 0 outside their mask."""

    @property
    def judged(self) -> Tensor:
        """Return ``[B, G]`` bool: False where a response has no reward and is left out of its group."""
        return ~self.rewards.isnan()


def known_rewards(rewards: Tensor) -> list[list[float | None]]:
    """Return rewards ``[B, G]`` as lists, with None where a response has none."""
    return [[None if value != value else value for value in row] for row in rewards.tolist()]


def select_prompts(value: Any, rows: list[int]) -> Any:
    """Return the same record for some of its prompts: dimension 0 of every tensor and list."""
    if isinstance(value, Tensor):
        return value[torch.as_tensor(rows, dtype=torch.long, device=value.device)]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(select_prompts(part, rows) for part in value))
    if isinstance(value, list):
        return [value[row] for row in rows]
    if isinstance(value, dict):  # columns by name
        return {name: select_prompts(part, rows) for name, part in value.items()}
    return value
