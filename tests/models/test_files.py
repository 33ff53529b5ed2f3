"""Where a model's files are looked for, and what is said of those that are not there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from vbon_lightning import models
from vbon_lightning.models import ModelError


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
