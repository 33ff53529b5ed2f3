"""Tables from JSON Lines and back, in both layouts, and lines that are broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.reference_table.setting import FINGERPRINT, content, encode, lines, load, make_row, write
from vbon_lightning.reference_table import (
    ReferenceTable,
    ReferenceTableError,
    TableRow,
    export_jsonl,
    import_jsonl,
    prompt_key,
)

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


def test_two_prompts_of_the_same_tokens_are_refused(tmp_path: Path) -> None:
    """In a file, and where the table has the one and the file the other."""

    def folding(text: str) -> list[int]:
        return encode(text.lower().strip())

    def import_of(name: str, *records: dict) -> int:
        file = lines(tmp_path / name, *records)
        return import_jsonl(file, tmp_path / "table", encode=folding, encode_response=encode, fingerprint=FINGERPRINT)

    other = {"prompt": "A ", "text": "three", "reward": 9.0}
    with pytest.raises(ReferenceTableError, match="line 4: the prompt 'A ' has the tokens of 'a', which stands before"):
        import_of("in.jsonl", *RESPONSE_LINES, other)
    assert not (tmp_path / "table").exists()
    assert import_of("one.jsonl", *RESPONSE_LINES) == 2
    with pytest.raises(ReferenceTableError, match="prompt 'A ' has the tokens of 'a', whose responses and rewards"):
        import_of("two.jsonl", {"prompt": "c", "text": "", "reward": 0}, other)
    assert [row.prompt for row in content(tmp_path / "table")] == ["a", "b"]


def test_a_prompt_without_tokens_is_named_by_its_line(tmp_path: Path) -> None:
    file = lines(tmp_path / "in.jsonl", *RESPONSE_LINES)
    with pytest.raises(ReferenceTableError, match=r"in\.jsonl, line 2: the prompt 'b': a prompt needs at least one"):
        import_jsonl(
            file,
            tmp_path / "table",
            encode=lambda text: [] if text == "b" else encode(text),
            encode_response=encode,
            fingerprint=FINGERPRINT,
        )


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
        ({"prompt": "a", "text": "b", "reward": 1e39}, r"must be finite, got 1e\+39"),
        ({"prompt": "a", "text": "b", "reward": None}, "must be finite, got None"),
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
