"""The sums beside a model's weights."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests import helpers
from vbon_lightning import models
from vbon_lightning.models import ModelError
from vbon_lightning.models.sums import check_sums, write_sums


@pytest.fixture
def export(llama: str, tmp_path: Path) -> Path:
    models.save_pretrained(helpers.tiny_llama(), models.load_tokenizer(llama), tmp_path / "export")
    return tmp_path / "export"


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_flipped_byte_is_found_before_anything_is_loaded(export: Path) -> None:
    models.load_causal_lm(str(export), trainable=False)
    flip(export / "model.safetensors", -5)
    with pytest.raises(
        ModelError, match=r"^`name`: '.*model\.safetensors' is not the file that was exported"
    ) as raised:
        models.load_causal_lm(str(export), trainable=False)
    assert "\n" not in str(raised.value) and "remove SHA256SUMS" in str(raised.value)
    (export / "SHA256SUMS").unlink()
    models.load_causal_lm(str(export), trainable=False)  # changed on purpose


def test_they_are_what_sha256sum_writes(export: Path) -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("there is no sha256sum")
    assert subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=export, capture_output=True).returncode == 0
    flip(export / "model.safetensors", 400)
    assert subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=export, capture_output=True).returncode == 1


def test_every_file_of_weights_has_one(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    for name in ("b.safetensors", "a.safetensors", "adapter/c.safetensors", "config.json"):
        (tmp_path / name).write_text(name)
    write_sums(tmp_path)
    lines = (tmp_path / "SHA256SUMS").read_text().splitlines()
    assert [line[64:] for line in lines] == ["  a.safetensors", "  adapter/c.safetensors", "  b.safetensors"]
    (tmp_path / "a.safetensors").unlink()  # whoever needs it says so
    (tmp_path / "config.json").write_text("another")
    with (tmp_path / "SHA256SUMS").open("a") as stream:
        stream.write("a line of something else\n")
    check_sums(tmp_path)
    (tmp_path / "adapter" / "c.safetensors").write_text("another")
    with pytest.raises(ModelError, match=r"`policy`: .*c\.safetensors"):
        check_sums(tmp_path, "policy")


@pytest.mark.parametrize("damage", ["garbage\n", "\x00\xff" * 50, "0" * 64 + "  other.safetensors\n"])
def test_sums_that_are_damaged_switch_nothing_off(damage: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("weights")
    (tmp_path / "SHA256SUMS").write_text(damage)
    with pytest.raises(ModelError, match=r"SHA256SUMS' is damaged: it has no sum of model\.safetensors"):
        check_sums(tmp_path)
    (tmp_path / "SHA256SUMS").write_text("0" * 64 + "  pytorch_model.bin\n")  # of somebody who sums other files
    check_sums(tmp_path)
