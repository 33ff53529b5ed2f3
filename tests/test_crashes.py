"""What kills work on purpose does so where it says."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.crashes import count_calls, killed_at, with_files_of


def test_it_dies_before_each_call_and_not_elsewhere(tmp_path: Path) -> None:
    watched, other = tmp_path / "watched", tmp_path / "other"
    other.mkdir()

    def work() -> None:
        watched.mkdir()  # 1
        (other / "a").write_text("not watched")
        with (watched / "a").open("w") as stream:  # 2
            stream.write("x")
            stream.flush()
            os.fsync(stream.fileno())  # 3
        (watched / "a").replace(watched / "b")  # 4
        (watched / "b").read_text()
        (watched / "b").unlink()  # 5

    left = []
    for call in range(1, 7):
        shutil.rmtree(watched, ignore_errors=True)
        assert killed_at(call, work, watched) == ("died" if call < 6 else "done")
        left.append(sorted(os.listdir(watched)) if watched.exists() else None)
    assert left == [None, [], ["a"], ["a"], ["b"], []]
    shutil.rmtree(watched)
    assert count_calls(work, watched) == 5


@pytest.mark.parametrize(("fatal", "end"), [(False, "failed"), (True, "died")])
def test_a_disk_that_is_full(fatal: bool, end: str, tmp_path: Path) -> None:
    def work() -> None:
        (tmp_path / "a").write_bytes(b"x" * 1000)

    assert with_files_of(100, work, fatal=fatal) == end
    assert (tmp_path / "a").stat().st_size == 100
    assert with_files_of(1000, work, fatal=fatal) == "done"
