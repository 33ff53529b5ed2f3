"""Text sources: each format reads the same rows, the steps follow their order, and each mistake is named."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vbon_lightning.data.sources import SourceError, TextRow, TextSource, read_rows

RECORDS = [
    {"text": "One day, Tom was sad. é", "label": 0, "summary": "Tom sad"},
    {"text": "Lily saw a\n\nbig \u2028 dog, and ran", "label": 1, "summary": "Lily ran"},
    {"text": "One day, Tom was glad.", "label": 1, "summary": "Tom glad"},
    {"text": "short", "label": 0, "summary": "s"},
]


def jsonl(path: Path, *records: Any) -> str:
    text = "".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return jsonl(tmp_path / "data.jsonl", *RECORDS)


def prompts(path: str, **options: Any) -> list[str]:
    return [row.prompt for row in read_rows(TextSource(path, **options))]


def error(path: str, **options: Any) -> str:
    with pytest.raises(SourceError) as caught:
        read_rows(TextSource(path, **options))
    return str(caught.value)


# Formats


def save(kind: str, directory: Path) -> str:
    file = directory / f"data{kind}"
    if kind in (".jsonl", ".jsonl.gz"):
        return jsonl(file, *RECORDS)
    if kind in (".csv", ".csv.gz"):
        opener = gzip.open if kind.endswith("gz") else open
        with opener(file, "wt", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(RECORDS[0]))
            writer.writeheader()
            writer.writerows(RECORDS)
    elif kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(RECORDS), file)
    else:
        datasets = pytest.importorskip("datasets")
        data = datasets.Dataset.from_list(RECORDS)
        if kind == "dict":
            data = datasets.DatasetDict(train=data, test=data.select([0]))
        data.save_to_disk(str(file))
    return str(file)


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet", "saved", "dict"])
def test_each_format_reads_the_same_rows(tmp_path: Path, kind: str) -> None:
    source = TextSource(save(kind, tmp_path), response_column="summary", where={"label": 1})
    rows = read_rows(source)
    assert [row[1:4] for row in rows] == [(r["text"], r["summary"], r["text"]) for r in RECORDS if r["label"] == 1]
    # Row numbers, or the lines of the file, of which a quoted CSV field takes several and the header one.
    assert [row.row for row in rows] == ([3, 6] if "csv" in kind else [2, 3])


def test_lines_of_a_text_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffOne day,\r\n\r\n  Lily \u2028 saw\n".encode())
    lines = [(1, "One day,"), (3, "  Lily \u2028 saw")]
    assert read_rows(TextSource(str(file))) == [TextRow(number, line, None, line) for number, line in lines]


def test_split_of_a_saved_data_set(tmp_path: Path) -> None:
    path = save("dict", tmp_path)
    assert prompts(path, split="test") == [RECORDS[0]["text"]]
    assert "there is no split 'val'; the splits are train, test" in error(path, split="val")


def test_csv_fields_may_be_long(tmp_path: Path) -> None:
    file, limit = tmp_path / "data.csv", csv.field_size_limit()
    file.write_text("text\n" + "a" * 200_000 + "\n")
    assert len(prompts(str(file))[0]) == 200_000
    assert csv.field_size_limit() == limit


def test_paths_may_use_variables_and_packages(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VBON_TEST_DATA", str(Path(path).parent))
    assert len(prompts("${VBON_TEST_DATA}/data.jsonl")) == 4
    monkeypatch.delenv("VBON_TEST_DATA")
    assert "VBON_TEST_DATA" in error("${VBON_TEST_DATA}/data.jsonl")
    assert "no_such_package_here" in error("package:no_such_package_here/data.jsonl")


def test_a_file_inside_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "vbon_test_package"
    package.mkdir()
    (package / "__init__.py").touch()
    jsonl(package / "data.jsonl", *RECORDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert len(prompts("package:vbon_test_package/data.jsonl")) == 4


# Steps


def test_first_words_keep_the_white_space_between_them(path: str) -> None:
    assert prompts(path, first_words=4, min_words=4) == [
        "One day, Tom was",
        "Lily saw a\n\nbig",
        "One day, Tom was",
    ]


def test_first_words_of_a_text_with_exactly_so_many(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "data.jsonl", {"text": " \ta b c\n"})
    assert prompts(file, first_words=3) == ["a b c"]
    assert prompts(file) == [" \ta b c\n"]


def test_response_goes_with_a_cut_prompt(path: str) -> None:
    rows = read_rows(TextSource(path, first_words=2, stop=1, response_column="summary"))
    assert rows == [TextRow(1, "One day,", "Tom sad", RECORDS[0]["text"])]


def test_unique_keeps_the_first_of_equal_prompts(path: str) -> None:
    rows = read_rows(TextSource(path, first_words=4, min_words=4, unique=True))
    assert [row.row for row in rows] == [1, 2]


@pytest.mark.parametrize(("low", "high", "rows"), [(5, None, [1, 2, 3]), (None, 5, [3, 4]), (2, 6, [1, 3])])
def test_word_limits_include_their_ends(path: str, low: int | None, high: int | None, rows: list[int]) -> None:
    assert [row.row for row in read_rows(TextSource(path, min_words=low, max_words=high))] == rows


@pytest.mark.parametrize("kind", [".jsonl", ".csv"])
def test_where_takes_a_value_or_one_of_a_list(tmp_path: Path, kind: str) -> None:
    file = save(kind, tmp_path)
    two = [RECORDS[1]["text"], RECORDS[2]["text"]]
    assert prompts(file, where={"label": 1}) == two
    assert prompts(file, where={"summary": ["Tom glad", "Lily ran", "nobody"]}) == two
    assert prompts(file, where={"label": [1, 7], "summary": ["Lily ran"]}) == two[:1]
    assert "0 left by where={'label': []}" in error(file, where={"label": []})
    tags = jsonl(tmp_path / "tags.jsonl", {"text": "a", "tags": ["x", "y"]}, {"text": "b", "tags": ["y"]})
    assert prompts(tags, where={"tags": ["y"]}) == ["b"]  # a column of lists


def test_slice_comes_after_the_filters(path: str) -> None:
    assert prompts(path, where={"label": 1}, start=1) == [RECORDS[2]["text"]]
    assert prompts(path, where={"label": 1, "summary": "Lily ran"}) == [RECORDS[1]["text"]]
    assert prompts(path, min_words=2, start=1, stop=2) == [RECORDS[1]["text"]]


def test_shuffle_is_a_permutation_by_seed_that_the_slice_cuts(tmp_path: Path) -> None:
    texts = [f"prompt {i}" for i in range(50)]
    file = jsonl(tmp_path / "data.jsonl", *({"text": text} for text in texts))
    shuffled = prompts(file, shuffle_seed=3)
    assert shuffled != texts
    assert sorted(shuffled) == sorted(texts)
    assert prompts(file, shuffle_seed=3) == shuffled != prompts(file, shuffle_seed=4)
    parts = [prompts(file, shuffle_seed=3, start=a, stop=b) for a, b in ((0, 20), (20, None))]
    assert parts[0] + parts[1] == shuffled


def test_template_fills_in_columns(path: str) -> None:
    assert prompts(path, template="{{x}} {label}: {summary}\nTL;DR:", column="absent", stop=2) == [
        "{x} 0: Tom sad\nTL;DR:",
        "{x} 1: Lily ran\nTL;DR:",
    ]


def test_columns_of_a_template_are_cut_before_it_is_filled_in(path: str) -> None:
    options = {"template": "TITLE: {summary}\nPOST: {text}\nTL;DR:", "stop": 2}
    assert prompts(path, field_words={"text": 4}, **options) == [
        "TITLE: Tom sad\nPOST: One day, Tom was\nTL;DR:",
        "TITLE: Lily ran\nPOST: Lily saw a\n\nbig\nTL;DR:",
    ]
    assert prompts(path, field_words={"summary": 2}, **options) == prompts(path, **options)


def test_columns_in_braces_inside_the_data_are_not_filled_in(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "data.jsonl", {"text": "{label} {0.__class__}", "label": 1})
    assert prompts(file, template="<{text}>") == ["<{label} {0.__class__}>"]


def test_reading_ends_at_stop_unless_shuffled(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "data.jsonl", {"text": "a"}, {"text": "b"}, "{broken")
    assert prompts(file, stop=2) == ["a", "b"]
    assert "line 3: not valid JSON" in error(file, stop=2, shuffle_seed=0)


# Mistakes


@pytest.mark.parametrize("name", ["absent.jsonl", "absent.csv.gz", "absent.txt", "absent.parquet"])
def test_a_missing_file(tmp_path: Path, name: str) -> None:
    assert error(str(tmp_path / name)) == f"file {tmp_path / name} does not exist"


def test_a_missing_directory(tmp_path: Path) -> None:
    assert "does not exist: there is neither a file nor a directory" in error(str(tmp_path / "absent"))


def test_a_file_of_an_unknown_kind(tmp_path: Path) -> None:
    (tmp_path / "data.xml").touch()
    assert "expected one of .jsonl, .json, .csv, .tsv, .txt, .parquet, .arrow by name, got 'data.xml'" in error(
        str(tmp_path / "data.xml")
    )


def test_a_data_set_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path: str, name: str | None, split: str, streaming: bool) -> None:
        asked.append((path, name, split, streaming))
        raise ConnectionError("hub not reachable")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = error("owner/reviews", name="plain", split="test")
    assert asked == [("owner/reviews", "plain", "test", False)]
    assert "data set owner/reviews: cannot be loaded (name='plain', split='test')" in message
    assert "ConnectionError: hub not reachable" in message
    assert "Expected a local file" in message


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(RECORDS * 600)  # more than a batch
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, split, streaming: data)
    rows = read_rows(TextSource("owner/reviews", response_column="summary", start=2300))
    expected = [(i + 1, RECORDS[i % 4]) for i in range(2300, 2400)]
    assert rows == [TextRow(n, row["text"], row["summary"], row["text"]) for n, row in expected]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "line 2: not valid JSON: Expecting value"),
        ('["text"]', "line 2: expected a JSON object, got list"),
    ],
)
def test_a_broken_json_line(tmp_path: Path, line: str, message: str) -> None:
    file = jsonl(tmp_path / "data.jsonl", {"text": "a"}, line)
    assert f"file {file}, {message}" in error(file)


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / "data.txt"
    file.write_bytes(b"one\ntwo \xff\n")
    assert f"file {file}, line 2: not UTF-8 text" in error(str(file))


def test_broken_compression(tmp_path: Path) -> None:
    whole = Path(jsonl(tmp_path / "data.jsonl.gz", *RECORDS))
    whole.write_bytes(whole.read_bytes()[:-20])
    assert "broken data after line 2: Compressed file ended" in error(str(whole))
    whole.write_text("not gzip")
    assert "broken data after line 0: Not a gzipped file" in error(str(whole))


def test_broken_parquet(tmp_path: Path) -> None:
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    assert "not a readable Parquet file" in error(str(tmp_path / "data.parquet"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('text,label\n"a\nb",1\nc\n', "line 4: expected 2 fields as in the first line, got 1"),
        ("text\na,b\n", "line 2: expected 1 fields as in the first line, got 2"),
        ('text\n"a\n', "not valid CSV: unexpected end of data"),
        ("", "is empty; expected a line with the column names"),
    ],
)
def test_broken_csv(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "data.csv").write_text(text)
    assert message in error(str(tmp_path / "data.csv"))


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet", "saved"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"column": "body"}, "there is no column 'body'"),
        ({"response_column": "answer"}, "there is no column 'answer'"),
        ({"where": {"stars": 1}}, "there is no column 'stars'"),
        ({"template": "{text} {title}"}, "there is no column 'title', which the template names"),
    ],
)
def test_an_absent_column(tmp_path: Path, kind: str, options: dict[str, Any], message: str) -> None:
    assert f"{message}; the columns are 'text', 'label', 'summary'" in error(save(kind, tmp_path), **options)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{text", "is malformed"),
        ("{text.__class__}", "got 'text.__class__'"),
        ("{text[0]}", "nothing else; got 'text[0]'"),
        ("{}", "nothing else; got ''"),
        ("{0}", "nothing else; got '0'"),
        ("{text:>9}", "with format '>9'"),
        ("{text!r}", "and conversion 'r'"),
    ],
)
def test_a_template_that_is_more_than_column_names(path: str, template: str, message: str) -> None:
    assert message in error(path, template=template)


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        ("", {}, "line 2: the prompt is empty"),
        (" \n", {}, "set min_words to leave out such rows"),
        (None, {}, "line 2: column 'text' must hold text, got None (NoneType)"),
        (7, {}, "line 2: column 'text' must hold text, got 7 (int)"),
        (None, {"template": "{text}"}, "line 2: column 'text' must hold text, got None"),
        (
            "one two",
            {"first_words": 3},
            "line 2: the text has 2 words, first_words=3 needs more; set min_words to 3",
        ),
    ],
)
def test_a_row_that_does_not_fit(tmp_path: Path, value: Any, options: dict[str, Any], message: str) -> None:
    file = jsonl(tmp_path / "data.jsonl", {"text": "one two three"}, {"text": value})
    assert message in error(file, **options)


@pytest.mark.parametrize(
    ("value", "message"),
    [(" ", "line 2: the response (column 'r') is empty"), (None, "column 'r' must hold text, got None")],
)
def test_a_response_that_does_not_fit(tmp_path: Path, value: Any, message: str) -> None:
    file = jsonl(tmp_path / "data.jsonl", {"text": "a", "r": "b"}, {"text": "a", "r": value})
    assert message in error(file, response_column="r")


def test_nothing_left_says_which_step_took_it(path: str) -> None:
    message = error(path, where={"label": 1}, min_words=6, unique=True, start=5, stop=9)
    assert message == (
        f"{path}: no row from start=5 to stop=9: 4 rows read, 2 left by where={{'label': 1}}, "
        "1 left by min_words=6, max_words=None, 1 left by unique=True"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": -1}, "start must not be negative, got -1"),
        ({"start": 3, "stop": 3}, "start=3, stop=3 take no rows"),
        ({"first_words": 0}, "first_words must be at least 1, got 0"),
        ({"field_words": {"post": 3}}, "field_words names 'post', which is no column of the template None"),
        ({"field_words": {"a": 3}, "template": "{b}"}, "field_words names 'a', .* of the template '{b}'"),
        ({"field_words": {"b": 0}, "template": "{b}"}, "field_words must be at least 1, got 0 for 'b'"),
        ({"min_words": 3, "max_words": 2}, "min_words=3 is larger than max_words=2"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        TextSource("data.jsonl", **options)


# Command line


def test_a_source_can_be_written_in_yaml_and_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--train", type=TextSource)
    parsed = parser.parse_args(["--train.path=data.csv", "--train.where={label: 1}", "--train.first_words=4"])
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # the older name
    source = instantiate(parsed).train
    assert source == TextSource("data.csv", where={"label": 1}, first_words=4)
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(TextSource, "train")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    assert "Column that holds the response" in " ".join(capsys.readouterr().out.split())
