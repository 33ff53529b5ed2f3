"""What is wrong with a saved model is told before it is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vbon_lightning.models import ModelError, ModelSpec, check_saved


@pytest.fixture
def copy(llama: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def test_what_is_whole_passes(copy: Path) -> None:
    check_saved(str(copy))
    check_saved(ModelSpec(config={"model_type": "llama"}, tokenizer=str(copy)))
    check_saved("somebody/model-of-the-hub")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_named(value: float, copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    name = sorted(name for name in weights if name.endswith("weight"))[-1]
    weights[name].view(-1)[1] = value
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"^the weight {name} in {copy}/model\.safetensors holds NaN or infinity"):
        check_saved(str(copy))


def test_files_that_are_gone_or_broken_are_named(copy: Path) -> None:
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[:-5])
    with pytest.raises(ModelError, match=r"model\.safetensors' is broken or cut short"):
        check_saved(str(copy))
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        check_saved(str(copy))
    (copy / "config.json").unlink()
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        check_saved(str(copy))


def test_what_cannot_be_dialled_is_told_before_it_is_loaded(copy: Path) -> None:
    with pytest.raises(ModelError, match="^only a tilted policy can be dialled to an N, and .*copy' is none"):
        check_saved(ModelSpec(name=str(copy), dial=4.0))
    check_saved(ModelSpec(name=str(copy), tilt=str(copy), dial=4.0))
    (copy / "config.json").write_text('{"model_type": "vbon_tilted_lm"}')
    check_saved(ModelSpec(name=str(copy), dial=4.0))
