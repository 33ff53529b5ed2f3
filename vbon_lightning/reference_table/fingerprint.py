"""The provenance of a table: which reference, reward, temperature, length and EOS rule made it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vbon_lightning.checks import differences
from vbon_lightning.reference_table.shards import (
    ReferenceTableError,
    shard_files,
)
from vbon_lightning.reference_table.store import TablePath, UrlPath, create_file, table_file
from vbon_lightning.whole_files import atomic_file, sync_directory

_FILE = "fingerprint.json"
_SKIPS = "on_missing"
"""In the fingerprint where responses without a reward are replaced by further draws."""
_UNSAID = {"precision": "32-true"}
"""What a fingerprint means that does not say it: those of older tables do not, and the default is not written down."""


class FingerprintMismatch(ReferenceTableError):
    """The table was made under other settings than the run that wants to use it.

    Attributes:
        differences: each differing field with the table's value and the run's value.
    """

    def __init__(self, path: TablePath, differences: Mapping[str, tuple[Any, Any]]) -> None:
        """Write the message."""
        self.path, self.differences = path, dict(differences)
        lines = "".join(
            f"\n  {field}: the table has {table!r}, this run has {run!r}"
            for field, (table, run) in self.differences.items()
        )
        super().__init__(
            f"the reference table {path} was made under other settings:{lines}\n"
            "Use the table's settings, or make a new table in another directory with `vbon predict`"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Let the error cross a process boundary."""
        return type(self), (self.path, self.differences)


def plain(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fingerprint as it reads back from JSON.

    Raises:
        TypeError: if it holds something JSON cannot.
    """
    try:
        value: dict[str, Any] = json.loads(json.dumps(dict(fingerprint), allow_nan=False, sort_keys=True))
        return value
    except (TypeError, ValueError) as problem:
        raise TypeError(
            f"a fingerprint holds plain values only (strings, numbers, lists, mappings): {problem}"
        ) from problem


def check(path: TablePath, table: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Compare a table's fingerprint with a run's.

    A table of a run that would have stopped at a missing reward has none, and is what one that skips would have made.

    Raises:
        FingerprintMismatch: naming each field that differs.
    """
    ours = _UNSAID | plain(run)
    if _SKIPS not in table:
        ours.pop(_SKIPS, None)
    if found := differences(_UNSAID | dict(table), ours):
        raise FingerprintMismatch(path, found)


def read(directory: TablePath) -> dict[str, Any]:
    """Read the fingerprint of the table in ``directory``.

    Raises:
        ReferenceTableError: if there is no table, or its fingerprint is missing or broken.
    """
    path = directory / _FILE
    try:
        fingerprint = json.loads(path.read_text(encoding="utf-8"))
    except NotADirectoryError:
        raise ReferenceTableError(f"{directory} is a file, and a reference table is a directory: name that") from None
    except FileNotFoundError:
        if directory.is_dir() and shard_files(directory):
            raise ReferenceTableError(
                f"{directory} holds shards of a reference table but no {_FILE}, "
                "so what made them is unknown; put the file back, "
                "or make the table anew in another directory with `vbon predict`"
            ) from None
        raise ReferenceTableError(f"there is no reference table in {directory}; make it with `vbon predict`") from None
    except OSError as problem:
        raise ReferenceTableError(f"{path} cannot be read: {problem.strerror or problem}") from problem
    except ValueError as problem:
        raise ReferenceTableError(
            f"{path} is not valid JSON ({problem}); put the file back, or make the table anew in another "
            "directory with `vbon predict`"
        ) from problem
    if not isinstance(fingerprint, dict):
        raise ReferenceTableError(
            f"{path} must hold a JSON object, got {type(fingerprint).__name__}; put the file back, or make the table "
            "anew in another directory with `vbon predict`"
        )
    return fingerprint


def longest_response(fingerprint: Mapping[str, Any]) -> int | None:
    """Return the most tokens that a response of a table may have; None where its fingerprint does not say."""
    longest = fingerprint.get("max_new_tokens")
    return longest if isinstance(longest, int) and not isinstance(longest, bool) else None


def claim(directory: TablePath, fingerprint: Mapping[str, Any], shard: str) -> dict[str, Any]:
    """Write the fingerprint of a new table, or check it against the one of an existing table.

    Of several first writers exactly one puts its file there; the others compare with it. A table that goes on with
    missing rewards skipped says so from then on.

    Raises:
        FingerprintMismatch: if the table was made under other settings.
        ReferenceTableError: if there are shards without a fingerprint.
    """
    path = directory / _FILE
    ours = plain(fingerprint)
    content = (json.dumps(ours, indent=2, sort_keys=True) + "\n").encode()
    if not path.exists() and not shard_files(directory):
        _put_first(path, content, shard)
    theirs = read(directory)
    check(directory, theirs, ours)
    if _SKIPS in ours and _SKIPS not in theirs:
        with table_file(path, None if isinstance(path, UrlPath) else _temporary(path, shard)) as stream:
            stream.write(content)
        return ours
    return theirs


def _put_first(path: TablePath, content: bytes, shard: str) -> None:
    """Put the file there, whole, unless another writer was first."""
    if isinstance(path, UrlPath):
        create_file(path, content)
        return
    mine = _temporary(path, shard)
    with atomic_file(mine) as stream:
        stream.write(content)
    try:
        os.link(mine, path)  # unlike a rename this fails when another writer was first
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not path.exists():
            mine.replace(path)
    mine.unlink(missing_ok=True)
    sync_directory(path.parent)


def _temporary(path: Path, shard: str) -> Path:
    return path.with_name(f".fingerprint-{shard}.json")
