"""Shards that no writer of this package would have written are refused, by file, row and prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.reference_table.setting import FINGERPRINT, make_row, write
from vbon_lightning.reference_table import ReferenceTable, ReferenceTableError, ReferenceTableWriter, export_jsonl
from vbon_lightning.reference_table.checking import check_rows, checked_groups
from vbon_lightning.reference_table.shards import SCHEMA, rows_to_table

NAN, INF = float("nan"), float("inf")


def put_shard(path: Path, **changes: Any) -> None:
    """Write a table and, beside it, a shard by other hands: 70 rows, the third of the second row group changed."""
    write(path, make_row(200))
    rows = [make_row(i) for i in range(70)]
    columns = {name: [getattr(row, name) for row in rows] for name in SCHEMA.names}
    for name, value in changes.items():
        columns[name][66] = value
    pq.write_table(pa.table(columns, schema=SCHEMA), path / "part-x-000000.parquet", row_group_size=64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": [0.0, NAN, 1.0]}, "has nan in rewards, of response 1, which is not a finite number"),
        ({"rewards": [0.0, 1.0, -INF]}, "has -inf in rewards, of response 2, which is not a finite number"),
        ({"rewards": [None, 1.0, 2.0]}, "has None in rewards, of response 0, which is not a finite number"),
        ({"rewards": [0.0, 1.0]}, "has 2 rewards but 3 responses"),
        ({"rewards": []}, "has no responses"),
        ({"rewards": None}, "has no rewards"),
        ({"log_probs": [0.0, INF, 1.0]}, "has inf in log_probs, of response 1, which is not a finite number"),
        ({"log_probs": [0.0, None, 1.0]}, "has None in log_probs, of response 1, which is missing"),
        ({"log_probs": [0.0, -1.0, 5.0]}, "has 5.0 in log_probs, of response 2, which is the log of no probability"),
        ({"log_probs": []}, "has 3 rewards but 0 log_probs"),
        ({"finished": [True] * 4}, "has 3 rewards but 4 finished"),
        ({"finished": [True, None, True]}, "has None in finished, of response 1, which is missing"),
        ({"responses": ["a"]}, "has 3 rewards but 1 responses"),
        ({"responses": None}, "has no responses"),
        ({"responses": ["a", None, "b"]}, "has None in responses, of response 1, which is missing"),
        ({"response_tokens": [[1]]}, "has 3 rewards but 1 response_tokens"),
        ({"response_tokens": None}, "has no response_tokens"),
        ({"response_tokens": [[1], None, [2]]}, "has None in response_tokens, of response 1, which is missing"),
        ({"response_tokens": [[1], [], [2, -3]]}, "has -3 in response_tokens, which is no token id"),
        ({"response_tokens": [[1], [5, None], [2]]}, "has None in response_tokens, which is no token id"),
        ({"prompt_tokens": []}, "has no prompt tokens"),
        ({"prompt_tokens": None}, "has no prompt_tokens"),
        ({"prompt_tokens": [1, None]}, "has None in prompt_tokens, which is no token id"),
        ({"prompt_tokens": [1, -166]}, "has -166 in prompt_tokens, which is no token id"),
        ({"prompt_tokens": [1, 167]}, "has the key [0-9a-f]{64}, which is not that of its prompt tokens"),
        ({"key": "0" * 64}, "has the key 0{64}, which is not that of its prompt tokens"),
        ({"key": ""}, "has the key , which is not that of its prompt tokens"),
        ({"key": None}, "has no key"),
    ],
)
def test_what_the_writer_refuses_the_reader_refuses(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    put_shard(tmp_path, **change)
    where = rf"^{tmp_path}/part-x-000000\.parquet, row 66 \(prompt 'prompt 66'\) {message}: delete that file and run"
    with pytest.raises(ReferenceTableError, match=where) as caught:
        ReferenceTable.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_response_is_no_longer_than_the_fingerprint_says(tmp_path: Path) -> None:
    longest = FINGERPRINT["max_new_tokens"]
    assert isinstance(longest, int)
    put_shard(tmp_path, response_tokens=[[1] * longest, [], [2]])
    ReferenceTable.open(tmp_path)
    put_shard(tmp_path, response_tokens=[[1], [2] * (longest + 1), [2]])
    with pytest.raises(ReferenceTableError, match=f"row 66.* has {longest + 1} tokens in response 1, .*{longest}"):
        ReferenceTable.open(tmp_path)
    writer = ReferenceTableWriter(tmp_path / "new", FINGERPRINT)
    with pytest.raises(ReferenceTableError, match=f"prompt 1.*{longest + 1} tokens"):
        writer.write([make_row(1)._replace(response_tokens=[[1], [2] * (longest + 1), [2]])])


def test_a_row_without_a_prompt_is_named_by_its_number(tmp_path: Path) -> None:
    put_shard(tmp_path, prompt=None)
    with pytest.raises(ReferenceTableError, match=r"row 66 \(prompt 'None'\) has no prompt"):
        ReferenceTable.open(tmp_path)


def test_rows_that_fit_pass(tmp_path: Path) -> None:
    """Unknown columns, empty responses, keys of columns, and shards without rows."""
    put_shard(
        tmp_path, log_probs=None, finished=None, response_tokens=[[], [], []], key=f"{make_row(66).key}:{'0' * 16}"
    )
    pq.write_table(SCHEMA.empty_table(), tmp_path / "part-y-000000.parquet")
    table = ReferenceTable.open(tmp_path)
    assert len(table) == 71
    export_jsonl(table, tmp_path / "out.jsonl")
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 71
    assert [len(group) for group in checked_groups(tmp_path / "part-x-000000.parquet")] == [64, 6]
    check_rows(SCHEMA.empty_table(), tmp_path)


def test_a_part_of_a_table_is_counted_from_its_own_first_value(tmp_path: Path) -> None:
    """Arrow slices share their parents' values."""
    rows = [make_row(0)._replace(rewards=[0.0, 1.0, 2.0]), make_row(1), make_row(2)._replace(rewards=[0.0, 1.0, NAN])]
    table = rows_to_table(rows)
    check_rows(table.slice(0, 2), tmp_path)
    with pytest.raises(ReferenceTableError, match=r"row 12 \(prompt 'prompt 2'\) has nan in rewards, of response 2"):
        check_rows(table.slice(1), tmp_path, 11)


