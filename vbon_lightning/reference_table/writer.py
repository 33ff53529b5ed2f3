"""Write a reference table shard by shard: a kill at any moment loses only the shard being written."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vbon_lightning.reference_table import fingerprint as fingerprints
from vbon_lightning.reference_table.checking import checked_groups
from vbon_lightning.reference_table.shards import (
    ReferenceTableError,
    TableRow,
    atomic_file,
    prompt_key,
    quoted,
    rows_to_table,
    shard_count,
    shard_files,
    shard_keys,
    sync_directory,
    write_tables,
)


class ReferenceTableWriter:
    """Add rows to a reference table; several processes may do so side by side under different shard names.

    Each :meth:`write` makes one Parquet file that appears whole or not at all. After a kill, open the writer
    again and leave out :meth:`finished_keys`.

    Args:
        path: directory of the table, made if absent.
        fingerprint: what makes the table's rows: reference, reward, temperature, length, EOS rule. The first
            writer stores it, each later one must agree.
        shard: name of this writer, different in each process that runs at the same time (say ``rank0``).

    Raises:
        FingerprintMismatch: if the table was made under other settings.
        ReferenceTableError: if there are shards without a fingerprint.
        ValueError: for a shard name with characters other than letters, digits, ``_``, ``.`` and ``-``.
    """

    def __init__(self, path: str | Path, fingerprint: Mapping[str, Any], *, shard: str) -> None:
        """Open the table for writing."""
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", shard):
            raise ValueError(f"a shard name has letters, digits, '_', '.' and '-' only, got {shard!r}")
        self.path, self.shard = Path(path), shard
        self.path.mkdir(parents=True, exist_ok=True)
        self.fingerprint = fingerprints.claim(self.path, fingerprint, shard)
        self._remove_leftovers()

    def finished_keys(self) -> set[str]:
        """Return the prompt keys in all complete shards, those of other processes included."""
        while True:
            try:
                return {key for file in shard_files(self.path) for key in shard_keys(file)}
            except FileNotFoundError:  # another process has just compacted its shards: list them again
                continue

    def write(self, rows: Iterable[TableRow]) -> None:
        """Write rows as one new shard; when this returns they are on the disk.

        Args:
            rows: the rows; nothing is written if there are none.

        Raises:
            ReferenceTableError: for a row that does not fit, naming its prompt; nothing is written then.
        """
        checked = [_checked(row) for row in rows]
        if checked:
            with atomic_file(self._next_file()) as stream:
                write_tables(stream, iter([rows_to_table(checked)]))

    def compact(self) -> None:
        """Merge this writer's own shards into one.

        The merged shard appears before its parts go, so a kill in between leaves duplicates, never a gap;
        of rows with one key, readers and this take the one with most responses, and of such the first.
        """
        parts = self._own_files()
        if len(parts) < 2:
            return
        with atomic_file(self._next_file()) as stream:
            write_tables(stream, _without_duplicates(parts))
        # Last to first: what is left after a kill is a prefix, and what is taken from it and the merged shard the same.
        for part in reversed(parts):
            part.unlink()
        sync_directory(self.path)

    def _own_files(self) -> list[Path]:
        return [file for file in shard_files(self.path) if shard_count(file, self.shard) is not None]

    def _next_file(self) -> Path:
        counts = [shard_count(file, self.shard) for file in self._own_files()]
        number = max((count for count in counts if count is not None), default=-1) + 1
        return self.path / f"part-{self.shard}-{number:06d}.parquet"

    def _remove_leftovers(self) -> None:
        name = re.escape(self.shard)
        temporary = rf"\.part-{name}-\d{{6,}}\.parquet\.tmp|\.{{1,2}}fingerprint-{name}\.json(\.tmp)?"
        pattern = re.compile(temporary)
        for file in self.path.iterdir():
            if pattern.fullmatch(file.name):
                file.unlink(missing_ok=True)


def _without_duplicates(files: list[Path]) -> Iterator[pa.Table]:
    most: dict[str, tuple[int, int]] = {}
    for number, (key, count) in enumerate(
        row for path in files for table in checked_groups(path) for row in _sizes(table)
    ):
        if count > most.get(key, (0, 0))[0]:
            most[key] = count, number
    number = 0
    for path in files:
        for table in checked_groups(path):
            chosen = [most[key][1] == place for place, (key, _) in enumerate(_sizes(table), number)]
            number += len(table)
            yield table.filter(pa.array(chosen, type=pa.bool_()))


def _sizes(table: pa.Table) -> Iterator[tuple[str, int]]:
    """Return the key and the number of responses of each row."""
    return zip(table.column("key").to_pylist(), pc.list_value_length(table.column("rewards")).to_pylist(), strict=True)


def _checked(row: TableRow) -> TableRow:
    """Return the row in plain types, or say what is wrong with it."""
    where = f"the row of prompt {quoted(row.prompt)}"
    try:
        key = prompt_key(row.prompt_tokens)
    except ValueError as problem:
        raise ReferenceTableError(f"{where}: {problem}") from problem
    if row.key.partition(":")[0] != key:
        raise ReferenceTableError(f"{where}: expected the key {key} of its prompt tokens, got {row.key}")
    count = len(row.responses)
    if count == 0:
        raise ReferenceTableError(f"{where} has no responses")
    for name in ("response_tokens", "rewards", "log_probs", "finished"):
        values = getattr(row, name)
        if values is None and name in ("log_probs", "finished"):  # unknown
            continue
        if len(values) != count:
            raise ReferenceTableError(f"{where} has {count} responses but {len(values)} {name}")
    for text in (row.prompt, *row.responses):
        try:
            text.encode()
        except UnicodeEncodeError as problem:
            raise ReferenceTableError(f"{where}: {quoted(text)} cannot be stored as UTF-8") from problem
    tokens = [[int(token) for token in ids] for ids in row.response_tokens]
    for response, ids in zip(row.responses, tokens, strict=True):
        if ids and not 0 <= min(ids) <= max(ids) < 2**31:
            raise ReferenceTableError(
                f"{where}: token ids must be in [0, 2**31), and those of response {quoted(response)} go from "
                f"{min(ids)} to {max(ids)}"
            )
    return TableRow(
        key=row.key,
        prompt=row.prompt,
        prompt_tokens=[int(token) for token in row.prompt_tokens],
        responses=list(row.responses),
        response_tokens=tokens,
        rewards=_finite(row.rewards, "reward", where, row.responses),
        log_probs=None if row.log_probs is None else _finite(row.log_probs, "log-prob", where, row.responses),
        finished=None if row.finished is None else [bool(value) for value in row.finished],
    )


def _finite(values: Any, what: str, where: str, responses: list[str]) -> list[float]:
    with np.errstate(over="ignore"):  # too large for float32 becomes inf, which is refused below
        numbers: list[float] = np.asarray(values, dtype=np.float64).astype(np.float32).tolist()
    for number, response in zip(numbers, responses, strict=True):
        if not math.isfinite(number):
            raise ReferenceTableError(f"{where}: the {what} of response {quoted(response)} is {number}, not finite")
    return numbers
