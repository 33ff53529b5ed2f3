"""Directories that are replaced: whole at every moment, whatever dies in the middle."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crashes import count_calls, killed_at, with_files_of
from vbon_lightning import staging
from vbon_lightning.staging import check_writable, clear_leftovers, exchange, is_live, lock, staged_directory, stand_in

NAMES = ["a.txt", "sub/b.txt"]


def write(target: Path, text: str) -> None:
    with staged_directory(target) as staged:
        (staged / "sub").mkdir()
        for name in NAMES:
            (staged / name).write_text(text * 100)


def read(directory: Path) -> str:
    """Return what a directory was written with; it must be all of one."""
    (text,) = {(directory / name).read_text() for name in NAMES}
    assert len(text) == 300
    return text[:3]


def no_exchange(first: Path, second: Path) -> bool:
    return False


@pytest.fixture(params=["exchange", "two renames"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "two renames":
        monkeypatch.setattr(staging, "exchange", no_exchange)
    return str(request.param)


def test_it_is_replaced_whole_and_nothing_is_left(either_way: str, tmp_path: Path) -> None:
    target = tmp_path / "nested" / "out"
    for text in ("old", "new"):
        write(target, text)
        assert read(target) == text
        assert os.listdir(target.parent) == ["out"]


def test_an_error_leaves_the_old_one(either_way: str, tmp_path: Path) -> None:
    write(tmp_path / "out", "old")

    def fail() -> None:
        with staged_directory(tmp_path / "out") as staged:
            (staged / "a.txt").write_text("new")
            raise RuntimeError("now")

    with pytest.raises(RuntimeError, match="now"):
        fail()
    assert read(tmp_path / "out") == "old" and os.listdir(tmp_path) == ["out"]


def test_killed_at_every_call(either_way: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    write(target, "old")
    calls = count_calls(lambda: write(target, "new"), tmp_path)
    assert calls > 8
    seen = set()
    for call in range(1, calls + 1):
        write(target, "old")
        assert killed_at(call, lambda: write(target, "new"), tmp_path) == "died"
        there = target if target.exists() else stand_in(target)
        assert there is not None, f"call {call}: nothing is there to be read"
        seen.add((read(there), there == target))
        clear_leftovers(tmp_path)
        assert os.listdir(tmp_path) == ["out"], f"call {call}"
        assert read(target) in ("old", "new")
    moved_away = {("old", False)} if either_way == "two renames" else set()
    assert seen == {("old", True), ("new", True)} | moved_away


@pytest.mark.parametrize("size", [0, 1, 150, 299])
@pytest.mark.parametrize("fatal", [False, True])
def test_a_full_disk_leaves_the_old_one(size: int, fatal: bool, tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    assert with_files_of(size, lambda: write(tmp_path / "out", "new"), fatal=fatal) == ("died" if fatal else "failed")
    assert read(tmp_path / "out") == "old"
    write(tmp_path / "out", "new")
    assert read(tmp_path / "out") == "new" and os.listdir(tmp_path) == ["out"]


@pytest.mark.skipif(not hasattr(os, "O_DIRECTORY"), reason="swaps names as Linux and macOS do")
def test_a_reader_finds_a_whole_one_at_every_moment(tmp_path: Path) -> None:
    target, found, done = tmp_path / "out", [], threading.Event()
    write(target, "aaa")

    def look() -> None:
        while not done.is_set():
            found.append((target / "a.txt").read_text())

    reader = threading.Thread(target=look)
    reader.start()
    for text in ("bbb", "ccc", "ddd", "eee") * 5:
        write(target, text)
    done.set()
    reader.join()
    assert len(found) > 20 and {len(text) for text in found} == {300}


def test_what_a_live_process_writes_is_left_alone(tmp_path: Path) -> None:
    with staged_directory(tmp_path / "out") as staged:
        (staged / "a.txt").write_text("x")
        assert is_live(staged)
        assert clear_leftovers(tmp_path) == []
        assert (staged / "a.txt").exists()
        (staged / "sub").mkdir()
        (staged / "sub" / "b.txt").write_text("x")
    assert sorted(os.listdir(tmp_path / "out")) == ["a.txt", "sub"]


def test_leftovers_of_one_name_or_all(tmp_path: Path) -> None:
    left = [tmp_path / f".{name}.0123abcd.partial" for name in ("a", "b.ckpt")]
    left[0].mkdir()
    left[1].touch()
    others = [tmp_path / name for name in (".a.partial", ".c.0123abcd.tmp", "d.0123abcd.partial", ".git")]
    for path in others:
        path.touch()
    assert clear_leftovers(tmp_path, "a") == left[:1]
    assert clear_leftovers(tmp_path) == left[1:]
    assert all(path.exists() for path in others)
    assert clear_leftovers(tmp_path / "nowhere") == []


def test_the_newest_that_was_moved_away_is_put_back(tmp_path: Path) -> None:
    for age, mark in enumerate(("aaaaaaaa", "bbbbbbbb")):
        old = tmp_path / f".out.{mark}.old"
        old.mkdir()
        (old / "mark").write_text(mark)
        os.utime(old, (1000 + age, 1000 + age))
    assert stand_in(tmp_path / "out") == tmp_path / ".out.bbbbbbbb.old"
    clear_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["out"] and (tmp_path / "out" / "mark").read_text() == "bbbbbbbb"
    assert stand_in(tmp_path / "out") is None  # it is there
    assert stand_in(tmp_path / "gone") is None and stand_in(tmp_path / "gone" / "too") is None


def test_what_cannot_be_written_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "new" / "deep"):
        check_writable(place, "the export")
    with pytest.raises(NotADirectoryError, match="the export cannot be written to .*deep: .*file is a file"):
        check_writable(tmp_path / "file" / "deep", "the export")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # who runs the tests may be allowed all
    with pytest.raises(PermissionError, match=f"checkpoints cannot be written to .*deep: {tmp_path} is read-only"):
        check_writable(tmp_path / "new" / "deep", "checkpoints")


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for text in ("old", "new"):
        write(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink() and read(tmp_path / "real") == text
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_names_that_cannot_be_swapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="No such file"):
        exchange(tmp_path / "a", tmp_path / "b")
    monkeypatch.setattr(staging.sys, "platform", "win32")
    assert not exchange(tmp_path / "a", tmp_path / "b")
    assert is_live(tmp_path) is None  # nobody knows


@pytest.mark.parametrize("unsupported", [True, False])
def test_locks_that_a_file_system_does_not_know(
    unsupported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "not supported")

    def locking() -> Callable[..., None]:
        return refuse if unsupported else staging.fcntl.flock

    left = tmp_path / ".a.0123abcd.partial"
    left.touch()
    monkeypatch.setattr(staging.fcntl, "flock", locking())
    descriptor = os.open(tmp_path, os.O_RDONLY)
    lock(descriptor)
    os.close(descriptor)
    old = tmp_path / ".b.0123abcd.old"
    old.mkdir()
    assert clear_leftovers(tmp_path) == ([] if unsupported else [left])
    assert (tmp_path / "b").is_dir() and not old.exists()  # put back all the same
