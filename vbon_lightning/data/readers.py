"""Opening what a source names: files of many formats, here or behind a URL, data sets, rows in memory."""

from __future__ import annotations

import csv
import glob
import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from vbon_lightning._json_lines import is_url, open_bytes, parse_json, read_json_lines, read_lines
from vbon_lightning.paths import looks_like_path, resolve_path

Numbered = Iterator[tuple[int, dict[str, Any]]]
"""Rows as they stand, each with its number, counted from 1."""


class SourceError(ValueError):
    """A text source that is missing, or that holds something other than what was asked for."""


class Part(NamedTuple):
    """One file, data set or list of a source."""

    what: str
    """What messages call it."""
    unit: str
    """What messages call a row of it: ``row`` or ``line``."""
    rows: Callable[[Mapping[str, str]], Numbered]
    """Reads the rows: of the columns that are named, each with what asks for it, or of all where none is."""


def open_parts(path: Any, *, name: str | None = None, split: str = "train", streaming: bool = False) -> list[Part]:
    """Find what a source names, and how to read it.

    Args:
        path: A file, a URL that fsspec knows, a pattern of either (``*``), several of them, a directory that
            ``datasets`` saved, the name of a data set on the hub, or rows in memory: a ``datasets.Dataset`` or a list
            of mappings.
        name: Configuration of a data set of the hub.
        split: Split of a data set.
        streaming: Read a data set of the hub as it comes, without downloading it first.

    Raises:
        SourceError: If there is no such thing, or it is of a kind that cannot be read.
    """
    if isinstance(path, str):
        return [_named(one, name, split, streaming) for one in _matches(path)]
    if isinstance(path, Sequence) and path and all(isinstance(one, str) for one in path):
        return [part for one in path for part in open_parts(one, name=name, split=split, streaming=streaming)]
    return [Part("the rows given", "row", lambda columns: _memory_rows(path))]


def _matches(path: str) -> list[str]:
    """Expand a path, and the files that a pattern stands for, in order of their names."""
    try:
        resolved = resolve_path(path)
    except (ValueError, OSError, ImportError) as problem:
        raise SourceError(f"{path}: {problem}") from problem
    if not any(sign in resolved for sign in "*?[") or (not is_url(resolved) and Path(resolved).exists()):
        return [resolved]
    if is_url(resolved):
        import fsspec

        files, _, paths = fsspec.get_fs_token_paths(resolved)
        found = [files.unstrip_protocol(one) for one in paths]
    else:
        found = glob.glob(resolved, recursive=True)
    if not found:
        raise SourceError(f"{path}: no file matches this pattern")
    return sorted(found)


def _named(path: str, name: str | None, split: str, streaming: bool) -> Part:
    pure = PurePosixPath(path)
    kind = pure.with_suffix("").suffix if pure.suffix in COMPRESSED else pure.suffix
    packed = pure.suffix in COMPRESSED
    local = None if is_url(path) else Path(path)
    if local is None or local.is_file() or (kind in READERS and not local.is_dir()):
        if kind not in READERS or (packed and kind in COLUMNAR):
            raise SourceError(f"file {path}: expected one of {', '.join(READERS)} by name, got {pure.name!r}")
        if local is not None and not local.is_file():
            raise SourceError(f"file {path} does not exist")
        unit = "row" if kind in (*COLUMNAR, ".json") else "line"
        return Part(f"file {path}", unit, lambda columns: READERS[kind](path, columns))
    if not local.is_dir() and looks_like_path(path):
        raise SourceError(f"{path} does not exist: there is neither a file nor a directory of that name")
    where = local if local.is_dir() else path
    return Part(f"data set {path}", "row", lambda columns: _data_set_rows(where, columns, name, split, streaming))


def check_columns(what: str, held: Collection[str], needed: Mapping[str, str]) -> None:
    """Refuse to read columns that are not there.

    Args:
        what: Where they are missing, for the message.
        held: Columns that are there.
        needed: Columns that are to be read, each with what asks for it, for the message (may be empty).

    Raises:
        SourceError: Naming the column and those that are there.
    """
    for column, why in needed.items():
        if column not in held:
            names = ", ".join(map(repr, held))
            raise SourceError(f"{what}: there is no column {column!r}{why}; the columns are {names}")


def _check_names(what: str, names: Sequence[str]) -> None:
    """Refuse columns of the same name, of which a row would keep the last; nobody asks for those without one."""
    for name in names:
        if name.strip() and names.count(name) > 1:
            raise SourceError(
                f"{what}: the column {name!r} is there {names.count(name)} times: rename or leave out others"
            )


# -- formats ---------------------------------------------------------------------------------------


def _text_lines(path: str, columns: Mapping[str, str]) -> Numbered:
    for number, line in read_lines(path, SourceError):
        if line.strip():
            yield number, {"text": line}


def _json_line_rows(path: str, columns: Mapping[str, str]) -> Numbered:
    return read_json_lines(path, SourceError)


