"""Checkpoints on the disk: whole or absent, and refused in a line where they are broken."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from tests.crashes import count_calls, killed_at, with_files_of
from vbon_lightning.checkpoints import CheckpointError, WholeCheckpointIO, read_checkpoint
from vbon_lightning.checkpoints import io as io_module
from vbon_lightning.finite import NotFiniteError
from vbon_lightning.staging import clear_leftovers


def content(value: float = 1.0, **more: Any) -> dict[str, Any]:
    weights = {"policy.a": torch.arange(4), "policy.b": torch.full((3000,), value)}
    return {"state_dict": weights, "pytorch-lightning_version": "2.6.4", "global_step": 7} | more


def save(path: Path, value: float = 1.0) -> None:
    WholeCheckpointIO().save_checkpoint(content(value), path)


def value_of(path: Path) -> float:
    return float(read_checkpoint(path)["state_dict"]["policy.b"].unique())


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "last.ckpt"
    for value in (1.0, 2.0):
        save(path, value)
        assert value_of(path) == value
        assert float(TorchCheckpointIO().load_checkpoint(path)["state_dict"]["policy.b"][0]) == value
        assert os.listdir(path.parent) == ["last.ckpt"]
    found = WholeCheckpointIO().load_checkpoint(path, map_location="meta", weights_only=True)
    assert found["state_dict"]["policy.a"].is_meta
    (path.rename(tmp_path / "elsewhere.ckpt"))  # its digest goes along
    assert value_of(tmp_path / "elsewhere.ckpt") == 2.0
    with pytest.raises(TypeError, match="storage_options"):
        WholeCheckpointIO().save_checkpoint(content(), path, storage_options={})


def test_killed_at_every_call(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save(path, 1.0)
    calls = count_calls(lambda: save(path, 2.0), tmp_path)
    assert calls >= 4  # open, sync, rename, sync of the directory
    seen = []
    for call in range(1, calls + 1):
        save(path, 1.0)
        assert killed_at(call, lambda: save(path, 2.0), tmp_path) == "died"
        seen.append(value_of(path))
        clear_leftovers(tmp_path)
        assert os.listdir(tmp_path) == ["last.ckpt"], f"call {call}"
    assert seen[0] == 1.0 and seen[-1] == 2.0 and seen == sorted(seen)


@pytest.mark.parametrize("fatal", [False, True])
def test_a_full_disk_keeps_the_older_one(fatal: bool, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save(path, 1.0)
    whole = path.stat().st_size
    for size in (0, 1, 64, 1000, whole // 2, whole - 50, whole - 1):
        ended = with_files_of(size, lambda: save(path, 2.0), fatal=fatal)
        assert ended == ("died" if fatal else "failed")
        assert value_of(path) == 1.0
        assert fatal or os.listdir(tmp_path) == ["last.ckpt"]
    clear_leftovers(tmp_path)
    assert with_files_of(whole, lambda: save(path, 2.0)) == "done"
    assert value_of(path) == 2.0 and os.listdir(tmp_path) == ["last.ckpt"]


def test_another_run_that_starts_leaves_it_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = io_module.write_sealed

    def meanwhile(*arguments: Any) -> None:
        assert len(os.listdir(tmp_path)) == 1
        assert clear_leftovers(tmp_path) == []
        write(*arguments)

    monkeypatch.setattr(io_module, "write_sealed", meanwhile)
    save(tmp_path / "last.ckpt", 6.0)
    assert value_of(tmp_path / "last.ckpt") == 6.0


def test_what_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        save(tmp_path / "file" / "last.ckpt")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(OSError, match=r"the checkpoint .*last\.ckpt cannot be written \(Permission denied\)"):
        save(tmp_path / "last.ckpt")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("state", ["state_dict", "current_model_state"])
def test_weights_that_are_not_finite_are_neither_written_nor_used(bad: float, state: str, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save(path, 1.0)
    broken = content() | {state: {"policy.a": torch.ones(2), "policy.c": torch.tensor([0.0, bad])}}
    with pytest.raises(NotFiniteError, match=r"last\.ckpt is not written: after step 7 its weight policy\.c holds NaN"):
        WholeCheckpointIO().save_checkpoint(broken, path)
    assert value_of(path) == 1.0
    torch.save(broken, path)
    with pytest.raises(NotFiniteError, match=r"last\.ckpt cannot be used: .*policy\.c holds NaN"):
        read_checkpoint(path)


def test_a_directory_says_which_checkpoints_it_has(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a directory, and no checkpoint: there is none in it"):
        read_checkpoint(tmp_path)
    for age, name in enumerate(("last.ckpt", "best/step=7.ckpt")):
        save(tmp_path / name)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    with pytest.raises(CheckpointError, match=r"give a file of it, such as .*/last\.ckpt; an exported model"):
        read_checkpoint(tmp_path)


def test_what_could_run_when_it_is_read_is_not_read(tmp_path: Path) -> None:
    """And nobody is told how to read it all the same, as torch tells them."""
    torch.save({"state_dict": {}, "anything": Path("of another program")}, tmp_path / "foreign.ckpt")
    with pytest.raises(CheckpointError, match="may run when it is read") as raised:
        read_checkpoint(tmp_path / "foreign.ckpt", weights_only=True)
    assert "weights_only" not in str(raised.value)


def test_a_url(tmp_path: Path) -> None:
    url = "memory://runs/last.ckpt"
    io = WholeCheckpointIO()
    io.save_checkpoint(content(3.0), url)
    assert float(io.load_checkpoint(url)["state_dict"]["policy.b"][0]) == 3.0
    files = fsspec.filesystem("memory")
    files.pipe("/runs/last.ckpt", files.cat("/runs/last.ckpt").replace(b"policy.a", b"policy.x"))
    with pytest.raises(CheckpointError, match=r"memory://runs/last\.ckpt is damaged"):
        io.load_checkpoint(url)
    io.save_checkpoint(content(4.0), tmp_path.as_uri() + "/last.ckpt")
    assert value_of(tmp_path / "last.ckpt") == 4.0
    io.remove_checkpoint(url)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint memory://runs"):
        io.load_checkpoint(url)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"a": torch.ones(2)}, "bare weights .a state_dict."),
        ({"epoch": 3, "model": {}}, "holds a mapping of 'epoch', 'model'"),
        ({}, "holds a mapping of nothing"),
        ([1, 2], "holds a list"),
        (torch.ones(2), "holds a Tensor"),
        (torch.nn.Linear(1, 1), "cannot be read as a checkpoint: it holds more than tensors and plain values"),
    ],
    ids=["state_dict", "mapping", "nothing", "list", "tensor", "module"],
)
def test_other_programs_files(other: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "other.ckpt"
    torch.save(other, path)
    with pytest.raises(CheckpointError, match=rf"other\.ckpt.*{message}") as raised:
        read_checkpoint(path, weights_only=True)
    assert "\n" not in str(raised.value)


def test_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*gone\.ckpt"):
        read_checkpoint(tmp_path / "gone.ckpt")


def test_an_older_one_is_read_with_a_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(content(5.0), tmp_path / "old.ckpt")
    with caplog.at_level("INFO"):
        assert value_of(tmp_path / "old.ckpt") == 5.0
    assert "old.ckpt has no digest" in caplog.text
    caplog.clear()
    save(tmp_path / "new.ckpt")
    value_of(tmp_path / "new.ckpt")
    assert "digest" not in caplog.text
