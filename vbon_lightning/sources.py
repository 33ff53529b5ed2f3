"""Where text comes from: a file, a directory or a data set of the hub, turned into prompts and responses."""

from __future__ import annotations

import csv
import random
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from vbon_lightning._json_lines import read_json_lines, read_lines
from vbon_lightning.conversations import ConversationError, Message, as_conversation, split_prompt, transcript
from vbon_lightning.paths import looks_like_path, resolve_path

_Row = tuple[int, dict[str, Any]]


class SourceError(ValueError):
    """A text source that is missing, or that holds something other than what was asked for."""


@dataclass
class TextSource:
    """Say where prompts (and responses) come from and which of them to take.

    The steps, in order: read the rows; keep those that ``where`` asks for; make the text (``template``, its columns
    cut to ``field_words``, or ``column``); keep those with ``min_words`` to ``max_words`` words; cut to
    ``first_words``; drop repeats (``unique``); shuffle (``shuffle_seed``); take ``start`` to ``stop``. Without a
    shuffle, reading ends at ``stop``.

    Args:
        path: A local ``.jsonl``, ``.csv``, ``.txt`` (each also ``.gz``) or ``.parquet`` file, a directory
            saved by ``datasets``, or the name of a data set on the hub. ``package:NAME/file`` is a file
            inside an installed package, and ``${VAR}`` an environment variable.
        name: Configuration of the data set, for the hub.
        split: Split of the data set; single files have none.
        column: Column that holds the text, or a conversation as a list of messages (``{role, content}``); ``text`` for
            the lines of a ``.txt`` file. None where the conversations of ``response_column`` and ``rejected_column``
            hold the prompt that they share.
        response_column: Column that holds the response, to fine-tune on pairs.
        rejected_column: Column that holds a worse response than ``response_column``, to learn a reward from
            preferences.
        label_column: Column that holds the text's label, to learn a reward by classification.
        template: Text with ``{column}`` in braces to be filled in, in place of ``column``;
            ``{{`` and ``}}`` are literal braces.
        field_words: Cut columns of the template to so many words before they are filled in, so that what the
            template has behind a long column stays.
        first_words: Number of words of the text that make the prompt, None for the whole text.
        where: Keep rows whose column equals the value, or one of a list of values, for each column named.
        start: First row to take, counted from 0 after filtering and shuffling.
        stop: Row to stop before, None to take all.
        shuffle_seed: Seed to shuffle the rows with before the slice, None to keep their order.
        unique: Whether to drop rows whose prompt occurred before.
        min_words: Keep rows whose text has at least so many words.
        max_words: Keep rows whose text has at most so many words.

    Raises:
        SourceError: for numbers that make no sense.
    """

    path: str
    name: str | None = None
    split: str = "train"
    column: str | None = "text"
    response_column: str | None = None
    rejected_column: str | None = None
    label_column: str | None = None
    template: str | None = None
    field_words: dict[str, int] | None = None
    first_words: int | None = None
    where: dict[str, Any] | None = None
    start: int = 0
    stop: int | None = None
    shuffle_seed: int | None = None
    unique: bool = False
    min_words: int | None = None
    max_words: int | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense."""
        if self.start < 0:
            raise SourceError(f"start must not be negative, got {self.start}")
        if self.stop is not None and self.stop <= self.start:
            raise SourceError(f"start={self.start}, stop={self.stop} take no rows; stop must be larger than start")
        if self.first_words is not None and self.first_words < 1:
            raise SourceError(f"first_words must be at least 1, got {self.first_words}")
        if self.field_words:
            fields = [] if self.template is None else _template_fields(self.template)
            for column, words in self.field_words.items():
                if column not in fields:
                    raise SourceError(
                        f"field_words names {column!r}, which is no column of the template {self.template!r}"
                    )
                if words < 1:
                    raise SourceError(f"field_words must be at least 1, got {words} for {column!r}")
        if self.min_words is not None and self.max_words is not None and self.min_words > self.max_words:
            raise SourceError(f"min_words={self.min_words} is larger than max_words={self.max_words}")


class TextRow(NamedTuple):
    """A prompt, its response if there is one, and where it stood."""

    row: int
    """The row (or line of the file), counted from 1, for messages."""
    prompt: str
    """The prompt as text."""
    response: str | None
    """The response as text; None without a response column."""
    text: str
    """The whole text, of which the prompt is the first words where ``first_words`` cuts it."""
    rejected: str | None = None
    """A worse response as text; None without a column of them."""
    label: str | int | None = None
    """The text's label as it stands in the source; None without a column of them."""
    columns: dict[str, Any] | None = None
    """The columns that were asked for beside the text, by name."""
    messages: list[Message] | None = None
    """The prompt, or the whole conversation, as messages where the column has some; ``prompt`` is their transcript."""
    answer: list[Message] | None = None
    """The response as messages, where there is one and the prompt is messages."""
    worse: list[Message] | None = None
    """The worse response as messages."""
    rendered: bool = False
    """Whether the texts are what a chat template made of messages, special tokens written out."""
    spans: list[tuple[int, int]] | None = None
    """Of a rendered conversation, where the assistant's turns stand in ``text``, as characters."""


