"""Prompts are one writer's at a time, go back when it dies, and a living one keeps them whatever the clocks say."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.reference_table.test_writer_names import a_gone_writer
from vbon_lightning.reference_table import PromptLeases
from vbon_lightning.reference_table import leases as leases_module
from vbon_lightning.reference_table.store import table_path

Open = Callable[..., PromptLeases]


@pytest.fixture(params=["directory", "memory"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    place = table_path(f"memory:/{tmp_path}" if request.param == "memory" else tmp_path / "table" / "leases")
    made: list[PromptLeases] = []

    def open_leases(writer: str, seconds: float = 60.0) -> PromptLeases:
        made.append(PromptLeases(place, writer, seconds=seconds))
        return made[-1]

    yield open_leases
    for leases in made:
        leases.close()


def files(leases: PromptLeases) -> list[str]:
    return sorted(file.name for file in leases.directory.iterdir())


def test_a_prompt_is_taken_once(opened: Open) -> None:
    a, b = opened("a"), opened("b")
    assert a.take(["1", "2:x"]) == ["1", "2:x"]
    assert a.take(["1"]) == b.take(["1", "3"]) == [], "the first is a's, and so the group"
    assert b.take(["3", "2:x", "4"]) == ["3", "4"]
    assert b.holders(["1", "3", "9"]) == ["a"]
    a.release(["1", "3"])
    assert b.take(["1"]) == ["1"], "what was given back is free; what is another's was not given"
    assert files(a) == ["1.lease", "2-x.lease", "3.lease", "4.lease", "a.writer", "b.writer"]
    a.close()
    b.close()
    assert files(a) == []


def test_nothing_is_written_before_something_is_taken(tmp_path: Path) -> None:
    leases = PromptLeases(tmp_path / "leases", "a", seconds=60.0)
    assert leases.sweep() == leases.others() == set()
    leases.close()
    assert not (tmp_path / "leases").exists()


def test_a_silent_writers_prompts_go_to_another_and_a_living_ones_do_not(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(leases_module.time, "monotonic", lambda: now[0])
    silent, living, other = opened("silent"), opened("living"), opened("other")
    assert silent.take(["1"]) and living.take(["2"])
    silent._stopped.set()  # as if its machine was gone: what it wrote stays as it is
    for second, beat in ((0.0, 1), (50.0, 2), (61.0, 3)):
        assert other.take(["1"]) == other.take(["2"]) == [] or second > 60
        now[0] = second
        living._beat(beat)
    assert other.others() == {"living"}
    assert other.take(["2"]) == []
    assert other.take(["1"]) == ["1"]
    silent.release(["1"])  # it comes back and thinks that it still has it
    assert "1.lease" in files(other), "the other's lease stays"
    living._stopped.set()
    now[0] = 121.0
    assert other.take(["2"]) == []
    now[0] = 122.0
    assert other.take(["2"]) == ["2"], "it was heard of until 61"


def test_clocks_that_differ_do_not_matter(tmp_path: Path) -> None:
    """Neither an old file time nor a new one says anything."""
    a, b = (PromptLeases(tmp_path, name, seconds=60.0) for name in ("a", "b"))
    a.take(["1"])
    for stamp in (1.0, time.time() + 1e6):
        for file in tmp_path.iterdir():
            os.utime(file, (stamp, stamp))
        assert b.take(["1"]) == []
        assert b.others() == {"a"}
    a.close()
    b.close()


def test_a_writer_says_again_and_again_that_it_lives(tmp_path: Path) -> None:
    a, b = (PromptLeases(tmp_path, name, seconds=1.0) for name in ("a", "b"))
    a.take(["1"])
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        assert b.take(["1"]) == [] and b.sweep() == set()
        time.sleep(0.02)
    a.close()
    b.close()


def test_a_writer_of_longer_leases_may_be_silent_for_longer(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(leases_module.time, "monotonic", lambda: now[0])
    slow, quick = opened("slow", 100.0), opened("quick", 1.0)
    slow.take(["1"])
    slow._stopped.set()
    assert quick.take(["1"]) == []
    now[0] = 99.0
    assert quick.take(["1"]) == []
    now[0] = 101.0
    assert quick.take(["1"]) == ["1"]


def test_a_process_that_is_gone_from_this_machine_is_dead_at_once(opened: Open) -> None:
    a, b = opened(a_gone_writer()), opened("b")
    a.take(["1", "2"])
    a._stopped.set()
    assert b.others() == set()
    assert b.take(["1"]) == ["1"]
    assert b.sweep() == {a.writer}
    assert files(b) == ["1.lease", "b.writer"], "the dead one's other lease is removed, the one taken over is not"


def test_half_a_lease_is_free_in_time(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its writer died over it, and nothing says who that was."""
    now = [0.0]
    monkeypatch.setattr(leases_module.time, "monotonic", lambda: now[0])
    a = opened("a")
    a.take(["0"])
    (a.directory / "1.lease").write_bytes(b"")
    assert a.take(["1"]) == []
    now[0] = 61.0
    assert a.take(["1"]) == ["1"]


def test_a_lease_that_cannot_be_renewed_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    leases = PromptLeases(tmp_path / "leases", "a", seconds=0.05)
    leases.take(["1"])

    def full(number: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(leases, "_beat", full)
    time.sleep(0.2)
    leases.close()
    assert caplog.text.count("leases cannot be renewed, so that others may make the same prompts: no space left") == 1


def test_a_lease_lasts_longer_than_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="longer than 0 seconds, got 0"):
        PromptLeases(tmp_path, "a", seconds=0)
