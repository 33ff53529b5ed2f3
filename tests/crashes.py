"""Kill a piece of work at each of its file-system calls, or let the disk run full in the middle of it.

``os.fork`` makes the process that dies, so what is set up before needs no repeating. An audit hook sees Python's own
calls; what a library written in C or Rust writes is met by a limit on the size of files, in whatever language.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from transformers.utils import logging as transformers_logging

WATCHED = {
    "open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.copyfile",
    "shutil.move", "shutil.rmtree", "os.utime", "os.chmod",
}  # fmt: skip
DIED, FAILED, DONE = "died", "failed", "done"


def count_calls(work: Callable[[], object], directory: Path) -> int:
    """Return how many file-system calls the work makes under a directory; it is done in a process of its own."""
    reading, writing = os.pipe()

    def counted() -> None:
        seen = _watch(directory, None)
        work()
        os.write(writing, str(seen[0]).encode())

    status = _in_child(counted)
    os.close(writing)
    with os.fdopen(reading) as stream:
        text = stream.read()
    assert status == DONE and text, "the work itself fails"
    return int(text)


def killed_at(call: int, work: Callable[[], object], directory: Path) -> str:
    """Do the work in a process that kills itself before its call of that number (from 1) under the directory.

    Returns:
        ``died`` or, where it makes fewer calls, ``done``.
    """

    def watched() -> None:
        _watch(directory, call)
        work()

    return _in_child(watched)


def with_files_of(size: int, work: Callable[[], object], *, fatal: bool = False) -> str:
    """Do the work in a process whose files may not grow beyond a number of bytes, as if the disk were full there.

    Args:
        size: the bytes.
        work: the work.
        fatal: the process dies there, a file half written; otherwise the write fails as on a full disk.

    Returns:
        ``died``, ``failed`` or ``done``.
    """

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if fatal else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        work()

    return _in_child(limited)


def _watch(directory: Path, fatal: int | None) -> list[int]:
    """Count the calls that name something under the directory; at the fatal one, die."""
    prefix, seen = str(directory), [0]

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event not in WATCHED or not any(_is_under(argument, prefix) for argument in arguments):
            return
        if event == "open" and not _writes(arguments):
            return
        seen[0] += 1
        if seen[0] == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        if event == "open" and _empties(arguments):  # between the call and the first byte what was there is gone
            seen[0] += 1
            if seen[0] == fatal:
                seen[0] = sys.maxsize // 2  # the hook's own calls are not counted
                os.truncate(str(arguments[0]), 0)
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    sync = os.fsync

    def counted_sync(descriptor: int) -> None:
        seen[0] += 1
        if seen[0] == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)

    os.fsync = counted_sync
    return seen


def _is_under(argument: object, prefix: str) -> bool:
    if isinstance(argument, bytes):
        argument = os.fsdecode(argument)
    return isinstance(argument, str | os.PathLike) and os.path.abspath(argument).startswith(prefix)


def _writes(arguments: tuple[object, ...]) -> bool:
    _, mode, flags = arguments
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _empties(arguments: tuple[object, ...]) -> bool:
    """Tell whether a call opens a file that is there, and holds something, to write it anew in its place."""
    path, mode, flags = arguments
    anew = "w" in mode if isinstance(mode, str) else isinstance(flags, int) and bool(flags & os.O_TRUNC)
    return anew and isinstance(path, str | os.PathLike) and os.path.isfile(path) and os.path.getsize(path) > 0


def _in_child(work: Callable[[], object]) -> str:
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 1
        # All children share the lock of progress bars: one that dies with it would stop the others.
        transformers_logging.disable_progress_bar()
        try:
            work()
            code = 0
        except BaseException as problem:
            if not (isinstance(problem, OSError) and problem.errno in (errno.EFBIG, errno.ENOSPC)):
                traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return DIED
    return DONE if os.WEXITSTATUS(status) == 0 else FAILED