def read_rows(source: TextSource, columns: Sequence[str] = ()) -> list[TextRow]:
    """Read the prompts (and responses) of a source.

    Args:
        source: where they come from and which to take.
        columns: what else to read of each row, as it stands: what a reward asks for.

    Returns:
        The rows, at least one.

    Raises:
        SourceError: for a source that cannot be found or read, a column it lacks, a value that is not
            text, an empty prompt or response, a text with fewer than ``first_words`` words, no row left.
    """
    kept: Counter[str] = Counter()
    rows = _text_rows(source, kept, columns)
    if source.shuffle_seed is not None:
        shuffled = list(rows)
        random.Random(source.shuffle_seed).shuffle(shuffled)
        rows = iter(shuffled)
    taken = list(islice(rows, source.start, source.stop))
    if not taken:
        raise SourceError(
            f"{source.path}: no row from start={source.start} to stop={source.stop}: "
            f"{kept['read']} rows read, {kept['where']} left by where={source.where}, "
            f"{kept['words']} left by min_words={source.min_words}, max_words={source.max_words}, "
            f"{kept['unique']} left by unique={source.unique}"
        )
    return taken


def _text_rows(source: TextSource, kept: Counter[str], columns: Sequence[str]) -> Iterator[TextRow]:
    """Yield the rows before shuffle and slice, and count how many passed each filter."""
    fields = _template_fields(source.template) if source.template is not None else []
    texts = fields if source.template is not None else [source.column]
    named = (source.response_column, source.rejected_column, source.label_column)
    texts = texts + [column for column in named if column]
    texts = [column for column in texts if column is not None]
    wanted = [name for name in columns if name != "messages"]  # which a conversation brings by itself
    needed = list(dict.fromkeys([*texts, *(source.where or {}), *wanted]))
    where, unit, records = _open(source, needed)
    seen: set[str] = set()
    for number, record in records:
        place = f"{where}, {unit} {number}"
        for column in needed:
            if column not in record:
                raise SourceError(f"{place}: {_missing(source, column, list(record), columns)}")
        kept["read"] += 1
        if not all(_equal(record[column], value) for column, value in (source.where or {}).items()):
            continue
        kept["where"] += 1
        try:
            talk = _conversation(source, record)
        except ConversationError as problem:
            raise SourceError(f"{place}: {problem}") from problem
        if "messages" in columns and talk is None and "messages" not in record:
            raise SourceError(f"{place}: there are no messages, which the reward reads: the prompt is plain text")
        if source.template is not None:
            filled = {field: _field(record[field], field, place) for field in fields}
            for field, most in (source.field_words or {}).items():
                if (words := len(filled[field].split())) > most:
                    filled[field] = _first_words(filled[field], words, most, place)
            text = source.template.format(**filled)
        elif talk is not None:
            text = transcript(talk[0])
        else:
            assert source.column is not None
            text = _text(record[source.column], source.column, place)
        words = len(text.split())
        if words < (source.min_words or 0) or (source.max_words is not None and words > source.max_words):
            continue
        kept["words"] += 1
        if not words:
            raise SourceError(f"{place}: the prompt is empty; fill it, or set min_words to leave out such rows")
        if talk is not None and source.first_words is not None:
            raise SourceError(f"{place}: first_words cuts texts, and this is a conversation: leave it out")
        prompt = _first_words(text, words, source.first_words, place)
        if source.unique:
            if prompt in seen:
                continue
            seen.add(prompt)
        kept["unique"] += 1
        response, rejected = (
            None if talk is not None else _response(record, column, place)
            for column in (source.response_column, source.rejected_column)
        )
        label = None if source.label_column is None else _label(record[source.label_column], source.label_column, place)
        beside = {column: record[column] for column in wanted} if columns else None
        if talk is None:
            yield TextRow(number, prompt, response, text, rejected, label, beside)
        else:
            messages, answer, worse = talk
            yield TextRow(number, prompt, None, text, None, label, beside, messages, answer, worse)


