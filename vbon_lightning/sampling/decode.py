"""Sample G responses a prompt from a causal language model, one prefill a prompt."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from vbon_lightning.sampling.cache import SHARE_FROM, SamplingCache, can_extend, can_share_prompts, shared_prompts
from vbon_lightning.sampling.memory import note_cache
from vbon_lightning.sampling.plain import prompts_with_room, refuse_plain, runs_plain
from vbon_lightning.sampling.request import SamplingRequest, check_request
from vbon_lightning.sampling.towers import note_read
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
        growing = Growing(reader_of(model, request), request)
        growing.grow()
        return growing.completions()


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


class Reader(ABC):
    """What a model makes of the next token of N rows, each a token longer than it was."""

    model: PreTrainedModel
    logits: Tensor
    """``[N, V]`` of the rows' first tokens, while there are none."""
    compact_below: float
    """Finished rows are to be dropped once the running ones are fewer than this share of all."""

    @property
    def models(self) -> tuple[PreTrainedModel, ...]:
        """Return all models that read the rows."""
        return (self.model,)

    @abstractmethod
    def select(self, rows: Tensor) -> None:
        """Keep some rows; a row may be kept several times, and those of a prompt stay together."""

    @abstractmethod
    def advance(self, tokens: Tensor) -> Tensor:
        """Add a token ``[N]`` to each row and return the logits ``[N, V]`` of the next."""


