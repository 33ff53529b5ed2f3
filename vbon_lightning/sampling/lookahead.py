"""What a model makes of many next tokens at every position of a response: one pass over all of them.

The response is run once and its keys and values kept; every candidate token then attends to the part of it that it
follows, and to itself. The candidates never see each other, so that the pass is as one forward pass for each of them.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from vbon_lightning.sampling.cache import attending, can_extend, squashes_scores
from vbon_lightning.sampling.decode import forget_casts
from vbon_lightning.sampling.scoring import body_outputs
from vbon_lightning.types import Completions, PromptBatch, Responses

_ATTENTION = "vbon_lookahead"

MAX_TOKENS = 2**12
"""Candidate tokens that live at once."""


class _Layer(DynamicLayer):
    """A trunk's keys and values; those of the candidates are handed back and forgotten."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.trunk_keys, self.trunk_values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.trunk_keys.shape[-2]


class _Trunk(DynamicCache):
    """The cache of N sequences, and which of its tokens each of R states sees."""

    def __init__(self, cache: Cache, rows: slice, visible: Tensor) -> None:
        super().__init__()
        layers = cast("list[DynamicLayer]", cache.layers)
        states = [(cast(Tensor, layer.keys)[rows], cast(Tensor, layer.values)[rows]) for layer in layers]
        self.layers = [_Layer(keys, values) for keys, values in states]
        blank = torch.zeros(visible.shape, dtype=states[0][0].dtype, device=visible.device)
        # [N, 1, 1, R, 1, S]: heads twice, candidates
        self.bias = blank.masked_fill_(~visible, -torch.inf)[:, None, None, :, None]


_running: list[_Trunk] = []


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend from each candidate to the tokens before it and to itself."""
    trunk = _running[-1]
    layer = cast(_Layer, trunk.layers[cast(int, module.layer_idx)])
    rows, heads, tokens, width = query.shape
    shared = key.shape[1]
    states = trunk.bias.shape[3]
    scale = width**-0.5 if scaling is None else scaling
    asked = (query * scale).view(rows, shared, heads // shared, tokens, width)
    own = (asked * key.unsqueeze(2)).sum(-1, keepdim=True)
    before = asked.flatten(2, 3) @ layer.trunk_keys.transpose(-1, -2)  # [N, shared, heads/shared * R k, S]
    before = before.view(rows, shared, heads // shared, states, tokens // states, -1) + trunk.bias
    before = before.view(rows, shared, heads // shared, tokens, -1)
    weights = torch.cat([before, own], dim=-1).softmax(-1, dtype=torch.float32).to(value.dtype)
    of_trunk, of_self = weights[..., :-1], weights[..., -1:]
    found = (of_trunk.flatten(2, 3) @ layer.trunk_values).view(rows, shared, heads // shared, tokens, -1)
    found = found + of_self * value.unsqueeze(2)
    return found.view(rows, heads, tokens, -1).transpose(1, 2), None


AttentionInterface.register(_ATTENTION, _attend)


def _body_config(model: PreTrainedModel) -> PreTrainedConfig:
    return cast(PreTrainedModel, model.base_model).config


def _looking_ahead(model: PreTrainedModel, trunk: _Trunk) -> AbstractContextManager[None]:
    # The body's own config: a model that wraps another may have a copy.
    return attending(_body_config(model).get_text_config(), _ATTENTION, _running, trunk)


@torch.no_grad()
def lookahead_states(
    model: PreTrainedModel,
    prompts: PromptBatch,
    responses: Completions | Responses,
    candidates: Tensor,
    *,
    max_tokens: int = MAX_TOKENS,
) -> Tensor:
    """Return a model's last hidden states after each candidate.

    Args:
        model: A model with a causal body; its head is not run.
        prompts: ``[B, P]`` prompts.
        responses: ``[B, G, T]`` responses; state t is the prompt and t tokens of the response.
        candidates: ``[B, G, R, k]`` long: what may follow states 0 to R - 1, with R at most T + 1.
        max_tokens: Candidates that live at once; bounds the memory.

    Returns:
        ``[B, G, R, k, H]``. What is after the end of a response means nothing.
    """
    batch, samples, states, count = candidates.shape
    cut = states - 1  # the last state needs no token after it
    tokens = responses.tokens[..., :cut]
    flat = candidates.reshape(batch * samples, states, count)
    if not can_look_ahead(model):
        return _one_by_one(model, prompts, tokens, flat, max_tokens).view(batch, samples, states, count, -1)
    cache = trunk_cache(model, prompts, tokens)
    lengths = prompts.mask.sum(-1)
    attended = prompts.mask.repeat_interleave(samples, dim=0)
    found = []
    for rows in torch.arange(len(flat)).split(max(1, max_tokens // (states * count))):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        visible = visible_tokens(attended[part], states)
        positions = lengths.repeat_interleave(samples)[part, None] + torch.arange(states, device=lengths.device)
        found.append(look_ahead(model, cache, part, flat[part], visible, positions))
    forget_casts(candidates.device)
    return torch.cat(found).view(batch, samples, states, count, -1)


def trunk_cache(model: PreTrainedModel, prompts: PromptBatch, tokens: Tensor) -> Cache:
    """Run prompts and the given tokens of their responses ``[B, G, t]`` and return the cache, a row a response."""
    _, samples, length = tokens.shape
    cache, _ = prompt_trunk(model, prompts, samples)
    if length:
        extend_trunk(model, cache, prompts.mask.long().repeat_interleave(samples, dim=0), tokens.flatten(0, 1))
    return cache


def prompt_trunk(model: PreTrainedModel, prompts: PromptBatch, samples: int) -> tuple[Cache, Tensor]:
    """Run prompts; return the cache, ``samples`` rows a prompt, and the prompts' last hidden states ``[B, H]``."""
    mask = prompts.mask.long()
    padded = not bool(prompts.mask.all())
    cache = DynamicCache(config=_body_config(model))
    output = model.base_model(
        input_ids=prompts.tokens,
        attention_mask=mask if padded else None,
        position_ids=(mask.cumsum(-1) - 1).clamp_(min=0),
        past_key_values=cache,
        use_cache=True,
    )
    cache.batch_repeat_interleave(samples)
    states: Tensor = output.last_hidden_state
    return cache, states[:, -1]


