"""Numbers that are read once the device has come to them, so that nothing waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

Note = TypeVar("Note")


class _Waiting(NamedTuple, Generic[Note]):
    values: Tensor
    note: Note
    copied: torch.cuda.Event | None


class LateNumbers(Generic[Note]):
    """Read a step's numbers: on a GPU when the next step's are put in, by which time they have long been there.

    Args:
        read: Called with the numbers, on the CPU, and what was noted with them.
    """

    def __init__(self, read: Callable[[Tensor, Note], None]) -> None:
        self._read = read
        self._waiting: _Waiting[Note] | None = None

    def put(self, values: Tensor, note: Note) -> None:
        """Put numbers in, after having read those before them; on the CPU they are read at once.

        Args:
            values: ``[N]``.
            note: What is to be known when they are read.
        """
        self.settle()
        copied = None
        if values.is_cuda:
            here = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            here.copy_(values, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(values.device))
            self._waiting = _Waiting(here, note, copied)
        else:
            self._read(values.cpu(), note)

    def settle(self) -> None:
        """Read what has not been read."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            if waiting.copied is not None:
                waiting.copied.synchronize()
            self._read(waiting.values, waiting.note)

    def forget(self) -> None:
        """Read no more of what was put in."""
        self._waiting = None
