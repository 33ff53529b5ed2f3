"""Which column of somebody's data is the prompt, and which the response: by their names and by what they hold."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

from vbon_lightning.data.conversations import as_conversation
from vbon_lightning.data.sources import SourceError

CONVERSATIONS = ("messages", "conversation", "conversations", "prompt")
PROMPTS = ("prompt", "question", "instruction", "query", "problem", "post", "input")
TEXTS = ("text", "content", "document", "article", "review", "sentence", "body")
RESPONSES = ("response", "completion", "answer", "output", "summary", "target", "solution", "chosen")

LONG_TEXT = 16
"""Words from which on a text is one to be continued rather than a prompt."""
FIRST_WORDS = 8
"""Words of such a text that make the prompt."""


class Layout(NamedTuple):
    """What the columns of a source are."""

    kind: str
    """``conversations``, ``prompts``, or ``texts`` to be continued."""
    column: str
    response: str | None
    """The column that holds a response, or the right answer."""
    columns: list[str]
    """All columns."""


def layout_of(records: Sequence[dict[str, Any]], prompt: str | None = None, response: str | None = None) -> Layout:
    """Tell the prompt's column and the response's from the first rows of a source.

    Args:
        records: The rows, all columns, at least one.
        prompt: The prompt's column, where it is known.
        response: The response's column, where it is known.

    Raises:
        SourceError: If there is no such column, or nothing tells which it is.
    """
    columns = list(dict.fromkeys(name for record in records for name in record))
    for option, named in (("--prompt_column", prompt), ("--response_column", response)):
        if named is not None and named not in columns:
            raise SourceError(f"{option} {named!r}: there is no such column; the columns are {_listed(columns)}")
    talks = [name for name in columns if as_conversation(records[0].get(name)) is not None]
    texts = [name for name in columns if all(isinstance(record.get(name), str) for record in records)]
    column = prompt or _first(CONVERSATIONS, talks) or _first(PROMPTS, texts) or _first(TEXTS, texts)
    if column is None and len(texts) == 1:
        column = texts[0]
    if column is None:
        raise SourceError(
            f"nothing tells which column is the prompt: name it with --prompt_column; the columns are "
            f"{_listed(columns)}, of which {_listed(texts + talks) or 'none'} hold text or messages"
        )
    if column in talks:
        kind = "conversations"
    elif column in texts:
        words = median(len(record[column].split()) for record in records)
        kind = "texts" if column in TEXTS and words >= LONG_TEXT else "prompts"
    else:
        raise SourceError(f"column {column!r} holds neither text nor messages in all of the first rows")
    others = [name for name in columns if name != column]
    return Layout(kind, column, response or _first(RESPONSES, others), columns)


def _first(names: Sequence[str], among: Sequence[str]) -> str | None:
    known = {name.lower(): name for name in reversed(among)}
    return next((known[name] for name in names if name in known), None)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))
