"""Checks at the public edge: shapes, dtypes, Python scalars; never tensor values, which would stall a GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def working_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype to compute in: float64, or float32 on MPS, which has no float64."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def check_float(name: str, value: Tensor) -> None:
    """Raise TypeError unless ``value`` is a floating-point tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {value.dtype}; convert it with .float()")


def check_integer(name: str, value: Tensor) -> None:
    """Raise TypeError unless ``value`` is an integer tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers such as token ids, got {value.dtype}")


def check_mask(name: str, value: Tensor) -> None:
    """Raise TypeError unless ``value`` is a bool tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor, got {value.dtype}; convert it with .bool()")


def check_same_shape(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless both tensors have the same shape."""
    if value.shape != other.shape:
        raise ValueError(f"{name} must have the shape of {other_name}, {list(other.shape)}, got {list(value.shape)}")


def check_shape(name: str, value: Tensor, expected: Sequence[int], meaning: str) -> None:
    """Raise ValueError unless ``value`` has exactly the ``expected`` shape."""
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {meaning} = {list(expected)}, got {list(value.shape)}")


def check_dims(name: str, value: Tensor, dims: int, meaning: str, *, at_least: bool = False) -> None:
    """Raise ValueError unless ``value`` has ``dims`` dimensions, or no fewer."""
    if value.dim() != dims and not (at_least and value.dim() > dims):
        raise ValueError(f"{name} must have shape {meaning}, got {list(value.shape)} with {value.dim()} dimension(s)")


def check_real(name: str, value: float, *, above: float = -math.inf, at_least: float = -math.inf,
               at_most: float = math.inf, below: float = math.inf) -> None:  # fmt: skip
    """Raise TypeError unless ``value`` is a finite real number, ValueError unless it is in range."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a real number, got {value!r} of type {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
    if not value > above:
        raise ValueError(f"{name} must be greater than {above:g}, got {value!r}")
    if not value >= at_least:
        raise ValueError(f"{name} must be at least {at_least:g}, got {value!r}")
    if not value <= at_most:
        raise ValueError(f"{name} must be at most {at_most:g}, got {value!r}")
    if not value < below:
        raise ValueError(f"{name} must be less than {below:g}, got {value!r}")


def check_count(name: str, value: int, *, at_most: int, of: str) -> None:
    """Raise unless ``value`` is an integer with ``1 <= value <= at_most``; ``of`` says what limits it."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{name} counts samples here and must be an integer, got {value!r} of type {type(value).__name__}"
        )
    if not 1 <= value <= at_most:
        raise ValueError(
            f"{name} must satisfy 1 <= {name} <= {at_most} ({of}), got {value}; cache more samples or lower {name}"
        )
