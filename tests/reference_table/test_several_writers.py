"""Several processes fill one table, and are killed at each moment: nothing is lost, made twice or half."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.crashes import count_calls, killed_at, with_files_of
from tests.reference_table.setting import FINGERPRINT, content, make_row, shards
from vbon_lightning.actors import ActorSpec
from vbon_lightning.callbacks.reference_table_writer import ReferenceTableWriter as Writer
from vbon_lightning.reference_table import PromptLeases, ReferenceTable, ReferenceTableWriter
from vbon_lightning.reference_table import leases as leases_module

ROWS = 40
GROUPS = [list(range(first, first + 4)) for first in range(0, ROWS, 4)]
NUMBER = {make_row(i, samples=1).key: i for i in range(ROWS)}


class _Trainer:
    """What the callback asks of a trainer."""

    is_global_zero = False

    class strategy:
        @staticmethod
        def barrier(name: str) -> None:
            pass

    def __init__(self, table: Path) -> None:
        class Data:
            reference_table = str(table)
            actors = ActorSpec("nowhere")

            @staticmethod
            def fingerprint() -> dict[str, Any]:
                return FINGERPRINT

            @staticmethod
            def table_prompts() -> dict[str, Any]:
                return {}

        self.datamodule = Data()


def fill(table: Path, *, groups: list[list[int]] = GROUPS, lease_s: float = 60.0, pause: float = 0.0) -> list[int]:
    """Do what `vbon predict` does with a table, the sampling aside; return the numbers of the rows that it made."""
    trainer: Any = _Trainer(table)
    writer, made = Writer(lease_s), list[int]()
    writer.setup(trainer, None, "predict")
    try:
        while not writer.look_again() >= {make_row(i).key for group in groups for i in group}:
            before = len(made)
            for group in groups:
                taken = [NUMBER[key] for key in writer.take([make_row(i).key for i in group])]
                time.sleep(pause * len(taken))
                writer.write([make_row(i) for i in taken])
                made += taken
            time.sleep(0.01 if len(made) == before else 0.0)
        writer.on_predict_end(trainer, None)
    finally:
        writer.teardown(trainer, None, "predict")
    return made


def in_process(work: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def assert_whole(table: Path) -> None:
    assert sorted(content(table)) == sorted(make_row(i) for i in range(ROWS))
    assert not list(table.glob(".*")), "no unfinished file is left"


def test_four_share_the_work_and_one_is_killed(tmp_path: Path) -> None:
    """The killed one's prompts are made by the others, which end when all is there; one reads all the while."""
    table, made = tmp_path / "table", tmp_path / "made"
    made.mkdir()

    def work(name: int) -> None:
        rows = fill(table, groups=GROUPS[name:] + GROUPS[:name], pause=0.01)
        (made / str(name)).write_text(" ".join(map(str, rows)))

    children = [in_process(lambda name=name: work(name)) for name in range(4)]  # type: ignore[misc]
    while not table.exists() or len(shards(table)) < 3:
        time.sleep(0.005)
    os.kill(children[2], signal.SIGKILL)
    for _ in range(5):
        reader = ReferenceTable.open(table, fingerprint=FINGERPRINT)
        assert all(reader.row(key) == make_row(NUMBER[key]) for key in reader.keys()[:6])
        assert all(row == make_row(NUMBER[row.key]) for row in reader.rows())
    codes = [os.waitpid(child, 0)[1] for child in children]
    assert codes == [0, 0, signal.SIGKILL, 0]
    assert_whole(table)
    rows = [int(number) for file in made.iterdir() for number in file.read_text().split()]
    assert len(rows) == len(set(rows)), "no two made the same prompt"
    assert not list((table / "leases").iterdir()), "a dead one's leases and its beat are gone"
    assert fill(table) == []


def test_a_writer_killed_at_each_call_loses_nothing(tmp_path: Path) -> None:
    table, groups = tmp_path / "table", [[0, 1], [2]]

    def work() -> None:
        fill(table, groups=groups)

    calls = count_calls(work, table)
    assert calls > 20
    for call in range(1, calls + 1):
        shutil.rmtree(table, ignore_errors=True)
        assert killed_at(call, work, table) == "died"
        held = content(table) if table.exists() and shards(table) else []
        assert all(row == make_row(NUMBER[row.key]) for row in held), "what a reader sees beside it"
        made = fill(table, groups=groups)
        assert sorted(made) == sorted(set(range(3)) - {NUMBER[row.key] for row in held}), "and nothing is made again"
        assert sorted(content(table)) == sorted(make_row(i) for i in range(3))
        assert not list(table.glob(".*")) and not list((table / "leases").iterdir()), call
        assert len(shards(table)) <= 2, "what the dead one left in pieces is merged"


@pytest.mark.parametrize("fatal", [True, False])
def test_a_disk_that_is_full_loses_nothing(fatal: bool, tmp_path: Path) -> None:
    table = tmp_path / "table"
    fill(table, groups=GROUPS[:1])
    (whole,) = table.glob("*.parquet")
    for size in (50, 150, whole.stat().st_size - 10):
        end = with_files_of(size, lambda: fill(table, lease_s=0.2), fatal=fatal)
        assert end == ("died" if fatal else "failed")
        assert {row.key for row in content(table)} >= {make_row(i).key for i in GROUPS[0]}
        assert all(row == make_row(NUMBER[row.key]) for row in content(table))
        assert not [file for file in table.glob(".*") if not fatal], "what failed is cleaned up"
    fill(table, lease_s=0.2)  # half a lease may not tell whose it was: it is free in time
    assert_whole(table)


