"""The reference table: rows go through unchanged, kills lose nothing, misfits are refused by name."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vbon_lightning.reference_table import (
    FingerprintMismatch,
    PromptNotInTable,
    ReferenceTable,
    ReferenceTableError,
    ReferenceTableWriter,
    TableRow,
    export_jsonl,
    import_jsonl,
    prompt_key,
    table_summary,
)
from vbon_lightning.reference_table import writer as writer_module

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


# Keys


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


# Rows go through unchanged


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(codec="utf-8"), max_size=8)


@st.composite
def rows(draw: st.DrawFn) -> TableRow:
    m = draw(st.integers(1, 4))
    tokens = draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4))

    def lists(element: st.SearchStrategy) -> list:
        return draw(st.lists(element, min_size=m, max_size=m))

    return TableRow(
        prompt_key(tokens),
        draw(texts),
        tokens,
        lists(texts),
        lists(st.lists(st.integers(0, 2**31 - 1), max_size=3)),
        lists(finite),
        lists(finite) if draw(st.booleans()) else None,
        lists(st.booleans()) if draw(st.booleans()) else None,
    )


@settings(max_examples=40, deadline=None)
@given(st.lists(rows(), min_size=1, max_size=5, unique_by=lambda row: row.key))
def test_any_row_reads_back_as_written(tmp_path_factory: pytest.TempPathFactory, written: list[TableRow]) -> None:
    path = tmp_path_factory.mktemp("table")
    write(path, *written)
    assert content(path) == written


def test_columns_are_tensors_in_the_order_of_the_responses(tmp_path: Path) -> None:
    expected = [make_row(i, samples=3 + i % 2) for i in range(150)]  # over two row groups
    write(tmp_path, *expected)
    table = ReferenceTable.open(tmp_path, fingerprint=FINGERPRINT)
    assert len(table) == 150
    assert table.samples == 3
    assert table.fingerprint == FINGERPRINT
    assert table.keys() == [row.key for row in expected]
    for row in expected:
        assert torch.equal(table.rewards(row.key), torch.tensor(row.rewards))
        assert torch.equal(table.log_probs(row.key), torch.tensor(row.log_probs))
        assert torch.equal(table.finished(row.key), torch.tensor(row.finished))
    assert table.row(expected[149].key) == expected[149]
    assert table.rewards(expected[0].key).dtype == torch.float32
    assert expected[3].key in table
    assert "0" not in table


def test_matrices_follow_the_keys_and_are_cut_to_the_common_m(tmp_path: Path) -> None:
    a, b = make_row(1, samples=4), make_row(2, samples=2)
    write(tmp_path, a, b)
    table = ReferenceTable.open(tmp_path)
    keys = [b.key, a.key, b.key]
    assert torch.equal(table.rewards_matrix(keys), torch.tensor([r.rewards[:2] for r in (b, a, b)]))
    assert torch.equal(table.log_probs_matrix(keys), torch.tensor([r.log_probs[:2] for r in (b, a, b)]))
    assert torch.equal(table.finished_matrix(keys), torch.tensor([r.finished[:2] for r in (b, a, b)]))
    assert table.rewards_matrix([]).shape == (0, 2)
    assert table.finished_matrix([]).dtype == torch.bool
    with pytest.raises(ValueError, match="got 1 texts and 2 keys"):
        table.rewards_matrix([a.key, b.key], ["a"])


def test_response_tokens_are_kept_as_they_are(tmp_path: Path) -> None:
    expected = [make_row(i, samples=3 + i % 2) for i in range(150)]  # over two row groups
    expected[5] = expected[5]._replace(response_tokens=[[], [7, 7], [2], []])
    write(tmp_path, *expected)
    table = ReferenceTable.open(tmp_path)
    for row in expected:
        tokens, lengths = table.response_tokens(row.key)
        assert [part.tolist() for part in tokens.split(lengths.tolist())] == row.response_tokens
    assert table.longest_response == 3
    chosen = [expected[5], expected[4], expected[149]]
    tokens, mask = table.response_matrix([row.key for row in chosen], pad_id=9)
    assert tokens.shape == mask.shape == (3, 3, 3)
    assert tokens.dtype == torch.long
    for row, ids, keep in zip(chosen, tokens, mask, strict=True):
        assert [part[kept].tolist() for part, kept in zip(ids, keep, strict=True)] == row.response_tokens[:3]
        assert (ids[~keep] == 9).all()
        assert torch.equal(keep, torch.arange(3) < keep.sum(-1, keepdim=True))


def test_response_tokens_stay_in_memory(tmp_path: Path) -> None:
    a, b = make_row(1), make_row(2)
    write(tmp_path, a, b)
    table = ReferenceTable.open(tmp_path)
    table.response_matrix([a.key])
    for file in tmp_path.glob("*.parquet"):
        file.unlink()
    assert table.response_tokens(b.key).lengths.tolist() == [1, 2, 3]


def test_responses_without_tokens_are_named(tmp_path: Path) -> None:
    write(tmp_path, make_row(1)._replace(response_tokens=[[], [], []], finished=None))
    table = ReferenceTable.open(tmp_path)
    with pytest.raises(ReferenceTableError, match="lacks the token ids of its 3 responses to prompt 'prompt 1'"):
        table.response_matrix([make_row(1).key], ["prompt 1"])
    assert not table.knows_finished


def test_keys_restrict_the_table_and_its_m(tmp_path: Path) -> None:
    a, b, c = make_row(1, samples=4), make_row(2, samples=2), make_row(3, samples=5)
    write(tmp_path, a, b)
    write(tmp_path, c, shard="rank1")
    table = ReferenceTable.open(tmp_path, keys=[c.key, a.key, "0" * 64])
    assert table.keys() == [a.key, c.key]
    assert table.samples == 4
    with pytest.raises(PromptNotInTable):
        table.rewards(b.key)
    with pytest.raises(ReferenceTableError, match="none of the prompts asked for"):
        _ = ReferenceTable.open(tmp_path, keys=["0" * 64]).samples


def test_a_table_can_travel_to_a_worker_process(tmp_path: Path) -> None:
    row = make_row(1)
    write(tmp_path, row)
    table = pickle.loads(pickle.dumps(ReferenceTable.open(tmp_path)))
    assert torch.equal(table.rewards(row.key), torch.tensor(row.rewards))


def test_a_missing_prompt_is_named(tmp_path: Path) -> None:
    write(tmp_path, make_row(1))
    table = ReferenceTable.open(tmp_path)
    absent = prompt_key([9])
    with pytest.raises(PromptNotInTable) as caught:
        table.rewards_matrix([make_row(1).key, absent], ["prompt 1", "Lily saw"])
    message = str(caught.value)
    assert message.startswith(f"prompt 'Lily saw' (key {absent}) is not among the 1 prompts")
    assert "vbon predict" in message
    assert isinstance(caught.value, KeyError)
    for read in (table.row, table.finished, table.log_probs):
        with pytest.raises(PromptNotInTable, match=f"the prompt with key {absent}"):
            read(absent)


# What the writer refuses


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rewards": [0.0, float("nan"), 1.0]},
            r"'prompt 7': the reward of response ' response 7.1 é\\n' is nan",
        ),
        ({"rewards": [0.0, 1.0, 1e39]}, r"reward of response ' response 7.2 é\\n' is inf, not finite"),
        ({"log_probs": [0.0, float("-inf"), 0.0]}, "log-prob of response ' response 7.1"),
        ({"rewards": [0.0, 1.0]}, "'prompt 7' has 3 responses but 2 rewards"),
        ({"finished": [True]}, "3 responses but 1 finished"),
        ({"log_probs": []}, "3 responses but 0 log_probs"),
        ({"response_tokens": [[1]] * 4}, "3 responses but 4 response_tokens"),
        ({"responses": [], "response_tokens": [], "rewards": []}, "'prompt 7' has no responses"),
        ({"prompt_tokens": []}, "'prompt 7': a prompt needs at least one token"),
        ({"key": "0" * 64}, f"expected the key {prompt_key([1, 107])} of its prompt tokens, got 0000"),
        ({"responses": ["a", "\ud800", "b"]}, "cannot be stored as UTF-8"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_by_name(tmp_path: Path, change: dict, message: str) -> None:
    writer = ReferenceTableWriter(tmp_path, FINGERPRINT, shard="rank0")
    with pytest.raises(ReferenceTableError, match=message):
        writer.write([make_row(1), make_row(7)._replace(**change)])
    assert shards(tmp_path) == []


def test_a_shard_name_cannot_leave_the_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got '\.\./rank0'"):
        ReferenceTableWriter(tmp_path, FINGERPRINT, shard="../rank0")


# Provenance


def test_a_mismatch_lists_each_field_that_differs(tmp_path: Path) -> None:
    write(tmp_path, make_row(1))
    other = {"reference": "tiny", "reward": "other", "temperature": 1.0, "eos": {"ids": [2], "name": "</s>"}}
    for attempt in (
        lambda: ReferenceTable.open(tmp_path, fingerprint=other),
        lambda: ReferenceTableWriter(tmp_path, other, shard="rank1"),
    ):
        with pytest.raises(FingerprintMismatch) as caught:
            attempt()
        assert caught.value.differences == {
            "eos.ids": ("(absent)", [2]),
            "eos.name": ("(absent)", "</s>"),
            "max_new_tokens": (24, "(absent)"),
            "reward": ("vader", "other"),
            "temperature": (0.7, 1.0),
        }
        assert "reward: the table has 'vader', this run has 'other'" in str(caught.value)
        assert "reference" not in caught.value.differences
        assert pickle.loads(pickle.dumps(caught.value)).differences == caught.value.differences


def test_fingerprints_compare_as_json_stores_them(tmp_path: Path) -> None:
    ReferenceTableWriter(tmp_path, {"ids": (2, 1), "temperature": 1}, shard="a")
    ReferenceTableWriter(tmp_path, {"temperature": 1.0, "ids": [2, 1]}, shard="b")
    assert json.loads((tmp_path / "fingerprint.json").read_text()) == {"ids": [2, 1], "temperature": 1}
    with pytest.raises(TypeError, match="plain values only"):
        ReferenceTableWriter(tmp_path, {"path": Path("x")}, shard="a")


def test_the_loser_of_a_race_for_the_first_fingerprint_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def rival_first(source: Path, target: Path) -> None:
        Path(target).write_text(json.dumps({"reward": "rival"}))
        link(source, target)

    monkeypatch.setattr(os, "link", rival_first)
    with pytest.raises(FingerprintMismatch, match="the table has 'rival', this run has 'vader'"):
        ReferenceTableWriter(tmp_path, FINGERPRINT, shard="rank0")
    assert [file.name for file in tmp_path.iterdir()] == ["fingerprint.json"]


def test_a_file_system_without_hard_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no hard links")

    monkeypatch.setattr(os, "link", refuse)
    write(tmp_path, make_row(1))
    assert ReferenceTable.open(tmp_path, fingerprint=FINGERPRINT).keys() == [make_row(1).key]


# Broken and missing tables


def test_a_missing_table_and_an_empty_one_say_how_to_make_it(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(ReferenceTableError, match=r"no reference table in .*; make it with `vbon predict`"):
            ReferenceTable.open(path)
    ReferenceTableWriter(tmp_path, FINGERPRINT, shard="rank0").write([])
    with pytest.raises(ReferenceTableError, match="is empty; fill it with `vbon predict`"):
        ReferenceTable.open(tmp_path)


def test_shards_without_a_usable_fingerprint_are_refused(tmp_path: Path) -> None:
    write(tmp_path, make_row(1))
    (tmp_path / "fingerprint.json").write_text("{")
    with pytest.raises(ReferenceTableError, match=r"fingerprint\.json is not valid JSON"):
        ReferenceTable.open(tmp_path)
    (tmp_path / "fingerprint.json").write_text("[]")
    with pytest.raises(ReferenceTableError, match="must hold a JSON object, got list"):
        ReferenceTable.open(tmp_path)
    (tmp_path / "fingerprint.json").unlink()
    for attempt in (ReferenceTable.open, lambda path: ReferenceTableWriter(path, FINGERPRINT, shard="rank1")):
        with pytest.raises(ReferenceTableError, match=r"holds shards .* but no fingerprint\.json"):
            attempt(tmp_path)


@pytest.mark.parametrize("damage", ["truncate", "empty", "garbage"])
def test_a_broken_shard_is_named_with_the_way_out(tmp_path: Path, damage: str) -> None:
    writer = write(tmp_path, make_row(1))
    writer.write([make_row(2)])
    broken = tmp_path / "part-rank0-000001.parquet"
    whole = broken.read_bytes()
    broken.write_bytes({"truncate": whole[: len(whole) // 2], "empty": b"", "garbage": b"x" * 500}[damage])
    for attempt in (lambda: ReferenceTable.open(tmp_path), writer.finished_keys, writer.compact):
        with pytest.raises(ReferenceTableError, match=r"part-rank0-000001\.parquet is .*delete that file and run"):
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
    with pytest.raises(ReferenceTableError, match=r"part-x-000000\.parquet is not a shard .*\['key', 'score'\]"):
        ReferenceTable.open(tmp_path)


# Several writers, kills and compaction


def test_writers_side_by_side_and_after_a_restart_do_not_collide(tmp_path: Path) -> None:
    a, b = (ReferenceTableWriter(tmp_path, FINGERPRINT, shard=name) for name in ("rank1", "rank1-000000"))
    a.write([make_row(0)])
    b.write([make_row(1)])
    again = ReferenceTableWriter(tmp_path, FINGERPRINT, shard="rank1")
    assert again.finished_keys() == a.finished_keys() == {make_row(0).key, make_row(1).key}
    again.write([make_row(2)])
    assert shards(tmp_path) == [
        "part-rank1-000000-000000.parquet",
        "part-rank1-000000.parquet",
        "part-rank1-000001.parquet",
    ]
    assert content(tmp_path) == [make_row(0), make_row(2), make_row(1)]


def test_only_the_writer_of_the_same_name_cleans_leftovers(tmp_path: Path) -> None:
    write(tmp_path, make_row(1))
    leftovers = [
        tmp_path / name
        for name in (
            ".part-rank0-000001.parquet.tmp",
            ".fingerprint-rank0.json",
            "..fingerprint-rank0.json.tmp",
        )
    ]
    foreign = tmp_path / ".part-rank00-000001.parquet.tmp"
    for file in (*leftovers, foreign):
        file.write_bytes(b"half a shard")
    assert content(tmp_path) == [make_row(1)]
    ReferenceTableWriter(tmp_path, FINGERPRINT, shard="rank0")
    assert not any(file.exists() for file in leftovers)
    assert foreign.exists()


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = write(tmp_path, make_row(1))
    before = sorted(tmp_path.iterdir())

    def full(stream: object, tables: object) -> None:
        stream.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(writer_module, "write_tables", full)
    for attempt in (lambda: writer.write([make_row(2)]), lambda: writer.write([make_row(3)])):
        with pytest.raises(OSError, match="no space left"):
            attempt()
    assert sorted(tmp_path.iterdir()) == before


def test_compaction_merges_own_shards_and_changes_nothing_else(tmp_path: Path) -> None:
    writer = ReferenceTableWriter(tmp_path, FINGERPRINT, shard="rank0")
    for i in range(70):
        writer.write([make_row(i)])
    write(tmp_path, make_row(100), shard="rank1")
    before = content(tmp_path)
    writer.compact()
    assert shards(tmp_path) == ["part-rank0-000070.parquet", "part-rank1-000000.parquet"]
    assert content(tmp_path) == before
    writer.compact()
    writer.write([make_row(71)])
    assert shards(tmp_path)[:2] == ["part-rank0-000070.parquet", "part-rank0-000071.parquet"]


@pytest.mark.parametrize("unlinked", range(4))
def test_a_kill_during_compaction_leaves_the_same_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unlinked: int
) -> None:
    writer = write(tmp_path, make_row(1), make_row(2))
    writer.write([make_row(2, value=50.0), make_row(3)])  # a repeated prompt: the first wins
    writer.write([make_row(3, value=50.0), make_row(4)])
    before = content(tmp_path)
    assert before == [make_row(i) for i in (1, 2, 3, 4)]
    unlink, left = Path.unlink, [unlinked]

    def killed(path: Path, **options: bool) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        if unlinked < 3:
            with pytest.raises(KeyboardInterrupt):
                writer.compact()
        else:
            writer.compact()
    assert len(shards(tmp_path)) == 4 - unlinked
    assert content(tmp_path) == before
    resumed = ReferenceTableWriter(tmp_path, FINGERPRINT, shard="rank0")
    assert resumed.finished_keys() == {row.key for row in before}
    resumed.compact()
    assert len(shards(tmp_path)) == 1
    assert content(tmp_path) == before


def test_an_open_table_survives_compaction_by_its_writer(tmp_path: Path) -> None:
    writer = write(tmp_path, make_row(1))
    writer.write([make_row(2)])
    table = ReferenceTable.open(tmp_path)
    reading = table.rows()
    assert next(reading) == make_row(1)
    writer.compact()
    assert list(reading) == [make_row(2)]
    assert torch.equal(table.rewards(make_row(2).key), torch.tensor(make_row(2).rewards))
    assert table.row(make_row(1).key) == make_row(1)


WRITE_UNTIL_KILLED = """
import sys
from test_reference_table import FINGERPRINT, ReferenceTableWriter, make_row
writer = ReferenceTableWriter(sys.argv[1], FINGERPRINT, shard=sys.argv[2])
done = writer.finished_keys()
for i in range(int(sys.argv[3]), int(sys.argv[4])):
    if make_row(i).key not in done:
        writer.write([make_row(i, samples=200)])
        print(i, flush=True)
        if i % 10 == 9:
            writer.compact()