def extend_trunk(model: PreTrainedModel, cache: Cache, attended: Tensor, tokens: Tensor) -> Tensor:
    """Run more tokens ``[N, t]`` of each row and return their hidden states; ``attended`` masks what is cached."""
    count = tokens.shape[1]
    whole = torch.nn.functional.pad(attended, (0, count), value=1)
    output = model.base_model(
        input_ids=tokens,
        attention_mask=None if bool(attended.all()) else whole,
        position_ids=attended.sum(-1, keepdim=True) + torch.arange(count, device=tokens.device),
        past_key_values=cache,
        use_cache=True,
    )
    states: Tensor = output.last_hidden_state
    return states


def visible_tokens(prompt_mask: Tensor, states: int) -> Tensor:
    """Return which tokens of a trunk each of R states sees, ``[N, R, P + R - 1]`` bool."""
    device = prompt_mask.device
    behind = torch.arange(states - 1, device=device) < torch.arange(states, device=device)[:, None]
    rows = len(prompt_mask)
    return torch.cat([prompt_mask[:, None].expand(-1, states, -1), behind.expand(rows, -1, -1)], dim=-1)


def look_ahead(
    model: PreTrainedModel, cache: Cache, rows: slice, candidates: Tensor, visible: Tensor, positions: Tensor
) -> Tensor:
    """Run candidates behind a trunk.

    Args:
        model: The model, one that :func:`can_look_ahead`.
        cache: The trunk's.
        rows: Which of its rows.
        candidates: ``[N, R, k]``.
        visible: ``[N, R, S]`` bool: which of the trunk's tokens each state sees.
        positions: ``[N, R]``: the position of each state's candidates.

    Returns:
        ``[N, R, k, H]``.
    """
    trunk = _Trunk(cache, rows, visible)
    count = candidates.shape[-1]
    with _looking_ahead(model, trunk):
        output = model.base_model(
            input_ids=candidates.flatten(1),
            position_ids=positions.repeat_interleave(count, dim=1),
            past_key_values=trunk,
            use_cache=True,
        )
    states: Tensor = output.last_hidden_state
    return states.view(*candidates.shape, -1)


