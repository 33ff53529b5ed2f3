"""Tilted models: what they compute, what of them is trained and kept, and what is refused."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from tests.helpers import save_tiny_classifier, save_tiny_model, tiny_tokenizer
from tests.models.setting import make_valued_files
from tests.modules.setting import ALPHABET
from vbon_lightning.actors import Actors, ActorSpec
from vbon_lightning.dialling import dial
from vbon_lightning.models import (
    ModelError,
    ModelSpec,
    TiltedConfig,
    TiltedLM,
    load_causal_lm,
    load_classifier,
    load_tokenizer,
    load_value_model,
    model_identity,
    new_tilted_lm,
    save_pretrained,
)
from vbon_lightning.sampling import prompt_noise, response_statistics, sample_completions
from vbon_lightning.sampling.request import SamplingRequest
from vbon_lightning.sampling.scoring import base_states, output_head, response_states
from vbon_lightning.types import PromptBatch, Responses

TOKENS = torch.tensor([[3, 9, 4, 7, 10], [5, 5, 8, 3, 6]])
TOWERS = ("llama", "gpt2", "other", "value")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_valued_files(tmp_path_factory.mktemp("files"))
    save_tiny_model(directory / "other", alphabet=ALPHABET, seed=4)
    save_tiny_classifier(directory / "encoder", vocab_size=11, seed=4)
    tiny_tokenizer(directory / "encoder", alphabet=ALPHABET)
    save_tiny_model(directory / "tied", alphabet=ALPHABET, seed=3, tie_word_embeddings=True)
    save_tiny_model(directory / "reordered", alphabet="hgfedcba")
    return directory


def spec(files: Path, base: str = "llama", tower: str = "value", **changes: Any) -> ModelSpec:
    return ModelSpec(str(files / base), tilt=str(files / tower), **changes)


def scramble(model: Any, seed: int = 0, size: float = 0.5) -> Any:
    """Give the heads of a tilted model weights."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for head in model.heads:
            for weight in (head.weight, head.bias):
                weight.copy_(size * torch.randn(weight.shape, generator=noise))
    return model


def tilted(files: Path, base: str = "llama", tower: str = "value", degree: int = 2) -> Any:
    """Load a frozen tilted model whose heads say much."""
    model = load_causal_lm(spec(files, base, tower), trainable=False)
    model.add_heads(degree)
    return scramble(model).requires_grad_(False)


def by_hand(files: Path, model: Any, base: str, tower: str, tokens: Tensor, n: float) -> Tensor:
    """Return the log-probabilities of the next token after each, from the two models as they were loaded."""
    reference = AutoModelForCausalLM.from_pretrained(files / base).eval()
    if tower == "value":
        body = load_value_model(str(files / "value")).body
    else:
        body = AutoModel.from_pretrained(files / tower).eval()
    with torch.no_grad():
        logits = reference(input_ids=tokens).logits
        states = body(input_ids=tokens).last_hidden_state
        for power, head in enumerate(model.heads, start=1):
            logits = logits + (math.log(n) / math.log(8)) ** power * (states @ head.weight.T + head.bias)
    return logits.log_softmax(-1)


