"""How much memory the caches of keys and values hold at the most, while somebody asks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor
from transformers import Cache

Meter = TypeVar("Meter")


class CacheMeter:
    """Remembers the most bytes that caches held at once, of those that :func:`note_cache` was told of."""

    def __init__(self) -> None:
        self.peak = 0
        self._held: WeakKeyDictionary[Cache, int] = WeakKeyDictionary()

    def note(self, cache: Cache) -> None:
        """Take down how many bytes a cache holds now."""
        self._held[cache] = cache_bytes(cache)
        self.peak = max(self.peak, sum(self._held.values()))


_METER: ContextVar[CacheMeter | None] = ContextVar("meter", default=None)


@contextmanager
def asking(asked: ContextVar[Meter | None], meter: Meter) -> Iterator[Meter]:
    """Let a meter hear what runs inside; one inside another hears it alone.

    Args:
        asked: Where those who have something to tell find the meter.
        meter: The meter.
    """
    token = asked.set(meter)
    try:
        yield meter
    finally:
        asked.reset(token)


def metered_caches() -> AbstractContextManager[CacheMeter]:
    """Measure the caches of what runs inside."""
    return asking(_METER, CacheMeter())


def note_cache(cache: Cache) -> None:
    """Say that a cache has grown; nothing comes of it unless somebody measures."""
    if (meter := _METER.get()) is not None:
        meter.note(cache)


def cache_bytes(cache: Cache) -> int:
    """Return how many bytes a cache's tensors take, the room that is kept for tokens to come included."""
    held = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, Tensor)]
    return sum(value.numel() * value.element_size() for value in held)
