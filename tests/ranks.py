"""Two processes for the tests of data-parallel runs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def run_two(module: str, *arguments: str, timeout: float = 200.0) -> None:
    """Run ``python -m module *arguments rank`` for the ranks 0 and 1 of one gloo group, as DDP finds them.

    Raises:
        AssertionError: With all that they wrote, if either fails (the other is not waited for then), or takes too long.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    # Files: a rank whose pipe is full would wait for its reader, who waits for the other rank.
    with tempfile.TemporaryFile("w+") as first, tempfile.TemporaryFile("w+") as second:
        logs = (first, second)
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", module, *arguments, str(rank)],
                cwd=ROOT,
                env=os.environ | shared | {"LOCAL_RANK": str(rank), "NODE_RANK": "0"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            for rank, log in enumerate(logs)
        ]
        end = time.monotonic() + timeout
        try:
            codes = [process.poll() for process in processes]
            while None in codes and not any(codes) and time.monotonic() < end:
                time.sleep(0.05)
                codes = [process.poll() for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        for log in logs:
            log.seek(0)
        outputs = "\n".join(f"-- rank {rank}\n{log.read()}" for rank, log in enumerate(logs))
    assert codes == [0, 0], f"exit codes {codes} (None: still running)\n{outputs}"


def leave() -> None:
    """End a rank that has done and written all it should.

    Without the interpreter's own end, in which a thread of torch's is now and then destroyed while it still runs.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # rank 0 keeps the store, which the other may still need
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
