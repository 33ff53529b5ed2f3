"""What a shard may hold: the reader asks of a file what the writer asks of a row, a column at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vbon_lightning._visible import shorten
from vbon_lightning.reference_table.shards import ReferenceTableError, open_shard
from vbon_lightning.reference_table.store import TablePath

MOST_LOG_PROB = 1e-2
"""Log-probabilities are at most 0, but for rounding in half precision."""
_MAY_BE_UNKNOWN = ("log_probs", "finished")
_REMEDY = "delete that file and run `vbon predict` again: it makes the prompts that are missing then"


def checked_groups(path: TablePath, longest: int | None = None) -> Iterator[pa.Table]:
    """Read a shard, one row group at a time, and refuse what no writer would have written.

    Args:
        path: the shard.
        longest: the most tokens that a response may have; None where nothing says so.

    Yields:
        The row groups, all columns.

    Raises:
        FileNotFoundError: if the shard is gone.
        ReferenceTableError: if it is no shard or broken, or naming its row that does not fit.
    """
    first = 0
    with open_shard(path) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group).combine_chunks()
            check_rows(table, path, first, longest=longest)
            yield table
            first += len(table)


def check_rows(table: pa.Table, path: TablePath, first: int = 0, *, longest: int | None = None) -> None:
    """Refuse rows that do not fit together: keys, lengths, tokens, and numbers that are none.

    Args:
        table: rows of a shard, in the table's schema.
        path: the shard, for the message.
        first: number of the first of them in the shard.
        longest: the most tokens that a response may have; None where nothing says so.

    Raises:
        ReferenceTableError: naming the file, the row, its prompt and what is wrong.
    """
    if not len(table):
        return
    rows = _Rows(table, path, first)
    for name in ("key", "prompt"):
        rows.refuse(np.flatnonzero(rows.column(name).is_null()), f"has no {name}")
    counts = rows.lengths("rewards")
    rows.refuse(np.flatnonzero(counts == 0), "has no responses")
    for name in ("responses", "response_tokens", *_MAY_BE_UNKNOWN):
        lengths = rows.lengths(name, unknown=name in _MAY_BE_UNKNOWN)
        known = rows.column(name).is_valid().to_numpy(zero_copy_only=False)
        rows.refuse(
            np.flatnonzero(known & (lengths != counts)),
            lambda row, name=name, lengths=lengths: f"has {counts[row]} rewards but {lengths[row]} {name}",
        )
        rows.refuse_values(name, pc.is_null(rows.values(name)), "is missing")
    for name in ("rewards", "log_probs"):
        values = rows.values(name)
        rows.refuse_values(name, pc.invert(pc.is_finite(values).fill_null(False)), "is not a finite number")
    above = pc.greater(rows.values("log_probs"), MOST_LOG_PROB).fill_null(False)
    rows.refuse_values("log_probs", above, "is the log of no probability")
    rows.refuse_tokens("prompt_tokens", rows.column("prompt_tokens"))
    _check_keys(rows)
    tokens = rows.values("response_tokens")
    rows.refuse_tokens("response_tokens", tokens)
    if longest is not None:
        rows.refuse_longer(tokens, longest)


class _Rows:
    """Rows of a shard, and how to name the one that is wrong."""

    def __init__(self, table: pa.Table, path: TablePath, first: int) -> None:
        self.table, self.path, self.first = table, path, first

    def column(self, name: str) -> pa.Array:
        return self.table.column(name).chunk(0)

    def values(self, name: str) -> pa.Array:
        """Return what the lists of a column hold, end to end."""
        return self.column(name).flatten()

    def lengths(self, name: str, *, unknown: bool = False) -> np.ndarray:
        """Return how long each list of a column is; 0 where it is missing, which may mean that it is unknown."""
        column = self.column(name)
        if not unknown:
            self.refuse(np.flatnonzero(column.is_null()), f"has no {name}")
        return _lengths(column)

    def refuse(self, places: np.ndarray, problem: object) -> None:
        """Refuse the first of these rows, if there is one."""
        if len(places):
            row = int(places[0])
            prompt = self.column("prompt")[row].as_py()
            said = problem(row) if callable(problem) else problem
            raise ReferenceTableError(
                f"{self.path}, row {self.first + row} (prompt {shorten(str(prompt))}) {said}: {_REMEDY}"
            )

    def refuse_values(self, name: str, wrong: pa.Array, problem: str) -> None:
        """Refuse the row of the first value, in the lists of a column, that is wrong."""
        places = np.flatnonzero(wrong)
        if len(places):
            row, response = _place_in_lists(self.lengths(name, unknown=True), int(places[0]))
            value = self.column(name)[row][response].as_py()
            self.refuse(np.array([row]), f"has {value} in {name}, of response {response}, which {problem}")

    def refuse_tokens(self, name: str, lists: pa.Array) -> None:
        """Refuse a row with a token id that is missing or negative; larger ones than an int32 no file holds."""
        tokens = lists.flatten()
        wrong = np.flatnonzero(pc.less(tokens, 0).fill_null(True))
        if len(wrong):
            row, _ = _place_in_lists(_lengths(lists), int(wrong[0]))
            if name == "response_tokens":
                row, _ = _place_in_lists(self.lengths(name), row)
            value = tokens[int(wrong[0])].as_py()
            self.refuse(np.array([row]), f"has {value} in {name}, which is no token id")

    def refuse_longer(self, responses: pa.Array, longest: int) -> None:
        """Refuse a row with a response of more tokens than there may be."""
        lengths = _lengths(responses)
        places = np.flatnonzero(lengths > longest)
        if len(places):
            row, response = _place_in_lists(self.lengths("response_tokens"), int(places[0]))
            self.refuse(
                np.array([row]),
                f"has {int(lengths[places[0]])} tokens in response {response}, and the table's fingerprint says that "
                f"{longest} (max_new_tokens) are the most",
            )


def _check_keys(rows: _Rows) -> None:
    lengths = rows.lengths("prompt_tokens")
    rows.refuse(np.flatnonzero(lengths == 0), "has no prompt tokens")
    ids = rows.values("prompt_tokens").to_numpy(zero_copy_only=False).astype("<i4").tobytes()
    start = 0
    for row, (key, length) in enumerate(zip(rows.column("key").to_pylist(), lengths.tolist(), strict=True)):
        # As `prompt_key` has it, without a list of the tokens.
        if key.partition(":")[0] != hashlib.sha256(ids[start : start + 4 * length]).hexdigest():
            rows.refuse(np.array([row]), f"has the key {key}, which is not that of its prompt tokens")
        start += 4 * length


def _lengths(lists: pa.Array) -> np.ndarray:
    found: np.ndarray = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return found


def _place_in_lists(lengths: np.ndarray, value: int) -> tuple[int, int]:
    """Return the list that a value of all of them, end to end, is in, and its place there."""
    ends = np.cumsum(lengths)
    row = int(np.searchsorted(ends, value, side="right"))
    return row, value - int(ends[row] - lengths[row])
