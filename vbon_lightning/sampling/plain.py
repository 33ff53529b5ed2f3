"""Models that must be run without a cache: each text as it is, nothing before it and no positions given.

Recurrent and hybrid models keep states that cannot be shared or extended as keys and values are, and some decoders
count their positions otherwise than from 0. Their texts stand at the left of a row and end in filler, which a causal
model cannot see from the tokens before it: the pass is the one that the model's authors made it for, at the price of
the whole text for every token that is sampled.
"""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from vbon_lightning.finite import NotFiniteError
from vbon_lightning.models import ModelError
from vbon_lightning.models.loading import evaluating

EXACT, ROUNDED = 0.02, 0.5
"""How far two ways to run a model may be apart in a log-probability: in float32, and in half precision."""


def left_aligned(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move the real tokens of each row to its left, in their order.

    Args:
        tokens: ``[N, L]``.
        mask: ``[N, L]`` bool.

    Returns:
        The tokens, each row filled up with a token of its own, and how many are real, ``[N]``.
    """
    order = (~mask).to(torch.int8).argsort(dim=-1, stable=True)
    moved, lengths = tokens.gather(1, order), mask.sum(-1)
    behind = torch.arange(tokens.shape[1], device=tokens.device) >= lengths[:, None]
    # Some models take the pad token for a sign, so the filler is a token that is there.
    return torch.where(behind, moved[:, :1], moved), lengths


def prompts_with_room(tokens: Tensor, mask: Tensor, samples: int, room: int) -> tuple[Tensor, Tensor]:
    """Lay out prompts for responses to be written behind them.

    Args:
        tokens: ``[B, P]``.
        mask: ``[B, P]`` bool.
        samples: G, responses a prompt.
        room: Tokens of a response.

    Returns:
        ``[B G, P + room]``, each prompt at the left of its rows, then filler; and the prompts' lengths, ``[B G]``.
    """
    aligned, lengths = left_aligned(tokens, mask)
    text = torch.cat([aligned, aligned[:, :1].expand(-1, room)], dim=1)
    return text.repeat_interleave(samples, dim=0), lengths.repeat_interleave(samples)


def runs_plain(model: PreTrainedModel) -> bool:
    """Return whether a model has to be run without a cache; it is tried on a few tokens, once a model.

    Raises:
        ModelError: If what a model says of a token depends on what follows it: it is no decoder.
        NotFiniteError: If what it says is NaN.
    """
    if model not in _PLAIN:
        uncast = torch.autocast(next(model.parameters()).device.type, enabled=False)
        # In training mode there may be no cache, where activations are computed again, and dropout would be noise.
        with torch.no_grad(), uncast, evaluating(model):
            _PLAIN[model] = _judge(model)
    return _PLAIN[model]


def refuse_plain(model: PreTrainedModel, what: str) -> None:
    """Refuse what has no way but by a cache.

    Args:
        model: The model.
        what: What was asked for, for the message.

    Raises:
        ModelError: If the model runs without one.
    """
    if runs_plain(model):
        raise ModelError(
            f"{what} needs a model with a plain cache of keys and values, and {type(model).__name__} has none"
        )


_PLAIN: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()

_PROMPT, _SHORT, _NEXT = 4, 3, 2
"""Lengths of the texts that a model is tried on."""


def _judge(model: PreTrainedModel) -> bool:
    device = next(model.parameters()).device
    if 0 < (getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0) <= _PROMPT + _NEXT:
        return False  # too short a context to try anything in
    texts = _texts(model).to(device)
    length = texts.shape[1]
    own = [_log_probs(model(input_ids=text[None], use_cache=False)) for text in texts]  # [1, L, V] each
    if any(bool(found.isnan().any()) for found in own):
        raise NotFiniteError(
            f"what a model ({type(model).__name__}) says of a few tokens is NaN, though its weights are finite: it "
            "comes from a run that diverged, or is broken; give another model, or export it again from its last good "
            "checkpoint"
        )
    limit = EXACT if own[0].dtype == torch.float32 and next(model.parameters()).dtype == torch.float32 else ROUNDED
    filled = torch.cat([texts, texts[:, :1]], dim=1)
    padded = _log_probs(model(input_ids=filled, use_cache=False))[:, :length]
    apart = max(_apart(padded[place], found[0]) for place, found in enumerate(own))
    if not apart <= limit:
        raise ModelError(
            f"{type(model).__name__} is no causal language model: what it says of a token changes by {apart:.3g} nats "
            "with what stands behind it"
        )
    try:
        cached = max(_apart(found, own[row][0, place]) for found, row, place in _with_cache(model, texts))
        reason = f"its forward pass with a cache and without one are {cached:.3g} nats apart on a token"
    except Exception as error:  # unknown architectures fail in unknown ways
        cached, reason = float("inf"), f"it cannot be run with a shared cache ({type(error).__name__})"
    if cached <= limit:
        return False
    warnings.warn(
        f"{type(model).__name__}: {reason}. It is sampled and scored without one, which takes a pass over the whole "
        "text for every token that is sampled",
        stacklevel=2,
    )
    return True


def _texts(model: PreTrainedModel) -> Tensor:
    """Return two texts ``[2, 6]`` of tokens that stand for themselves."""
    config = model.config.get_text_config()
    special = {getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")}
    ordinary = [token for token in range(min(config.vocab_size, 64)) if token not in special] or [0]
    count = _PROMPT + _NEXT
    places = (torch.arange(2 * count) * 7 + torch.arange(2 * count) // count) % len(ordinary)
    return torch.tensor(ordinary)[places].view(2, count)


def _with_cache(model: PreTrainedModel, texts: Tensor) -> list[tuple[Tensor, int, int]]:
    """Run texts as sampling and scoring do: log-probabilities ``[V]``, the row and the place that they are of."""
    rows = len(texts)
    mask = torch.ones(rows, _PROMPT, dtype=torch.long, device=texts.device)
    mask[1, : _PROMPT - _SHORT] = 0
    prompts = texts[:, :_PROMPT].clone()
    prompts[1] = texts[1, :_SHORT].repeat(2)[-_PROMPT:]  # padded on the left by anything
    behind = torch.stack([texts[0, _PROMPT:], texts[1, _SHORT : _SHORT + _NEXT]])
    lengths = mask.sum(-1)
    cache = DynamicCache(config=model.config)
    output = model(
        input_ids=prompts,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
    )
    first = _log_probs(output)[:, -1]
    found = [(first[row], row, int(lengths[row]) - 1) for row in range(rows)]
    cache = output.past_key_values
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2], device=texts.device))
    # Several tokens at once, then one.
    for start, stop in ((0, _NEXT - 1), (_NEXT - 1, _NEXT)):
        mask = torch.nn.functional.pad(mask, (0, stop - start), value=1)
        output = model(
            input_ids=behind[:, start:stop],
            attention_mask=mask,
            position_ids=lengths[:, None] + torch.arange(start, stop, device=texts.device),
            past_key_values=cache,
            use_cache=True,
        )
        said = _log_probs(output)
        found += [
            (said[row, place - start], row, int(lengths[row]) + place)
            for row in range(rows)
            for place in range(start, stop)
        ]
    return found


def _apart(first: Tensor, second: Tensor) -> float:
    return float(torch.where(first == second, 0.0, (first - second).abs()).max())  # also where both are -inf


def _log_probs(output: Any) -> Tensor:
    logits: Tensor = output.logits
    return logits.float().log_softmax(-1)
