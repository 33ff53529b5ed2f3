"""Names of writers that nobody else has, and that tell which process each is."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import socket
from datetime import datetime, timezone
from pathlib import Path

_NAME = re.compile(r".+-(?P<machine>[0-9a-f]{8})\.(?P<pid>\d+)\.(?P<started>\d+)-[0-9a-f]{8}")


def new_writer_name() -> str:
    """Return a name: the time, the machine and the process, as people and :func:`still_runs` read them, 32 random bits.

    The time puts a table's rows in the order of their making, and before those of a later writer; nothing else hangs
    on it.
    """
    begun = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S.%f")
    host = re.sub(r"[^A-Za-z0-9]+", "-", socket.gethostname()).strip("-")[:32] or "writer"
    pid = os.getpid()
    return f"{begun}-{host}-{_this_machine() or '0' * 8}.{pid}.{_started(pid) or 0}-{secrets.token_hex(4)}"


def still_runs(name: str) -> bool | None:
    """Tell whether a writer's process runs on this machine; None where that cannot be known, and for other machines.

    Args:
        name: the writer's name; one that was given by hand says nothing.
    """
    match, machine = _NAME.fullmatch(name), _this_machine()
    if match is None or machine is None or match["machine"] != machine:
        return None
    return _started(int(match["pid"])) == int(match["started"])


def _this_machine() -> str | None:
    """Name this machine since it was started, and the container; None where that cannot be known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        processes = os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
    return hashlib.sha256(f"{boot} {processes}".encode()).hexdigest()[:8]


def _started(pid: int) -> int | None:
    """Return when a process started, by the kernel's count; None where there is none, or it waits to be buried."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else int(fields[18])