def test_a_directory_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole table needs no writing; one with something missing says what is wrong before anything is made."""
    fill(tmp_path / "table", groups=GROUPS[:2])
    before = sorted((tmp_path / "table").rglob("*"))
    make = Path.open

    def refuse(path: Path, mode: str = "r", *arguments: Any, **more: Any) -> Any:
        if "r" not in mode:
            raise PermissionError(13, "Permission denied", str(path))
        return make(path, mode, *arguments, **more)

    monkeypatch.setattr(Path, "open", refuse)
    assert fill(tmp_path / "table", groups=GROUPS[:2]) == []
    with pytest.raises(OSError, match=r"table/leases cannot be written: Permission denied. Ask for the right to"):
        fill(tmp_path / "table")
    assert sorted((tmp_path / "table").rglob("*")) == before
    monkeypatch.setattr(Path, "open", make)
    monkeypatch.setattr(Path, "mkdir", lambda path, **more: refuse(path, "w"))
    with pytest.raises(OSError, match=r"new cannot be written: Permission denied"):
        fill(tmp_path / "new")


def test_a_prompt_that_was_written_while_it_was_taken_is_not_made_again(tmp_path: Path) -> None:
    """One looks, another writes it and gives it back, and only then the first takes it."""
    trainer: Any = _Trainer(tmp_path)
    slow, quick = Writer(), Writer()
    for writer in (slow, quick):
        writer.setup(trainer, None, "predict")
    keys = [make_row(i).key for i in (0, 1)]
    assert quick.take(keys[:1]) == keys[:1]
    quick.write([make_row(0)])
    assert slow.take(keys) == keys[1:]
    assert slow.taken == {keys[1]}
    assert [file.name for file in (tmp_path / "leases").glob("*.lease")] == [f"{keys[1]}.lease"]
    assert quick.take(keys) == [], "the other has it"
    for writer in (slow, quick):
        writer.on_exception(trainer, None, RuntimeError())  # type: ignore[arg-type]
    assert list((tmp_path / "leases").iterdir()) == []


def test_a_writer_that_was_stopped_for_longer_than_its_lease_comes_back(tmp_path: Path) -> None:
    """In the middle of a shard: its prompts are made by another, and nothing of it is touched or lost."""
    table = tmp_path / "table"

    def stopped() -> None:
        write, first = ReferenceTableWriter.write, [True]

        def stop_within(self: ReferenceTableWriter, rows: Any) -> None:
            half = table / f".part-{self.shard}-000000.parquet.tmp"
            if first.pop() if first else False:
                half.write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGSTOP)
                assert half.exists(), "it is alive"
            write(self, rows)

        ReferenceTableWriter.write = stop_within  # type: ignore[method-assign]
        fill(table, groups=GROUPS[:3], lease_s=0.1)

    child = in_process(stopped)
    assert os.waitpid(child, os.WUNTRACED)[0] == child
    assert len(fill(table, groups=GROUPS[:3], lease_s=0.1)) == 12
    os.kill(child, signal.SIGCONT)
    assert os.waitpid(child, 0)[1] == 0
    assert sorted(content(table)) == sorted(make_row(i) for i in range(12))
    assert not list(table.glob(".*")) and not list((table / "leases").iterdir())


def test_what_a_writer_of_another_machine_left_is_removed_within_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(leases_module.time, "monotonic", lambda: now[0])
    (tmp_path / "leases").mkdir()
    left = [tmp_path / "leases" / "elsewhere.writer", tmp_path / "leases" / f"{make_row(30).key}.lease"]
    left.append(tmp_path / ".part-elsewhere-000007.parquet.tmp")
    for file, content_ in zip(left, (b"17 60", b"elsewhere", b"half a shard"), strict=True):
        file.write_bytes(content_)
    trainer: Any = _Trainer(tmp_path)
    writer = Writer(60.0)
    writer.setup(trainer, None, "predict")
    assert all(file.exists() for file in left), "it may live"
    now[0] = 61.0
    writer.on_predict_end(trainer, None)
    assert not any(file.exists() for file in left)


def test_shards_of_a_living_writer_are_its_own_to_merge(tmp_path: Path) -> None:
    living, merging = ReferenceTableWriter(tmp_path, FINGERPRINT), ReferenceTableWriter(tmp_path, FINGERPRINT)
    leases = [PromptLeases(tmp_path / "leases", one.shard, seconds=60.0) for one in (living, merging)]
    leases[0].take(["1"])
    for i in (0, 1):
        living.write([make_row(i)])
    fill(tmp_path, groups=GROUPS[:1])
    assert len(shards(tmp_path)) == 3
    leases[0].close()  # now its shards are left behind, but another is at them
    leases[1].take(["merging"])
    fill(tmp_path, groups=GROUPS[:1])
    assert len(shards(tmp_path)) == 3
    leases[1].close()
    fill(tmp_path, groups=GROUPS[:1])
    assert len(shards(tmp_path)) == 2


def test_leftovers_of_a_living_writer_are_not_touched(tmp_path: Path) -> None:
    living = ReferenceTableWriter(tmp_path, FINGERPRINT)
    leases = PromptLeases(tmp_path / "leases", living.shard, seconds=60.0)
    leases.take(["1"])
    half = tmp_path / f".part-{living.shard}-000000.parquet.tmp"
    half.write_bytes(b"half a shard")
    fill(tmp_path, groups=GROUPS[:1])
    assert half.exists()
    assert sorted(file.name for file in (tmp_path / "leases").iterdir()) == ["1.lease", f"{living.shard}.writer"]
    leases.close()
