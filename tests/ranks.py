"""Two processes for the tests of data-parallel runs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def run_two(module: str, *arguments: str) -> None:
    """Run ``python -m module *arguments rank`` for the ranks 0 and 1 of one gloo group, as DDP finds them.

    Raises:
        AssertionError: With all that they wrote, if either fails.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments, str(rank)],
            cwd=ROOT,
            env=os.environ | shared | {"LOCAL_RANK": str(rank), "NODE_RANK": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)


def leave() -> None:
    """End a rank that has done and written all it should.

    Without the interpreter's own end, in which a thread of torch's is now and then destroyed while it still runs.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
