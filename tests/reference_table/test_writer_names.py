"""Each writer's name is its own, and tells whether its process still runs here."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest

from vbon_lightning.reference_table import writer_names
from vbon_lightning.reference_table.writer_names import new_writer_name, still_runs


def a_gone_writer() -> str:
    """Return the name of a writer whose process ran here and is gone."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.write(writing, new_writer_name().encode())
        os._exit(0)
    os.close(writing)
    os.wait()
    with os.fdopen(reading) as stream:
        return stream.read()


def test_names_differ_and_come_in_the_order_of_time() -> None:
    names = [new_writer_name() for _ in range(50)]
    assert len(set(names)) == 50
    assert sorted(name[:22] for name in names) == [name[:22] for name in names]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+", name) for name in names), "as shard names are"


def test_a_host_with_an_odd_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_names.socket, "gethostname", lambda: "(none) é/..\\x")
    assert re.fullmatch(r"[0-9T.]+-none-x-[0-9a-f]{8}\.\d+\.\d+-[0-9a-f]{8}", new_writer_name())


def test_who_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, gone = new_writer_name(), a_gone_writer()
    assert still_runs(mine) is True
    assert still_runs(gone) is False
    machine, pid, _ = re.search(r"-([0-9a-f]{8})\.(\d+)\.(\d+)-", gone).groups()  # type: ignore[union-attr]
    assert still_runs(gone.replace(machine, "0" * 8 if machine != "0" * 8 else "1" * 8)) is None, "of another machine"
    assert still_runs(mine.replace(f".{os.getpid()}.", f".{os.getpid()}.1")) is False, "another process's number by now"
    for given in ("rank0", "", f"host-{pid}"):
        assert still_runs(given) is None
    monkeypatch.setattr(writer_names, "_this_machine", lambda: None)
    assert still_runs(gone) is still_runs(new_writer_name()) is None, "where it cannot be known"


def test_a_process_that_ended_and_waits_for_its_parent_is_gone() -> None:
    child = os.fork()
    if child == 0:
        signal.pause()
    assert writer_names._started(child) is not None
    os.kill(child, signal.SIGKILL)
    until = time.monotonic() + 10
    while writer_names._started(child) is not None and time.monotonic() < until:
        time.sleep(0.01)
    assert writer_names._started(child) is None
    os.waitpid(child, 0)
