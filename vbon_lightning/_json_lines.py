"""Read lines of text and JSON Lines, plain or compressed, here or behind a URL, with errors that name the line."""

from __future__ import annotations

import json
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec

from vbon_lightning._visible import is_text


def is_url(path: str | Path) -> bool:
    """Say whether a path is a URL, which fsspec opens: ``s3://``, ``https://``, ``memory://`` and so on."""
    return "://" in str(path)


@contextmanager
def open_bytes(path: str | Path, error: type[Exception]) -> Iterator[IO[bytes]]:
    """Open a file to read, decompressed as the end of its name says.

    Args:
        path: the file, or a URL.
        error: the exception to raise.

    Raises:
        error: for a file that does not exist or a URL that cannot be opened.
    """
    if not is_url(path) and not Path(path).is_file():
        raise error(f"file {path} does not exist")
    try:
        opened = fsspec.open(str(path), "rb", compression="infer").open()
    except FileNotFoundError as problem:
        raise error(f"file {path} does not exist, or cannot be reached") from problem
    except (OSError, ValueError, ImportError) as problem:
        raise error(f"file {path} cannot be opened: {type(problem).__name__}: {problem}") from problem
    with opened as stream:
        yield stream


def read_lines(path: str | Path, error: type[Exception]) -> Iterator[tuple[int, str]]:
    """Yield ``(line number, line)`` of a UTF-8 text file, which may be compressed, without the line ends.

    Args:
        path: the file, or a URL; one named ``.gz``, ``.bz2``, ``.xz`` or ``.zst`` is decompressed.
        error: the exception to raise.

    Raises:
        error: for a file that does not exist, broken compression and bytes that are not UTF-8.
    """
    number = 0
    try:
        # Bytes, and only \n ends a line: text mode would also split at other characters inside strings.
        with open_bytes(path, error) as stream:
            for number, line in enumerate(stream, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as problem:
        raise error(f"file {path}, line {number}: not UTF-8 text: {problem.reason}") from problem
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as problem:
        raise error(f"file {path}: broken data after line {number}: {problem}") from problem


def parse_json(text: str) -> Any:
    """Parse JSON, in which no key of an object stands twice and all text is made of whole characters.

    Args:
        text: the JSON.

    Raises:
        ValueError: for JSON that is malformed, repeats a key, or has half a character (a lone surrogate).
    """
    twice: list[tuple[dict[str, Any], str]] = []

    def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) != len(pairs):
            names = [name for name, _ in pairs]
            twice.append((record, next(name for name in names if names.count(name) > 1)))
        return record

    found = json.loads(text, object_pairs_hook=each_once)
    if twice:
        (record, name), *_ = twice
        place = next(place for place, part in _parts(found, "") if part is record)
        raise ValueError(f"the key {name!r} is there twice{place and f' in {place}'}: leave one of them")
    if "\\ud" in text or "\\uD" in text:  # halves are nothing but written out
        for place, part in _parts(found, ""):
            if isinstance(part, str) and not is_text(part):
                raise ValueError(f"half a character (a lone surrogate){place and f' in {place}'}: {part[:80]!r}")
    return found


def _parts(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Yield all that a value holds, itself and keys too, each with its place: ``[2].messages[1].content``."""
    yield place, value
    if isinstance(value, dict):
        for name, part in value.items():
            yield place, name
            yield from _parts(part, f"{place}.{name}".lstrip("."))
    elif isinstance(value, list):
        for number, part in enumerate(value, start=1):
            yield from _parts(part, f"{place}[{number}]")


def read_json_lines(path: str | Path, error: type[Exception]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield ``(line number, object)`` of a JSON Lines file; blank lines are passed over.

    Args:
        path: the file or URL, plain or compressed.
        error: the exception to raise.

    Raises:
        error: as :func:`read_lines`, and for a line that is not a JSON object, or none that :func:`parse_json` takes.
    """
    for number, line in read_lines(path, error):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as problem:
            raise error(f"file {path}, line {number}: not valid JSON: {problem}") from problem
        if not isinstance(record, dict):
            raise error(f"file {path}, line {number}: expected a JSON object, got {type(record).__name__}")
        yield number, record
