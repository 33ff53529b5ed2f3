"""Write a reference table shard by shard: a kill at any moment loses only the shard being written."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from vbon_lightning._visible import shorten
from vbon_lightning.reference_table import fingerprint as fingerprints
from vbon_lightning.reference_table.checking import MOST_LOG_PROB, checked_groups
from vbon_lightning.reference_table.shards import (
    ReferenceTableError,
    TableRow,
    prompt_key,
    row_sizes,
    rows_to_table,
    shard_count,
    shard_files,
    shard_sizes,
    shard_writer,
    write_tables,
)
from vbon_lightning.reference_table.store import TablePath, make_folder, sync_folder, table_file, table_path, telling
from vbon_lightning.reference_table.writer_names import new_writer_name, still_runs

_AT_ONCE = 16
"""Shards whose keys are read at the same time."""
_UNFINISHED = re.compile(r"\.part-(?P<shard>.+)-\d{6,}\.parquet\.tmp|\.{1,2}fingerprint-(?P<claim>.+?)\.json(\.tmp)?")


class ReferenceTableWriter:
    """Add rows to a reference table; any number of processes may do so side by side, each under a name of its own.

    Each :meth:`write` makes one Parquet file that appears whole or not at all. After a kill, open the writer
    again and leave out :meth:`finished_keys`.

    Args:
        path: directory of the table, made if absent, or the URL of a folder of a store.
        fingerprint: what makes the table's rows: reference, reward, temperature, length, EOS rule. The first
            writer stores it, each later one must agree.
        shard: name of this writer, which no other process may use; by default one that nobody has.

    Raises:
        FingerprintMismatch: if the table was made under other settings.
        ReferenceTableError: if there are shards without a fingerprint.
        TableStoreError: if the place cannot be written.
        ValueError: for a shard name with characters other than letters, digits, ``_``, ``.`` and ``-``.
    """

    def __init__(self, path: str | TablePath, fingerprint: Mapping[str, Any], *, shard: str | None = None) -> None:
        """Open the table for writing."""
        if shard is None:
            shard = new_writer_name()
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", shard):
            raise ValueError(f"a shard name has letters, digits, '_', '.' and '-' only, got {shard!r}")
        self.path, self.shard = table_path(path), shard
        self._next: int | None = None
        self._rows: dict[str, list[tuple[str, int]]] = {}
        self._finished: set[str] = set()
        self._finished_with = 1
        with telling(self.path, writing=True):
            make_folder(self.path)
            self.fingerprint = fingerprints.claim(self.path, fingerprint, shard)
            self.remove_leftovers()

    def finished_keys(self, samples: int = 1) -> set[str]:
        """Return the prompt keys in all complete shards, those of other processes included.

        Args:
            samples: how many responses a prompt is to have.
        """
        while True:
            try:
                files = shard_files(self.path)
                new = [file for file in files if file.name not in self._rows]  # a shard never changes
                with ThreadPoolExecutor(_AT_ONCE) as threads:  # a store takes its time for each
                    found = list(threads.map(shard_sizes, new))
                self._rows |= zip((file.name for file in new), found, strict=True)
                merged = len(self._rows) > len(files)  # into others, or deleted
                if merged or samples != self._finished_with:
                    self._rows = {file.name: self._rows[file.name] for file in files}
                    self._finished, self._finished_with, new = set(), samples, files
                rows = (row for file in new for row in self._rows[file.name])
                self._finished.update(key for key, count in rows if count >= samples)
                return set(self._finished)
            except FileNotFoundError:  # another process has just compacted its shards: list them again
                continue

    def write(self, rows: Iterable[TableRow]) -> None:
        """Write rows as one new shard; when this returns they are on the disk.

        Args:
            rows: the rows; nothing is written if there are none.

        Raises:
            ReferenceTableError: for a row that does not fit, naming its prompt; nothing is written then.
        """
        longest = fingerprints.longest_response(self.fingerprint)
        checked = [_checked(row, longest) for row in rows]
        if checked:
            with telling(self.path, writing=True), table_file(self._next_file()) as stream:
                write_tables(stream, iter([rows_to_table(checked)]))

    def compact(self, abandoned: Collection[str] = ()) -> None:
        """Merge this writer's own shards, and those that others left behind, into one.

        The merged shard appears before its parts go, so a kill in between leaves duplicates, never a gap;
        of rows with one key, readers and this take the one with most responses, and of such the first.

        Args:
            abandoned: names of writers that died, whose shards are merged, too.
        """
        while True:
            parts = [file for file in shard_files(self.path) if shard_writer(file) in {self.shard, *abandoned}]
            if len(parts) < 2:
                return
            try:
                with telling(self.path, writing=True), table_file(self._next_file()) as stream:
                    write_tables(stream, _without_duplicates(parts))
                break
            except FileNotFoundError:  # another process has just merged some of them: list them again
                continue
        # Last to first: what is left after a kill is a prefix, and what is taken from it and the merged shard the same.
        for part in reversed(parts):
            part.unlink(missing_ok=True)
        sync_folder(self.path)

    def in_pieces(self) -> set[str]:
        """Return the other writers with several shards, or with rows that longer ones have replaced, living or not."""
        files, whole = shard_files(self.path), self.finished_keys(self._finished_with)
        shards = Counter(shard_writer(file) for file in files)
        for file in files:
            if any(count < self._finished_with and key in whole for key, count in self._rows.get(file.name, [])):
                shards[shard_writer(file)] += 1
        return {name for name, count in shards.items() if count > 1} - {self.shard}

    def remove_leftovers(self, writers: Collection[str] = ()) -> None:
        """Remove unfinished files of this writer before it began, of processes that are gone, and of others that died.

        Args:
            writers: names of others that died.
        """
        for file in self.path.iterdir():
            match = _UNFINISHED.fullmatch(file.name)
            name = match and (match["shard"] or match["claim"])
            if name and (name in (self.shard, *writers) or still_runs(name) is False):
                file.unlink(missing_ok=True)

    def _next_file(self) -> TablePath:
        """Return a name that this writer never used, though its shard be merged by another: readers know it by name."""
        if self._next is None:
            counts = [shard_count(file, self.shard) for file in shard_files(self.path)]
            self._next = max((count + 1 for count in counts if count is not None), default=0)
        number, self._next = self._next, self._next + 1
        return self.path / f"part-{self.shard}-{number:06d}.parquet"


def _without_duplicates(files: Sequence[TablePath]) -> Iterator[pa.Table]:
    most: dict[str, tuple[int, int]] = {}
    for number, (key, count) in enumerate(
        row for path in files for table in checked_groups(path) for row in row_sizes(table)
    ):
        if count > most.get(key, (0, 0))[0]:
            most[key] = count, number
    number = 0
    for path in files:
        for table in checked_groups(path):
            chosen = [most[key][1] == place for place, (key, _) in enumerate(row_sizes(table), number)]
            number += len(table)
            yield table.filter(pa.array(chosen, type=pa.bool_()))


def _checked(row: TableRow, longest: int | None) -> TableRow:
    """Return the row in plain types, or say what is wrong with it."""
    where = f"the row of prompt {shorten(row.prompt)}"
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
            raise ReferenceTableError(f"{where}: {shorten(text)} cannot be stored as UTF-8") from problem
    tokens = [[int(token) for token in ids] for ids in row.response_tokens]
    for response, ids in zip(row.responses, tokens, strict=True):
        if ids and not 0 <= min(ids) <= max(ids) < 2**31:
            raise ReferenceTableError(
                f"{where}: token ids must be in [0, 2**31), and those of response {shorten(response)} go from "
                f"{min(ids)} to {max(ids)}"
            )
        if longest is not None and len(ids) > longest:
            raise ReferenceTableError(
                f"{where}: response {shorten(response)} has {len(ids)} tokens, and the table's fingerprint says that "
                f"{longest} (max_new_tokens) are the most"
            )
    return TableRow(
        key=row.key,
        prompt=row.prompt,
        prompt_tokens=[int(token) for token in row.prompt_tokens],
        responses=list(row.responses),
        response_tokens=tokens,
        rewards=_finite(row.rewards, "reward", where, row.responses),
        log_probs=None if row.log_probs is None else _log_probs(row.log_probs, where, row.responses),
        finished=None if row.finished is None else [bool(value) for value in row.finished],
    )


def _finite(values: Any, what: str, where: str, responses: list[str]) -> list[float]:
    with np.errstate(over="ignore"):  # too large for float32 becomes inf, which is refused below
        numbers: list[float] = np.asarray(values, dtype=np.float64).astype(np.float32).tolist()
    for number, response in zip(numbers, responses, strict=True):
        if not math.isfinite(number):
            raise ReferenceTableError(f"{where}: the {what} of response {shorten(response)} is {number}, not finite")
    return numbers


def _log_probs(values: Any, where: str, responses: list[str]) -> list[float]:
    numbers = _finite(values, "log-prob", where, responses)
    for number, response in zip(numbers, responses, strict=True):
        if number > MOST_LOG_PROB:
            raise ReferenceTableError(
                f"{where}: the log-prob of response {shorten(response)} is {number}, the log of no probability"
            )
    return numbers