def log_probs(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    return model(input_ids=tokens).logits.log_softmax(-1)


def by_steps(model: Any, tokens: Tensor, *, first: int) -> Tensor:
    """Return the logits of some tokens run at once and the others one by one, by the cache."""
    output = model(input_ids=tokens[:, :first], use_cache=True)
    found = [output.logits]
    for place in range(first, tokens.shape[1]):
        output = model(input_ids=tokens[:, place, None], past_key_values=output.past_key_values, use_cache=True)
        found.append(output.logits)
    return torch.cat(found, dim=1)


# -- what it computes --


@pytest.mark.parametrize("base", ["llama", "gpt2", "tied"])
@pytest.mark.parametrize("tower", TOWERS)
def test_it_is_its_base_at_the_start_and_at_one(base: str, tower: str, files: Path) -> None:
    reference = load_causal_lm(str(files / base), trainable=False)
    model: Any = load_causal_lm(spec(files, base, tower), trainable=False)
    assert model.n == 8
    assert torch.equal(model(input_ids=TOKENS).logits, reference(input_ids=TOKENS).logits)
    scramble(model)
    assert not torch.allclose(log_probs(model), log_probs(reference), atol=0.1)
    model.turn(1)
    assert torch.equal(model(input_ids=TOKENS).logits, reference(input_ids=TOKENS).logits)


@pytest.mark.parametrize("n", [1.5, 8, 20])
@pytest.mark.parametrize(("base", "tower"), [("llama", "value"), ("gpt2", "llama"), ("tied", "other")])
def test_its_log_ratios_are_a_polynomial_in_log_n(n: float, base: str, tower: str, files: Path) -> None:
    model = tilted(files, base, tower)
    model.turn(n)
    expected = by_hand(files, model, base, tower, TOKENS, n)
    torch.testing.assert_close(log_probs(model), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("base", "tower"), [("llama", "value"), ("gpt2", "llama"), ("llama", "gpt2")])
def test_a_cache_changes_nothing(base: str, tower: str, files: Path) -> None:
    model = tilted(files, base, tower)
    expected = model(input_ids=TOKENS).logits
    torch.testing.assert_close(by_steps(model, TOKENS, first=2), expected, atol=1e-5, rtol=1e-5)
    kept = model(input_ids=TOKENS, logits_to_keep=2).logits
    torch.testing.assert_close(kept, expected[:, -2:], atol=1e-5, rtol=1e-5)
    assert model(input_ids=TOKENS, use_cache=False).past_key_values is None


def test_generate_takes_the_likeliest_tokens(files: Path) -> None:
    model = tilted(files)
    model.generation_config.eos_token_id = None
    found = model.generate(TOKENS, max_new_tokens=4, do_sample=False)
    expected = TOKENS
    for _ in range(4):
        expected = torch.cat([expected, model(input_ids=expected).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, expected)


PROMPTS = [[3], [3, 4, 5, 6], [9, 8]]


def prompts() -> PromptBatch:
    width = max(map(len, PROMPTS))
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in PROMPTS])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in PROMPTS])
    return PromptBatch(torch.arange(3), torch.ones(3, dtype=torch.bool), tokens, mask, ["a", "b", "c"])


@pytest.mark.parametrize(("base", "tower"), [("llama", "value"), ("gpt2", "llama")])
def test_samples_and_their_scores_are_those_of_plain_passes(base: str, tower: str, files: Path) -> None:
    model, batch = tilted(files, base, tower), prompts()
    noise = prompt_noise([0, 1, 2], num_samples=3, length=4, seed=1, stream="test", step=0)
    found = sample_completions(
        model, SamplingRequest(batch.tokens, batch.mask, noise, end_ids=[2], pad_id=0, temperature=0.7)
    )
    reference = load_causal_lm(str(files / base), trainable=False)
    scored = response_statistics(model, reference, batch, found, temperature=0.7)
    assert found.mask.sum() > 20
    for row, prompt in enumerate(PROMPTS):
        for sample in range(3):
            response = found.tokens[row, sample][found.mask[row, sample]].tolist()
            ours = (by_hand(files, model, base, tower, torch.tensor([prompt + response]), 8.0) / 0.7).log_softmax(-1)
            theirs = (log_probs(reference, torch.tensor([prompt + response])) / 0.7).log_softmax(-1)
            for place, token in enumerate(response):
                at = len(prompt) + place - 1
                assert float(found.log_probs[row, sample, place]) == pytest.approx(float(ours[0, at, token]), abs=1e-4)
                assert float(scored.log_probs[row, sample, place]) == pytest.approx(float(ours[0, at, token]), abs=1e-4)
                kl = float((ours[0, at].exp() * (ours[0, at] - theirs[0, at])).sum())
                assert float(scored.kl[row, sample, place]) == pytest.approx(kl, abs=1e-4)


# -- one pass for policy and reference --


def given() -> tuple[PromptBatch, Responses]:
    tokens = torch.tensor([[[4, 5, 6, 2], [7, 3, 2, 0]]] * 3)
    return prompts(), Responses(tokens, tokens != 0)


