"""Comparing the settings a checkpoint was made with to those of the run that resumes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ConfigMismatchError(ValueError):
    """A checkpoint was made with other settings than the run that would resume it."""


def plain(value: Any) -> Any:
    """Keep what compares and stores as text of nested settings: numbers, strings, None, lists, mappings."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items() if not _is_opaque(part)}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value if not _is_opaque(part)]
    return value


def _is_opaque(value: Any) -> bool:
    return not (value is None or isinstance(value, (bool, int, float, str, list, tuple, Mapping)))


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List where two nested mappings of plain values differ, as ``key: old -> new`` lines."""
    found = []
    for key in sorted({*old, *new}, key=str):
        name, before, after = f"{prefix}{key}", old.get(key, "(absent)"), new.get(key, "(absent)")
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{name}.")
        elif before != after:
            found.append(f"{name}: checkpoint has {before!r}, this run has {after!r}")
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
            + "\n  ".join(found)
            + "\nResume with the settings the checkpoint was made with, or start a new run from the exported "
            "policy (`data.policy: <export directory>`) without `--ckpt_path`."
        )
