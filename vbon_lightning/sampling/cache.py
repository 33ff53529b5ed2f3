"""Key-value caches for sampling many responses to each prompt.

transformers' own cache copies itself for each token, and holds each prompt once for each of its samples. Here there is
room for all tokens from the start, and long prompts are held once: a step's queries of all samples of a prompt meet its
keys in one matrix product, which reads them once and not once a sample (as in Hydragen,
https://arxiv.org/abs/2402.05099).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

SHARE_FROM = 64
"""Prompt tokens from which holding a prompt once is faster than the library's attention on a copy a sample."""

_ATTENTION = "vbon_shared_prompt"


class _Layer(DynamicLayer):
    """A layer with room for all tokens to come."""

    def __init__(self, keys: Tensor, values: Tensor, room: int, rows: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        _, heads, self.length, width = keys.shape
        self._keys = keys.new_empty(rows, heads, self.length + room, width)
        self._values = values.new_empty(rows, heads, self.length + room, values.shape[-1])
        repeats = rows // keys.shape[0]
        self._keys[:, :, : self.length] = keys.repeat_interleave(repeats, dim=0)
        self._values[:, :, : self.length] = values.repeat_interleave(repeats, dim=0)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, self.length = self.length, self.length + key_states.shape[-2]
        self._keys[:, :, start : self.length] = key_states
        self._values[:, :, start : self.length] = value_states
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length

    def batch_select_indices(self, indices: Tensor) -> None:
        self._keys, self._values = self._keys[indices], self._values[indices]


class _SharedLayer(_Layer):
    """A layer that holds the responses' tokens a row, and the prompts' tokens a prompt."""

    def __init__(self, keys: Tensor, values: Tensor, room: int, rows: int) -> None:
        super().__init__(keys[:, :, :0], values[:, :, :0], room, rows)
        self.prompt_keys, self.prompt_values = keys, values

    def get_seq_length(self) -> int:
        return self.prompt_keys.shape[-2] + self.length


class SamplingCache(DynamicCache):
    """The cache of B x G responses to B prompts, made of the prompts' own.

    Args:
        prompts: The cache after the prompts have been run, of plain layers only (:func:`can_extend`).
        samples: G, responses a prompt.
        room: Tokens a response may have in the cache.
        shared: Whether prompts are held once; the model must then run under :func:`shared_prompts`.
        prompt_mask: ``[B, P]`` bool, for ``shared``; None without padding.
    """

    def __init__(
        self, prompts: Cache, *, samples: int, room: int, shared: bool, prompt_mask: Tensor | None = None
    ) -> None:
        super().__init__()
        layers = cast("list[DynamicLayer]", prompts.layers)
        states = [(cast(Tensor, layer.keys), cast(Tensor, layer.values)) for layer in layers]
        first, _ = states[0]
        self.prompts, self.groups = first.shape[0], samples
        rows = self.prompts * samples
        self.layers = [(_SharedLayer if shared else _Layer)(keys, values, room, rows) for keys, values in states]
        self.owners = torch.arange(self.prompts, device=first.device).repeat_interleave(samples)
        self.slots: Tensor | None = None
        self.bias: Tensor | None = None
        if shared and prompt_mask is not None:
            blank = torch.zeros(prompt_mask.shape, dtype=first.dtype, device=prompt_mask.device)
            self.bias = blank.masked_fill_(~prompt_mask, -torch.inf)[:, None, None]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, or several copies of one, prompt by prompt."""
        super().batch_select_indices(indices)
        self.owners = self.owners[indices]
        counts = torch.bincount(self.owners, minlength=self.prompts)
        self.groups = int(counts.max())
        rank = torch.arange(len(indices), device=indices.device) - (counts.cumsum(0) - counts)[self.owners]
        # Prompts have different numbers of rows left; each gets as many slots as the one with most.
        self.slots = self.owners * self.groups + rank

    def by_prompt(self, rows: Tensor) -> Tensor:
        """Turn ``[N, K, R, ...]`` rows into ``[B, K, G R, ...]``, G slots a prompt, the empty ones zero."""
        if self.slots is not None:
            full = rows.new_zeros(self.prompts * self.groups, *rows.shape[1:])
            rows = full.index_copy_(0, self.slots, rows)
        _, heads, repeats, *rest = rows.shape
        return rows.view(self.prompts, self.groups, heads, repeats, *rest).transpose(1, 2).flatten(2, 3)

    def by_row(self, grouped: Tensor) -> Tensor:
        """Undo :meth:`by_prompt`."""
        prompts, heads, _, *rest = grouped.shape
        rows = grouped.view(prompts, heads, self.groups, -1, *rest).transpose(1, 2).flatten(0, 1)
        return rows if self.slots is None else rows[self.slots]


def can_extend(cache: Cache) -> bool:
    """Return whether a cache is one of plain layers, whose keys and values are all that was seen."""
    return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)


_running: list[SamplingCache] = []


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend from one new token a row to its prompt's tokens, held once a prompt, and to its own."""
    cache = _running[-1]
    layer = cast(_SharedLayer, cache.layers[cast(int, module.layer_idx)])
    rows, heads, _one, width = query.shape
    shared = key.shape[1]
    scale = width**-0.5 if scaling is None else scaling
    asked = (query * scale).view(rows, shared, heads // shared, width)
    prompt = cache.by_prompt(asked) @ layer.prompt_keys.transpose(-1, -2)
    if cache.bias is not None:
        prompt = prompt + cache.bias
    scores = torch.cat([cache.by_row(prompt), asked @ key.transpose(-1, -2)], dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    of_prompt, own = weights.split([prompt.shape[-1], key.shape[-2]], dim=-1)
    found = cache.by_row(cache.by_prompt(of_prompt) @ layer.prompt_values) + own @ value
    return found.view(rows, 1, heads, -1), None


AttentionInterface.register(_ATTENTION, _attend)


@contextmanager
def attending(config: PreTrainedConfig, implementation: str, running: list[Any], cache: Any) -> Iterator[None]:
    """Let a model attend by another implementation for a while, which finds its cache on top of a stack.

    Args:
        config: The text config that the model's layers read.
        implementation: A registered attention.
        running: The stack.
        cache: What to put on it.
    """
    before = config._attn_implementation
    running.append(cache)
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = before
        running.pop()


def shared_prompts(model: PreTrainedModel, cache: SamplingCache) -> AbstractContextManager[None]:
    """Let a model attend to prompts that a cache holds once."""
    return attending(model.config.get_text_config(), _ATTENTION, _running, cache)


def can_share_prompts(model: PreTrainedModel) -> bool:
    """Return whether a model computes the same where prompts are held once.

    Some do more in their attention than this one knows of: squash scores, add biases. Two prompts and a step tell; they
    are run once a model.
    """
    if model not in _SHARES:
        try:
            _SHARES[model] = not squashes_scores(model) and _probe(model)
        except Exception:  # unknown architectures fail in unknown ways
            _SHARES[model] = False
    return _SHARES[model]


_SQUASHED = re.compile("attn.*soft_?cap|attention.*soft_?cap|alibi|sink")


def squashes_scores(model: PreTrainedModel) -> bool:
    """Return whether a model's config speaks of more than products in its attention: caps, biases by distance, sinks.

    On a model that is fresh from a config scores are too small for a pass to tell.
    """
    entries = model.config.get_text_config().to_dict()
    return any(value and _SQUASHED.search(name) is not None for name, value in entries.items())


_SHARES: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


@torch.no_grad()
def _probe(model: PreTrainedModel) -> bool:
    if not getattr(model, "_supports_attention_backend", False):
        return False
    device = next(model.parameters()).device
    tokens = torch.tensor([[0, 1, 2], [0, 0, 1]], device=device) % model.config.get_text_config().vocab_size
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]], device=device)
    positions = (mask.cumsum(-1) - 1).clamp_(min=0)

    def prefill() -> Cache:
        cache = DynamicCache(config=model.config)
        model(input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        return cache

    own = prefill()
    if not can_extend(own):
        return False
    own.batch_repeat_interleave(2)
    cache = SamplingCache(prefill(), samples=2, room=2, shared=True, prompt_mask=mask.bool())
    attended = mask.repeat_interleave(2, dim=0)
    for _ in range(2):
        attended = nn.functional.pad(attended, (0, 1), value=1)
        given: dict[str, Any] = {
            "input_ids": torch.tensor([[1], [0], [0], [2]], device=device),
            "position_ids": attended.sum(-1, keepdim=True) - 1,
            "use_cache": True,
        }
        expected = model(attention_mask=attended, past_key_values=own, **given).logits
        with shared_prompts(model, cache):
            found = model(past_key_values=cache, **given).logits
        if not torch.allclose(found, expected, atol=1e-3 if found.dtype == torch.float32 else 0.1, rtol=1e-2):
            return False
    return True
