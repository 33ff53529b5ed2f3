"""Where text comes from: a file, a directory or a data set of the hub, turned into prompts and responses."""

from __future__ import annotations

import random
import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from vbon_lightning._visible import is_text
from vbon_lightning.data.conversations import (
    MESSAGES,
    ConversationError,
    Message,
    as_conversation,
    split_prompt,
    transcript,
)
from vbon_lightning.data.readers import Part, SourceError, check_columns, open_parts
from vbon_lightning.paths import public_name

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class TextSource:
    """Say where prompts (and responses) come from and which of them to take.

    The steps, in order: read the rows; keep those that ``where`` asks for; make the text (``template``, its columns
    cut to ``field_words``, or ``column``); keep those with ``min_words`` to ``max_words`` words; cut to
    ``first_words``; drop repeats (``unique``); shuffle (``shuffle_seed``); take ``start`` to ``stop``. Without a
    shuffle, reading ends at ``stop``.

    Args:
        path: A ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.txt`` file (each also ``.gz``, ``.bz2``, ``.xz``), a
            ``.parquet`` or ``.arrow`` file, a pattern (``part-*.jsonl``) or a list of them, which are read one after
            another; here, or behind a URL that ``fsspec`` knows (``https://``, ``s3://``, ``hf://``). Or a directory
            saved by ``datasets``, or the name of a data set on the hub. ``package:NAME/file`` is a file inside an
            installed package, and ``${VAR}`` an environment variable. In Python also rows in memory: a
            ``datasets.Dataset`` or a list of mappings.
        name: Configuration of the data set, for the hub.
        split: Split of the data set; single files have none.
        column: Column that holds the text, or a conversation as a list of messages (``{role, content}``); ``text`` for
            the lines of a ``.txt`` file. Found by default (:func:`find_columns`): ``text``, ``prompt``, ``messages`` or
            the only one that will do; none where the conversations of ``response_column`` and ``rejected_column`` hold
            the prompt that they share.
        response_column: Column that holds the response, to fine-tune on pairs; ``completion`` or ``chosen`` where the
            prompt's column was found.
        rejected_column: Column that holds a worse response than ``response_column``, to learn a reward from
            preferences; ``rejected`` where the prompt's column was found.
        label_column: Column that holds the label of the text, with its response where there is one, to learn a reward
            by classification.
        template: Text with ``{column}`` in braces to be filled in, in place of ``column``;
            ``{{`` and ``}}`` are literal braces. Special tokens that it spells itself are meant.
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
        rendered: Whether special tokens that the columns spell (``<|im_end|>``) are meant, as where a chat template
            rendered them before. By default they are text like any other.
        streaming: Read training rows as they are needed, in the order of the file, so that memory does not grow with
            it: an epoch then has no known length, ``unique`` and ``shuffle_seed`` are refused, and a row that cannot be
            used is found when its turn comes.
        buffer_size: Rows that are shuffled among each other, where they are streamed.

    Raises:
        SourceError: for numbers that make no sense.
    """

    path: str | list[str] | list[dict[str, Any]]
    name: str | None = None
    split: str = "train"
    column: str | None = None
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
    rendered: bool = False
    streaming: bool = False
    buffer_size: int = 1000

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
        if self.buffer_size < 1:
            raise SourceError(f"buffer_size must be at least 1, got {self.buffer_size}")
        for option, usual in (("unique", False), ("shuffle_seed", None)):
            if self.streaming and getattr(self, option) is not usual:
                raise SourceError(f"{option} needs all rows at once, which streaming never has: leave out one of them")

    @classmethod
    def of(cls, rows: TextSource | Dataset | Sequence[Mapping[str, Any]], **options: Any) -> TextSource:
        """Make a source of rows in memory; one that is a source already stays as it is.

        Args:
            rows: A ``datasets.Dataset``, a list of mappings, or a source.
            **options: What else a source takes, such as ``column``.

        Raises:
            SourceError: If it is none of these, or empty.
        """
        if isinstance(rows, TextSource):
            return rows
        if not hasattr(rows, "column_names") and not (
            isinstance(rows, Sequence) and all(isinstance(row, Mapping) for row in rows)
        ):
            raise SourceError(
                f"expected a TextSource, a datasets.Dataset or a list of mappings, got {type(rows).__name__}"
            )
        if not len(rows):
            raise SourceError("there are no rows")
        return cls(rows, **options)  # type: ignore[arg-type]

    @property
    def called(self) -> str:
        """What messages call the source."""
        return ", ".join(self._files) or f"{len(self.path)} rows in memory"

    @property
    def _files(self) -> list[str]:
        """The paths; none of rows in memory."""
        given = [self.path] if isinstance(self.path, str) else self.path
        return [one for one in given if isinstance(one, str)] if isinstance(given, list) else []

    @property
    def public_name(self) -> tuple[str, bool]:
        """Return what others may read of where the rows come from, and whether that is a name of the hub."""
        if isinstance(self.path, str):
            return public_name(self.path)
        return ", ".join(public_name(name)[0] for name in self._files) or self.called, False

    def settings(self) -> dict[str, Any]:
        """Return what says which rows these are, in plain values; rows in memory by their number."""
        said = vars(self) | {"path": self.path if isinstance(self.path, str) else self._files or self.called}
        if not self.rendered:  # as in checkpoints that know no such option
            del said["rendered"]
        return said


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
    marked: bool = False
    """Whether special tokens that the texts spell are meant, those of ``fields`` aside."""
    fields: list[tuple[int, int]] | None = None
    """What of ``text`` a template's columns wrote, as characters; None where all of it may spell special tokens."""
    hidden: Mapping[int, str] = {}
    """Private characters that stand for those that begin a special token which is only text, for ``str.translate``."""
    spans: list[tuple[int, int]] | None = None
    """Of a rendered conversation, where the assistant's turns stand in ``text``, as characters."""
    where: str | None = None
    """The file that the row is in, where its source has several."""


