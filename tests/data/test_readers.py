"""The formats and places that a source may name, each read to the same rows."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import threading
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers import tiny_tokenizer
from vbon_lightning.data.encoding import PromptError
from vbon_lightning.data.preparing import prepare_rows
from vbon_lightning.data.readers import SourceError, open_parts
from vbon_lightning.data.sources import TextSource, read_rows, stream_rows

ROWS = [{"text": "a, b", "answer": "1"}, {"text": "c \u00e9", "answer": "2"}, {"text": "d", "answer": "3"}]


def lines() -> str:
    return "".join(json.dumps(row) + "\n" for row in ROWS)


def separated(mark: str) -> str:
    return (
        "\n".join(mark.join(f'"{value}"' for value in row) for row in [list(ROWS[0]), *map(dict.values, ROWS)]) + "\n"
    )


def table(write: str) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        getattr(datasets.Dataset.from_list(ROWS), write)(str(path))

    return make


def arrow(path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(path.with_suffix("")))
    (written,) = path.with_suffix("").glob("*.arrow")
    written.rename(path)


FILES: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_text(lines()),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines().encode())),
    "a.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(lines().encode())),
    "a.jsonl.xz": lambda path: path.write_bytes(lzma.compress(lines().encode())),
    "list.json": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "wrapped.json": lambda path: path.write_text(json.dumps({"version": 1, "data": ROWS})),
    "lines.json": lambda path: path.write_text(lines()),
    "list.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "a.csv": lambda path: path.write_text(separated(",")),
    "a.tsv": lambda path: path.write_text(separated("\t")),
    "a.parquet": table("to_parquet"),
    "a.arrow": arrow,
}


def read(path: Any, **options: Any) -> list[tuple[str, dict[str, Any] | None]]:
    return [(row.prompt, row.columns) for row in read_rows(TextSource(path, **options), ("answer",))]


EXPECTED = [(row["text"], {"answer": row["answer"]}) for row in ROWS]


@pytest.mark.parametrize("name", FILES)
def test_every_format_holds_the_same_rows(name: str, tmp_path: Path) -> None:
    FILES[name](tmp_path / name)
    assert read(str(tmp_path / name)) == EXPECTED
    assert read(str(tmp_path / name), start=1, stop=2) == EXPECTED[1:2]
    with pytest.raises(SourceError, match=f"{name}.*no column 'absent'.*columns are 'text', 'answer'"):
        read(str(tmp_path / name), column="absent")
    fsspec.filesystem("memory").pipe(f"/{name}", (tmp_path / name).read_bytes())
    assert read(f"memory://{name}") == EXPECTED


def test_a_line_with_a_conversation_is_a_row_and_no_list_of_rows(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "hello"}]
    (tmp_path / "a.json").write_text(json.dumps({"messages": talk}) + "\n")
    (row,) = read_rows(TextSource(str(tmp_path / "a.json")))
    assert row.messages == talk


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "row 1: expected a JSON object, got int"),
        ('{"a": [], "b": []}', "an object with one such list; this one has the keys 'a', 'b'"),
        ("3", "expected a list of objects, got int"),
        ("[{", "not valid JSON"),
    ],
)
def test_other_json_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text + ("\n" if text != "[{" else ""))
    if text.startswith("{"):  # over several lines, so that it is no line of JSON Lines
        (tmp_path / "a.json").write_text(json.dumps(json.loads(text), indent=1))
    with pytest.raises(SourceError, match=f"a.json.*{message}"):
        read(str(tmp_path / "a.json"))


def test_several_files_and_patterns_are_read_one_after_another(tmp_path: Path) -> None:
    for number, row in enumerate(ROWS):
        (tmp_path / f"part-{number}.jsonl").write_text(json.dumps(row) + "\n")
    assert read(str(tmp_path / "part-*.jsonl")) == EXPECTED
    assert read([str(tmp_path / "part-2.jsonl"), str(tmp_path / "part-[01].jsonl")]) == [EXPECTED[2], *EXPECTED[:2]]
    (tmp_path / "part-[9].jsonl").write_text(lines())  # a name, not a pattern, where there is such a file
    assert len(read(str(tmp_path / "part-[9].jsonl"))) == 3
    store = fsspec.filesystem("memory")
    store.pipe({f"/set/{number}.jsonl": json.dumps(row).encode() for number, row in enumerate(ROWS)})
    assert read("memory://set/*.jsonl") == EXPECTED
    with pytest.raises(SourceError, match=r"\*\.csv: no file matches this pattern"):
        read(str(tmp_path / "*.csv"))
    (tmp_path / "part-1.jsonl").write_text("{}\n")
    with pytest.raises(SourceError, match=r"part-1\.jsonl, line 1: there is no column 'text'"):
        read(str(tmp_path / "part-?.jsonl"))


def test_of_several_files_errors_name_the_one(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text("a\n")
    rows = read_rows(TextSource(str(tmp_path / "*.txt")))
    assert [row.where for row in rows] == [f"file {tmp_path}/{number}.txt" for number in range(2)]
    assert read_rows(TextSource(str(tmp_path / "0.txt")))[0].where is None
    long = [rows[1]._replace(prompt="ab")]
    with pytest.raises(PromptError, match=r"1\.txt, row 1: the prompt has 2 tokens"):
        prepare_rows(long, "prompts", tiny_tokenizer(alphabet="ab"), max_prompt_tokens=1, source=TextSource("x.txt"))


def test_files_of_a_web_server(tmp_path: Path) -> None:
    FILES["a.jsonl.gz"](tmp_path / "a.jsonl.gz")
    serve = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert read(f"{address}/a.jsonl.gz") == EXPECTED
        with pytest.raises(SourceError, match=r"absent\.jsonl does not exist, or cannot be reached"):
            read(f"{address}/absent.jsonl")
        server.shutdown()


def test_urls_that_cannot_be_opened_are_named() -> None:
    with pytest.raises(SourceError, match=r"memory://absent\.jsonl does not exist"):
        read("memory://absent.jsonl")
    with pytest.raises(SourceError, match=r"nowhere://a\.jsonl cannot be opened: ValueError"):
        read("nowhere://a.jsonl")
    with pytest.raises(SourceError, match="expected one of .jsonl, .json"):
        read("memory://a.xml")


def test_rows_in_memory() -> None:
    assert read(ROWS) == read(datasets.Dataset.from_list(ROWS)) == EXPECTED
    named = TextSource.of(datasets.Dataset.from_list(ROWS), column="answer")
    assert [row.prompt for row in read_rows(named)] == ["1", "2", "3"]
    assert TextSource.of(named) is named
    assert (named.called, named.settings()["path"]) == ("3 rows in memory", "3 rows in memory")
    with pytest.raises(SourceError, match="the rows given, row 2: there is no column 'text'"):
        read_rows(TextSource.of([{"text": "a"}, {}]))
    for wrong, message in (({"text": ["a"]}, "got dict"), (["text"], "got list"), ([], "there are no rows")):
        with pytest.raises(SourceError, match=message):
            TextSource.of(wrong)  # type: ignore[arg-type]


def test_a_data_set_may_come_as_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = datasets.Dataset.from_list(ROWS)
    asked: list[bool] = []

    def load(path: str, name: str | None, split: str, streaming: bool) -> Any:
        asked.append(streaming)
        return whole.to_iterable_dataset() if streaming else whole

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [row.prompt for row in stream_rows(TextSource("owner/name", streaming=True))] == [r["text"] for r in ROWS]
    assert read("owner/name") == EXPECTED
    assert asked == [True, True, False, False]  # the first row says which column it is


def test_parts_read_only_the_columns_that_are_asked_for(tmp_path: Path) -> None:
    FILES["a.parquet"](tmp_path / "a.parquet")
    (part,) = open_parts(str(tmp_path / "a.parquet"))
    assert next(part.rows({"answer": ""})) == (1, {"answer": "1"})
    assert next(part.rows({})) == (1, ROWS[0])


# -- what a file says twice, and half characters ---------------------------------------------------

DOUBTFUL: dict[str, tuple[str, str]] = {
    "twice.jsonl": (
        '{"text": "a"}\n{"text": "b", "text": "c"}\n',
        r"twice\.jsonl, line 2: not valid JSON: the key 'text' is there twice",
    ),
    "within.jsonl": (
        '{"text": "a", "more": [{"x": {"y": 1, "y": 2}}]}\n',
        r"line 1: not valid JSON: the key 'y' is there twice in more\[1\]\.x",
    ),
    "twice.json": (
        '[{"text": "a"},\n {"text": "b", "text": "c"}]',
        r"twice\.json: not valid JSON: the key 'text' is there twice in \[2\]",
    ),
    "twice.csv": ("text,answer,text\na,b,c\n", r"twice\.csv, line 1: the column 'text' is there 2 times"),
    "twice.tsv": ("text\ttext\na\tb\n", r"twice\.tsv, line 1: the column 'text' is there 2 times"),
    "half.jsonl": (
        '{"text": "fine \\\\ud83d"}\n{"text": "a\\ud83d"}\n',
        r"half\.jsonl, line 2: not valid JSON: half a character \(a lone surrogate\) in text",
    ),
    "half.json": ('[{"text": "a"}, {"text": ["\\uDE00"]}]', r"half\.json: .* half a character .* in \[2\]\.text\[1\]"),
    "key.jsonl": ('{"text": "a", "\\ude00": 1}\n', r"key\.jsonl, line 1: .* half a character"),
    "talk.csv": (
        'messages\n"[{""role"": ""user"", ""role"": ""user"", ""content"": ""a""}]"\n',
        r"talk\.csv, line 2: messages as JSON: the key 'role' is there twice in \[1\]",
    ),
}


@pytest.mark.parametrize("name", DOUBTFUL)
def test_what_a_file_says_twice_or_by_half_is_refused_with_its_place(name: str, tmp_path: Path) -> None:
    text, message = DOUBTFUL[name]
    (tmp_path / name).write_text(text)
    source = TextSource(str(tmp_path / name), column="messages" if "talk" in name else "text")
    with pytest.raises(SourceError, match=message):
        read_rows(source)


@pytest.mark.parametrize("end", ["parquet", "arrow"])
def test_columns_of_one_name(end: str, tmp_path: Path) -> None:
    path = tmp_path / f"twice.{end}"
    columns = pa.table([["a"], ["b"]], names=["text", "text"])
    if end == "parquet":
        pq.write_table(columns, path)
    else:
        with pa.ipc.new_stream(path, columns.schema) as stream:
            stream.write_table(columns)
    with pytest.raises(SourceError, match=rf"twice\.{end}: the column 'text' is there 2 times"):
        read_rows(TextSource(str(path), column="text"))


def test_half_characters_in_memory() -> None:
    said = [{"role": "user", "content": "a\ud800"}]
    for row, message in (({"text": "a\ud800"}, "in column 'text'"), ({"messages": said}, "in a message")):
        with pytest.raises(
            SourceError, match=rf"the rows given, row 1: half a character \(a lone surrogate\) {message}"
        ):
            read_rows(TextSource([row]))


def test_whole_characters_that_are_written_out_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00 \\\\ud800"}\n')
    (row,) = read_rows(TextSource(str(tmp_path / "a.jsonl")))
    assert row.prompt == "\U0001f600 \\ud800"


def test_columns_without_a_name_may_be_several(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,,\na,,\n")  # as spreadsheets write empty columns
    assert [row.prompt for row in read_rows(TextSource(str(tmp_path / "a.csv")))] == ["a"]
