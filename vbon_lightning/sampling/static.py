"""Decode in fixed shapes, so that on CUDA one step can be captured as a graph and replayed.

A small model's step on a GPU is bound by the launches of its kernels, a few hundred a step, and not by the memory
they read. A CUDA graph launches them all at once, but replays the same kernels on the same addresses: no shape may
change, nothing may wait for the host. So the cache has room for every token from the start, finished rows stay, and
where to write is a tensor. Rows and prompt widths are padded to a few sizes, so that a graph serves many batches.

On the CPU, and where a capture fails, the same step runs uncaptured. The step is tested on the CPU, the capture by
tests that need CUDA.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from vbon_lightning.adapters import adapters_active
from vbon_lightning.sampling.cache import can_extend
from vbon_lightning.sampling.decode import (
    caching,
    choose_tokens,
    forget_casts,
    prefill,
    sample_completions,
)
from vbon_lightning.sampling.request import SamplingRequest, check_request
from vbon_lightning.types import Completions

_MASKED = ("eager", "sdpa")
"""Attention that takes a mask of its own for every row, key by key."""


class StaticLayer(DynamicLayer):
    """A layer of fixed size, written where a tensor says."""

    def __init__(self, keys: Tensor, values: Tensor, *, rows: int, size: int, slot: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        # Zeros: what is masked gets weight zero, and zero times what memory happens to hold need not be zero.
        self.keys = keys.new_zeros(rows, keys.shape[1], size, keys.shape[-1])
        self.values = values.new_zeros(rows, values.shape[1], size, values.shape[-1])
        self.slot = slot

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token a row at the slot and return everything."""
        keys, values = cast(Tensor, self.keys), cast(Tensor, self.values)
        # Under autocast the library's cache holds both in the keys' type.
        keys.index_copy_(2, self.slot, key_states.to(keys.dtype))
        values.index_copy_(2, self.slot, value_states.to(values.dtype))
        return keys, values