def as_row(prompt: str | Sequence[Message], place: int) -> TextRow:
    """Make a row of a prompt that was given by itself.

    Args:
        prompt: Text, or a conversation as a list of messages.
        place: Its row, for messages of errors.
    """
    if isinstance(prompt, str):
        return TextRow(place, prompt, None, prompt)
    text = transcript(prompt)
    return TextRow(place, text, None, text, messages=list(prompt))


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
    rows = _text_rows(find_columns(source), kept, columns)
    if source.shuffle_seed is not None:
        shuffled = list(rows)
        random.Random(source.shuffle_seed).shuffle(shuffled)
        rows = iter(shuffled)
    taken = list(islice(rows, source.start, source.stop))
    if not taken:
        raise SourceError(
            f"{source.called}: no row from start={source.start} to stop={source.stop}: "
            f"{kept['read']} rows read, {kept['where']} left by where={source.where}, "
            f"{kept['words']} left by min_words={source.min_words}, max_words={source.max_words}, "
            f"{kept['unique']} left by unique={source.unique}"
        )
    return taken


def stream_rows(source: TextSource, columns: Sequence[str] = ()) -> Iterator[TextRow]:
    """Read a source's rows one by one, in their order.

    Args:
        source: where they come from and which to take.
        columns: what else to read of each row, as it stands.

    Raises:
        SourceError: as :func:`read_rows`, when the row's turn comes.
    """
    return islice(_text_rows(find_columns(source), Counter(), columns), source.start, source.stop)


def find_columns(source: TextSource) -> TextSource:
    """Name the columns of a source that does not say where its text is, by what its first row holds.

    These are looked for in turn: ``text``; ``prompt``, with ``completion``, or ``chosen`` and ``rejected``, beside it;
    ``chosen`` and ``rejected`` that are whole conversations; ``messages``; the only column that holds a conversation;
    the only column that holds text.

    Args:
        source: the source; one that names a column or a template is returned as it is.

    Raises:
        SourceError: if the source cannot be read, or nothing says which column it is.
    """
    if source.column is not None or source.template is not None:
        return source
    (record,) = first_records(source, 1)
    compares = {"chosen", "rejected"} <= record.keys()
    usual = "chosen" if compares else "completion" if "completion" in record else None
    answer, worse = source.response_column or usual, source.rejected_column or ("rejected" if compares else None)
    answered = replace(source, response_column=answer, rejected_column=worse)
    talks = [column for column, value in record.items() if _talk(value) is not None]
    if _opens(record, answer) and _opens(record, worse):
        return answered  # the prompt is what the two share
    for column, found in (("text", source), ("prompt", answered), (MESSAGES, source)):
        if column in record:
            return replace(found, column=column)
    for columns in (talks, [column for column, value in record.items() if isinstance(value, str)]):
        if len(columns) == 1:
            return replace(source, column=columns[0])
    raise SourceError(
        f"{source.called}: which column holds the text, or the conversation? Name it as `column`; the columns are "
        f"{', '.join(map(repr, record))}"
    )


def first_records(source: TextSource, count: int) -> list[dict[str, Any]]:
    """Return the first rows of a source as they stand, with all their columns and whatever the source asks for.

    Args:
        source: Where they come from.
        count: How many, at most.

    Raises:
        SourceError: For a source that cannot be found or read, or that holds nothing.
    """
    (first, *_) = _parts(source)
    found = [record for _, record in islice(first.rows({}), count)]
    if not found:
        raise SourceError(f"{first.what} is empty")
    return found


