"""PyTorch Lightning modules that align language models to Best-of-N."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vbon_lightning.actors import ActorSpec
    from vbon_lightning.data import AlignmentDataModule, TextSource
    from vbon_lightning.decoding import sample
    from vbon_lightning.models import ModelSpec
    from vbon_lightning.modules import (
        BOND,
        DPO,
        JBOND,
        KLRL,
        SFT,
        WIND,
        BoNDistillation,
        BoNSFT,
        ReferenceSampler,
        RewardModelling,
        ValueModelling,
        VBoN,
    )
    from vbon_lightning.sharded_strategy import ShardedStrategy

__version__ = "0.1.0"

__all__ = [
    "BOND",
    "DPO",
    "JBOND",
    "KLRL",
    "SFT",
    "WIND",
    "ActorSpec",
    "AlignmentDataModule",
    "BoNDistillation",
    "BoNSFT",
    "ModelSpec",
    "ReferenceSampler",
    "RewardModelling",
    "ShardedStrategy",
    "TextSource",
    "VBoN",
    "ValueModelling",
    "sample",
]

_HOMES = {
    "BOND": "modules",
    "DPO": "modules",
    "JBOND": "modules",
    "KLRL": "modules",
    "SFT": "modules",
    "WIND": "modules",
    "ActorSpec": "actors",
    "AlignmentDataModule": "data",
    "BoNDistillation": "modules",
    "BoNSFT": "modules",
    "ModelSpec": "models",
    "ReferenceSampler": "modules",
    "RewardModelling": "modules",
    "ShardedStrategy": "sharded_strategy",
    "TextSource": "data",
    "VBoN": "modules",
    "ValueModelling": "modules",
    "sample": "decoding",
}


def __getattr__(name: str) -> Any:
    """Import a public class when it is first asked for, so that the maths alone does not load Lightning."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted([*globals(), *__all__])