class _Cached(Reader):
    """Runs each token once, behind a cache of what was before it."""

    compact_below = _COMPACT_BELOW

    def __init__(self, model: PreTrainedModel, request: SamplingRequest) -> None:
        prompt_tokens, prompt_mask, noise, *_ = request
        _, samples, length = noise.shape
        self.model = model
        padded = not bool(prompt_mask.all())
        prompts, logits = prefill(model, prompt_tokens, prompt_mask, padded)
        self.cache, self.context = _extend(model, prompts, prompt_mask if padded else None, samples, length)
        self.logits = logits.repeat_interleave(samples, dim=0)
        self.positions = prompt_mask.sum(-1).repeat_interleave(samples)
        self.attention = prompt_mask.long().repeat_interleave(samples, dim=0) if padded else None

    def select(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self.positions = self.positions[rows]
        self.attention = None if self.attention is None else self.attention[rows]

    def advance(self, tokens: Tensor) -> Tensor:
        if self.attention is not None:
            self.attention = torch.nn.functional.pad(self.attention, (0, 1), value=1)
        with self.context():
            output = self.model(
                input_ids=tokens[:, None],
                attention_mask=self.attention,
                position_ids=self.positions[:, None],
                past_key_values=self.cache,
                use_cache=True,
            )
        self.positions = self.positions + 1
        note_cache(self.cache)
        logits: Tensor = output.logits[:, -1]
        return logits


class _Plain(Reader):
    """Runs the whole text again for every token, for models that have no cache to share."""

    compact_below = 1.0

    def __init__(self, model: PreTrainedModel, request: SamplingRequest) -> None:
        _, samples, length = request.noise.shape
        self.model = model
        self.text, self.lengths = prompts_with_room(request.prompt_tokens, request.prompt_mask.bool(), samples, length)
        self.logits = self._run()

    def select(self, rows: Tensor) -> None:
        self.text, self.lengths = self.text[rows], self.lengths[rows]

    def advance(self, tokens: Tensor) -> Tensor:
        self.text[torch.arange(len(tokens), device=tokens.device), self.lengths] = tokens
        self.lengths = self.lengths + 1
        return self._run()

    def _run(self) -> Tensor:
        logits: Tensor = self.model(input_ids=self.text[:, : int(self.lengths.max())], use_cache=False).logits
        return logits[torch.arange(len(logits), device=logits.device), self.lengths - 1]


def reader_of(model: PreTrainedModel, request: SamplingRequest) -> Reader:
    """Run a model on the prompts of a request, for each of which there are as many rows as it has noise."""
    return _Plain(model, request) if runs_plain(model) else _Cached(model, request)


class Growing:
    """Responses in the making: rows that grow in step, and may be dropped or copied on the way.

    What was decoded stays in the cache, whatever becomes of the rows. To be used without gradients, and under
    :func:`caching`.

    Args:
        reader: What gives the logits.
        request: The prompts, the noise, and how responses end.
    """

    def __init__(self, reader: Reader, request: SamplingRequest) -> None:
        batch, samples, self.longest = request.noise.shape
        device, self.rows = request.prompt_tokens.device, batch * samples
        self.reader, self.prompts, self.temperature = reader, batch, request.temperature
        self.noise = request.noise.to(device).reshape(self.rows, self.longest)
        """``[N, T]``: a uniform for each token."""
        self.ends, self.pad_id = torch.as_tensor(list(request.end_ids), device=device), request.pad_id
        self.tokens, self.log_probs, self.mask, self.finished = _nothing_yet(
            self.rows, self.longest, self.pad_id, device
        )
        self.length = 0
        """Tokens that rows which have not finished have."""
        self.generated = torch.zeros((), dtype=torch.long, device=device)
        """Tokens that were chosen, those of rows that are gone included."""
        self.lockstep = Lockstep(reader.model)
        self.active = torch.arange(self.rows, device=device)
        """The row that each of the reader's is."""
        self._note_read(request.prompt_mask)

    def grow(self, until: int | None = None) -> None:
        """Choose tokens until the rows that have not finished have so many; the most there may be by default."""
        while self.length < (self.longest if until is None else min(until, self.longest)):
            logits = self._next_logits()
            if logits is None:
                break
            self._choose(logits)
        forget_casts(self.tokens.device)

    def _next_logits(self) -> Tensor | None:
        """Return the logits ``[N, V]`` of the active rows, or None where none goes on."""
        if self.length == 0:
            return self.reader.logits
        keep = self.lockstep.rows_to_run((~self.finished[self.active]).nonzero().squeeze(-1))
        if keep is None:
            return None
        if keep.numel() < self.reader.compact_below * self.active.numel():
            self.reader.select(keep)
            self.active = self.active[keep]
        self._note_read(keep.numel())
        return self.reader.advance(self.tokens[self.active, self.length - 1])

    def _note_read(self, tokens: int | Tensor) -> None:
        for model in self.reader.models:
            note_read(model, tokens)

    def _choose(self, logits: Tensor) -> None:
        active, place = self.active, self.length
        chosen, log_p = choose_tokens(logits, self.noise[active, place, None], self.temperature)
        chosen, running = chosen.squeeze(-1), ~self.finished[active]
        self.log_probs[active, place] = torch.where(running, log_p.squeeze(-1), 0.0)
        self.tokens[active, place] = torch.where(running, chosen, self.pad_id)
        self.mask[active, place] = running
        self.finished[active] |= torch.isin(chosen, self.ends)
        self.length, self.generated = place + 1, self.generated + running.sum()

    def select(self, rows: Tensor, *, own_noise: bool = True) -> None:
        """Keep some rows, or several copies of one, once they have a token.

        Args:
            rows: ``[R]`` rows, as many for each prompt, prompt by prompt; as many as there are, where noise stays
                in its place.
            own_noise: Whether a row takes the noise of its later tokens with it, or finds that of its new place.
        """
        place = torch.full_like(self.finished, -1, dtype=torch.long)
        place[self.active] = torch.arange(len(self.active), device=place.device)
        found = place[rows].masked_fill(self.finished[rows], -1)
        self.tokens, self.log_probs = self.tokens[rows], self.log_probs[rows]
        self.mask, self.finished = self.mask[rows], self.finished[rows]
        self.noise = self.noise[rows] if own_noise else self.noise
        self.active = (found >= 0).nonzero().squeeze(-1)
        if len(self.active):
            self.reader.select(found[self.active])

    def completions(self) -> Completions:
        """Return the rows as they are."""
        shape = (self.prompts, -1, self.length)
        return Completions(
            tokens=self.tokens[:, : self.length].reshape(shape),
            mask=self.mask[:, : self.length].reshape(shape),
            finished=self.finished.view(self.prompts, -1),
            log_probs=self.log_probs[:, : self.length].reshape(shape),
        )


def _nothing_yet(rows: int, length: int, pad_id: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return tokens, log-probabilities and mask ``[N, T]`` and what has finished ``[N]``, before the first token."""
    return (
        torch.full((rows, length), pad_id, dtype=torch.long, device=device),
        torch.zeros(rows, length, dtype=torch.float32, device=device),
        torch.zeros(rows, length, dtype=torch.bool, device=device),
        torch.zeros(rows, dtype=torch.bool, device=device),
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
