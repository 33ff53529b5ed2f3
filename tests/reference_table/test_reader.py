"""Reading the reference table: rows go through unchanged, and what is not there is named."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference_table.setting import FINGERPRINT, content, make_row, write
from vbon_lightning.reference_table import (
    OtherPrompt,
    PromptNotInTable,
    ReferenceTable,
    ReferenceTableError,
    ReferenceTableWriter,
    TableRow,
    prompt_key,
    reader,
)
from vbon_lightning.reference_table.shards import open_shard

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
log_probs = st.floats(max_value=0.0, width=32, allow_nan=False, allow_infinity=False)
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
        lists(log_probs) if draw(st.booleans()) else None,
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


def test_the_row_of_most_responses_counts_and_of_such_the_first(tmp_path: Path) -> None:
    a, b, c = (make_row(i, samples=2) for i in (1, 2, 3))
    write(tmp_path, a, b, c)
    more = [make_row(1, samples=3, value=7.0), make_row(3, samples=1), make_row(2, samples=2, value=7.0)]
    write(tmp_path, *more, shard="rank1")
    write(tmp_path, make_row(1, samples=3, value=9.0), shard="rank2")
    table = ReferenceTable.open(tmp_path)
    assert content(tmp_path) == [more[0], b, c]
    assert (table.samples, table.most_samples) == (2, 3)
    assert [table.count(row.key) for row in (a, b, c)] == [3, 2, 2]
    assert table.count("0" * 64) == 0
    assert torch.equal(table.rewards_matrix([a.key, b.key]), torch.tensor([more[0].rewards[:2], b.rewards]))
    assert table.row(a.key) == more[0]
    assert ReferenceTable.open(tmp_path, keys=["0"]).most_samples == 0


def test_a_row_is_of_one_text_whichever_part_of_it_is_read(tmp_path: Path) -> None:
    row = make_row(1)
    write(tmp_path, row)
    table = ReferenceTable.open(tmp_path)
    message = "^prompt 'Prompt 1' has the tokens of 'prompt 1', whose responses and rewards are in the reference table"
    for read in (table.row, table.rewards, table.finished, table.log_probs, table.response_tokens, table.check_text):
        read(row.key, "prompt 1")
        with pytest.raises(OtherPrompt, match=message):
            read(row.key, "Prompt 1")
    for read in (table.rewards_matrix, table.finished_matrix, table.log_probs_matrix, table.response_matrix):
        with pytest.raises(OtherPrompt, match=message):
            read([row.key], ["Prompt 1"])
    table.check_text(prompt_key([9]), "absent")


def test_rows_of_a_group_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [make_row(i) for i in range(70)]  # over two row groups
    write(tmp_path, *expected)
    table, opened = ReferenceTable.open(tmp_path), []
    monkeypatch.setattr(reader, "open_shard", lambda path: opened.append(path) or open_shard(path))
    assert [table.row(row.key) for row in expected] == expected
    assert len(opened) == 2


def test_tokens_that_a_model_does_not_have_are_refused(tmp_path: Path) -> None:
    write(tmp_path, make_row(1), make_row(2)._replace(response_tokens=[[], [3, 900], [2]]))
    write(tmp_path, make_row(3)._replace(response_tokens=[[], [], []]), shard="rank1")
    table = ReferenceTable.open(tmp_path)
    table.check_tokens(901)
    table.check_tokens(None)
    with pytest.raises(ReferenceTableError, match="to 'prompt 2' with the token id 900, and the model has 900 tokens"):
        table.check_tokens(900)


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


def test_a_missing_table_and_an_empty_one_say_how_to_make_it(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(ReferenceTableError, match=r"no reference table in .*; make it with `vbon predict`"):
            ReferenceTable.open(path)
    ReferenceTableWriter(tmp_path, FINGERPRINT, shard="rank0").write([])
    with pytest.raises(ReferenceTableError, match="is empty; fill it with `vbon predict`"):
        ReferenceTable.open(tmp_path)


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


def test_responses_that_go_on_behind_an_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [make_row(i)._replace(finished=[False] * 3) for i in (0, 5, 7)]
    write(tmp_path, *rows[:2])
    write(tmp_path, rows[2], shard="rank1")
    table = ReferenceTable.open(tmp_path)
    load, read = ReferenceTable._load, []
    monkeypatch.setattr(ReferenceTable, "_load", lambda self, name, part: read.append(name) or load(self, name, part))
    table.check_tokens(1000, [999])
    assert read == ["response_tokens", "finished"], "a table's tokens are most of it, and read once"
    with pytest.raises(ReferenceTableError, match="'prompt 7'.*go on behind the token 7, which ends a response"):
        table.check_tokens(None, [7, 999])
    write(tmp_path / "ended", make_row(0, samples=2)._replace(finished=[False, True]))
    ReferenceTable.open(tmp_path / "ended").check_tokens(None, [1])  # only ever the last token
    with pytest.raises(ReferenceTableError, match="'prompt 0'.*go on behind the token 0,"):
        ReferenceTable.open(tmp_path / "ended").check_tokens(None, [0])


@pytest.mark.parametrize(
    ("finished", "problem"),
    [
        ([False, False, False], r"said to be cut though their last token \(response 2\) ends one"),
        ([False, True, True], r"said to be finished though no token at their end \(response 1\) ends one"),
        ([True, False, True], r"said to be finished though no token at their end \(response 0\) ends one"),
    ],
)
def test_flags_that_contradict_the_tokens_are_refused(tmp_path: Path, finished: list[bool], problem: str) -> None:
    def row(number: int, flags: list[bool] | None) -> TableRow:
        return make_row(number)._replace(response_tokens=[[7], [7, 1], [7, 1, 2]], finished=flags)

    right = [row(number, [False, False, True]) for number in (4, 6)]
    empty = make_row(8)._replace(response_tokens=[[], [], [2]], finished=[False, False, True])
    write(tmp_path, right[0], empty, right[1], row(9, None))
    ReferenceTable.open(tmp_path).check_tokens(None, [2])
    write(tmp_path, row(5, finished), shard="rank1")
    with pytest.raises(ReferenceTableError, match=f"first to 'prompt 5', that are {problem}"):
        ReferenceTable.open(tmp_path).check_tokens(None, [2])
