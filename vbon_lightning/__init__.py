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
        GRPO,
        JBOND,
        KLRL,
        PFPPO,
        QRPO,
        RLOO,
        SFT,
        WIND,
        AStarPO,
        BoNDistillation,
        BoNRegression,
        BoNSFT,
        InfAlignCTRL,
        MaxAtK,
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
    "GRPO",
    "JBOND",
    "KLRL",
    "PFPPO",
    "QRPO",
    "RLOO",
    "SFT",
    "WIND",
    "AStarPO",
    "ActorSpec",
    "AlignmentDataModule",
    "BoNDistillation",
    "BoNRegression",
    "BoNSFT",
    "InfAlignCTRL",
    "MaxAtK",
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
    "GRPO": "modules",
    "JBOND": "modules",
    "KLRL": "modules",
    "QRPO": "modules",
    "PFPPO": "modules",
    "RLOO": "modules",
    "SFT": "modules",
    "AStarPO": "modules",
    "WIND": "modules",
    "ActorSpec": "actors",
    "AlignmentDataModule": "data",
    "BoNDistillation": "modules",
    "BoNRegression": "modules",
    "BoNSFT": "modules",
    "InfAlignCTRL": "modules",
    "MaxAtK": "modules",
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
