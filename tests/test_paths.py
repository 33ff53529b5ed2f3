"""What a YAML file says about a place, turned into a path."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests import helpers
from tests.models.plain import logits
from vbon_lightning import models
from vbon_lightning.data import TextSource
from vbon_lightning.models import ModelError
from vbon_lightning.paths import PathError, looks_like_path, public_name, resolve_path


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    root = tmp_path / "site" / "vbon_test_package"
    root.mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('must not be imported')\n")
    monkeypatch.syspath_prepend(str(root.parent))
    return root


def test_package_paths(package):
    helpers.save_tiny_model(package / "weights" / "small", seed=5)
    name = "package:vbon_test_package/weights/small"
    assert resolve_path(name) == str(package / "weights" / "small")
    assert resolve_path("package:vbon_test_package") == str(package)
    assert torch.equal(logits(models.load_causal_lm(name, trainable=False)), logits(helpers.tiny_llama(seed=5)))
    assert len(models.load_tokenizer(name)) == 259
    assert models.model_identity(name) == models.model_identity(str(package / "weights" / "small"))
    assert "vbon_test_package" not in sys.modules
    with pytest.raises(ModelError, match="`name`: .*holds no 'weights/large'"):
        models.load_causal_lm("package:vbon_test_package/weights/large", trainable=False)
    with pytest.raises(PathError, match="'no_such_package_here', which is not installed"):
        resolve_path("package:no_such_package_here/x")
    with pytest.raises(PathError, match="without '..'"):
        resolve_path("package:vbon_test_package/../secrets")
    with pytest.raises(PathError, match="single module"):
        resolve_path("package:this/x")


def test_variables_and_home(monkeypatch):
    monkeypatch.setenv("MODELS", "/data/models")
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("NOWHERE", raising=False)
    assert resolve_path("${MODELS}/small") == "/data/models/small"
    assert resolve_path("~/small") == "/home/someone/small"
    assert resolve_path("owner/model") == "owner/model"
    with pytest.raises(PathError, match="variable NOWHERE is not set"):
        resolve_path("${NOWHERE}/small")
    with pytest.raises(ModelError, match="`name`: environment variable NOWHERE"):
        models.load_tokenizer("${NOWHERE}/small")


def test_what_looks_like_a_path():
    assert not any(map(looks_like_path, ["gpt2", "owner/model", "org/model-1.5B"]))
    assert all(map(looks_like_path, ["./gpt2", "../x", "/x", "~x/y", "a/b/c", "model/"]))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("owner/name", ("owner/name", True)),
        ("gpt2", ("gpt2", True)),
        ("/home/someone/secret/a.jsonl", ("a.jsonl", False)),
        ("~/secret/a.jsonl", ("a.jsonl", False)),
        ("./a.jsonl", ("a.jsonl", False)),
        ("s3://bucket/secret/a.jsonl", ("a.jsonl", False)),
        ("C:secret", ("C:secret", False)),
        ("package:vbon_lightning/assets/demo_lm", ("demo_lm", False)),
    ],
)
def test_names_that_others_may_read(name: str, shown: tuple[str, bool]) -> None:
    assert public_name(name) == shown
    assert TextSource(name).public_name == shown
    assert TextSource([name, "b.csv"]).public_name == (f"{shown[0]}, b.csv", False)
    assert TextSource([{"text": "a"}]).public_name == ("1 rows in memory", False)


@pytest.mark.parametrize("blank", ["", "  ", "\t"])
def test_a_blank_path_is_not_the_current_directory(blank: str) -> None:
    with pytest.raises(PathError, match="is blank: it would mean the current directory"):
        resolve_path(blank)
