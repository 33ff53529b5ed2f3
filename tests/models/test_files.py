"""Where a model's files are looked for, and what is said of those that are not there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import helpers
from vbon_lightning import models
from vbon_lightning.models import ModelError
from vbon_lightning.rewards import ClassifierReward


@pytest.mark.parametrize("name", ["./runs/gone", "/no/such/place", "~/no-such-model", "runs/a/b", "gone/"])
def test_a_missing_path_is_no_hub_lookup(name, monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("asked the hub")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(ModelError, match="`name`: the directory .* does not exist"):
        models.load_causal_lm(name, trainable=False)
    with pytest.raises(ModelError, match="`name`: the directory .* does not exist"):
        models.load_tokenizer(name)
    with pytest.raises(ModelError, match="`tokenizer`: the directory .* does not exist"):
        models.load_tokenizer({"name": "gpt2", "tokenizer": name})


def test_a_name_that_is_nowhere(monkeypatch):
    def unreachable(*args: object, **kwargs: object) -> None:
        raise OSError("cannot connect")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", unreachable)
    with pytest.raises(ModelError, match="'runs/gone': no such directory here, and from the hub: OSError: cannot con"):
        models.load_causal_lm("runs/gone", trainable=False)


def test_incomplete_directories(llama, tmp_path):
    with pytest.raises(ModelError, match="holds no config.json"):
        models.load_causal_lm(str(tmp_path), trainable=False)
    with pytest.raises(ModelError, match="holds no tokenizer"):
        models.load_tokenizer(str(tmp_path))
    shutil.copy(Path(llama, "config.json"), tmp_path)
    with pytest.raises(ModelError, match="holds no weights"):
        models.load_causal_lm(str(tmp_path), trainable=False)
    (tmp_path / "tiny.gguf").touch()
    with pytest.raises(ModelError, match="it holds tiny.gguf, give `gguf_file`"):
        models.load_causal_lm(str(tmp_path), trainable=False)
    with pytest.raises(ModelError, match="holds no 'x.gguf'; its GGUF files: tiny.gguf"):
        models.load_causal_lm({"name": str(tmp_path), "gguf_file": "x.gguf"}, trainable=False)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelError, match="model.safetensors' is broken or cut short"):
        models.load_causal_lm(str(tmp_path), trainable=False)


# -- files that are broken --


@pytest.fixture
def copy(llama, tmp_path):
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def scrap(path, how):
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "random": os.urandom(300)}[how])


@pytest.mark.parametrize("how", ["empty", "cut", "random"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
def test_a_broken_file_is_named(name, how, copy):
    scrap(copy / name, how)
    loads = {
        "tokenizer.json": lambda: models.load_tokenizer(str(copy)),
        "generation_config.json": lambda: models.model_identity(str(copy)),
    }
    with pytest.raises(ModelError) as raised:
        loads.get(name, lambda: models.load_causal_lm(str(copy), trainable=False))()
    said = str(raised.value)
    assert "\n" not in said and str(copy) in said
    assert name in said


def test_a_config_that_is_no_mapping(copy):
    (copy / "config.json").write_text("[1, 2]")
    for load in (models.model_identity, lambda name: models.load_causal_lm(name, trainable=False)):
        with pytest.raises(ModelError, match=r"config\.json' is broken: it holds no mapping but a list"):
            load(str(copy))


@pytest.mark.parametrize("how", ["empty", "cut", "random"])
def test_the_rewards_classifier_is_checked_too(how, tmp_path):
    helpers.save_tiny_classifier(tmp_path)
    scrap(tmp_path / "model.safetensors", how)
    with pytest.raises(ModelError, match=r"^`model`: .*model\.safetensors' is broken"):
        ClassifierReward(str(tmp_path), label=0)(["a"], [["b"]], [[[3]]])


@pytest.mark.parametrize("kind", ["policy", "classifier"])
def test_weights_that_are_not_finite_are_refused(kind, tmp_path):
    save = helpers.save_tiny_model if kind == "policy" else helpers.save_tiny_classifier
    save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = sorted(name for name in weights if name.endswith("weight"))[-1]
    weights[name].view(-1)[1] = torch.inf
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load = {
        "policy": lambda: models.load_causal_lm(str(tmp_path), trainable=False),
        "classifier": lambda: ClassifierReward(str(tmp_path), label=0)(["a"], [["b"]], [[[3]]]),
    }
    with pytest.raises(ModelError, match=f"the weight {name} of the model .* holds NaN or infinity"):
        load[kind]()


def test_an_export_that_was_being_replaced_is_found_under_its_other_name(copy):
    old = copy.rename(copy.with_name(".copy.0123abcd.old"))
    with pytest.warns(UserWarning, match=r"'.*copy' was being replaced when its writer died: '.*\.old' is read"):
        assert models.locate("name", str(copy)) == (str(old), None)