def test_compaction_refuses_them_too(tmp_path: Path) -> None:
    put_shard(tmp_path, rewards=[0.0, NAN, 1.0])
    pq.write_table(rows_to_table([make_row(300)]), tmp_path / "part-x-000001.parquet")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ReferenceTableError, match="row 66 .* has nan in rewards"):
        ReferenceTableWriter(tmp_path, FINGERPRINT, shard="x").compact()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.drop_columns(["log_probs"]), "it lacks log_probs"),
        (lambda table: table.append_column("score", pa.array([1.0])), "it has score beside"),
        (
            lambda table: table.set_column(5, "rewards", pa.array([[0.0]], pa.list_(pa.float64()))),
            "the column rewards holds list<.*double> where list<.*float> belongs",
        ),
        (lambda table: table.set_column(0, "key", pa.array([7])), "the column key holds int64 where string belongs"),
        (lambda table: table.select(SCHEMA.names[::-1]), "its columns are finished, .*, key and should be key, "),
    ],
)
def test_a_shard_of_another_schema_says_in_what_it_differs(tmp_path: Path, change: Any, message: str) -> None:
    write(tmp_path, make_row(1))
    pq.write_table(change(rows_to_table([make_row(2)])), tmp_path / "part-x-000000.parquet")
    where = rf"part-x-000000\.parquet is not a shard of a reference table: {message}.*; move that file elsewhere"
    with pytest.raises(ReferenceTableError, match=where):
        ReferenceTable.open(tmp_path)


def test_files_that_are_not_parquet_are_refused(tmp_path: Path) -> None:
    write(tmp_path, make_row(1))
    path = tmp_path / "part-x-000000.parquet"
    what = {b"": "and is empty: move it", b"PAR1": "is truncated or corrupt", b"text": "is no Parquet file: move it"}
    for content, problem in what.items():
        path.write_bytes(content)
        with pytest.raises(ReferenceTableError, match=rf"part-x-000000\.parquet .*{problem}"):
            ReferenceTable.open(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ReferenceTableError, match=r"part-x-000000\.parquet .*is a directory: move it"):
        ReferenceTable.open(tmp_path)
