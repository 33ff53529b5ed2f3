"""Settings compared: a checkpoint's with those of the run that resumes it, options with their defaults."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any


class ConfigMismatchError(ValueError):
    """A checkpoint was made with other settings than the run that would resume it."""


ABSENT = "(absent)"
"""Stands for a field that one side lacks."""


def plain(value: Any) -> Any:
    """Keep what compares and stores as text of nested settings: numbers, strings, None, lists, mappings."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items() if not _is_opaque(part)}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value if not _is_opaque(part)]
    return value


def is_plain(value: Any) -> bool:
    """Return whether :func:`plain` keeps all of a value."""
    if isinstance(value, Mapping):
        return all(is_plain(part) for part in value.values())
    return all(is_plain(part) for part in value) if isinstance(value, (list, tuple)) else not _is_opaque(value)


def _is_opaque(value: Any) -> bool:
    return not (value is None or isinstance(value, (bool, int, float, str, list, tuple, Mapping)))


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Find where two nested mappings of plain values differ: both values by the field's dotted name."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*old, *new}, key=str):
        name, before, after = f"{prefix}{key}", old.get(key, ABSENT), new.get(key, ABSENT)
        sides = [{} if value is ABSENT else value for value in (before, after)]
        if any(sides) and all(isinstance(side, Mapping) for side in sides):
            found |= differences(sides[0], sides[1], f"{name}.")
        elif before != after:
            found[name] = (before, after)
    return found


def check_same_settings(old: Mapping[str, Any], new: Mapping[str, Any], *, what: str) -> None:
    """Refuse to go on where settings differ.

    Raises:
        ConfigMismatchError: Naming every setting that differs and what to do.
    """
    found = differences(old, new)
    if found:
        raise ConfigMismatchError(
            f"the checkpoint's {what} settings disagree with this run's:\n  "
            + "\n  ".join(
                f"{name}: checkpoint has {its!r}, this run has {ours!r}" for name, (its, ours) in found.items()
            )
            + "\nResume with the settings the checkpoint was made with, or start a new run from the exported "
            "policy (`data.policy: <export directory>`) without `--ckpt_path`."
        )


def check_without_effect(cls: type, why: str, options: Mapping[str, Any], *, prefix: str = "") -> None:
    """Refuse options that are not what they are by default where nothing reads them.

    Args:
        cls: The class whose defaults count, its own and those it inherits.
        why: The options that leave them without effect, as ``NAME=VALUE``.
        options: Their values, by name.
        prefix: What the names have before them where a user sets them.

    Raises:
        ValueError: Naming the option and those that leave it without effect.
    """
    taken = [inspect.signature(vars(kind)["__init__"]).parameters for kind in cls.__mro__ if "__init__" in vars(kind)]
    for name, value in options.items():
        default = next(parameters[name].default for parameters in taken if name in parameters)
        if value != default:
            raise ValueError(f"{prefix}{name}={value} has no effect with {why}: leave it out, or set that otherwise")