def test_logits_need_not_live_at_once(files: Path) -> None:
    model = load_causal_lm(spec(files), trainable=True)
    scramble(model)
    found = {}
    for size in (11, 2**20):
        statistics = response_statistics(model, model.base, *given(), max_logits=size)
        gradients = torch.autograd.grad(
            statistics.kl.sum() + statistics.log_probs.square().sum(),
            [parameter for parameter in model.parameters() if parameter.requires_grad],
        )
        found[size] = [statistics.kl, *gradients]
    for few, all_at_once in zip(*found.values(), strict=True):
        torch.testing.assert_close(few, all_at_once, atol=1e-4, rtol=1e-4)
    assert output_head(model) is not None


def test_the_bases_states_are_the_references(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tilted(files)
    apart = response_statistics(model, copy.deepcopy(model.base), *given())
    calls = []
    inside = model.base.base_model.forward
    monkeypatch.setattr(model.base.base_model, "forward", lambda **values: calls.append(1) or inside(**values))
    together = response_statistics(model, model.base, *given())
    assert len(calls) == 2, "prompts and responses, once for both"
    for ours, theirs in zip(together[:3], apart[:3], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    assert base_states(copy.deepcopy(model.base), response_states(model, *given())) is None


def test_a_base_that_squashes_its_logits_is_scored_whole(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tilted(files)
    inside = model.base.forward

    def squashed(**values: Any) -> Any:
        output = inside(**values)
        output.logits = 2 * (output.logits / 2).tanh()
        return output

    monkeypatch.setattr(model.base, "forward", squashed)
    assert output_head(model) is None
    batch, responses = given()
    found = response_statistics(model, model.base, batch, responses)
    row = torch.tensor([PROMPTS[1] + [4, 5, 6, 2]])
    ours, theirs = log_probs(model, row)[0, 3:-1], model.base(input_ids=row).logits[0, 3:-1].log_softmax(-1)
    torch.testing.assert_close(found.kl[1, 0], (ours.exp() * (ours - theirs)).sum(-1), atol=1e-5, rtol=1e-5)


# -- training --


def test_only_the_tower_and_its_heads_are_trained(files: Path) -> None:
    model = load_causal_lm(spec(files), trainable=True)
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"tower", "heads"}
    assert not [name for name, _ in model.base.named_parameters() if model.get_parameter(f"base.{name}").requires_grad]
    frozen = load_causal_lm(spec(files), trainable=False)
    assert not [parameter for parameter in frozen.parameters() if parameter.requires_grad]


def test_gradients_are_those_of_the_formula(files: Path) -> None:
    model: Any = scramble(load_causal_lm(spec(files), trainable=True))
    model.add_heads(2)
    model.turn(5)
    log_probs(model).square().sum().backward()
    x = math.log(5) / math.log(8)
    first, second = model.heads
    torch.testing.assert_close(second.weight.grad, x * first.weight.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(second.bias.grad, x * first.bias.grad, atol=1e-4, rtol=1e-4)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.tower.parameters())


def test_policy_and_reference_are_one_copy(files: Path) -> None:
    actors = Actors.load(ActorSpec(spec(files)))
    assert actors.shares_base
    assert actors.reference is None
    with actors.as_reference() as reference:
        assert reference is actors.policy.base
    apart = Actors.load(ActorSpec(spec(files), reference=str(files / "gpt2")))
    assert not apart.shares_base
    assert apart.reference is not None


# -- export --


@pytest.fixture(scope="module")
def export(files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model = tilted(files, "tied")
    model.turn(6.5)
    directory = tmp_path_factory.mktemp("export") / "tilted"
    save_pretrained(
        model, load_tokenizer(str(files / "tied")), directory, generation={"do_sample": True, "temperature": 0.7}
    )
    return model, directory


def test_an_export_is_what_was_saved(export: tuple[Any, Path]) -> None:
    model, directory = export
    found = load_causal_lm(str(directory), trainable=False)
    assert isinstance(found, TiltedLM)
    assert found.n == 6.5
    assert torch.equal(log_probs(found), log_probs(model))
    assert found.generation_config.temperature == 0.7
    again = load_causal_lm(str(directory), trainable=True)
    assert {name.split(".")[0] for name, value in again.named_parameters() if value.requires_grad} == {"tower", "heads"}


@pytest.mark.parametrize("n", [1, 2, 16])
def test_an_export_is_dialled(n: float, export: tuple[Any, Path], tmp_path: Path) -> None:
    model, directory = export
    model = copy.deepcopy(model)
    model.turn(n)
    found = load_causal_lm({"name": str(directory), "dial": n}, trainable=False)
    assert torch.equal(log_probs(found), log_probs(model))
    dial(str(directory), n, str(tmp_path / "out"))
    assert torch.equal(log_probs(load_causal_lm(str(tmp_path / "out"), trainable=False)), log_probs(model))


@pytest.mark.slow
def test_transformers_alone_loads_an_export(export: tuple[Any, Path], tmp_path: Path) -> None:
    model, directory = export
    script = f"""
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(directory)!r}, trust_remote_code=True)
model.turn(4)
assert not any(name.startswith("vbon_lightning") for name in sys.modules)
torch.save(model(input_ids=torch.tensor({TOKENS.tolist()})).logits.detach(), {str(tmp_path / "logits.pt")!r})
"""
    environment = os.environ | {"HF_HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True, capture_output=True)
    model = copy.deepcopy(model)
    model.turn(4)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(input_ids=TOKENS).logits)


def test_an_identity_tells_towers_apart(files: Path) -> None:
    none, first, second = (
        model_identity(one) for one in (str(files / "llama"), spec(files), spec(files, tower="other"))
    )
    assert none != first != second != none
    assert first == model_identity(spec(files))


# -- what is refused --


def test_what_is_refused(files: Path, export: tuple[Any, Path]) -> None:
    _, directory = export
    for given, message in (
        ({"name": str(files / "llama"), "tilt": str(files / "reordered")}, "vocabular"),
        ({"name": str(files / "llama"), "tilt": str(files / "nowhere")}, "nowhere"),
        ({"name": str(files / "llama"), "tilt": str(files / "encoder")}, "is no causal one"),
        ({"name": str(directory), "tilt": str(files / "llama")}, "is tilted already"),
        ({"name": str(files / "llama"), "tilt": str(files / "gpt2"), "lora": {"r": 2}}, "give one of them"),
        ({"name": str(directory), "dial": 0.5}, "finite N >= 1"),
    ):
        with pytest.raises(ModelError, match=message):
            load_causal_lm(given, trainable=False)
    model = tilted(files)
    for n in (0.5, 0, math.inf, math.nan):
        with pytest.raises(ValueError, match="finite N >= 1"):
            model.turn(n)
    with pytest.raises(ValueError, match="degree must be at least 2, got 1"):
        model.add_heads(1)
    with pytest.raises(ModelError, match="sample with data.sampler eager, not graph"):
        Actors.load(ActorSpec(spec(files), sampler="graph"))


def test_windows_of_different_lengths_share_no_cache(files: Path) -> None:
    from transformers import MistralConfig

    def windowed(length: int) -> Any:
        sizes = {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "num_key_value_heads": 2,
        }
        return MistralConfig(vocab_size=11, sliding_window=length, **sizes)

    with pytest.raises(ValueError, match="sliding windows of different lengths"):
        TiltedConfig(base_config=windowed(4), tower_config=windowed(8))
    plain = load_causal_lm(str(files / "llama"), trainable=False)
    config = TiltedConfig(base_config=windowed(4), tower_config=plain.config)
    assert config.layer_types == ["sliding_attention"] * 2 + ["full_attention"]
    assert config.sliding_window == 4
    base = AutoModelForCausalLM.from_config(windowed(4)).eval()
    model = scramble(new_tilted_lm(base, plain.base_model)).eval()
    tokens = torch.randint(3, 11, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=tokens).logits
    torch.testing.assert_close(by_steps(model, tokens, first=6), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("field", ["tilt", "dial", "lora"])
def test_only_a_policy_is_tilted_or_dialled(field: str, files: Path) -> None:
    given = {"name": str(files / "value"), field: {"tilt": str(files / "llama"), "dial": 2, "lora": {"r": 2}}[field]}
    message = f"is trained whole: leave `{field}` out"
    with pytest.raises(ModelError, match=message):
        load_value_model(given)
    with pytest.raises(ModelError, match=message):
        load_classifier(given, labels=["a", "b"])
    if field == "dial":
        with pytest.raises(ModelError, match="only a tilted policy can be dialled"):
            load_causal_lm({"name": str(files / "llama"), "dial": 2}, trainable=False)
