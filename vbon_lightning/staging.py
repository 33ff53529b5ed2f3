"""Directories that appear whole or not at all, and what a kill leaves of them.

What is being written stands beside its target, as ``.NAME.MARK.partial``, and is locked by the process that writes it:
the lock goes with the process, however that ends, so that another one can tell what nobody writes any more.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vbon_lightning.whole_files import sync_directory

if sys.platform != "win32":
    import fcntl

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.(?P<state>partial|staged|old)")


def partial_path(target: Path, state: str = "partial") -> Path:
    """Return a name beside the target that nobody has: ``.NAME.MARK.partial``."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.{state}")


def lock(descriptor: int) -> None:
    """Mark an open file or directory as being written, until it is closed or the process ends."""
    if sys.platform != "win32":
        with suppress(OSError):  # a file system without locks: what a kill leaves there is never removed
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_live(path: Path) -> bool | None:
    """Return whether a process holds the lock of a file or directory; None where the file system knows no locks."""
    if sys.platform == "win32":
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY) if os.name == "posix" else None
    try:
        if descriptor is not None:
            lock(descriptor)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """Yield an empty directory that takes the target's place, whole, once the block has ended without an error.

    An older target is there until that moment, and goes with it: whoever opens the path finds the one or the other.

    Args:
        target: The directory to appear. A link is followed.
    """
    target = Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(target.parent, target.name)
    staged = partial_path(target)
    staged.mkdir()
    try:
        with _locked(staged):
            yield staged
            for path in staged.rglob("*"):
                _sync(path)
            sync_directory(staged)
            _put_in_place(staged, target)
            sync_directory(target.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _sync(path: Path) -> None:
    if path.is_dir():
        sync_directory(path)
        return
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def _put_in_place(staged: Path, target: Path) -> None:
    """Give a complete directory its final name; an older one there then has the staged one's, or is gone."""
    if not target.exists():
        os.replace(staged, target)
        return
    if exchange(staged, target):
        return
    old = partial_path(target, "old")
    with _locked(target):  # and under its other name
        os.replace(target, old)
        try:
            os.replace(staged, target)
        except BaseException:
            os.replace(old, target)
            raise
    shutil.rmtree(old, ignore_errors=True)


def exchange(first: Path, second: Path) -> bool:
    """Swap two names of a directory at once, as Linux and macOS can.

    Args:
        first: A file or directory.
        second: Another one on the same file system.

    Returns:
        Whether they were: False where the system or the file system knows no such thing.

    Raises:
        OSError: If they cannot be, for another reason.
    """
    names = os.fsencode(first), os.fsencode(second)
    library: Any = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        here = -100  # AT_FDCWD, which an absolute path does not look at
        failed = library.renameat2(here, names[0], here, names[1], ctypes.c_uint(2))  # RENAME_EXCHANGE
    elif sys.platform == "darwin" and hasattr(library, "renamex_np"):
        failed = library.renamex_np(names[0], names[1], ctypes.c_uint(2))  # RENAME_SWAP
    else:
        return False
    if not failed:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), str(second))


def check_writable(directory: Path, what: str) -> None:
    """Refuse a directory that nothing can be written to, before anything expensive.

    Args:
        directory: The directory; where it does not exist yet, the one that it would be made in is meant.
        what: What is to be written, for the message.

    Raises:
        PermissionError: If this process may not write there.
        NotADirectoryError: If a file is in its way.
    """
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{what} cannot be written to {directory}: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{what} cannot be written to {directory}: {there} is read-only for this process")


def stand_in(target: Path) -> Path | None:
    """Return the older version of a directory that is not there: a kill came while it was replaced.

    Args:
        target: The directory.
    """
    if target.exists() or not target.parent.is_dir():
        return None
    return max(_leftovers(target.parent, target.name, ("old",)), key=lambda path: path.stat().st_mtime, default=None)


def clear_leftovers(directory: Path, name: str | None = None) -> list[Path]:
    """Remove what killed processes left half-written in a directory, and put back what they had moved away.

    What another process is writing is left alone.

    Args:
        directory: Where to look; it need not exist.
        name: The name whose leftovers are meant; by default of any.

    Returns:
        What was removed.
    """
    removed: list[Path] = []
    if not directory.is_dir():
        return removed
    targets = {directory / found[1] for path in directory.iterdir() if (found := _LEFTOVER.fullmatch(path.name))}
    for target in targets if name is None else {directory / name}:
        kept = stand_in(target)
        if kept is not None and not is_live(kept):
            with suppress(OSError):
                os.replace(kept, target)
        for path in _leftovers(directory, target.name, ("partial", "staged", "old")):
            if is_live(path) is not False:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink()
            removed.append(path)
    return removed


def _leftovers(directory: Path, name: str, states: tuple[str, ...]) -> list[Path]:
    found = ((path, _LEFTOVER.fullmatch(path.name)) for path in directory.iterdir())
    return [path for path, match in found if match and match["name"] == name and match["state"] in states]
