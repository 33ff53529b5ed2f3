"""What tells one model from another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from transformers import AutoModelForCausalLM

from tests import helpers
from tests.models.plain import new_llama
from vbon_lightning import models


def test_identity_is_content_not_place(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "elsewhere")
    identity = models.model_identity(llama)
    assert all(isinstance(value, str) for value in identity.values())
    assert models.model_identity(str(tmp_path / "elsewhere")) == identity
    assert str(tmp_path) not in json.dumps(identity) and llama not in json.dumps(identity)


def test_identity_sees_weights_config_tokenizer_and_dtype(llama, tmp_path):
    copy = Path(shutil.copytree(llama, tmp_path / "copy"))
    identity = models.model_identity(str(copy))
    assert models.model_identity({"name": str(copy), "dtype": "bfloat16"}) != identity

    def differing() -> set[str]:
        now = models.model_identity(str(copy))
        return {key for key in identity if now[key] != identity[key]}

    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1  # same size: only the content tells
    (copy / "model.safetensors").write_bytes(weights)
    assert differing() == {"weights"}
    entries = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(entries | {"transformers_version": "0"}))
    assert differing() == {"weights"}
    (copy / "config.json").write_text(json.dumps(entries | {"rms_norm_eps": 0.5}))
    assert differing() == {"weights", "config"}
    helpers.tiny_tokenizer(copy, alphabet="abc")
    assert differing() == {"weights", "config", "tokenizer"}


def test_identity_of_hub_and_new_models(llama, monkeypatch):
    hub = models.model_identity({"name": "owner/model", "revision": "abc"})
    assert hub == {"name": "owner/model", "revision": "abc", "dtype": "float32"}
    assert models.model_identity("owner/model")["revision"] == "main"
    new = models.model_identity(new_llama(llama), seed=1)
    assert new != models.model_identity(new_llama(llama), seed=2)
    assert new != models.model_identity(new_llama(llama, rms_norm_eps=0.5), seed=1)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("loaded weights")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    models.model_identity(llama)


def test_identity_changes_with_the_end_tokens(tmp_path: Path) -> None:
    directory = helpers.save_tiny_model(tmp_path / "model", "llama")
    path = Path(directory, "generation_config.json")
    before = models.model_identity(str(directory))
    generation = json.loads(path.read_text())
    path.write_text(json.dumps(generation | {"eos_token_id": [1, 2]}))
    assert models.model_identity(str(directory)) != before
