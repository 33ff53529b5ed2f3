"""Sample with vLLM's offline engine in this process, its weights those of the model at hand.

**This was never run against the real vLLM**: it is written to its documented interface (``LLM.generate`` on token
ids, ``LLM.apply_model``, ``LLM.reset_prefix_cache``) and tested with a double of it. Nothing imports vLLM unless
``data.sampler`` is ``vllm``.

How weights get there: the engine is made from the model's config alone, its weights left to chance
(``load_format="dummy"``). Before it samples, the model's parameters, adapters merged, are handed under their
checkpoint names to ``load_weights`` of vLLM's own model, which runs in this process
(``VLLM_ENABLE_V1_MULTIPROCESSING=0``), so that they go from memory to memory. Then its prefix cache is dropped: it
would remember the weights before. A model that requires gradients is handed over for every call, one that does not
only when it is another than the last. Policy and reference take turns in one engine.

What vLLM computes differs from what the model computes in its last digits and more in half precision. Tokens are
vLLM's; log-probabilities are always those of the model itself, and their mean absolute difference is kept as
``mismatch``: responses are off the policy by as much.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vbon_lightning.adapters import adapters_active, merged_parameters
from vbon_lightning.sampling.request import SamplingRequest, check_request
from vbon_lightning.sampling.scoring import response_log_probs
from vbon_lightning.types import Completions, PromptBatch

ENGINE_OPTIONS: dict[str, Any] = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "generation_config": "vllm",
    "logprobs_mode": "processed_logprobs",
    "enable_prefix_caching": True,
    "gpu_memory_utilization": 0.3,
}
"""Arguments of ``vllm.LLM``: no tokenizer, no sampling defaults but ours, tempered log-probabilities, and a share of
the device's memory that leaves room for training."""


class VllmSampler:
    """Sample as :func:`~vbon_lightning.sampling.sample_completions` is asked to, but with vLLM.

    Each sample is a request of its own, whose seed is read off its noise: it is a function of the run's seed, the
    stream, the step, the prompt and the sample, whatever the batch. The distribution is the same as that of the other
    samplers, the samples are not.

    Args:
        options: Arguments of ``vllm.LLM`` beside or instead of :data:`ENGINE_OPTIONS`.
    """

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        self.options = dict(options or {})
        self.mismatch: float | None = None
        """Mean absolute difference of log-probabilities in the last call, in nats a token."""
        self._engine: Any = None
        self._directory: tempfile.TemporaryDirectory | None = None
        self._loaded: tuple[Any, ...] | None = None

    def __call__(self, model: PreTrainedModel, request: SamplingRequest) -> Completions:
        """Sample responses."""
        check_request(model, request)
        prompt_tokens, prompt_mask, noise, end_ids, pad_id, temperature = request
        if not 0.01 <= temperature <= 2:
            raise ValueError(f"vLLM samples at temperatures from 0.01 to 2 only, got data.temperature={temperature}")
        self._synchronise(model)
        batch, samples, length = noise.shape
        prompts = [row[keep].tolist() for row, keep in zip(prompt_tokens, prompt_mask, strict=True)]
        outputs = self._generate(prompts, request_seeds(noise), list(end_ids), length, temperature)
        device = prompt_tokens.device
        completions, theirs = _completions(outputs, (batch, samples, length), end_ids, pad_id)
        completions = Completions(*(part.to(device) for part in completions))
        index = torch.arange(batch, device=device)
        asked = PromptBatch(index, torch.ones_like(index, dtype=torch.bool), prompt_tokens, prompt_mask, [""] * batch)
        with torch.no_grad():
            ours = response_log_probs(model, asked, completions, temperature=temperature)
        self.mismatch = float((ours - theirs.to(device)).abs()[completions.mask].mean())
        return completions._replace(log_probs=ours)

    def _generate(
        self, prompts: list[list[int]], seeds: list[list[int]], end_ids: list[int], length: int, temperature: float
    ) -> list[Any]:
        """Return an output for each prompt and sample, in order."""
        from vllm import SamplingParams

        requests, parameters = [], []
        for tokens, row in zip(prompts, seeds, strict=True):
            for seed in row:
                requests.append({"prompt_token_ids": tokens})
                parameters.append(
                    SamplingParams(
                        n=1,
                        temperature=temperature,
                        top_p=1.0,
                        top_k=-1,
                        min_p=0.0,
                        seed=seed,
                        max_tokens=length,
                        # Ours are all the tokens that end a response, and those of the model's files are not asked.
                        stop_token_ids=end_ids,
                        ignore_eos=True,
                        logprobs=0,  # of the sampled token alone
                        detokenize=False,
                    )
                )
        found = self._engine.generate(requests, parameters, use_tqdm=False)
        outputs = [output for request in found for output in request.outputs]
        if not len(requests) == len(found) == len(outputs):
            raise RuntimeError(f"vLLM returned {len(outputs)} outputs to {len(requests)} requests")
        return outputs

    def _synchronise(self, model: PreTrainedModel) -> None:
        """Give the engine the model's weights, where it may not have them."""
        if self._engine is None:
            self._engine = self._make_engine(model)
        trains = any(parameter.requires_grad for parameter in model.parameters())
        # In-place changes count up the version, other tensors lie elsewhere. An optimizer need not do either.
        state = tuple((parameter.data_ptr(), parameter._version) for parameter in model.parameters())
        now = (ref(model), adapters_active(model), state)
        if trains or now != self._loaded:
            self._loaded = None
            self._engine.apply_model(lambda engine_model: _load(engine_model, model))
            self._engine.reset_prefix_cache()
            self._loaded = now

    def _make_engine(self, model: PreTrainedModel) -> Any:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            several = torch.distributed.get_world_size() > 1
            if several and "distributed_executor_backend" not in self.options:
                raise ValueError(
                    "data.sampler=vllm was made for one process: with several, set data.engine_options."
                    "distributed_executor_backend to external_launcher, which was not tried, or data.sampler to graph"
                )
        # An engine in a process of its own would have to be sent the weights.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        self._directory = tempfile.TemporaryDirectory(prefix="vbon_lightning-")
        config.save_pretrained(self._directory.name)
        parameter = next(model.parameters())
        kind = parameter.device.type
        casts = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else parameter.dtype
        options = {"dtype": str(casts).removeprefix("torch."), **ENGINE_OPTIONS, **self.options}
        return LLM(model=self._directory.name, **options)