"""


def test_killed_processes_resume_to_the_same_table(tmp_path: Path) -> None:
    path = tmp_path / "table"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}

    def start(shard: str, first: int, last: int) -> subprocess.Popen:
        arguments = [sys.executable, "-c", WRITE_UNTIL_KILLED, str(path), shard, str(first), str(last)]
        return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE)

    processes = [start("rank0", 0, 10_000), start("rank1", 10_000, 20_000)]
    for process, lines_to_see in zip(processes, (25, 13), strict=True):
        for _ in range(lines_to_see):
            assert process.stdout is not None
            assert process.stdout.readline()
    acknowledged = []
    for process in processes:
        process.send_signal(signal.SIGKILL)
        acknowledged.append(process.communicate()[0].split(b"\n"))
        assert process.returncode == -signal.SIGKILL
    table = ReferenceTable.open(path, fingerprint=FINGERPRINT)
    number = {make_row(i, samples=1).key: i for i in range(20_000)}
    found = sorted(map(number.__getitem__, table.keys()))
    low, high = [i for i in found if i < 10_000], [i for i in found if i >= 10_000]
    # Rows were written in order, so what is there has no gaps.
    assert low == list(range(len(low)))
    assert high == list(range(10_000, 10_000 + len(high)))
    assert len(low) >= 25
    assert len(high) >= 13
    for last, lines_seen in ((low[-1], acknowledged[0]), (high[-1], acknowledged[1])):
        assert all(int(line) <= last for line in lines_seen if line)  # what was acknowledged is there
    for shard, first, count in (("rank0", 0, len(low)), ("rank1", 10_000, len(high))):
        writer = ReferenceTableWriter(path, FINGERPRINT, shard=shard)
        assert make_row(first + count).key not in writer.finished_keys()
        writer.write([make_row(first + count, samples=200)])
        writer.compact()
    assert len(shards(path)) == 2
    assert not list(path.glob(".*"))
    expected = [*range(len(low) + 1), *range(10_000, 10_001 + len(high))]
    assert content(path) == [make_row(i, samples=200) for i in expected]


# JSON Lines


def lines(path: Path, *records: object) -> Path:
    text = "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def load(file: Path, table: Path) -> int:
    return import_jsonl(file, table, encode=encode, encode_response=lambda t: list(t.encode()), fingerprint=FINGERPRINT)


RESPONSE_LINES = [
    {"prompt": "a", "text": " one", "reward": 1},
    {"prompt": "b", "text": "", "reward": -0.1},
    {"prompt": "a", "text": " two é", "reward": 2.5},
]
PROMPT_LINES = [
    {"prompt": "a", "responses": [" one", " two é"], "rewards": [1, 2.5]},
    {"prompt": "b", "responses": [""], "rewards": [-0.1]},
]


@pytest.mark.parametrize("name", ["cache.jsonl", "cache.jsonl.gz"])
@pytest.mark.parametrize("records", [RESPONSE_LINES, PROMPT_LINES])
def test_both_layouts_import(tmp_path: Path, name: str, records: list[dict]) -> None:
    assert load(lines(tmp_path / name, *records, ""), tmp_path / "table") == 2
    table = ReferenceTable.open(tmp_path / "table", fingerprint=FINGERPRINT)
    row = table.row(prompt_key([1, 97]), "a")
    assert row == TableRow(
        prompt_key([1, 97]), "a", [1, 97], [" one", " two é"], [list(b" one"), list(" two é".encode())],
        [1.0, 2.5], None, None,
    )  # fmt: skip
    assert table.samples == 1
    assert len(table) == 2
    assert torch.equal(table.rewards(prompt_key([1, 98])), torch.tensor([-0.1]))


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
@pytest.mark.parametrize("layout", ["response", "prompt"])
def test_export_and_import_are_inverse(tmp_path: Path, layout: str, name: str) -> None:
    rewards = [0.1, 1 / 3, -3e38, 1e-45]
    original = make_row(1, samples=4)
    original = original._replace(
        prompt="line\u2028 é\n",
        prompt_tokens=encode("line\u2028 é\n"),
        rewards=torch.tensor(rewards).tolist(),
    )
    original = original._replace(key=prompt_key(original.prompt_tokens))
    write(tmp_path / "a", original)
    export_jsonl(ReferenceTable.open(tmp_path / "a"), tmp_path / name, layout)
    assert load(tmp_path / name, tmp_path / "b") == 1
    (back,) = content(tmp_path / "b")
    assert (back.key, back.prompt, back.responses) == (original.key, original.prompt, original.responses)
    assert back.rewards == original.rewards
    export_jsonl(ReferenceTable.open(tmp_path / "b"), tmp_path / ("again-" + name), layout)
    assert (tmp_path / ("again-" + name)).read_bytes() == (tmp_path / name).read_bytes()


def test_exported_lines_are_the_authors_layouts(tmp_path: Path) -> None:
    load(lines(tmp_path / "in.jsonl", *RESPONSE_LINES), tmp_path / "table")
    table = ReferenceTable.open(tmp_path / "table")
    export_jsonl(table, tmp_path / "prompt.jsonl")
    export_jsonl(table, tmp_path / "response.jsonl", "response")
    read = [
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("prompt", "response")
    ]
    assert read == [PROMPT_LINES, [RESPONSE_LINES[0], RESPONSE_LINES[2], RESPONSE_LINES[1]]]
    with pytest.raises(ValueError, match="'response' or 'prompt', got 'other'"):
        export_jsonl(table, tmp_path / "x.jsonl", "other")


def test_a_failed_export_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "table", make_row(1))
    table = ReferenceTable.open(tmp_path / "table")
    target = tmp_path / "out.jsonl"
    target.write_text("old")
    monkeypatch.setattr(table, "rows", lambda: iter([make_row(1), None]))
    with pytest.raises(AttributeError):
        export_jsonl(table, target)
    assert target.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "out.jsonl",
        "table",
    ]


def test_an_import_that_was_killed_resumes(tmp_path: Path) -> None:
    file = lines(tmp_path / "in.jsonl", *RESPONSE_LINES)
    load(lines(tmp_path / "part.jsonl", *RESPONSE_LINES[1:2]), tmp_path / "table")
    assert load(file, tmp_path / "table") == 1
    assert load(file, tmp_path / "table") == 0
    assert [row.prompt for row in content(tmp_path / "table")] == ["b", "a"]


def test_imported_tables_refuse_what_the_files_do_not_tell(tmp_path: Path) -> None:
    load(lines(tmp_path / "in.jsonl", *PROMPT_LINES), tmp_path / "table")
    table = ReferenceTable.open(tmp_path / "table")
    with pytest.raises(ReferenceTableError, match=r"holds no reference log-probabilities: JSON Lines imports"):
        table.log_probs_matrix(table.keys())
    with pytest.raises(ReferenceTableError, match="holds no flags that tell finished from truncated"):
        table.finished(table.keys()[0])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', "not valid JSON"),
        ("[1]", "expected a JSON object, got list"),
        ({"prompt": "a", "text": "b"}, "expected the fields .*, got prompt, text"),
        ({"prompt": "", "text": "b", "reward": 1}, "prompt must be text that is not empty, got ''"),
        ({"prompt": "a", "text": None, "reward": 1}, "a response must be text, got None"),
        (
            {"prompt": "a", "text": "b", "reward": float("nan")},
            "reward of response 'b' must be finite, got nan",
        ),
        ({"prompt": "a", "text": "b", "reward": "1"}, "must be finite, got '1'"),
        ({"prompt": "a", "text": "b", "reward": True}, "must be finite, got True"),
        ({"prompt": "a", "responses": ["b"], "rewards": [1, 2]}, "got 1 responses and 2 rewards"),
        ({"prompt": "a", "responses": [], "rewards": []}, "got 0 responses and 0 rewards"),
        ({"prompt": "a", "responses": "b", "rewards": [1]}, "must be lists"),
    ],
)
def test_a_broken_line_is_named_by_its_number(tmp_path: Path, line: object, message: str) -> None:
    file = lines(tmp_path / "in.jsonl", RESPONSE_LINES[0], "", line)
    with pytest.raises(ReferenceTableError, match=rf"in\.jsonl, line 3: .*{message}"):
        load(file, tmp_path / "table")
    assert not (tmp_path / "table").exists()


def test_an_import_file_that_is_absent_or_empty_is_named(tmp_path: Path) -> None:
    with pytest.raises(ReferenceTableError, match=r"absent\.jsonl does not exist"):
        load(tmp_path / "absent.jsonl", tmp_path / "table")
    with pytest.raises(ReferenceTableError, match=r"in\.jsonl holds no prompts"):
        load(lines(tmp_path / "in.jsonl"), tmp_path / "table")


# Summary


def test_summary_by_hand(tmp_path: Path) -> None:
    a = make_row(1, samples=4)._replace(rewards=[0.0, 0.0, 0.0, 4.0], finished=[True, True, True, False])
    b = make_row(2, samples=2)._replace(rewards=[1.0, 2.0], finished=[False, False])
    write(tmp_path, a, b)
    assert table_summary(ReferenceTable.open(tmp_path)) == {
        "prompts": 2,
        "samples": 2,
        "responses": 6,
        "mean_reward": pytest.approx((1.0 + 1.5) / 2),
        "tie_fraction": pytest.approx((3 / 6 + 0) / 2),  # 3 of the 6 pairs of the first prompt tie
        "finished_share": pytest.approx(3 / 8),
    }


def test_summary_says_what_it_cannot_know(tmp_path: Path) -> None:
    load(lines(tmp_path / "in.jsonl", {"prompt": "a", "text": "b", "reward": 1}), tmp_path / "table")
    summary = table_summary(ReferenceTable.open(tmp_path / "table"))
    assert summary["finished_share"] is None
    assert summary["tie_fraction"] != summary["tie_fraction"]


def test_responses_that_go_on_behind_an_end_are_refused(tmp_path: Path) -> None:
    write(tmp_path, make_row(0), make_row(5))
    write(tmp_path, make_row(7), shard="rank1")
    table = ReferenceTable.open(tmp_path)
    table.check_ends([999])
    with pytest.raises(ReferenceTableError, match="'prompt 7'.*go on behind the token 7, which ends a response"):
        table.check_ends([7, 999])
    write(tmp_path / "ended", make_row(0, samples=2))
    ReferenceTable.open(tmp_path / "ended").check_ends([1])  # only ever the last token
    with pytest.raises(ReferenceTableError, match="'prompt 0'.*go on behind the token 0,"):
        ReferenceTable.open(tmp_path / "ended").check_ends([0])
