"""One policy for every N: what it is at each N, what an export keeps, and what is refused."""

from __future__ import annotations

import copy
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.helpers import save_tiny_model, tiny_gpt2, tiny_llama
from vbon_lightning.dialling import dial
from vbon_lightning.models import (
    ModelError,
    add_dial,
    dialled,
    dialled_n,
    has_dial,
    load_causal_lm,
    load_tokenizer,
    model_identity,
    save_pretrained,
    set_dial,
)
from vbon_lightning.models.dial import plain_copy

TOKENS = torch.tensor([[3, 9, 4, 12, 7], [5, 5, 8, 3, 11]])
MODELS: dict[str, Any] = {
    "llama": lambda: tiny_llama(40, num_hidden_layers=2),
    "tied llama": lambda: tiny_llama(40, num_hidden_layers=2, tie_word_embeddings=True),
    "gpt2": lambda: tiny_gpt2(40, n_layer=2),
    "tied gpt2": lambda: tiny_gpt2(40, tie_word_embeddings=True),
}


def logits(model: Any) -> Tensor:
    return model(input_ids=TOKENS).logits


def moved(model: Any, seed: int = 0, size: float = 0.05) -> dict[str, Tensor]:
    """Give the deltas of a dialled model values, and return them by name."""
    noise = torch.Generator().manual_seed(seed)
    found = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".deltas"):
                parameter += size * torch.randn(parameter.shape, generator=noise)
                found[name.replace("parametrizations.", "").removesuffix(".0.deltas")] = parameter.detach().clone()
    return found


@pytest.fixture(params=MODELS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """Return a model and the same with a dial of degree 2."""
    model = MODELS[request.param]()
    other = copy.deepcopy(model)
    add_dial(other, degree=2)
    return model, other


def test_at_the_start_and_at_one_it_is_what_it_started_from(pair: tuple[Any, Any]) -> None:
    model, policy = pair
    for n in (1, 6.5):
        set_dial(policy, n)
        assert torch.equal(logits(policy), logits(model))
    moved(policy)
    assert not torch.allclose(logits(policy), logits(model), atol=1e-2)
    set_dial(policy, 1)
    assert torch.equal(logits(policy), logits(model))


@pytest.mark.parametrize("n", [1.5, 8, 20])
def test_the_weights_follow_the_polynomial(n: float, pair: tuple[Any, Any]) -> None:
    model, policy = pair
    deltas, plain = moved(policy), dict(model.named_parameters())
    assert set(deltas) == set(plain), "one for each weight, tied ones once"
    with torch.no_grad():
        for name, parameter in plain.items():
            x = math.log(n) / math.log(8)
            parameter += x * deltas[name][0] + x**2 * deltas[name][1]
    with dialled(policy, n):
        torch.testing.assert_close(logits(policy), logits(model), atol=1e-5, rtol=1e-5)
    found = plain_copy(policy, n)
    torch.testing.assert_close(logits(found), logits(model), atol=1e-5, rtol=1e-5)
    assert type(found) is type(model)
    assert not has_dial(found)
    assert {name for name, _ in found.named_parameters()} == set(plain)


def test_only_the_deltas_are_trained(pair: tuple[Any, Any]) -> None:
    _, policy = pair
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in policy.named_parameters() if name.endswith(".deltas")}
    set_dial(policy, 4)
    logits(policy).square().sum().backward()
    for name, parameter in policy.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (name in trained), name


def test_a_pass_without_gradients_does_not_take_them_from_the_next(pair: tuple[Any, Any]) -> None:
    _, policy = pair
    moved(policy)
    set_dial(policy, 2)
    with dialled(policy, 5):
        assert dialled_n(policy) == 5
        with torch.no_grad():
            logits(policy)
        found = logits(policy)
    assert dialled_n(policy) == 2
    found.sum().backward()
    assert any(parameter.grad is not None for parameter in policy.parameters())
    with pytest.raises(ZeroDivisionError), dialled(policy, 7):
        _ = 1 / 0
    assert dialled_n(policy) == 2


def test_a_copy_has_a_dial_of_its_own(pair: tuple[Any, Any]) -> None:
    _, policy = pair
    moved(policy)
    set_dial(policy, 4)
    other = copy.deepcopy(policy)
    before = logits(policy)
    set_dial(other, 9)
    assert torch.equal(logits(policy), before)
    assert not torch.allclose(logits(other), before, atol=1e-3)


def test_a_plain_copy_stands_alone(pair: tuple[Any, Any]) -> None:
    _, policy = pair
    moved(policy)
    set_dial(policy, 3)
    before, state = logits(policy), torch.get_rng_state()
    found = plain_copy(policy, 9)
    assert torch.equal(torch.get_rng_state(), state)
    assert dialled_n(policy) == 3
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.zero_()
    assert torch.equal(logits(policy), before)
    tied = found.get_input_embeddings().weight is found.get_output_embeddings().weight
    assert tied == bool(found.config.tie_word_embeddings)