def _load(engine_model: Any, model: PreTrainedModel) -> None:
    with torch.no_grad():
        engine_model.load_weights(merged_parameters(model))


def request_seeds(noise: Tensor) -> list[list[int]]:
    """Read a seed for each sample off its first uniform: all of its 53 bits.

    Args:
        noise: ``[B, G, T]`` float64 uniforms, multiples of 2^-53 as numpy's generators draw them.
    """
    return (noise[..., 0].double() * 2**53).long().tolist()


def _completions(
    outputs: list[Any], shape: tuple[int, int, int], end_ids: Sequence[int], pad_id: int
) -> tuple[Completions, Tensor]:
    """Return vLLM's outputs as completions, log-probabilities left out, and those beside them, on the CPU."""
    batch, samples, length = shape
    rows = [list(output.token_ids) for output in outputs]
    longest = max(map(len, rows))
    tokens = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    theirs = torch.zeros(len(rows), longest, dtype=torch.float32)
    finished = torch.zeros(len(rows), dtype=torch.bool)
    ends = set(end_ids)
    for row, (ids, output) in enumerate(zip(rows, outputs, strict=True)):
        ended = bool(ids) and ids[-1] in ends
        if not ids or ends & set(ids[:-1]) or (not ended and len(ids) != length):
            raise RuntimeError(
                f"vLLM returned a response of {len(ids)} tokens that neither ends with its first end token nor has "
                f"the full length of {length} (finish_reason {output.finish_reason!r}): {ids}"
            )
        tokens[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = True
        finished[row] = ended
        theirs[row, : len(ids)] = torch.tensor(
            [entry[token].logprob for token, entry in zip(ids, output.logprobs, strict=True)]
        )
    split = (batch, samples, longest)
    completions = Completions(
        tokens.view(split), mask.view(split), finished.view(batch, samples), torch.zeros(split, dtype=torch.float32)
    )
    return completions, theirs.view(split)
