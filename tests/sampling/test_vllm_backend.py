"""The vLLM backend against a double of vLLM: what it asks for, the weights it hands over, and what it makes of answers.

vLLM itself was not run. The double has the surface that is used (``LLM`` with ``generate``, ``apply_model`` and
``reset_prefix_cache``; ``SamplingParams``), is strict about it, and samples from weights of its own.
"""

from __future__ import annotations

import importlib.machinery
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers import tiny_gpt2, tiny_llama
from tests.sampling.test_decode import PAD, PROMPTS, VOCABULARY, noise_of, pad_left
from vbon_lightning.adapters import adapters_off, add_lora, merged_copy
from vbon_lightning.functional import token_log_probs
from vbon_lightning.sampling import make_sampler, response_logits
from vbon_lightning.sampling.request import SamplingRequest
from vbon_lightning.types import Completions, PromptBatch

ENDS = [2, 7, 20]


class SamplingParams:
    def __init__(self, **entries: Any) -> None:
        known = {"n", "temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "stop_token_ids", "ignore_eos"}
        assert set(entries) == known | {"logprobs", "detokenize"}
        assert entries["n"] == 1 and entries["top_p"] == 1 and entries["top_k"] in (0, -1) and entries["min_p"] == 0
        assert entries["ignore_eos"] and entries["logprobs"] == 0 and not entries["detokenize"]
        assert isinstance(entries["seed"], int) and 0 <= entries["seed"] < 2**63
        self.__dict__ |= entries


class EngineModel:
    """vLLM's own model: weights under the names of a checkpoint."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def load_weights(self, weights: Any) -> None:
        named = dict(self.model.named_parameters())
        given = dict(weights)
        assert given.keys() == named.keys()
        for name, value in given.items():
            named[name].copy_(value)


class LLM:
    """The engine: weights left to chance, a generator a request, log-probabilities off by a constant."""

    made: list[LLM] = []
    error = 0.0

    def __init__(self, model: str, **options: Any) -> None:
        self.options, self.requests, self.calls = options, [], []
        assert options["load_format"] == "dummy" and options["skip_tokenizer_init"]
        assert options["generation_config"] == "vllm" and options["logprobs_mode"] == "processed_logprobs"
        config = json.loads((Path(model) / "config.json").read_text())
        assert not list(Path(model).glob("*.safetensors"))
        self.architectures = config["architectures"]
        with torch.random.fork_rng(devices=[]):
            self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).float().eval()
        LLM.made.append(self)

    def apply_model(self, function: Any) -> list[Any]:
        self.calls.append("weights")
        return [function(EngineModel(self.model))]

    def reset_prefix_cache(self) -> None:
        self.calls.append("forget")

    def generate(self, prompts: list[Any], sampling_params: list[Any], use_tqdm: bool = True) -> list[Any]:
        assert not use_tqdm and len(prompts) == len(sampling_params)
        self.calls.append("generate")
        self.requests += list(zip(prompts, sampling_params, strict=True))
        return [self._answer(prompt["prompt_token_ids"], asked) for prompt, asked in self.requests[-len(prompts) :]]

    def _answer(self, prompt: list[int], asked: Any) -> Any:
        generator = torch.Generator().manual_seed(asked.seed)
        tokens: list[int] = []
        entries, reason = [], "length"
        while len(tokens) < asked.max_tokens and reason == "length":
            with torch.no_grad():
                logits = self.model(torch.tensor([prompt + tokens])).logits[0, -1] / asked.temperature
            token = int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
            value = float(logits.log_softmax(-1)[token]) + self.error
            tokens.append(token)
            entries.append({token: types.SimpleNamespace(logprob=value, rank=1)})
            if token in asked.stop_token_ids:
                reason = "stop"
        output = types.SimpleNamespace(token_ids=tuple(tokens), logprobs=entries, finish_reason=reason)
        return types.SimpleNamespace(outputs=[output], prompt_token_ids=prompt)


@pytest.fixture
def vllm(monkeypatch):
    module = types.ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    monkeypatch.setattr(LLM, "made", [])
    monkeypatch.setattr(LLM, "error", 0.0)
    return module


def draw(
    sampler: Any, model: Any, prompts: list[list[int]] = PROMPTS, noise: Any = None, **settings: Any
) -> Completions:
    arguments: dict[str, Any] = {"end_ids": ENDS, "pad_id": PAD, "temperature": 0.7} | settings
    noise = noise_of(list(range(len(prompts))), 3, 6) if noise is None else noise
    return sampler(model, SamplingRequest(*pad_left(prompts), noise, **arguments))


def scored(model: Any, drawn: Completions, temperature: float = 0.7) -> torch.Tensor:
    tokens, mask = pad_left(PROMPTS)
    index = torch.arange(len(PROMPTS))
    prompts = PromptBatch(index, torch.ones_like(index, dtype=torch.bool), tokens, mask, [""] * len(PROMPTS))
    logits = response_logits(model, prompts, drawn).logits
    found = token_log_probs(logits, drawn.tokens.flatten(0, 1), temperature=temperature).view(drawn.mask.shape)
    return torch.where(drawn.mask, found, 0.0)


@pytest.mark.parametrize("kind", [tiny_llama, tiny_gpt2])
def test_samples_of_the_models_own_weights(kind, vllm):
    model = kind(VOCABULARY, seed=1, spread=2.0)
    sampler = make_sampler("vllm")
    drawn = draw(sampler, model)
    (engine,) = LLM.made
    assert engine.architectures == [type(model).__name__]
    assert engine.options["dtype"] == "float32"
    assert engine.calls == ["weights", "forget", "generate"], "the cache of other weights is forgotten first"
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(engine.model.named_parameters())[name]), name
    asked = [prompt["prompt_token_ids"] for prompt, _ in engine.requests]
    assert asked == [prompt for prompt in PROMPTS for _ in range(3)]
    assert all(request.stop_token_ids == ENDS and request.max_tokens == 6 for _, request in engine.requests)
    assert all(request.temperature == 0.7 for _, request in engine.requests)
    assert torch.allclose(drawn.log_probs, scored(model, drawn), atol=1e-5)
    assert drawn.finished.any() and not drawn.finished.all()
    answers = [list(engine._answer(*request).outputs[0].token_ids) for request in _plain(engine.requests)]
    for row, ids in zip(drawn.tokens.flatten(0, 1).tolist(), answers, strict=True):
        assert row == ids + [PAD] * (len(row) - len(ids))
    assert drawn.mask.sum(-1).flatten().tolist() == [len(ids) for ids in answers]
    assert drawn.finished.flatten().tolist() == [ids[-1] in ENDS for ids in answers]
    assert sampler.mismatch < 1e-5


def _plain(requests: list[Any]) -> list[Any]:
    return [(prompt["prompt_token_ids"], asked) for prompt, asked in requests]


def test_log_probs_are_the_models_and_the_mismatch_is_told(vllm, monkeypatch):
    monkeypatch.setattr(LLM, "error", 0.25)
    model = tiny_llama(VOCABULARY, seed=1, spread=2.0)
    for sampler in (make_sampler("vllm"), make_sampler("vllm", max_rows=5)):
        drawn = draw(sampler, model)
        assert torch.allclose(drawn.log_probs, scored(model, drawn), atol=1e-5)
        assert sampler.mismatch == pytest.approx(0.25, abs=1e-5)


def test_one_seed_a_request(vllm):
    model = tiny_llama(VOCABULARY, seed=1, spread=2.0)
    sampler = make_sampler("vllm")
    together = draw(sampler, model)
    (engine,) = LLM.made
    seeds = [asked.seed for _, asked in engine.requests]
    assert len(set(seeds)) == 12
    assert max(seeds) > 2**50, "53 bits and not a few"
    alone = [draw(sampler, model, [prompt], noise_of([row], 3, 6)) for row, prompt in enumerate(PROMPTS)]
    for row, single in enumerate(alone):
        longest = single.tokens.shape[-1]
        assert torch.equal(single.tokens[0], together.tokens[row, :, :longest]), "whatever the batch"
    for change in ({"step": 1}, {"seed": 6}, {"stream": "val"}):
        draw(sampler, model, noise=noise_of([0, 1, 2, 3], 3, 6, **change))
        assert not set(seeds) & {asked.seed for _, asked in engine.requests[-12:]}, change
    in_passes = draw(make_sampler("vllm", max_rows=2), model)
    assert torch.equal(in_passes.tokens, together.tokens)


def test_new_weights_are_handed_over(vllm):
    model = tiny_llama(VOCABULARY, seed=1, spread=2.0)
    sampler = make_sampler("vllm")
    before = draw(sampler, model)
    with torch.no_grad():  # an update that no counter would show
        for parameter in model.parameters():
            parameter.data = parameter.data
            parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    after = draw(sampler, model)
    assert torch.allclose(after.log_probs, scored(model, after), atol=1e-4)
    assert sampler.mismatch < 1e-4, "the engine has the weights that score"
    assert before.tokens.shape != after.tokens.shape or not torch.equal(before.tokens, after.tokens)


def test_a_frozen_model_is_handed_over_once(vllm):
    frozen = tiny_llama(VOCABULARY, seed=1, spread=2.0).requires_grad_(False)
    policy = tiny_llama(VOCABULARY, seed=2, spread=2.0)
    sampler = make_sampler("vllm")
    for model, handed in [(frozen, True), (frozen, False), (policy, True), (policy, True), (frozen, True)]:
        draw(sampler, model)
        (engine,) = LLM.made
        assert ("weights" in engine.calls) == handed
        assert sampler.mismatch < 1e-5
        engine.calls.clear()
    with torch.no_grad():
        next(frozen.parameters()).mul_(2.0)
    draw(sampler, frozen)
    assert "weights" in engine.calls, "changed in place"


@pytest.mark.parametrize("kind", [tiny_llama, tiny_gpt2])
def test_adapters_are_merged_for_the_policy_and_left_out_for_the_reference(kind, vllm):
    model = kind(VOCABULARY, seed=1, spread=2.0)
    add_lora(model, {"r": 2, "lora_alpha": 8})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    sampler = make_sampler("vllm")
    draw(sampler, model)
    (engine,) = LLM.made
    merged = dict(merged_copy(model).named_parameters())
    for name, parameter in engine.model.named_parameters():
        assert torch.allclose(parameter, merged[name], atol=1e-6), name
    assert sampler.mismatch < 1e-5
    with adapters_off(model):
        draw(sampler, model)
        assert sampler.mismatch < 1e-5
    base = dict(kind(VOCABULARY, seed=1, spread=2.0).named_parameters())
    for name, parameter in engine.model.named_parameters():
        assert torch.equal(parameter, base[name]), name


@pytest.mark.parametrize(
    ("answer", "reason"),
    [([3, 4], "length"), ([3, 2, 4, 2], "stop"), ([], "abort")],
    ids=["too short", "went on behind an end", "empty"],
)
def test_an_answer_that_breaks_the_rules_is_refused(answer, reason, vllm, monkeypatch):
    def broken(self: Any, prompt: list[int], asked: Any) -> Any:
        entries = [{token: types.SimpleNamespace(logprob=-1.0)} for token in answer]
        output = types.SimpleNamespace(token_ids=answer, logprobs=entries, finish_reason=reason)
        return types.SimpleNamespace(outputs=[output])

    monkeypatch.setattr(LLM, "_answer", broken)
    with pytest.raises(RuntimeError, match=f"neither ends with its first end token .*'{reason}'"):
        draw(make_sampler("vllm"), tiny_llama(VOCABULARY))


def test_answers_are_counted(vllm, monkeypatch):
    monkeypatch.setattr(LLM, "generate", lambda self, *_, **__: [])
    with pytest.raises(RuntimeError, match="vLLM returned 0 outputs to 12 requests"):
        draw(make_sampler("vllm"), tiny_llama(VOCABULARY))


def test_options_reach_the_engine(vllm):
    options = {"gpu_memory_utilization": 0.6, "dtype": "bfloat16", "enforce_eager": True}
    draw(make_sampler("vllm", engine_options=options), tiny_llama(VOCABULARY))
    (engine,) = LLM.made
    assert engine.options | options == engine.options


@pytest.mark.parametrize("temperature", [0.001, 2.5])
def test_temperatures_that_vllm_would_change_are_refused(temperature, vllm):
    with pytest.raises(ValueError, match=r"temperatures from 0.01 to 2 only, got data.temperature"):
        draw(make_sampler("vllm"), tiny_llama(VOCABULARY), temperature=temperature)
    with pytest.raises(ValueError, match="positive and finite"):
        draw(make_sampler("vllm"), tiny_llama(VOCABULARY), temperature=math.nan)


def test_nothing_imports_vllm_unasked(vllm, monkeypatch):
    for name in [name for name in sys.modules if name.endswith("vllm_backend")]:
        monkeypatch.delitem(sys.modules, name)
    make_sampler("eager")
    make_sampler("graph")
    assert not any(name.endswith("vllm_backend") for name in sys.modules)
