"""Sample G responses a prompt from a causal language model, one prefill a prompt."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from vbon_lightning.sampling.cache import SHARE_FROM, SamplingCache, can_extend, can_share_prompts, shared_prompts
from vbon_lightning.sampling.plain import prompts_with_room, refuse_plain, runs_plain
from vbon_lightning.sampling.request import SamplingRequest, check_request
from vbon_lightning.sharding import Lockstep
from vbon_lightning.types import Completions

_COMPACT_BELOW = 0.875
"""Finished rows are dropped from the cache once the running ones are fewer than this share of it."""

MAX_CHOSEN = 2**23
"""Logits that are turned into tokens at once: 128 MiB, of 16 bytes each."""


@lru_cache(maxsize=64)
def _takes_logits_to_keep(model_class: Any) -> bool:
    return "logits_to_keep" in inspect.signature(model_class.forward).parameters


def keep_logits(model: PreTrainedModel, count: int) -> dict[str, int]:
    """Return the forward argument that limits logits to the last ``count`` positions, where there is one."""
    kind: Any = type(model)
    return {"logits_to_keep": count} if _takes_logits_to_keep(kind) else {}


def forget_casts(device: torch.device) -> None:
    """Forget the weights that autocast cast without a gradient; older torch would reuse them with one."""
    if torch.is_autocast_enabled(device.type):
        torch.clear_autocast_cache()


def recomputes(model: PreTrainedModel) -> bool:
    """Return whether a model computes activations again for the gradient, and then keeps no cache."""
    return model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@contextmanager
def caching(model: PreTrainedModel) -> Iterator[None]:
    """Let a model keep a cache, which gradient checkpointing forbids in training mode."""
    recomputing = recomputes(model)
    if recomputing:
        model.eval()
    try:
        yield
    finally:
        if recomputing:
            model.train()


def sample_completions(model: PreTrainedModel, request: SamplingRequest) -> Completions:
    """Sample responses by inverting the cumulative distribution at given uniforms.

    Each prompt is run once and its key-value cache shared by its samples; finished rows leave the batch; the
    log-probabilities come from the pass that chose the token. There is no top-k or top-p: they would make the
    sampling distribution another one than the policy's.

    Args:
        model: A causal language model.
        request: The prompts, the noise, and how responses end.

    Returns:
        :class:`~vbon_lightning.types.Completions`, as long as the longest response.

    Raises:
        ValueError: As :func:`~vbon_lightning.sampling.request.check_request`.
    """
    check_request(model, request)
    with torch.no_grad(), caching(model):
        return (_decode_plain if runs_plain(model) else _decode)(model, request)


def choose_tokens(
    logits: Tensor, uniforms: Tensor, temperature: float, *, max_logits: int = MAX_CHOSEN
) -> tuple[Tensor, Tensor]:
    """Invert the cumulative distribution of each row at its uniform.

    Args:
        logits: ``[N, V]``.
        uniforms: ``[N, 1]`` float64 on [0, 1).
        temperature: Sampling temperature, > 0.
        max_logits: Logits of as many rows at once as this, which bounds the memory; at least a row.

    Returns:
        The tokens ``[N, 1]`` and their log-probabilities ``[N, 1]``, in float32.
    """
    pieces = [_choose(logits[rows], uniforms[rows], temperature) for rows in bounded_rows(logits, max_logits)]
    if len(pieces) == 1:
        return pieces[0]
    tokens, log_probs = zip(*pieces, strict=True)
    return torch.cat(tokens), torch.cat(log_probs)


def bounded_rows(logits: Tensor, max_logits: int = MAX_CHOSEN) -> list[slice]:
    """Cut ``[N, V]`` logits into slices of rows with at most so many logits, and at least a row."""
    rows = max(1, max_logits // logits.shape[-1])
    return [slice(start, start + rows) for start in range(0, max(1, len(logits)), rows)]


def _choose(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    scaled = logits.float()
    # Before it is divided: a peaked row's logits are large, and their last digits would be multiplied.
    scaled = scaled - scaled.amax(-1, keepdim=True)
    if temperature != 1:
        scaled /= temperature
    # Summed in float64: the last of many small probabilities must not be lost.
    cumulative = scaled.exp().cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, uniforms * total, right=True)
    chosen = chosen.clamp_(max=scaled.shape[-1] - 1)
    return chosen, scaled.gather(-1, chosen) - total.log().float()


def prefill(model: PreTrainedModel, prompt_tokens: Tensor, prompt_mask: Tensor, padded: bool) -> tuple[Cache, Tensor]:
    """Run each prompt once and return its cache and the logits ``[B, V]`` of the first response token.

    Raises:
        ModelError: If the model has no cache that could be shared.
    """
    refuse_plain(model, "decoding this way")
    positions = (prompt_mask.long().cumsum(-1) - 1).clamp_(min=0)
    output = model(
        input_ids=prompt_tokens,
        attention_mask=prompt_mask.long() if padded else None,
        position_ids=positions,
        past_key_values=DynamicCache(config=model.config),
        use_cache=True,
        **keep_logits(model, 1),
    )
    return output.past_key_values, output.logits[:, -1]


def _decode(model: PreTrainedModel, request: SamplingRequest) -> Completions:
    prompt_tokens, prompt_mask, noise, end_ids, pad_id, temperature = request
    batch, samples, length = noise.shape
    lengths = prompt_mask.sum(-1)
    device = prompt_tokens.device
    rows = batch * samples
    noise = noise.to(device).reshape(rows, length)
    ends = torch.as_tensor(list(end_ids), device=device)

    tokens, log_probs, mask, finished = _nothing_yet(rows, length, pad_id, device)

    padded = not bool(prompt_mask.all())
    prompts, logits = prefill(model, prompt_tokens, prompt_mask, padded)
    cache, context = _extend(model, prompts, prompt_mask if padded else None, samples, length)
    logits = logits.repeat_interleave(samples, dim=0)
    next_position = lengths.repeat_interleave(samples)
    attention = prompt_mask.long().repeat_interleave(samples, dim=0) if padded else None
    active = torch.arange(rows, device=device)
    lockstep = Lockstep(model)

    for step in range(length):
        chosen, log_p = choose_tokens(logits, noise[active, step, None], temperature)
        running = ~finished[active]
        log_probs[active, step] = torch.where(running, log_p.squeeze(-1), 0.0)
        chosen = chosen.squeeze(-1)
        tokens[active, step] = torch.where(running, chosen, pad_id)
        mask[active, step] = running
        finished[active] |= torch.isin(chosen, ends)
        if step + 1 == length:
            break

        keep = lockstep.rows_to_run((~finished[active]).nonzero().squeeze(-1))
        if keep is None:
            break
        if keep.numel() < _COMPACT_BELOW * active.numel():
            cache.batch_select_indices(keep)
            active, chosen = active[keep], chosen[keep]
            attention = attention[keep] if attention is not None else None
        if attention is not None:
            attention = torch.cat([attention, attention.new_ones(len(active), 1)], dim=-1)
        with context():
            output = model(
                input_ids=chosen[:, None],
                attention_mask=attention,
                position_ids=(next_position[active] + step)[:, None],
                past_key_values=cache,
                use_cache=True,
            )
        logits = output.logits[:, -1]

    forget_casts(device)
    return _completions((batch, samples, step + 1), tokens, log_probs, mask, finished)


def _decode_plain(model: PreTrainedModel, request: SamplingRequest) -> Completions:
    """Decode without a cache: every token takes a pass over the whole text."""
    prompt_tokens, prompt_mask, noise, end_ids, pad_id, temperature = request
    batch, samples, length = noise.shape
    device, rows = prompt_tokens.device, batch * samples
    uniforms = noise.to(device).reshape(rows, length)
    ends = torch.as_tensor(list(end_ids), device=device)
    text, lengths = prompts_with_room(prompt_tokens, prompt_mask.bool(), samples, length)
    tokens, log_probs, mask, finished = _nothing_yet(rows, length, pad_id, device)
    lockstep, active = Lockstep(model), torch.arange(rows, device=device)
    for step in range(length):
        seen = int(lengths[active].max()) + step
        logits = model(input_ids=text[active, :seen], use_cache=False).logits
        last = logits[torch.arange(len(active), device=device), lengths[active] + step - 1]
        chosen, log_p = choose_tokens(last, uniforms[active, step, None], temperature)
        chosen = chosen.squeeze(-1)
        running = ~finished[active]
        tokens[active, step] = torch.where(running, chosen, pad_id)
        log_probs[active, step] = torch.where(running, log_p.squeeze(-1), 0.0)
        mask[active, step] = running
        text[active, lengths[active] + step] = chosen
        finished[active] |= torch.isin(chosen, ends)
        if step + 1 == length or (left := lockstep.rows_to_run((~finished).nonzero().squeeze(-1))) is None:
            break
        active = left
    forget_casts(device)
    return _completions((batch, samples, step + 1), tokens, log_probs, mask, finished)


def _nothing_yet(rows: int, length: int, pad_id: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return tokens, log-probabilities and mask ``[N, T]`` and what has finished ``[N]``, before the first token."""
    return (
        torch.full((rows, length), pad_id, dtype=torch.long, device=device),
        torch.zeros(rows, length, dtype=torch.float32, device=device),
        torch.zeros(rows, length, dtype=torch.bool, device=device),
        torch.zeros(rows, dtype=torch.bool, device=device),
    )


def _completions(
    shape: tuple[int, int, int], tokens: Tensor, log_probs: Tensor, mask: Tensor, finished: Tensor
) -> Completions:
    """Cut ``[N, T]`` to the longest response, ``shape`` being ``[B, G, longest]``."""
    longest = shape[-1]
    return Completions(
        tokens=tokens[:, :longest].reshape(shape),
        mask=mask[:, :longest].reshape(shape),
        finished=finished.view(shape[:2]),
        log_probs=log_probs[:, :longest].reshape(shape),
    )


def _extend(
    model: PreTrainedModel, prompts: Cache, prompt_mask: Tensor | None, samples: int, length: int
) -> tuple[Cache, Callable[[], AbstractContextManager[None]]]:
    """Return the cache of all rows, and the context to run the model in with it."""
    if not can_extend(prompts):  # of sliding windows, for example
        prompts.batch_repeat_interleave(samples)
        return prompts, nullcontext
    shared = samples > 1 and prompts.get_seq_length() >= SHARE_FROM and can_share_prompts(model)
    cache = SamplingCache(prompts, samples=samples, room=length - 1, shared=shared, prompt_mask=prompt_mask)
    return cache, partial(shared_prompts, model, cache) if shared else nullcontext
