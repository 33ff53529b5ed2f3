"""Spies, and modules whose policy has left its reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.modules.offline import table_batch, table_data
from tests.modules.setting import make_module


class Spy:
    """Calls what it stands for, and keeps the arguments of each call."""

    def __init__(self, real: Callable[..., Any]) -> None:
        self.real, self.calls = real, list[tuple[tuple[Any, ...], dict[str, Any]]]()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return self.real(*args, **kwargs)


def moved(files: Path, kind: str, **options: Any) -> tuple[Any, Any]:
    """A module whose policy is no longer its reference, and its data."""
    data = table_data(
        files, **({"value_model": str(files / "value")} if kind in ("valuecritic", "distillation") else {})
    )
    module: Any = make_module(kind, data, **options)
    module.configure_model()
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.policy.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=noise))
    return module, data


def module_batch(files: Path) -> Any:
    return table_batch(table_data(files)).prompts
