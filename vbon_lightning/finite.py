"""Whether numbers are numbers: NaN and infinity in weights, losses and gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class NotFiniteError(ValueError):
    """Weights, a loss or a gradient that are NaN or infinite."""


def largest(tensors: Sequence[Tensor]) -> Tensor:
    """Return the largest absolute value of each tensor, NaN where one holds a NaN; nothing waits for the device.

    Args:
        tensors: N tensors of floating-point numbers, none of them empty.

    Returns:
        ``[N]`` float32.
    """
    # What PyTorch's clipping of gradients calls: a few kernels for all of them, and no copies.
    found = torch._foreach_norm([_held(tensor.detach()) for tensor in tensors], ord=float("inf"))
    return torch.stack([value.float() for value in found])


def _held(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor that is spread over several; it may hold nothing of a small one."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part if part.numel() else part.new_zeros(1)


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor that holds NaN or infinity, None where all are finite.

    Args:
        tensors: Tensors by name; those of whole numbers, or without any storage, are passed over.
    """
    kept = [(name, value) for name, value in tensors if has_numbers(value)]
    by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, value in kept:
        by_device.setdefault(value.device, []).append((name, value))
    bad: set[str] = set()
    for some in by_device.values():
        sizes = largest([value for _, value in some])
        bad |= {name for (name, _), finite in zip(some, sizes.isfinite().tolist(), strict=True) if not finite}
    return next((name for name, _ in kept if name in bad), None)


def has_numbers(value: Tensor) -> bool:
    """Return whether a tensor holds floating-point numbers that can be looked at."""
    known = value.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return known and value.numel() > 0 and not value.is_meta and not value.is_sparse