def look_ahead_one(model: PreTrainedModel, cache: Cache, attended: Tensor, candidates: Tensor) -> Tensor:
    """Run candidates ``[N, k]`` for the next token of each row of a trunk, which stays as it is.

    Args:
        model: A model with a causal body.
        cache: The trunk's.
        attended: ``[N, S]`` long: which of the trunk's tokens are real.
        candidates: ``[N, k]``.

    Returns:
        ``[N, k, H]``.
    """
    if can_look_ahead(model):
        every = slice(0, len(candidates))
        positions = attended.sum(-1, keepdim=True)
        return look_ahead(model, cache, every, candidates[:, None], attended.bool()[:, None], positions)[:, 0]
    count = candidates.shape[1]
    copied = copy.deepcopy(cache)
    copied.batch_repeat_interleave(count)
    states = extend_trunk(model, copied, attended.repeat_interleave(count, dim=0), candidates.reshape(-1, 1))
    return states.view(*candidates.shape, -1)


def _one_by_one(
    model: PreTrainedModel, prompts: PromptBatch, tokens: Tensor, candidates: Tensor, max_tokens: int
) -> Tensor:
    """Run every candidate behind its own copy of what it follows: slow, and right for every causal model."""
    rows, states, count = candidates.shape
    samples = tokens.shape[1]
    found = []
    for state in range(states):
        ahead = candidates[:, state].reshape(len(prompts.tokens), samples, count)
        pieces = []
        for part in ahead.split(max(1, max_tokens // (states * samples)), dim=-1):
            before = tokens[:, :, None, :state].expand(-1, -1, part.shape[-1], -1)
            whole = torch.cat([before, part[..., None]], dim=-1).flatten(1, 2)
            # One more token, since states are those that predict the next one.
            padded = Responses(torch.nn.functional.pad(whole, (0, 1)), torch.ones_like(whole, dtype=torch.bool))
            pieces.append(body_outputs(model, prompts, padded)[:, -1].view(rows, part.shape[-1], -1))
        found.append(torch.cat(pieces, dim=1))
    return torch.stack(found, dim=1)


def can_look_ahead(model: PreTrainedModel) -> bool:
    """Return whether a model computes the same when many candidates share a trunk.

    Some do more in their attention than this one knows of. Two prompts and a few candidates tell; they are run once a
    model.
    """
    if model not in _CAN:
        try:
            _CAN[model] = not squashes_scores(model) and _probe(model)
        except Exception:  # unknown architectures fail in unknown ways
            _CAN[model] = False
    return _CAN[model]


_CAN: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


@torch.no_grad()
def _probe(model: PreTrainedModel) -> bool:
    if not getattr(model, "_supports_attention_backend", False):
        return False
    device = next(model.parameters()).device
    size = model.config.get_text_config().vocab_size
    prompts = PromptBatch(
        torch.arange(2, device=device),
        torch.ones(2, dtype=torch.bool, device=device),
        torch.tensor([[5, 3, 4], [0, 7, 6]], device=device) % size,
        torch.tensor([[True, True, True], [False, True, True]], device=device),
        ["", ""],
    )
    tokens = torch.tensor([[[9, 2]], [[1, 8]]], device=device) % size
    candidates = torch.tensor([[[3, 11], [4, 1], [2, 6]], [[10, 3], [5, 5], [12, 7]]], device=device) % size
    cache = trunk_cache(model, prompts, tokens)
    if not can_extend(cache):
        return False
    visible = visible_tokens(prompts.mask, 3)
    positions = prompts.mask.sum(-1)[:, None] + torch.arange(3, device=device)
    found = look_ahead(model, cache, slice(0, 2), candidates, visible, positions)
    expected = _one_by_one(model, prompts, tokens, candidates, MAX_TOKENS)
    tolerance = 1e-3 if found.dtype == torch.float32 else 0.1
    scale = expected.float().std().clamp(min=1e-6)
    return bool(((found - expected).float().abs().max() / scale) < tolerance * 10)
