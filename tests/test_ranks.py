"""Two processes of a test: what they are given, and that none fails unseen."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.ranks import leave, run_two

pytestmark = pytest.mark.slow


def test_they_meet_and_leave(tmp_path: Path) -> None:
    run_two("tests.test_ranks", "meets", str(tmp_path), timeout=60)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == ["3", "3"]


@pytest.mark.parametrize("way", ["raises", "aborts"])
def test_the_failure_of_one_is_shown(way: str, tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError, match="what went wrong"):
        run_two("tests.test_ranks", way, str(tmp_path), timeout=100)
    assert time.monotonic() - start < 60, "the other is not waited for"


def test_one_that_does_not_end_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"exit codes \[0, None\](?s:.*)still at it"):
        run_two("tests.test_ranks", "waits", str(tmp_path), timeout=20)


if __name__ == "__main__":
    way, directory, rank = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if way == "waits" and rank:
        print("still at it", flush=True)
        time.sleep(600)
    if way != "waits":
        store = f"file://{directory}/store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
        both = torch.tensor([rank + 1])
        torch.distributed.all_reduce(both)
        (directory / f"{rank}.txt").write_text(str(int(both)))
        if way != "meets":
            if rank == 0:
                time.sleep(600)
            print("what went wrong", flush=True)
            if way == "aborts":
                os.abort()
            raise RuntimeError
    leave()
