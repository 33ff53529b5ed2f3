"""Read JSON Lines files, plain or gzipped, with errors that name the line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_lines(path: Path, error: type[Exception]) -> Iterator[tuple[int, str]]:
    """Yield ``(line number, line)`` of a UTF-8 text file, which may be gzipped, without the line ends.

    Args:
        path: the file; a name ending in ``.gz`` is decompressed.
        error: the exception to raise.

    Raises:
        error: for a file that does not exist, broken compression and bytes that are not UTF-8.
    """
    if not path.is_file():
        raise error(f"file {path} does not exist")
    number = 0
    try:
        # Bytes, and only \n ends a line: text mode would also split at other characters inside strings.
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as problem:
        raise error(f"file {path}, line {number}: not UTF-8 text: {problem.reason}") from problem
    except (gzip.BadGzipFile, EOFError, zlib.error) as problem:
        raise error(f"file {path}: broken gzip data after line {number}: {problem}") from problem


def read_json_lines(path: Path, error: type[Exception]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield ``(line number, object)`` of a JSON Lines file; blank lines are passed over.

    Args:
        path: the file, plain or ``.gz``.
        error: the exception to raise.

    Raises:
        error: as :func:`read_lines`, and for a line that is not a JSON object.
    """
    for number, line in read_lines(path, error):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as problem:
            raise error(f"file {path}, line {number}: not valid JSON: {problem}") from problem
        if not isinstance(record, dict):
            raise error(f"file {path}, line {number}: expected a JSON object, got {type(record).__name__}")
        yield number, record