def _json_rows(path: str, columns: Mapping[str, str]) -> Numbered:
    """Read a list of objects, alone or as the one list of an object; JSON Lines go by this name too."""
    first = next((line for _, line in read_lines(path, SourceError) if line.strip()), "")
    if _is_row(first):
        yield from read_json_lines(path, SourceError)
        return
    with open_bytes(path, SourceError) as stream:
        try:
            held = parse_json(stream.read().decode("utf-8-sig"))
        except ValueError as problem:  # UnicodeDecodeError is one
            raise SourceError(f"file {path}: not valid JSON: {problem}") from problem
    if isinstance(held, dict):
        lists = {key: value for key, value in held.items() if isinstance(value, list)}
        if len(lists) != 1:
            raise SourceError(
                f"file {path}: expected a list of objects, or an object with one such list; this one has the keys "
                f"{', '.join(map(repr, held))}"
            )
        (held,) = lists.values()
    if not isinstance(held, list):
        raise SourceError(f"file {path}: expected a list of objects, got {type(held).__name__}")
    for number, record in enumerate(held, start=1):
        if not isinstance(record, dict):
            raise SourceError(f"file {path}, row {number}: expected a JSON object, got {type(record).__name__}")
        yield number, record


def _is_row(line: str) -> bool:
    """Say whether a line is an object, other than one that holds a list of rows."""
    try:
        held = json.loads(line)
    except ValueError:
        return False
    lists = [value for value in held.values() if isinstance(value, list)] if isinstance(held, dict) else []
    rows = len(lists) == 1 and lists[0] and all(isinstance(one, dict) and "role" not in one for one in lists[0])
    return isinstance(held, dict) and not rows


def _csv_rows(path: str, columns: Mapping[str, str], delimiter: str = ",") -> Numbered:
    lines = (line + "\n" for _, line in read_lines(path, SourceError))
    reader = csv.reader(lines, strict=True, delimiter=delimiter)
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses texts over 128 KiB
    try:
        header = next(reader, None)
        if header is None:
            raise SourceError(f"file {path} is empty; expected a line with the column names")
        _check_names(f"file {path}, line 1", header)
        start = reader.line_num + 1
        for values in reader:
            if values:
                if len(values) != len(header):
                    raise SourceError(
                        f"file {path}, line {start}: expected {len(header)} fields as in the first line, "
                        f"got {len(values)}"
                    )
                yield start, dict(zip(header, values, strict=True))
            start = reader.line_num + 1
    except csv.Error as problem:
        raise SourceError(f"file {path}, line {reader.line_num}: not valid CSV: {problem}") from problem
    finally:
        csv.field_size_limit(limit)


def _tsv_rows(path: str, columns: Mapping[str, str]) -> Numbered:
    return _csv_rows(path, columns, delimiter="\t")


def _parquet_rows(path: str, columns: Mapping[str, str]) -> Numbered:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_bytes(path, SourceError) as stream, pq.ParquetFile(stream) as file:
            _check_names(f"file {path}", file.schema_arrow.names)
            check_columns(f"file {path}", file.schema_arrow.names, columns)
            batches = file.iter_batches(columns=list(columns) or None)
            yield from enumerate((record for batch in batches for record in batch.to_pylist()), start=1)
    except (pa.ArrowException, OSError) as problem:
        raise SourceError(f"file {path}: not a readable Parquet file: {problem}") from problem


def _arrow_rows(path: str, columns: Mapping[str, str]) -> Numbered:
    import pyarrow as pa

    try:
        with open_bytes(path, SourceError) as stream:
            reader = pa.ipc.open_stream(stream)  # what datasets writes
            _check_names(f"file {path}", reader.schema.names)
            check_columns(f"file {path}", reader.schema.names, columns)
            kept = (batch.select(list(columns)) if columns else batch for batch in reader)
            yield from enumerate((record for batch in kept for record in batch.to_pylist()), start=1)
    except (pa.ArrowException, OSError) as problem:
        raise SourceError(f"file {path}: not a readable Arrow stream: {problem}") from problem


READERS: dict[str, Callable[[str, Mapping[str, str]], Numbered]] = {
    ".jsonl": _json_line_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _tsv_rows,
    ".txt": _text_lines,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
}
"""Formats by the end of a file's name."""

COLUMNAR = (".parquet", ".arrow")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


# -- data sets -------------------------------------------------------------------------------------


def _memory_rows(rows: Any) -> Numbered:
    if hasattr(rows, "column_names"):
        return _table_rows(rows, {})
    return enumerate((dict(row) for row in rows), start=1)


def _data_set_rows(
    path: Path | str, columns: Mapping[str, str], name: str | None, split: str, streaming: bool
) -> Numbered:
    import datasets

    what = f"data set {path}"
    saved = isinstance(path, Path) and any(
        (path / file).exists() for file in ("dataset_dict.json", "state.json", "dataset_info.json")
    )
    try:
        if saved:
            data = datasets.load_from_disk(str(path))
        else:
            data = datasets.load_dataset(str(path), name, split=split, streaming=streaming)
    except Exception as problem:  # the library raises many kinds, and all mean the same here
        raise SourceError(
            f"{what}: cannot be loaded (name={name!r}, split={split!r}): "
            f"{type(problem).__name__}: {problem}. "
            "Expected a local file, a directory saved by datasets, or a "
            "data set of the hub that can be reached or is cached"
        ) from problem
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise SourceError(f"{what}: there is no split {split!r}; the splits are {', '.join(data)}")
        data = data[split]
    if isinstance(data, datasets.IterableDataset):
        return enumerate(data, start=1)
    check_columns(what, data.column_names, columns)
    return _table_rows(data, columns)


def _table_rows(data: Any, columns: Mapping[str, str]) -> Numbered:
    """Read a data set in batches, many times as fast as row by row."""
    data = data.select_columns(list(columns)) if columns else data
    batches = data.iter(batch_size=1000)
    values = ((list(batch), row) for batch in batches for row in zip(*batch.values(), strict=True))
    return enumerate((dict(zip(names, row, strict=True)) for names, row in values), start=1)