def test_gradients_are_those_of_the_powers(pair: tuple[Any, Any]) -> None:
    model, policy = pair
    moved(policy)
    n = 5
    plain = plain_copy(policy, n).requires_grad_()
    logits(plain).square().sum().backward()
    with dialled(policy, n):
        loss = logits(policy).square().sum()
    loss.backward()
    assert {name for name, _ in plain.named_parameters()} == {name for name, _ in model.named_parameters()}
    x = math.log(n) / math.log(8)
    for name, parameter in plain.named_parameters():
        place, _, weight = name.rpartition(".")
        found: Any = policy.get_submodule(place).parametrizations[weight][0].deltas.grad
        assert parameter.grad is not None
        torch.testing.assert_close(found[0], x * parameter.grad, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found[1], x**2 * parameter.grad, atol=1e-4, rtol=1e-4)


STARTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied llama": {"tie_word_embeddings": True},
    "gpt2": {"kind": "gpt2"},
    "tied gpt2": {"kind": "gpt2", "tie_word_embeddings": True},
}


@pytest.fixture(scope="module", params=STARTS)
def export(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    """Return a live dialled policy, its export at N = 4, and what it started from."""
    directory = tmp_path_factory.mktemp("export")
    start = save_tiny_model(directory / "start", **STARTS[request.param])
    policy = load_causal_lm(start, trainable=True)
    add_dial(policy, degree=2)
    moved(policy)
    set_dial(policy, 4)
    save_pretrained(policy, load_tokenizer({"name": start}), directory / "dialled")
    return policy, directory / "dialled", Path(start)


@pytest.mark.parametrize("n", [1, 2, 4, 6.5, 16])
def test_an_export_turns_to_any_n(n: float, export: tuple[Any, Path, Path]) -> None:
    policy, directory, start = export
    with dialled(policy, n):
        expected = logits(policy)
    found = load_causal_lm({"name": str(directory), "dial": n}, trainable=False)
    torch.testing.assert_close(logits(found), expected, atol=1e-5, rtol=1e-5)
    if n == 1:
        reference = load_causal_lm(str(start), trainable=False)
        torch.testing.assert_close(logits(found), logits(reference), atol=1e-5, rtol=1e-5)


def test_transformers_alone_loads_the_n_that_was_exported(export: tuple[Any, Path, Path]) -> None:
    policy, directory, _ = export
    plain = AutoModelForCausalLM.from_pretrained(directory)
    with dialled(policy, 4):
        torch.testing.assert_close(logits(plain), logits(policy), atol=1e-6, rtol=1e-6)
    assert dialled_n(policy) == 4
    assert has_dial(policy), "exporting leaves the policy as it was"


def test_the_command_writes_a_plain_model(export: tuple[Any, Path, Path], tmp_path: Path) -> None:
    policy, directory, _ = export
    dial(str(directory), 6.5, str(tmp_path / "out"))
    assert not (tmp_path / "out" / "dial").exists()
    with dialled(policy, 6.5):
        torch.testing.assert_close(
            logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(policy), atol=1e-5, rtol=1e-5
        )


def test_a_models_identity_is_that_of_its_n(export: tuple[Any, Path, Path]) -> None:
    _, directory, _ = export
    none, two, three, again = (model_identity({"name": str(directory), "dial": n}) for n in (None, 2, 3, 2))
    assert two == again
    assert none != two != three != none


def test_what_is_refused(export: tuple[Any, Path, Path], tmp_path: Path) -> None:
    policy, directory, start = export
    with pytest.raises(ModelError, match="is no dialled policy"):
        load_causal_lm({"name": str(start), "dial": 2}, trainable=False)
    for n in (0.5, 0, -2, math.inf, math.nan):
        with pytest.raises(ModelError, match="a policy is dialled to a finite N >= 1"):
            set_dial(policy, n)
        with pytest.raises(ModelError, match="a policy is dialled to a finite N >= 1"):
            load_causal_lm({"name": str(directory), "dial": n}, trainable=False)
    assert dialled_n(policy) == 4
    with pytest.raises(ModelError, match="has a dial already"):
        add_dial(policy, degree=2)
    with pytest.raises(ModelError, match="degree must be at least 1"):
        add_dial(tiny_llama(40), degree=0)
    with pytest.raises(ModelError, match="the model has no dial"):
        set_dial(tiny_llama(40), 2)
    # One of other sizes, and one of other names.
    ours = policy.config.model_type
    size, another = ("n_embd", "llama") if ours == "gpt2" else ("hidden_size", "gpt2")
    for other in (
        save_tiny_model(tmp_path / "wide", ours, **{size: 32}),
        save_tiny_model(tmp_path / "another", another),
    ):
        shutil.copytree(directory / "dial", Path(other) / "dial")
        with pytest.raises(ModelError, match="is another model's: it moves"):
            load_causal_lm({"name": other, "dial": 2}, trainable=False)


def test_an_export_in_half_precision_turns_too(export: tuple[Any, Path, Path], tmp_path: Path) -> None:
    policy, directory, _ = export
    save_pretrained(policy, load_tokenizer({"name": str(directory)}), tmp_path / "half", dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16
    found = load_causal_lm({"name": str(tmp_path / "half"), "dial": 16}, trainable=False)
    with dialled(policy, 16):
        torch.testing.assert_close(logits(found), logits(policy), atol=0.05, rtol=0.05)


def test_every_weight_has_its_deltas() -> None:
    policy = tiny_llama(40)
    add_dial(policy, degree=3)
    for module in policy.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            assert module.parametrizations.weight[0].deltas.shape == (3, *module.weight.shape)
