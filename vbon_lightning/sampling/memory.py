"""How much memory the caches of keys and values hold at the most, while somebody asks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor
from transformers import Cache


class CacheMeter:
    """Remembers the most bytes that caches held at once, of those that :func:`note_caches` was told of."""

    peak = 0

    def note(self, size: int) -> None:
        """Take down how many bytes are held now."""
        self.peak = max(self.peak, size)


_METER: ContextVar[CacheMeter | None] = ContextVar("meter", default=None)


@contextmanager
def metered_caches() -> Iterator[CacheMeter]:
    """Measure the caches of what runs inside."""
    meter = CacheMeter()
    token = _METER.set(meter)
    try:
        yield meter
    finally:
        _METER.reset(token)


def note_caches(*caches: Cache) -> None:
    """Say which caches are held now, all that are; nothing comes of it unless somebody measures."""
    if (meter := _METER.get()) is not None:
        meter.note(sum(map(cache_bytes, caches)))


def cache_bytes(cache: Cache) -> int:
    """Return how many bytes a cache's tensors take, the room that is kept for tokens to come included."""
    held = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, Tensor)]
    return sum(value.numel() * value.element_size() for value in held)