def _conversation(
    source: TextSource, record: dict[str, Any]
) -> tuple[list[Message], list[Message] | None, list[Message] | None] | None:
    """Return the prompt's messages, the answer's and the worse answer's; None where the column holds text."""
    if source.template is not None:
        return None
    sides = [
        None if column is None else _turns(record[column])
        for column in (source.response_column, source.rejected_column)
    ]
    if source.column is None:
        if sides[0] is None or sides[1] is None:
            raise ConversationError(
                "without a column the prompt is what chosen and rejected conversations share: name both as "
                "response_column and rejected_column"
            )
        return split_prompt(sides[0], sides[1])  # type: ignore[return-value]
    messages = as_conversation(record[source.column])
    return None if messages is None else (messages, sides[0], sides[1])


def _turns(value: Any) -> list[Message] | None:
    return [{"role": "assistant", "content": value}] if isinstance(value, str) else as_conversation(value)


def _response(record: dict[str, Any], column: str | None, place: str) -> str | None:
    if column is None:
        return None
    response = _text(record[column], column, place)
    if not response.strip():
        raise SourceError(f"{place}: the response (column {column!r}) is empty")
    return response


def _label(value: Any, column: str, place: str) -> str | int:
    if isinstance(value, bool) or (isinstance(value, float) and value == int(value)):
        return int(value)
    if not isinstance(value, (str, int)) or value == "":
        raise SourceError(f"{place}: the label (column {column!r}) must be a number or a name, got {value!r}")
    return value


def _first_words(text: str, words: int, count: int | None, place: str) -> str:
    if count is None:
        return text
    if words < count:
        raise SourceError(
            f"{place}: the text has {words} words, first_words={count} needs more; "
            f"set min_words to {count} or more to leave out such rows"
        )
    # Not split and join: the white space between the words stays as it is.
    match = re.match(rf"\s*(\S+(?:\s+\S+){{{count - 1}}})", text)
    assert match is not None
    return match[1]


def _template_fields(template: str) -> list[str]:
    try:
        parsed = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as problem:
        raise SourceError(
            f"the template {template!r} is malformed ({problem}); "
            "write {column} for a column, {{ and }} for braces"
        ) from problem
    for _, field, form, conversion in parsed:
        if not field or re.search(r"[.\[\]]", field) or field.isdigit() or form or conversion:
            raise SourceError(
                f"the template {template!r} may hold plain column names in braces, nothing else; "
                f"got {field!r} with format {form!r} and conversion {conversion!r}"
            )
    return list(dict.fromkeys(str(part[1]) for part in parsed))


def _text(value: Any, column: str, place: str) -> str:
    if not isinstance(value, str):
        raise SourceError(f"{place}: column {column!r} must hold text, got {value!r} ({type(value).__name__})")
    return value


def _field(value: Any, column: str, place: str) -> str:
    # Numbers read well inside a template; None or a list there is a mistake.
    return str(value) if isinstance(value, int | float) else _text(value, column, place)


def _equal(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, list) and any(_equal(value, one) for one in wanted):
        return True
    # CSV knows only text: there the number 1 is "1".
    return bool(value == wanted) or (isinstance(value, str) and value == str(wanted))


def _missing(source: TextSource, column: str, columns: list[str], asked: Sequence[str] = ()) -> str:
    named = source.template is not None and column in _template_fields(source.template)
    by = ", which the template names" if named else ", which the reward reads" if column in asked else ""
    return f"there is no column {column!r}{by}; the columns are {', '.join(map(repr, columns))}"


def _open(source: TextSource, needed: list[str]) -> tuple[str, str, Iterator[_Row]]:
    """Return what to call the source and its rows in messages, and its rows."""
    try:
        resolved = str(resolve_path(source.path))
    except (ValueError, OSError, ImportError) as problem:
        raise SourceError(f"{source.path}: {problem}") from problem
    path = Path(resolved).expanduser()
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if path.is_file() or (kind in _READERS and not path.is_dir()):
        if kind not in _READERS or (kind == ".parquet" and path.suffix == ".gz"):
            raise SourceError(f"file {path}: expected one of {', '.join(_READERS)} by name, got {path.name!r}")
        if not path.is_file():
            raise SourceError(f"file {path} does not exist")
        unit = "row" if kind == ".parquet" else "line"
        return f"file {path}", unit, _READERS[kind](path, needed, source)
    if not path.is_dir() and looks_like_path(resolved):
        raise SourceError(f"{path} does not exist: there is neither a file nor a directory of that name")
    return (
        f"data set {source.path}",
        "row",
        _data_set_rows(path if path.is_dir() else resolved, needed, source),
    )


