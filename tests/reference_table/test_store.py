"""Directories and folders of stores: the same table behind a path and a URL, and what is wrong told in one line."""

from __future__ import annotations

import builtins
import errno
import os
import pickle
import shutil
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.reference_table.setting import FINGERPRINT, content, encode, lines, make_row
from vbon_lightning.reference_table import (
    FingerprintMismatch,
    ReferenceTable,
    ReferenceTableError,
    ReferenceTableWriter,
    TableStoreError,
    export_jsonl,
    import_jsonl,
    table_path,
    table_summary,
)
from vbon_lightning.reference_table import store as store_module
from vbon_lightning.reference_table import writer as writer_module
from vbon_lightning.reference_table.store import UrlPath, create_file


@pytest.fixture(params=["directory", "file", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return where a table may lie."""
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket')}/{uuid.uuid4().hex}/table"
    places = {"directory": "", "file": "file://", "memory": "memory:/"}
    return f"{places[request.param]}{tmp_path}/table"


def names(place: str) -> list[str]:
    return sorted(file.name for file in table_path(place).iterdir())


def test_a_table_is_the_same_wherever_it_lies(place: str, tmp_path: Path) -> None:
    writer = ReferenceTableWriter(place, FINGERPRINT)
    assert writer.finished_keys() == set()
    writer.write([make_row(1), make_row(2)])
    writer.write([make_row(3)])
    other = ReferenceTableWriter(place, FINGERPRINT)
    other.write([make_row(4), make_row(1, value=9.0)])
    assert other.finished_keys() == writer.finished_keys() == {make_row(i).key for i in (1, 2, 3, 4)}
    beside = ReferenceTable.open(place, fingerprint=FINGERPRINT)
    assert beside.row(make_row(3).key) == make_row(3)
    writer.compact()
    assert len(names(place)) == 3
    assert beside.row(make_row(3).key) == make_row(3), "a reader follows the merged shard"
    table = pickle.loads(pickle.dumps(ReferenceTable.open(place)))
    assert list(table.rows()) == [make_row(i) for i in (1, 2, 3, 4)]
    assert table_summary(table)["prompts"] == 4
    with pytest.raises(FingerprintMismatch, match="the table has 'vader', this run has 'other'"):
        ReferenceTableWriter(place, FINGERPRINT | {"reward": "other"})
    assert ReferenceTableWriter(place, FINGERPRINT | {"on_missing": "skip"}).fingerprint["on_missing"] == "skip"
    assert ReferenceTable.open(place).fingerprint == FINGERPRINT | {"on_missing": "skip"}
    assert not [name for name in names(place) if name.startswith(".")]


def test_shards_of_a_dead_writer_are_merged_by_another(place: str) -> None:
    dead, writer = (ReferenceTableWriter(place, FINGERPRINT) for _ in range(2))
    for i in range(3):
        dead.write([make_row(i)])
    writer.write([make_row(3)])
    before = content(place)
    assert writer.in_pieces() == {dead.shard}
    writer.compact([dead.shard])
    assert len(names(place)) == 2
    assert content(place) == before
    dead.write([make_row(4)])  # it was not dead: its next shard has a name that it never used
    assert content(place) == [make_row(4), *before] or content(place) == [*before, make_row(4)]
    assert any(name.endswith(f"{dead.shard}-000003.parquet") for name in names(place))


def test_rows_that_longer_ones_have_replaced_are_merged_away(place: str) -> None:
    short, other, writer = (ReferenceTableWriter(place, FINGERPRINT) for _ in range(3))
    short.write([make_row(0, samples=2)])
    other.write([make_row(1, samples=3)])
    writer.write([make_row(0, samples=3)])
    assert writer.finished_keys(2) == writer.finished_keys(3) == {make_row(0).key, make_row(1).key}
    assert writer.finished_keys(4) == set()
    assert writer.finished_keys(3) == {make_row(0).key, make_row(1).key}
    assert writer.in_pieces() == {short.shard}, "of one shard, but not needed any more"
    writer.compact([short.shard])
    assert len(names(place)) == 3, "two shards and the fingerprint"
    assert sorted(content(place)) == sorted([make_row(0), make_row(1)])


def test_two_that_merge_the_same_shards_lose_nothing(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dead, writer, other = (ReferenceTableWriter(place, FINGERPRINT) for _ in range(3))
    for i in range(2):
        dead.write([make_row(i)])
    write_tables, attempts = writer_module.write_tables, list[str]()

    def other_first(stream: Any, tables: Any) -> None:
        attempts.append("merging")
        if len(attempts) == 1:
            other.compact([dead.shard])
        write_tables(stream, tables)

    monkeypatch.setattr(writer_module, "write_tables", other_first)
    writer.compact([dead.shard])
    assert len(attempts) == 2, "the parts are gone, and there is nothing left to merge"
    assert content(place) == [make_row(0), make_row(1)]
    assert len(names(place)) == 2


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
def test_json_lines_come_and_go(place: str, name: str, tmp_path: Path) -> None:
    file = lines(tmp_path / "in.jsonl", {"prompt": "a", "responses": [" b", ""], "rewards": [1.0, 0.5]})
    settings: Any = {"encode": encode, "encode_response": lambda text: list(text.encode()), "fingerprint": FINGERPRINT}
    assert import_jsonl(file, place, **settings) == 1
    export_jsonl(ReferenceTable.open(place), f"{place}/../{name}" if "://" not in place else f"{place}-{name}")
    there = f"{place}/../{name}" if "://" not in place else f"{place}-{name}"
    assert import_jsonl(there, f"{place}-again", **settings) == 1
    assert content(f"{place}-again") == content(place)


def test_one_of_several_creates_a_file(place: str) -> None:
    directory = table_path(place)
    directory.mkdir(parents=True, exist_ok=True)
    assert [create_file(directory / "a", text) for text in (b"first", b"second")] == [True, False]
    assert (directory / "a").read_bytes() == b"first"
    (directory / "a").unlink()
    (directory / "a").unlink(missing_ok=True)
    assert not (directory / "a").exists()
    assert create_file(directory / "a", b"third")


def test_a_missing_file_is_missing(place: str) -> None:
    with pytest.raises(FileNotFoundError):
        (table_path(place) / "none").read_bytes()
    with pytest.raises(ReferenceTableError, match="there is no reference table in .*table; make it with"):
        ReferenceTable.open(place)


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_broken_object_is_named_with_the_way_out(damage: str, bucket: str) -> None:
    place = f"{bucket}/{damage}"
    writer = ReferenceTableWriter(place, FINGERPRINT, shard="a")
    writer.write([make_row(1)])
    shard = UrlPath(f"{place}/part-a-000000.parquet")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-30] if damage == "cut" else whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    with pytest.raises(ReferenceTableError, match=r"part-a-000000\.parquet is truncated or corrupt .*delete that file"):
        ReferenceTable.open(place)


def test_a_write_that_fails_leaves_nothing(place: str) -> None:
    writer = ReferenceTableWriter(place, FINGERPRINT)
    with pytest.raises(KeyError), store_module.telling(writer.path, writing=True):
        _write_and_fail(writer)
    assert names(place) == ["fingerprint.json"]


def _write_and_fail(writer: ReferenceTableWriter) -> None:
    from vbon_lightning.reference_table.store import table_file

    with table_file(writer.path / "part-x-000000.parquet") as stream:
        stream.write(b"half")
        raise KeyError("of the code in between, and not of the store")


def test_a_large_file_goes_through_the_disk(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[Any] = []
    copy = shutil.copyfileobj
    monkeypatch.setattr(store_module.shutil, "copyfileobj", lambda *streams: (copied.append(streams), copy(*streams)))
    monkeypatch.setattr(store_module, "_IN_MEMORY", 10)
    UrlPath(f"{bucket}/large").write_bytes(b"x" * 100)
    assert UrlPath(f"{bucket}/large").read_bytes() == b"x" * 100
    assert len(copied) == 1


def test_what_others_put_there_is_seen(bucket: str) -> None:
    """The driver remembers what it has listed; the table must not."""
    place = f"{bucket}/listed"
    writer = ReferenceTableWriter(place, FINGERPRINT)
    writer.write([make_row(1)])
    assert len(writer.finished_keys()) == 1
    other = fsspec.filesystem("s3", skip_instance_cache=True)
    (shard,) = other.glob(f"{place}/*.parquet")
    other.copy(shard, f"{place}/part-other-000000.parquet")
    assert any(name.startswith("part-other") for name in names(place))
    other.rm_file(shard)
    assert names(place) == ["fingerprint.json", "part-other-000000.parquet"]


def test_a_file_system_behind_a_url_shows_no_half_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no object store gets another name first."""
    moved: list[tuple[str, str]] = []
    move = MemoryFileSystem.mv
    monkeypatch.setattr(MemoryFileSystem, "mv", lambda self, *paths: (moved.append(paths), move(self, *paths))[1])
    UrlPath("memory://whole/a").write_bytes(b"x")
    assert [target for _, target in moved] == ["/whole/a"]
    assert names("memory://whole") == ["a"]


# -- what is wrong with a place ------------------------------------------------------------------------


def said(attempt: Any) -> str:
    with pytest.raises((TableStoreError, ReferenceTableError)) as caught:
        attempt()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def both(url: str) -> list[str]:
    """Return what a reader and a writer say of a place."""
    return [said(lambda: ReferenceTable.open(url)), said(lambda: ReferenceTableWriter(url, FINGERPRINT))]


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name.split(".")[0] in ("gcsfs", "paramiko"):
            raise ImportError(f"No module named {name!r}")
        return found(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    for message in both("gs://bucket/table"):
        assert message.startswith("gs://bucket/table") and message.endswith("(pip install gcsfs)")
    for message in both("sftp://host/table"):
        assert "paramiko" in message
    for message in both("s4://bucket/table"):
        assert "fsspec knows no s4://" in message


def test_a_missing_bucket_is_named(bucket: str) -> None:
    reader, writer = both("s3://nobodys/table")
    assert "there is no reference table in s3://nobodys/table" in reader
    assert writer.startswith(
        "s3://nobodys/table/fingerprint.json cannot be written: The specified bucket does not exist"
    )
    assert "Make the bucket" in writer
    assert not fsspec.filesystem("s3").exists("nobodys"), "none is made by the way"


def test_missing_credentials_are_named(bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    for message in both(f"{bucket}/table"):
        assert "Unable to locate credentials" in message and "AWS_ACCESS_KEY_ID" in message
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_what_cannot_be_a_directory_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none")):
        with pytest.raises(TableStoreError, match=rf"^{place} cannot be the directory of a table \(.+\): name another"):
            ReferenceTableWriter(place, FINGERPRINT)
    with pytest.raises(ReferenceTableError, match=r"file is a file, and a reference table is a directory"):
        ReferenceTable.open(tmp_path / "file")


@pytest.mark.parametrize(("writing", "what"), [(True, "written"), (False, "read")])
def test_a_store_that_refuses_is_named(writing: bool, what: str) -> None:
    with pytest.raises(TableStoreError) as caught, store_module.telling(UrlPath("s3://a/b"), writing=writing):
        raise PermissionError("Access Denied")
    assert str(caught.value).startswith(f"s3://a/b cannot be {what}: Access Denied. Ask for the right to")


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "make room"),
        (errno.EFBIG, "File too large. What was written before is complete"),
        (errno.EDQUOT, "raise the quota"),
        (errno.EROFS, "Read-only file system. Ask for the right to"),
        (errno.EACCES, "Permission denied. Ask for the right to, or name another place"),
        (errno.EPERM, "Operation not permitted"),
    ],
)
def test_a_disk_that_takes_nothing_says_so(
    number: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = ReferenceTableWriter(tmp_path, FINGERPRINT)
    writer.write([make_row(1)])

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "open", refuse)
    for attempt in (
        lambda: writer.write([make_row(2)]),
        lambda: ReferenceTableWriter(tmp_path / "new", FINGERPRINT),
    ):
        found = said(attempt)
        assert found.startswith(f"{tmp_path}") and "cannot be written" in found and message in found
    monkeypatch.undo()
    assert content(tmp_path) == [make_row(1)]


def test_a_store_that_fails_is_not_taken_for_a_broken_shard(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = f"{bucket}/away"
    ReferenceTableWriter(place, FINGERPRINT).write([make_row(1)])
    table = ReferenceTable.open(place)

    class ConnectionClosedError(Exception):
        """A driver's own, which is no OSError."""

    def away(*_: object, **__: object) -> None:
        raise ConnectionClosedError("the line is cut")

    for problem in (away, _timed_out):
        monkeypatch.setattr(fsspec.get_filesystem_class("s3"), "open", problem)
        message = said(lambda: table.row(make_row(1).key))
        assert "cannot be reached" in message and "delete" not in message


def _timed_out(*_: object, **__: object) -> None:
    raise TimeoutError(errno.ETIMEDOUT, "timed out")