def _talk(value: Any) -> list[Message] | None:
    try:
        return as_conversation(value)
    except ConversationError:
        return None


def _opens(record: Mapping[str, Any], column: str | None) -> bool:
    """Say whether a column holds a whole conversation, rather than an answer."""
    messages = None if column is None else _talk(record.get(column))
    return messages is not None and messages[0]["role"] != "assistant"


def _parts(source: TextSource) -> list[Part]:
    return open_parts(source.path, name=source.name, split=source.split, streaming=source.streaming)


def _text_rows(source: TextSource, kept: Counter[str], columns: Sequence[str]) -> Iterator[TextRow]:
    """Yield the rows before shuffle and slice, and count how many passed each filter."""
    fields = [] if source.template is None else _template_fields(source.template)
    texts = [source.column] if source.template is None else fields
    texts = [*texts, source.response_column, source.rejected_column, source.label_column, *(source.where or {})]
    wanted = [column for column in columns if column != MESSAGES]  # which a conversation brings by itself
    needed = {column: "" for column in texts if column is not None}
    needed |= dict.fromkeys(wanted, ", which the reward reads")
    needed |= dict.fromkeys(fields, ", which the template names")
    parts, seen = _parts(source), set[str]()
    for part in parts:
        for number, record in part.rows(needed):
            place = f"{part.what}, {part.unit} {number}"
            check_columns(place, record, needed)
            kept["read"] += 1
            if not all(_equal(record[column], value) for column, value in (source.where or {}).items()):
                continue
            kept["where"] += 1
            try:
                talk = _conversation(source, record)
            except ConversationError as problem:
                raise SourceError(f"{place}: {problem}") from problem
            if MESSAGES in columns and talk is None:
                raise SourceError(f"{place}: there are no messages, which the reward reads: the prompt is plain text")
            text, filled = _filled(source, record, fields, place) if talk is None else (transcript(talk[0]), None)
            for turns in talk or ():
                if turns is not None and not is_text(transcript(turns)):
                    raise SourceError(f"{place}: half a character (a lone surrogate) in a message")
            words = len(text.split())
            if words < (source.min_words or 0) or (source.max_words is not None and words > source.max_words):
                continue
            kept["words"] += 1
            if not words:
                raise SourceError(f"{place}: the prompt is empty; fill it, or set min_words to leave out such rows")
            if talk is not None and source.first_words is not None:
                raise SourceError(f"{place}: first_words cuts texts, and this is a conversation: leave it out")
            if talk is not None and source.rendered:
                raise SourceError(f"{place}: rendered is said of text, and this is a conversation: leave it out")
            prompt = _first_words(text, words, source.first_words, place)
            if source.unique and prompt in seen:
                continue
            if source.unique:
                seen.add(prompt)
            kept["unique"] += 1
            response, rejected = (
                None if talk is not None else _response(record, column, place)
                for column in (source.response_column, source.rejected_column)
            )
            messages, answer, worse = talk or (None, None, None)
            yield TextRow(
                number,
                prompt,
                response,
                text,
                rejected,
                label=None if source.label_column is None else _label(record, source.label_column, place),
                columns={column: record[column] for column in wanted} if columns else None,
                messages=messages,
                answer=answer,
                worse=worse,
                marked=source.rendered or filled is not None,
                fields=None if source.rendered else filled,
                where=part.what if len(parts) > 1 else None,
            )


def _filled(
    source: TextSource, record: dict[str, Any], fields: Sequence[str], place: str
) -> tuple[str, list[tuple[int, int]] | None]:
    """Return the text of a row, its column or the template filled in; of a template also where its columns stand."""
    if source.template is None:
        assert source.column is not None
        return _text(record[source.column], source.column, place), None
    filled = {field: _field(record[field], field, place) for field in fields}
    for field, most in (source.field_words or {}).items():
        if (words := len(filled[field].split())) > most:
            filled[field] = _first_words(filled[field], words, most, place)
    text, spans = "", []
    for written, column, _, _ in string.Formatter().parse(source.template):
        text += written
        if column is not None:
            spans.append((len(text), len(text) + len(filled[column])))
            text += filled[column]
    return text, spans


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


def _label(record: dict[str, Any], column: str, place: str) -> str | int:
    value = record[column]
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
    if not is_text(value):
        raise SourceError(f"{place}: half a character (a lone surrogate) in column {column!r}: {value[:80]!r}")
    return value


def _field(value: Any, column: str, place: str) -> str:
    # Numbers read well inside a template; None or a list there is a mistake.
    return str(value) if isinstance(value, int | float) else _text(value, column, place)


def _equal(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, list) and any(_equal(value, one) for one in wanted):
        return True
    # CSV knows only text: there the number 1 is "1".
    return bool(value == wanted) or (isinstance(value, str) and value == str(wanted))