def _text_lines(path: Path, needed: list[str], source: TextSource) -> Iterator[_Row]:
    for number, line in read_lines(path, SourceError):
        if line.strip():
            yield number, {"text": line}


def _json_rows(path: Path, needed: list[str], source: TextSource) -> Iterator[_Row]:
    return read_json_lines(path, SourceError)


def _csv_rows(path: Path, needed: list[str], source: TextSource) -> Iterator[_Row]:
    lines = (line + "\n" for _, line in read_lines(path, SourceError))
    reader = csv.reader(lines, strict=True)
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses texts over 128 KiB
    try:
        header = next(reader, None)
        if header is None:
            raise SourceError(f"file {path} is empty; expected a line with the column names")
        start = reader.line_num + 1
        for values in reader:
            if values:
                if len(values) != len(header):
                    raise SourceError(
                        f"file {path}, line {start}: expected {len(header)} fields as in the first line, "
                        f"got {len(values)}"
                    )
                yield start, dict(zip(header, values, strict=True))
            start = reader.line_num + 1
    except csv.Error as problem:
        raise SourceError(f"file {path}, line {reader.line_num}: not valid CSV: {problem}") from problem
    finally:
        csv.field_size_limit(limit)


def _parquet_rows(path: Path, needed: list[str], source: TextSource) -> Iterator[_Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _check_columns(f"file {path}", file.schema_arrow.names, needed, source)
            batches = file.iter_batches(columns=needed or None)
            yield from enumerate((record for batch in batches for record in batch.to_pylist()), start=1)
    except (pa.ArrowException, OSError) as problem:
        raise SourceError(f"file {path}: not a readable Parquet file: {problem}") from problem


def _data_set_rows(path: Path | str, needed: list[str], source: TextSource) -> Iterator[_Row]:
    import datasets

    what = f"data set {source.path}"
    saved = isinstance(path, Path) and any(
        (path / file).exists() for file in ("dataset_dict.json", "state.json", "dataset_info.json")
    )
    try:
        if saved:
            data = datasets.load_from_disk(str(path))
        else:
            data = datasets.load_dataset(str(path), source.name, split=source.split)
    except Exception as problem:  # the library raises many kinds, and all mean the same here
        raise SourceError(
            f"{what}: cannot be loaded (name={source.name!r}, split={source.split!r}): "
            f"{type(problem).__name__}: {problem}. "
            "Expected a local file, a directory saved by datasets, or a "
            "data set of the hub that can be reached or is cached"
        ) from problem
    if isinstance(data, datasets.DatasetDict):
        if source.split not in data:
            raise SourceError(f"{what}: there is no split {source.split!r}; the splits are {', '.join(data)}")
        data = data[source.split]
    _check_columns(what, data.column_names, needed, source)
    data = data.select_columns(needed) if needed else data
    batches = data.iter(batch_size=1000)  # many times as fast as row by row
    values = ((list(batch), row) for batch in batches for row in zip(*batch.values(), strict=True))
    yield from enumerate((dict(zip(names, row, strict=True)) for names, row in values), start=1)


def _check_columns(what: str, columns: list[str], needed: list[str], source: TextSource) -> None:
    for column in needed:
        if column not in columns:
            raise SourceError(f"{what}: {_missing(source, column, columns)}")


_READERS: dict[str, Callable[[Path, list[str], TextSource], Iterator[_Row]]] = {
    ".jsonl": _json_rows,
    ".csv": _csv_rows,
    ".txt": _text_lines,
    ".parquet": _parquet_rows,
}


def first_records(source: TextSource, count: int) -> list[dict[str, Any]]:
    """Return the first rows of a source as they stand, with all their columns and whatever the source asks for.

    Args:
        source: Where they come from.
        count: How many, at most.

    Raises:
        SourceError: For a source that cannot be found or read, or that holds nothing.
    """
    where, _, records = _open(source, [])
    found = [record for _, record in islice(records, count)]
    if not found:
        raise SourceError(f"{where} is empty")
    return found
