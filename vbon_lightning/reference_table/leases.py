"""Which prompts a writer is at work on, so that several share the work; and who of them is still alive.

Leases save work and no more: a row depends on its prompt and the seed alone, and readers drop a prompt's second row.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence

from vbon_lightning.reference_table.store import TablePath, create_file, telling
from vbon_lightning.reference_table.writer_names import still_runs

_log = logging.getLogger(__name__)
_BEATS = 5
"""How often a writer says that it lives while a lease lasts."""
_LEASE, _WRITER = ".lease", ".writer"


class PromptLeases:
    """Take prompts that no other writer has, and those of writers that died.

    A lease is a file that is created exclusively and names its writer; a writer is a file that it changes again and
    again. A writer whose file did not change for the length of a lease (its own or that of the one who looks, whichever
    is longer), *by the clock of the one who looks*, is dead; one on this machine whose process is gone is dead at once.
    Nothing is written before the first prompt is taken.

    Args:
        directory: where the leases lie, made if absent.
        writer: name of this writer, which nobody else has.
        seconds: how long a writer may stay silent.
    """

    def __init__(self, directory: TablePath, writer: str, *, seconds: float) -> None:
        """Take the parts."""
        if not seconds > 0:
            raise ValueError(f"a lease must last longer than 0 seconds, got {seconds}")
        self.directory, self.writer, self.seconds = directory, writer, seconds
        self._mine: set[str] = set()
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._stopped = threading.Event()
        self._beating: threading.Thread | None = None

    def take(self, keys: Sequence[str]) -> list[str]:
        """Take the prompts of a group.

        Args:
            keys: keys of prompts.

        Returns:
            The keys of those taken; none where another writer has the first, for it will come to the rest.
        """
        self._start()
        taken: list[str] = []
        for key in keys:
            if self._take(_lease(key)):
                taken.append(key)
            elif not taken:
                break
        self._mine.update(taken)
        return taken

    def release(self, keys: Iterable[str]) -> None:
        """Give prompts back, once their rows are written or will not be.

        Args:
            keys: their keys.
        """
        for key in keys:
            if key in self._mine:
                self._mine.discard(key)
                if self._read(_lease(key)) == self.writer.encode():  # not taken over while this writer was silent
                    (self.directory / _lease(key)).unlink(missing_ok=True)

    def holders(self, keys: Iterable[str]) -> list[str]:
        """Return the writers that have some of these prompts.

        Args:
            keys: keys of prompts.
        """
        held = self._names()
        return sorted({self._owner(name) for key in keys if (name := _lease(key)) in held} - {self.writer, ""})

    def others(self) -> set[str]:
        """Return the other writers that live, as far as is known."""
        return {name for name in self._writers() if not self._is_dead(name)}

    def sweep(self) -> set[str]:
        """Remove what dead writers left in here, and return their names.

        A process of this machine that is silent and still there (stopped, or waiting for a disk) may come back: what it
        left is not touched, though its prompts may be taken.
        """
        dead = {name for name in self._writers() if self._is_dead(name) and not still_runs(name)}
        for name in self._names() if dead else ():
            if name.endswith(_LEASE) and self._owner(name) in dead:
                (self.directory / name).unlink(missing_ok=True)
        for name in dead:
            (self.directory / f"{name}{_WRITER}").unlink(missing_ok=True)
        return dead

    def close(self) -> None:
        """Give everything back and stop saying that this writer lives."""
        if self._beating is None:
            return
        self._stopped.set()
        self._beating.join()
        self._beating = None
        self.release(list(self._mine))
        (self.directory / f"{self.writer}{_WRITER}").unlink(missing_ok=True)

    def _start(self) -> None:
        if self._beating is not None:
            return
        with telling(self.directory, writing=True):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._beat(0)
        self._stopped.clear()
        self._beating = threading.Thread(target=self._keep_beating, name="leases", daemon=True)
        self._beating.start()

    def _keep_beating(self) -> None:
        number, told = 0, False
        while not self._stopped.wait(self.seconds / _BEATS):
            number += 1
            try:
                self._beat(number)
            except OSError as problem:
                if not told:
                    _log.warning("leases cannot be renewed, so that others may make the same prompts: %s", problem)
                told = True

    def _beat(self, number: int) -> None:
        (self.directory / f"{self.writer}{_WRITER}").write_bytes(f"{number} {self.seconds:g}".encode())

    def _names(self) -> set[str]:
        try:
            return {file.name for file in self.directory.iterdir()}
        except FileNotFoundError:  # nobody took anything yet
            return set()

    def _writers(self) -> set[str]:
        return {name.removesuffix(_WRITER) for name in self._names() if name.endswith(_WRITER)} - {self.writer}

    def _owner(self, name: str) -> str:
        return self._read(name).decode(errors="replace")

    def _take(self, name: str) -> bool:
        """Create a lease, in place of one that a dead writer left."""
        with telling(self.directory, writing=True):
            if create_file(self.directory / name, self.writer.encode()):
                return True
            owner = self._owner(name)
            if owner == self.writer or not self._is_dead(owner):
                return False
            (self.directory / name).unlink(missing_ok=True)
            return create_file(self.directory / name, self.writer.encode())

    def _is_dead(self, writer: str) -> bool:
        if still_runs(writer) is False:
            return True
        beat, now = self._read(f"{writer}{_WRITER}"), time.monotonic()
        last, since = self._seen.setdefault(writer, (beat, now))
        if last != beat:
            self._seen[writer] = (beat, now)
            return False
        return now - since > max(self.seconds, _promised(beat))

    def _read(self, name: str) -> bytes:
        """Read a file; nothing where it is gone, or its writer died over it."""
        try:
            return (self.directory / name).read_bytes()
        except FileNotFoundError:
            return b""


def _lease(key: str) -> str:
    return key.replace(":", "-") + _LEASE


def _promised(beat: bytes) -> float:
    """Return the seconds for which a writer said that it might be silent; nothing where it died over it."""
    try:
        return float(beat.split()[1])
    except (IndexError, ValueError):
        return 0.0
