"""Value models: their heads, what is saved and loaded, and what a run refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel

from tests.helpers import readable, save_tiny_classifier, save_tiny_model, tiny_tokenizer
from tests.models.setting import BINS, LENGTHS, TABLE, TOKENS, last_state, new_model, save_value_model, scramble
from tests.modules.setting import ALPHABET, VowelReward, make_data, make_files
from vbon_lightning.actors import Actors, ActorSpec
from vbon_lightning.functional import forecast_log_probs
from vbon_lightning.models import ModelError, ModelSpec, ValueModel, load_value_model, save_pretrained
from vbon_lightning.prefix_scorer import PrefixScorer
from vbon_lightning.sampling.decode import recomputes


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_files(tmp_path_factory.mktemp("files"))
    save_tiny_classifier(directory / "classifier", "gpt2", seed=4)
    save_value_model(make_data(directory), directory / "value")
    save_value_model(make_data(directory), directory / "other", seed=1)
    save_tiny_model(directory / "reordered", alphabet="hgfedcba")
    return directory


# -- new ones --


@pytest.mark.parametrize("source", ["llama", "gpt2", "classifier", "value"])
def test_a_new_model_has_its_sources_body_and_says_the_same_of_every_prefix(source: str, files: Path) -> None:
    model = new_model(str(files / source))
    body = AutoModel.from_pretrained(files / source)
    body = body.body if source == "value" else body
    expected = body.state_dict()
    assert list(model.body.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in model.body.state_dict().items())
    assert torch.equal(model.body(TOKENS).last_hidden_state, body.eval()(TOKENS).last_hidden_state)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.p for module in model.modules() if isinstance(module, nn.Dropout))
    found = model(TOKENS, LENGTHS)
    assert found.shape == (1, 6, 5)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(1, 6))
    # Neither scale nor factors: the standard logistic distribution, cut at the edges.
    edges = (BINS.edges - BINS.atoms.mean()) / BINS.atoms.std()
    bounds = torch.cat([torch.zeros(1), edges.float().sigmoid(), torch.ones(1)])
    torch.testing.assert_close(found, bounds.diff().log().expand(1, 6, 5), atol=1e-5, rtol=1e-5)


def test_a_new_body_comes_from_its_seed(files: Path) -> None:
    spec = ModelSpec(
        config={"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 16},
        tokenizer=str(files / "llama"),
    )
    one, same, other = (new_model(spec, seed=seed).body.wte.weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("source", ["classifier", "value", "config"])
def test_the_global_random_state_is_left_alone(source: str, files: Path) -> None:
    config = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 16}
    new = ModelSpec(config=config, tokenizer=str(files / "llama"))
    before = torch.get_rng_state()
    new_model(new if source == "config" else str(files / source))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dropout", [False, True])
def test_dropout_is_kept_where_asked_for(dropout: bool, files: Path) -> None:
    model = scramble(new_model(str(files / "gpt2"), dropout=dropout))
    assert torch.equal(model(TOKENS, LENGTHS), model(TOKENS, LENGTHS)) != dropout


def test_gradient_checkpointing_and_precision(files: Path) -> None:
    spec = {"name": str(files / "llama"), "gradient_checkpointing": True, "dtype": "bfloat16"}
    model = scramble(new_model(spec))
    assert recomputes(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    found = model(TOKENS, LENGTHS)
    assert found.dtype == torch.float32
    found.sum().backward()
    assert model.progress.weight.grad is not None
    assert not recomputes(new_model(str(files / "llama")))


# -- the head --


def test_the_head_reads_the_state_and_the_length(files: Path) -> None:
    model = scramble(new_model(str(files / "llama")))
    found = model(TOKENS, LENGTHS)
    for place, length in enumerate(LENGTHS[0].tolist()):
        state = last_state(model, TOKENS[0, : place + 1].tolist())
        outputs, biases = model.head(state), model.progress.weight[length]
        location = outputs[5] * biases[7].exp() + biases[5]
        by_hand = torch.cat([outputs[:5] + biases[:5], location[None], outputs[6:] + biases[6:7]])
        torch.testing.assert_close(found[0, place], forecast_log_probs(by_hand, BINS), atol=1e-5, rtol=1e-4)
    assert (found[0].diff(dim=0).abs().amax(-1) > 0.05).all()


def test_a_longer_response_counts_as_the_longest(files: Path) -> None:
    model = scramble(new_model(str(files / "llama")))
    states = torch.randn(16, generator=torch.Generator().manual_seed(0))
    last, beyond, before = (model.forecast(states, torch.tensor(length)) for length in (4, 9, 3))
    assert torch.equal(last, beyond)
    assert not torch.allclose(last, before)


# -- on disk --


@pytest.mark.parametrize("source", ["llama", "gpt2", "classifier"])
def test_saved_and_loaded_is_the_same(source: str, files: Path, tmp_path: Path) -> None:
    model = scramble(new_model(str(files / source)))
    save_pretrained(model, tiny_tokenizer(alphabet=ALPHABET), tmp_path)
    loaded, plain = load_value_model(str(tmp_path)), AutoModel.from_pretrained(tmp_path)
    assert isinstance(plain, ValueModel)
    for other in (loaded, plain):
        assert torch.equal(other.bins.edges, BINS.edges)
        assert torch.equal(other.bins.atoms, BINS.atoms)
        assert (other.config.table, other.config.longest) == (TABLE, 4)
        assert torch.equal(other(TOKENS, LENGTHS), model(TOKENS, LENGTHS))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert PrefixScorer.load(str(tmp_path)).fingerprint == TABLE


def test_loaded_in_another_precision(files: Path) -> None:
    whole, half = (load_value_model({"name": str(files / "value"), "dtype": dtype}) for dtype in (None, "bfloat16"))
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.bins.edges, whole.bins.edges)
    found, expected = half(TOKENS, LENGTHS), whole(TOKENS, LENGTHS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.15, rtol=0.05)


def broken(files: Path, directory: Path, part: str) -> str:
    """Copy the value model without one of its weights."""
    weights = load_file(files / "value" / "model.safetensors")
    del weights[part]
    directory.mkdir()
    for file in (files / "value").iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "SHA256SUMS").unlink()  # they are changed on purpose
    return str(directory)


@pytest.mark.parametrize("part", ["head.weight", "progress.weight", "body.norm.weight"])
def test_missing_weights_are_refused(part: str, files: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"lacks 1 weights of this kind of model, such as {part}"):
        load_value_model(broken(files, tmp_path / "broken", part))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llama", "is no value model .*: train one with `ValueModelling` and give its export"),
        ("classifier", "is no value model"),
        ("nowhere", "the directory .* does not exist"),
    ],
)
def test_what_is_no_value_model(name: str, message: str, files: Path) -> None:
    with pytest.raises(ModelError, match=message):
        load_value_model(str(files / name))


def test_a_value_model_has_a_directory_and_no_adapters(files: Path) -> None:
    with pytest.raises(ModelError, match="a value model is trained first: give its directory as `name`"):
        load_value_model(ModelSpec(config={"model_type": "gpt2"}, tokenizer=str(files / "llama")))
    with pytest.raises(ModelError, match="a value model is trained whole: leave `lora` out"):
        new_model(ModelSpec(str(files / "llama"), lora={"r": 2}))


# -- in a run --


def load(files: Path, **changes: Any) -> Actors:
    spec = {"policy": str(files / "llama"), "reward": VowelReward(), "max_new_tokens": 4}
    return Actors.load(ActorSpec(**(spec | {"value_model": str(files / "value")} | changes)), value=True)


def test_actors_load_what_is_named_and_only_where_it_is_used(files: Path) -> None:
    scorer = load(files).value
    assert scorer is not None
    assert scorer.fingerprint == make_data(files).fingerprint()
    spec = ActorSpec(str(files / "llama"), reward=VowelReward(), max_new_tokens=4, value_model=str(files / "value"))
    assert Actors.load(spec).value is None
    assert load(files, value_model=None).value is None
    assert load(files, reward=None).value is not None, "nothing to disagree with"
    assert load(files, policy=str(files / "gpt2"), reference=str(files / "llama")).value is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.7}, "temperature: the value model has 1.0, this run has 0.7"),
        ({"max_new_tokens": 5}, "max_new_tokens: the value model has 4, this run has 5"),
        ({"reward": VowelReward(2.0)}, "reward.scale: the value model has '1.0', this run has '2.0'"),
        ({"missing_eos_penalty": 1.0}, "missing_eos_penalty: the value model has 0.0, this run has 1.0"),
        ({"reference": "gpt2"}, "reference.weights: the value model has"),
    ],
    ids=readable,
)
def test_a_value_model_of_something_else_is_refused(changes: dict[str, Any], message: str, files: Path) -> None:
    changes = {key: str(files / value) if key == "reference" else value for key, value in changes.items()}
    with pytest.raises(ModelError, match=message):
        load(files, **changes)


def test_the_missing_eos_penalty_is_part_of_what_it_was_trained_on(files: Path, tmp_path: Path) -> None:
    data = make_data(files, missing_eos_penalty=1.0)
    fingerprint = data.fingerprint() | {"missing_eos_penalty": 1.0}
    value = save_value_model(data, tmp_path, fingerprint=fingerprint)
    assert load(files, value_model=value, missing_eos_penalty=1.0).value is not None
    with pytest.raises(ModelError, match=r"missing_eos_penalty: the value model has 1\.0, this run has 0\.5"):
        load(files, value_model=value, missing_eos_penalty=0.5)
    # One that does not say was trained without.
    assert "missing_eos_penalty" not in make_data(files).fingerprint()
    # What it predicts has a precision of its own: it need not be that of the table it was trained on.
    other = save_value_model(data, tmp_path / "bf16", fingerprint=fingerprint | {"precision": "bf16-mixed"})
    assert load(files, value_model=other, missing_eos_penalty=1.0).value is not None
    with pytest.raises(ModelError, match=r"missing_eos_penalty: the value model has 0\.0, this run has 0\.5"):
        load(files, missing_eos_penalty=0.5)


def test_what_is_said_of_a_value_model_of_something_else(files: Path) -> None:
    with pytest.raises(ModelError) as found:
        load(files, temperature=0.7, max_new_tokens=5)
    assert str(found.value).splitlines() == [
        f"the value model {str(files / 'value')!r} was trained on other rewards than this run's:",
        "  max_new_tokens: the value model has 4, this run has 5",
        "  temperature: the value model has 1.0, this run has 0.7",
        "Train one on this run's reference table with `ValueModelling`, or use the settings it was trained with",
    ]


def test_a_value_model_of_another_vocabulary_is_refused(files: Path) -> None:
    reordered = str(files / "reordered")
    with pytest.raises(ModelError, match="one vocabulary, but 8 tokens differ"):
        load(files, policy=reordered, reference=reordered)


def test_a_plain_model_is_refused(files: Path) -> None:
    with pytest.raises(ModelError, match="train one with `ValueModelling`"):
        load(files, value_model=str(files / "llama"))


def test_the_identity_of_a_run_holds_it(files: Path) -> None:
    named = [None, str(files / "value"), str(files / "other")]
    found = [make_data(files, value_model=name).actors.identity() for name in named]
    assert "value_model" not in found[0]
    assert found[1]["value_model"] != found[2]["value_model"]
    assert json.loads(json.dumps(found)) == found
