"""From where text lies to the batches that a module reads: sources, conversations, encoding, dealing of rows."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vbon_lightning.data.module import AlignmentDataModule, Split
    from vbon_lightning.data.sources import TextSource

__all__ = ["AlignmentDataModule", "Split", "TextSource"]

_HOMES = {"AlignmentDataModule": "module", "Split": "module", "TextSource": "sources"}


def __getattr__(name: str) -> Any:
    """Import the data module when it is asked for: rewards read conversations, and know nothing of Lightning."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