class StaticDecoder:
    """The state of a decode of N rows in fixed shapes, and its step.

    Args:
        prompts: A cache that prompts have been run into, of plain layers: it tells the layers' shapes.
        logits: ``[B, V]`` logits of the first token: they tell the vocabulary and the type.
        rows: N.
        width: Prompt tokens there is room for.
        length: T, the most tokens a response has.
        temperature: Sampling temperature, > 0.
        pad_id: What stands behind the end.
    """

    def __init__(
        self, prompts: Cache, logits: Tensor, *, rows: int, width: int, length: int, temperature: float, pad_id: int
    ) -> None:
        device, vocabulary = logits.device, logits.shape[-1]
        self.rows, self.width, self.length = rows, width, length
        self.temperature, self.pad_id = temperature, pad_id
        self.number = torch.zeros(1, dtype=torch.long, device=device)
        """``[1]``: the token that is chosen next."""
        self.slot = torch.full((1,), width, dtype=torch.long, device=device)
        """``[1]``: its place in the cache."""
        self.logits = logits.new_zeros(rows, vocabulary)
        self.noise = torch.full((rows, length), 0.5, dtype=torch.float64, device=device)
        self.prompt_lengths = torch.ones(rows, dtype=torch.long, device=device)
        self.ends = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        self.tokens = torch.full((rows, length), pad_id, dtype=torch.long, device=device)
        self.log_probs = torch.zeros(rows, length, dtype=torch.float32, device=device)
        self.mask = torch.zeros(rows, length, dtype=torch.bool, device=device)
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)
        # Attention kernels want their masks' rows aligned.
        size = _round_up(width + length - 1, 8)
        self.attend = torch.zeros(rows, 1, 1, size, dtype=torch.bool, device=device)
        """``[N, 1, 1, S]``: which places of the cache a row sees."""
        self.cache = DynamicCache()
        layers = cast("list[DynamicLayer]", prompts.layers)
        self.cache.layers = [
            StaticLayer(cast(Tensor, layer.keys), cast(Tensor, layer.values), rows=rows, size=size, slot=self.slot)
            for layer in layers
        ]
        self.graph: Any = None

    def load(self, prompts: Cache, logits: Tensor, prompt_mask: Tensor, noise: Tensor, end_ids: Sequence[int]) -> None:
        """Take in a batch: B prompts with G samples each, at most N rows; the rows left over count as finished.

        Args:
            prompts: The cache after the prompts have been run.
            logits: ``[B, V]`` logits of the first token.
            prompt_mask: ``[B, P]`` bool, P at most the width.
            noise: ``[B, G, T]`` float64 uniforms.
            end_ids: Token ids that end a response.
        """
        batch, samples, _ = noise.shape
        used = batch * samples
        behind = slice(self.width - prompt_mask.shape[-1], self.width)
        for mine, theirs in zip(self.cache.layers, cast("list[DynamicLayer]", prompts.layers), strict=True):
            for name in ("keys", "values"):
                room = getattr(mine, name)[:used].unflatten(0, (batch, samples))
                room[:, :, :, behind] = getattr(theirs, name)[:, None]
        self.attend.zero_()
        self.attend[:used].unflatten(0, (batch, samples))[..., behind] = prompt_mask[:, None, None, None]
        self.logits[:used].unflatten(0, (batch, samples))[:] = logits[:, None]
        self.prompt_lengths[:used].unflatten(0, (batch, samples))[:] = prompt_mask.sum(-1)[:, None]
        self.noise[:used] = noise.reshape(used, self.length).to(self.noise.device)
        self.ends.zero_()
        # An id outside the vocabulary is never sampled.
        known = [token for token in end_ids if 0 <= token < len(self.ends)]
        self.ends[torch.tensor(known, dtype=torch.long, device=self.ends.device)] = True
        self.tokens.fill_(self.pad_id)
        self.log_probs.zero_()
        self.mask.zero_()
        self.finished.zero_()
        self.finished[used:] = True
        self.restart()

    def restart(self) -> None:
        """Go back to the first token."""
        self.number.zero_()
        self.slot.fill_(self.width)

    def choose(self) -> Tensor:
        """Choose a token a row from the logits, write it down and return it, ``[N, 1]``."""
        chosen, log_probs = choose_tokens(self.logits, self.noise.index_select(1, self.number), self.temperature)
        ended = self.finished[:, None]
        # Filled and not selected by torch.where: a number that becomes a tensor would be copied to the device.
        self.tokens.index_copy_(1, self.number, chosen.masked_fill(ended, self.pad_id))
        self.log_probs.index_copy_(1, self.number, log_probs.masked_fill(ended, 0.0))
        self.mask.index_copy_(1, self.number, ~ended)
        self.finished |= self.ends[chosen.squeeze(-1)]
        return chosen

    def step(self, model: PreTrainedModel) -> None:
        """Choose a token a row and run the model on it; shapes are fixed and the host is never waited for."""
        chosen = self.choose()
        self.attend.index_fill_(-1, self.slot, True)
        mask = self.attend
        if model.config.get_text_config()._attn_implementation != "sdpa":  # the other adds its mask to the scores
            lowest = torch.finfo(self.logits.dtype).min
            mask = torch.zeros_like(mask, dtype=self.logits.dtype).masked_fill(~mask, lowest)
        output = model(
            input_ids=chosen,
            attention_mask=mask,
            position_ids=(self.prompt_lengths + self.number)[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.logits.copy_(output.logits[:, -1])
        self.number += 1
        self.slot += 1

    def capture(self, model: PreTrainedModel, pool: Any) -> None:
        """Capture the step in a CUDA graph; it reads the parameters where they are, and so sees their updates.

        Args:
            model: The model.
            pool: Memory that graphs share: none of them leaves anything in it between two steps.
        """
        device, graph, begun = self.logits.device, torch.cuda.CUDAGraph(), False
        # The last context is for a capture that fails: it would leave its own stream the current one.
        current = torch.cuda.current_stream(device)
        try:
            with torch.cuda.device(device), _without_cast_cache(device), torch.cuda.stream(current):
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    self.restart()
                    self.step(model)  # libraries set themselves up in their first calls
                    self.restart()
                    with _waiting_refused():
                        self.step(model)
                torch.cuda.current_stream().wait_stream(stream)
                self.restart()
                begun = True
                # Threads of their own may score or load meanwhile.
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    self.step(model)
        except Exception:
            if begun:
                _mend_after_broken_capture(device, pool)
            raise
        self.graph = graph

    def run(self, model: PreTrainedModel) -> None:
        """Do a step: replay it where it was captured."""
        if self.graph is None:
            self.step(model)
        else:
            self.graph.replay()

    def completions(self, batch: int, samples: int) -> Completions:
        """Return copies of what was sampled, as long as the longest response."""
        used = batch * samples
        longest = int(self.mask[:used].sum(-1).max())
        shape = (batch, samples, longest)
        return Completions(
            tokens=self.tokens[:used, :longest].clone().view(shape),
            mask=self.mask[:used, :longest].clone().view(shape),
            finished=self.finished[:used].clone().view(batch, samples),
            log_probs=self.log_probs[:used, :longest].clone().view(shape),
        )


class GraphSampler:
    """Sample as :func:`~vbon_lightning.sampling.sample_completions` does, in fixed shapes and replayed on CUDA.

    The same noise gives the same tokens. Models that do more in their cache or attention than it knows of (sliding
    windows, kernels without a mask of their own) are sampled by the eager loop, and a warning says so once.

    Under autocast the weights are cast at every step, since casts kept from one step to the next would outlive an
    update of the weights; a model held in half precision avoids that.

    Args:
        check_every: Steps between two looks at whether all rows have finished; each look waits for the device.
        width_step: Prompt widths are padded to multiples of it.
        keep: Shapes whose state is kept: each holds a cache of rows x (prompt + response) tokens.
    """

    def __init__(self, *, check_every: int = 8, width_step: int = 16, keep: int = 4) -> None:
        self.check_every, self.width_step, self.keep = check_every, width_step, keep
        self._decoders: WeakKeyDictionary[PreTrainedModel, OrderedDict[Hashable, StaticDecoder]] = WeakKeyDictionary()
        self._pool: Any = None
        self._uncaptured: WeakSet[PreTrainedModel] = WeakSet()
        self._warned: set[str] = set()

    def __call__(self, model: PreTrainedModel, request: SamplingRequest) -> Completions:
        """Sample responses."""
        check_request(model, request)
        one_token = request.noise.shape[-1] == 1  # which needs no cache
        obstacle = None if one_token else why_not_static(model)
        if obstacle is not None:
            self._warn(f"{type(model).__name__} is sampled by the eager loop: {obstacle}")
        if obstacle is not None or one_token:
            return sample_completions(model, request)
        with torch.no_grad(), caching(model):
            return self._decode(model, request)

    def _decode(self, model: PreTrainedModel, request: SamplingRequest) -> Completions:
        prompt_tokens, prompt_mask, noise, end_ids, pad_id, temperature = request
        batch, samples, length = noise.shape
        prompts, logits = prefill(model, prompt_tokens, prompt_mask, not bool(prompt_mask.all()))
        rows, width = row_bucket(batch * samples), _round_up(prompt_tokens.shape[-1], self.width_step)
        decoder = self._decoder(model, prompts, logits, rows, width, length, temperature, pad_id)
        decoder.load(prompts, logits, prompt_mask, noise, end_ids)
        del prompts, logits
        for number in range(1, length):
            decoder.run(model)
            if number % self.check_every == 0 and bool(decoder.finished.all()):
                break
        else:
            decoder.choose()
        forget_casts(prompt_tokens.device)
        return decoder.completions(batch, samples)

    def _decoder(
        self,
        model: PreTrainedModel,
        prompts: Cache,
        logits: Tensor,
        rows: int,
        width: int,
        length: int,
        temperature: float,
        pad_id: int,
    ) -> StaticDecoder:
        known = self._decoders.setdefault(model, OrderedDict())
        states = cast(Tensor, cast(DynamicLayer, prompts.layers[0]).keys)
        shape = (rows, width, length, temperature, pad_id, logits.dtype, states.dtype)
        key = (*shape, *_how_it_computes(model, logits.device))
        if key not in known:
            while len(known) >= self.keep:
                known.popitem(last=False)
            # Made in inference mode, tensors could not be written to outside of it.
            with torch.inference_mode(False), torch.no_grad():
                known[key] = StaticDecoder(
                    prompts, logits, rows=rows, width=width, length=length, temperature=temperature, pad_id=pad_id
                )
                if logits.is_cuda and model not in self._uncaptured:
                    self._capture(known[key], model)
        known.move_to_end(key)
        return known[key]

    def _capture(self, decoder: StaticDecoder, model: PreTrainedModel) -> None:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            decoder.capture(model, self._pool)
        except Exception as problem:  # whatever the model does that a capture forbids: it still runs uncaptured
            decoder.graph = None
            self._pool = None  # a broken capture leaves it in use
            self._uncaptured.add(model)
            self._warn(f"a decode step of {type(model).__name__} could not be captured and runs uncaptured: {problem}")

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"data.sampler=graph: {message}", stacklevel=3)


def row_bucket(rows: int) -> int:
    """Return how many rows a decode of some rows is padded to: a power of two, from 32 on a multiple of 32."""
    return 1 << (rows - 1).bit_length() if rows <= 32 else _round_up(rows, 32)


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step


def _how_it_computes(model: PreTrainedModel, device: torch.device) -> tuple[Hashable, ...]:
    """Return what a captured step has taken for granted about its model."""
    casts = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    tensors = [*model.parameters(), *model.buffers()]
    where = hash(tuple(tensor.data_ptr() for tensor in tensors))
    config = model.config.get_text_config()
    return casts, model.training, adapters_active(model), config._attn_implementation, where


@contextmanager
def _waiting_refused() -> Iterator[None]:
    """Let what waits for the device raise, as far as torch sees it: before a capture, and so without breaking one."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _mend_after_broken_capture(device: torch.device, pool: Any) -> None:
    """Undo what torch takes for still being captured after a capture broke off.

    Its generator, of which every draw would raise until the process ends, dropout's too: a copy of its state draws on
    from the same place. And its allocator, which would give back no memory that another stream has used.
    """
    generator = torch.cuda.default_generators[device.index]
    generator.graphsafe_set_state(generator.clone_state())
    with suppress(RuntimeError, AttributeError):  # what torch.cuda.use_mem_pool ends by; not for everyone to call
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)


@contextmanager
def _without_cast_cache(device: torch.device) -> Iterator[None]:
    """Keep autocast from caching casts: a captured step would read them for ever, whatever the weights become."""
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    torch.clear_autocast_cache()
    with torch.autocast(device.type, dtype=torch.get_autocast_dtype(device.type), cache_enabled=False):
        yield


def why_not_static(model: PreTrainedModel) -> str | None:
    """Return why a model cannot be decoded in fixed shapes, or None where it can.

    Two prompts and two steps tell; they are run once a model.
    """
    implementation = model.config.get_text_config()._attn_implementation
    if implementation not in _MASKED:
        return f"its attention ({implementation}) takes no mask of its own; load it with sdpa"
    if model not in _OBSTACLES:
        try:
            _OBSTACLES[model] = _probe(model)
        except Exception as problem:  # unknown architectures fail in unknown ways
            _OBSTACLES[model] = f"it does not run on a cache of fixed size ({problem})"
    return _OBSTACLES[model]


_OBSTACLES: WeakKeyDictionary[PreTrainedModel, str | None] = WeakKeyDictionary()


@torch.no_grad()
def _probe(model: PreTrainedModel) -> str | None:
    if any("FullyShardedDataParallel" in type(module).__name__ for module in model.modules()) or any(
        hasattr(parameter, "full_tensor") for parameter in model.parameters()
    ):
        return "its parameters are sharded, and are gathered elsewhere every time"
    device = next(model.parameters()).device
    tokens = torch.tensor([[0, 1, 2], [0, 0, 1]], device=device) % model.config.get_text_config().vocab_size
    mask = torch.tensor([[True, True, True], [False, True, True]], device=device)
    with caching(model):
        own, logits = prefill(model, tokens, mask, True)
        if not can_extend(own):
            return "its cache is not a plain one (sliding windows, recurrent states)"
        decoder = StaticDecoder(own, logits, rows=3, width=5, length=3, temperature=1.0, pad_id=0)
        noise = torch.tensor([[0.3, 0.6, 0.5], [0.7, 0.2, 0.5]], dtype=torch.float64)
        decoder.load(own, logits, mask, noise[:, None], [])
        attended = mask.long()
        for number in range(2):
            decoder.step(model)
            attended = torch.nn.functional.pad(attended, (0, 1), value=1)
            expected = model(
                input_ids=decoder.tokens[:2, number, None],
                attention_mask=attended,
                position_ids=attended.sum(-1, keepdim=True) - 1,
                past_key_values=own,
                use_cache=True,
            ).logits[:, -1]
            found = decoder.logits[:2]
            if not torch.allclose(found, expected, atol=1e-3 if found.dtype == torch.float32 else 0.1, rtol=1e-2):
                return "it computes something else on a cache of fixed size"
    forget_casts(device)
    return None
