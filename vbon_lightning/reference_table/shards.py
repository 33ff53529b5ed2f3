"""The table's rows and files: keys of prompts, the Parquet schema, shards that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vbon_lightning.reference_table.store import TablePath, TableStoreError, UrlPath, telling

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("prompt", pa.string()),
        ("prompt_tokens", pa.list_(pa.int32())),
        ("responses", pa.list_(pa.string())),
        ("response_tokens", pa.list_(pa.list_(pa.int32()))),
        ("rewards", pa.list_(pa.float32())),
        ("log_probs", pa.list_(pa.float32())),
        ("finished", pa.list_(pa.bool_())),
    ]
)
ROW_GROUP = 64  # prompts that are read together when one row is asked for
_SHARD_FILE = re.compile(r"part-(?P<shard>.+)-(?P<count>\d{6,})\.parquet")


class ReferenceTableError(ValueError):
    """A reference table that is missing, broken or does not hold what was asked for."""


class TableRow(NamedTuple):
    """One prompt of the table with its M reference responses."""

    key: str
    """:func:`prompt_key` of ``prompt_tokens`` (and of what else the reward reads of the prompt's row)."""
    prompt: str
    """The prompt as text."""
    prompt_tokens: list[int]
    """Token ids of the prompt, without padding."""
    responses: list[str]
    """M responses as text."""
    response_tokens: list[list[int]]
    """M lists of token ids, the EOS included where one was sampled."""
    rewards: list[float]
    """M rewards, stored as float32."""
    log_probs: list[float] | None
    """M sequence log-probabilities (nats) under the reference at the table's temperature; None if unknown."""
    finished: list[bool] | None
    """M flags: True where an EOS ended the response; None if unknown."""


def joined_rows(held: TableRow, further: TableRow, first: int) -> TableRow:
    """Return a row with further responses behind its own; what is unknown of either is unknown of both.

    Args:
        held: the row.
        further: the same prompt's, with the responses to add.
        first: how many of the row's responses come before them; those that it has already are left out.
    """
    columns: dict[str, Any] = {}
    known = max(0, len(held.rewards) - first)
    for name in ("responses", "response_tokens", "rewards", "log_probs", "finished"):
        parts = getattr(held, name), getattr(further, name)
        columns[name] = None if None in parts else [*parts[0], *parts[1][known:]]
    return held._replace(**columns)


def prompt_key(tokens: Sequence[int], columns: Mapping[str, Any] | None = None) -> str:
    """Hash a prompt's token ids: SHA-256 over little-endian int32, in hexadecimal.

    Token ids, not text: a round trip through a tokenizer may change the text.

    Args:
        tokens: token ids of the prompt without padding.
        columns: what the reward reads of the prompt's row beside it, such as the right answer: two prompts that differ
            in it have rewards of their own.

    Returns:
        64 hexadecimal digits; with columns, a colon and 16 digits of their hash behind them.

    Raises:
        ValueError: if there are no tokens, or one does not fit.
    """
    ids = np.asarray(tokens, dtype=np.int64)
    if ids.ndim != 1 or ids.size == 0:
        raise ValueError(f"a prompt needs at least one token in a flat list, got shape {tuple(ids.shape)}")
    if ids.min() < 0 or ids.max() >= 2**31:
        raise ValueError(f"token ids must be in [0, 2**31), got {int(ids.min())} to {int(ids.max())}")
    key = hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()
    if not columns:
        return key
    text = json.dumps(columns, sort_keys=True, default=str)
    return f"{key}:{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def text_digest(text: str) -> int:
    """Return 64 bits that stand for a text where many are compared."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def shard_count(path: TablePath, shard: str) -> int | None:
    """Return the running number of a shard file of the writer named ``shard``, None for any other file."""
    match = _SHARD_FILE.fullmatch(path.name)
    return int(match["count"]) if match and match["shard"] == shard else None


def shard_writer(path: TablePath) -> str:
    """Return the name of the writer of a shard file, and nothing for any other file."""
    match = _SHARD_FILE.fullmatch(path.name)
    return match["shard"] if match else ""


def shard_files(directory: TablePath) -> list[TablePath]:
    """List the complete shards by writer, then by number: the order in which duplicates are resolved."""
    found: list[tuple[str, int, TablePath]] = []
    for path in directory.iterdir():
        match = _SHARD_FILE.fullmatch(path.name)
        if match:
            found.append((match["shard"], int(match["count"]), path))
    return [path for _, _, path in sorted(found, key=lambda shard: shard[:2])]


@contextmanager
def open_shard(path: TablePath) -> Iterator[pq.ParquetFile]:
    """Open a shard for reading and turn whatever is wrong with its bytes into one error.

    Raises:
        FileNotFoundError: if it is gone (another process may have compacted it).
        ReferenceTableError: if it is truncated or corrupt, or not a shard of such a table.
        TableStoreError: if the store cannot be reached.
    """
    try:
        with ExitStack() as opened:
            source: Any = path
            if isinstance(path, UrlPath):
                opened.enter_context(telling(path, writing=False))
                source = opened.enter_context(path.open())
            file = opened.enter_context(pq.ParquetFile(source, page_checksum_verification=True))
            if not file.schema_arrow.equals(SCHEMA):
                raise ReferenceTableError(
                    f"{path} is not a shard of a reference table: {_misfit(file.schema_arrow)}; "
                    "move that file elsewhere"
                )
            yield file
    except (FileNotFoundError, PermissionError, TableStoreError):
        raise
    except (pa.ArrowException, OSError) as problem:
        if (what := _other_than_parquet(path)) is not None:
            raise ReferenceTableError(
                f"{path} is called as a shard of a reference table is, and is {what}: move it elsewhere, and run `vbon "
                "predict` again if prompts are missing then"
            ) from problem
        raise ReferenceTableError(
            f"{path} is truncated or corrupt ({problem}); delete that file and run `vbon predict` again: "
            "it resumes and makes only the prompts that are missing"
        ) from problem


def _other_than_parquet(path: TablePath) -> str | None:
    """Say what is called like a shard and is none; None of a file that begins as they do."""
    if isinstance(path, UrlPath):
        return None
    if path.is_dir():
        return "a directory"
    with path.open("rb") as stream:
        begins = stream.read(4)
    return None if begins == b"PAR1" else "no Parquet file" if begins else "empty"


def _misfit(schema: pa.Schema) -> str:
    """Say in which columns a file's schema differs from that of a shard."""
    missing = [name for name in SCHEMA.names if name not in schema.names]
    extra = [name for name in schema.names if name not in SCHEMA.names]
    problems = [
        f"the column {name} holds {schema.field(name).type} where {SCHEMA.field(name).type} belongs"
        for name in SCHEMA.names
        if schema.names.count(name) == 1 and schema.field(name).type != SCHEMA.field(name).type
    ]
    if missing:
        problems.insert(0, f"it lacks {', '.join(missing)}")
    if extra:
        problems.append(f"it has {', '.join(extra)} beside")
    return ", ".join(problems) or f"its columns are {', '.join(schema.names)} and should be {', '.join(SCHEMA.names)}"


def row_sizes(table: pa.Table) -> list[tuple[str, int]]:
    """Return the key and the number of responses of each row."""
    lengths = pc.list_value_length(table.column("rewards")).to_pylist()
    return list(zip(table.column("key").to_pylist(), lengths, strict=True))


def shard_sizes(path: TablePath) -> list[tuple[str, int]]:
    """Read the prompt keys of one shard and the numbers of their responses, in its order."""
    with open_shard(path) as file:
        return row_sizes(file.read(columns=["key", "rewards"]))


def write_tables(stream: BinaryIO, tables: Iterator[pa.Table]) -> None:
    """Write tables as one Parquet file with row groups of :data:`ROW_GROUP` prompts and page checksums."""
    with pq.ParquetWriter(stream, SCHEMA, compression="zstd", write_page_checksum=True) as writer:
        waiting: pa.Table = SCHEMA.empty_table()
        for table in tables:
            waiting = pa.concat_tables([waiting, table])
            whole = len(waiting) - len(waiting) % ROW_GROUP
            if whole:
                writer.write_table(waiting.slice(0, whole), row_group_size=ROW_GROUP)
                waiting = waiting.slice(whole)
        if len(waiting):
            writer.write_table(waiting, row_group_size=ROW_GROUP)


def rows_to_table(rows: Sequence[TableRow]) -> pa.Table:
    """Turn rows into an Arrow table of the table's schema."""
    columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in SCHEMA.names}
    return pa.table(columns, schema=SCHEMA)
