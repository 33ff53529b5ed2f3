"""What several updates on one rollout hold fixed, and how a checkpoint keeps it."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from vbon_lightning.types import Completions, PromptBatch, Responses, Rollout


class Experience(NamedTuple):
    """A minibatch of a rollout, and what several updates on it must hold fixed."""

    rollout: Rollout
    advantages: Tensor
    """``[B, G, T]``."""
    values: Tensor | None
    """``[B, G, T]``: the critic's values when the rollout was made."""
    returns: Tensor | None
    """``[B, G, T]``: what the critic should learn."""
    weights: Tensor | None = None
    """``[B, G]``: what each response weighs in the loss, in the advantages already; None where all weigh the same."""


def to_plain(value: Any) -> Any:
    """Turn nested NamedTuples into dicts, which checkpoints load under ``weights_only``."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {name: to_plain(part) for name, part in zip(value._fields, value, strict=True)}
    if isinstance(value, dict):
        return {name: to_plain(part) for name, part in value.items()}
    return value.detach().cpu() if isinstance(value, Tensor) else value


def from_plain(value: dict[str, Any]) -> Experience:
    """Make again what :func:`to_plain` took apart."""
    rollout = dict(value["rollout"])
    rollout["prompts"] = PromptBatch(**rollout["prompts"])
    rollout["completions"] = Completions(**rollout["completions"])
    if rollout["extra"] is not None:
        rollout["extra"] = Responses(**rollout["extra"])
    return Experience(**(value | {"rollout": Rollout(**rollout)}))
