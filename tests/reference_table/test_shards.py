"""Keys of prompts, and shards that are broken or no shards."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.reference_table.setting import content, make_row, write
from vbon_lightning.reference_table import ReferenceTable, ReferenceTableError, prompt_key


def test_key_is_sha256_of_little_endian_int32() -> None:
    assert prompt_key([1, 2**31 - 1]) == hashlib.sha256(struct.pack("<2i", 1, 2**31 - 1)).hexdigest()
    assert prompt_key(torch.tensor([5, 6])) == prompt_key((5, 6)) != prompt_key([6, 5])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([], "at least one token"), ([[1]], "flat list"), ([-1], r"got -1 to -1"), ([2**31], r"\[0, 2\*\*31\)")],
)
def test_key_refuses_what_is_no_prompt(tokens: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompt_key(tokens)


@pytest.mark.parametrize("damage", ["truncate", "empty", "garbage"])
def test_a_broken_shard_is_named_with_the_way_out(tmp_path: Path, damage: str) -> None:
    writer = write(tmp_path, make_row(1))
    writer.write([make_row(2)])
    broken = tmp_path / "part-rank0-000001.parquet"
    whole = broken.read_bytes()
    broken.write_bytes({"truncate": whole[: len(whole) // 2], "empty": b"", "garbage": b"x" * 500}[damage])
    for attempt in (lambda: ReferenceTable.open(tmp_path), writer.finished_keys, writer.compact):
        way_out = "delete that file and run" if damage == "truncate" else "move it elsewhere, and run"
        with pytest.raises(ReferenceTableError, match=rf"part-rank0-000001\.parquet is .*{way_out}"):
            attempt()
    broken.unlink()  # the advice works
    assert writer.finished_keys() == {make_row(1).key}
    writer.write([make_row(2)])
    assert content(tmp_path) == [make_row(1), make_row(2)]


def test_a_flipped_bit_in_the_rewards_is_noticed(tmp_path: Path) -> None:
    row = make_row(1, samples=64)
    write(tmp_path, row._replace(rewards=torch.linspace(0, 1, 64).tolist()))
    file = tmp_path / "part-rank0-000000.parquet"
    group = pq.read_metadata(file).row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    (chunk,) = (column for column in columns if column.path_in_schema.startswith("rewards"))
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data = bytearray(file.read_bytes())
    data[start + chunk.total_compressed_size // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ReferenceTableError, match=r"part-rank0-000000\.parquet is truncated or corrupt"):
        ReferenceTable.open(tmp_path).rewards(row.key)


def test_a_foreign_parquet_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path, make_row(1))
    pq.write_table(pa.table({"key": ["a"], "score": [1.0]}), tmp_path / "part-x-000000.parquet")
    with pytest.raises(ReferenceTableError, match=r"part-x-000000\.parquet is not a shard .*it has score beside"):
        ReferenceTable.open(tmp_path)
