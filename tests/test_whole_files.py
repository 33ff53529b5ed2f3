"""A file is there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vbon_lightning.whole_files import atomic_file, sync_directory


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with atomic_file(path) as stream:
        stream.write(b"new")
        stream.flush()
        assert path.read_bytes() == b"old"
        assert sorted(os.listdir(tmp_path)) == [".file.tmp", "file"]
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_what_breaks_off_leaves_what_was_there(tmp_path: Path) -> None:
    path, temporary = tmp_path / "file", tmp_path / "elsewhere"
    path.write_bytes(b"old")

    def interrupted() -> None:
        with atomic_file(path, temporary) as stream:
            stream.write(b"new")
            assert temporary.exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_the_directory_is_put_on_the_disk_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bool] = []
    really = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.path.isdir(f"/proc/self/fd/{descriptor}"))
        really(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_file(tmp_path / "file") as stream:
        stream.write(b"new")
    assert synced == [False, True]
    sync_directory(tmp_path)
    assert synced == [False, True, True]
