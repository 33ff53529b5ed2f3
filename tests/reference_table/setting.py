"""Rows made up by number, and tables and JSON Lines of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from vbon_lightning.reference_table import ReferenceTable, ReferenceTableWriter, TableRow, import_jsonl, prompt_key

FINGERPRINT = {"reference": "tiny", "reward": "vader", "temperature": 0.7, "max_new_tokens": 24}


def make_row(number: int, samples: int = 3, value: float = 0.0) -> TableRow:
    tokens = [1, 100 + number]
    return TableRow(
        key=prompt_key(tokens),
        prompt=f"prompt {number}",
        prompt_tokens=tokens,
        responses=[f" response {number}.{j} é\n" for j in range(samples)],
        response_tokens=[[number, j, 2][: j + 1] for j in range(samples)],
        rewards=[value + number + 0.25 * j for j in range(samples)],
        log_probs=[-1.5 * (j + 1) for j in range(samples)],
        finished=[j % 2 == 0 for j in range(samples)],
    )


def write(path: Path, *rows: TableRow, shard: str = "rank0") -> ReferenceTableWriter:
    writer = ReferenceTableWriter(path, FINGERPRINT, shard=shard)
    writer.write(rows)
    return writer


def content(path: Path) -> list[TableRow]:
    return list(ReferenceTable.open(path).rows())


def shards(path: Path) -> list[str]:
    return sorted(file.name for file in path.glob("*.parquet"))


def encode(text: str) -> list[int]:
    return [1, *text.encode()]


def lines(path: Path, *records: object) -> Path:
    text = "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def load(file: Path, table: Path) -> int:
    return import_jsonl(file, table, encode=encode, encode_response=lambda t: list(t.encode()), fingerprint=FINGERPRINT)
