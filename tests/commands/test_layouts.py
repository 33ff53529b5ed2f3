"""Which column is the prompt and which the response."""

from __future__ import annotations

from typing import Any

import pytest

from vbon_lightning.commands.layouts import layout_of
from vbon_lightning.data.sources import SourceError

TALK = [{"role": "user", "content": "Hello"}]
LONG = "word " * 20


@pytest.mark.parametrize(
    ("record", "kind", "column", "response"),
    [
        ({"id": 1, "question": "a", "answer": "b"}, "prompts", "question", "answer"),
        ({"Prompt": "a", "Completion": "b"}, "prompts", "Prompt", "Completion"),
        ({"prompt": TALK, "chosen": TALK, "rejected": TALK}, "conversations", "prompt", "chosen"),
        ({"text": "a", "messages": TALK}, "conversations", "messages", None),
        ({"text": "a b"}, "prompts", "text", None),
        ({"text": LONG, "label": 1}, "texts", "text", None),
        ({"prompt": LONG}, "prompts", "prompt", None),  # a prompt by its name is one, however long
        ({"xyz": "a", "number": 2}, "prompts", "xyz", None),
    ],
    ids=str,
)
def test_told_from_names_and_values(record: dict[str, Any], kind: str, column: str, response: str | None) -> None:
    found = layout_of([record, record])
    assert (found.kind, found.column, found.response, found.columns) == (kind, column, response, list(record))


def test_what_is_named_wins() -> None:
    record = {"prompt": "a", "title": "b", "response": "c", "note": "d"}
    found = layout_of([record], "title", "note")
    assert (found.column, found.response) == ("title", "note")


@pytest.mark.parametrize(
    ("records", "named", "message"),
    [
        ([{"one": "a", "two": "b"}], (None, None), "which column is the prompt: name it with --prompt_column.*'one', "),
        ([{"one": 1}], (None, None), "of which none hold text"),
        ([{"prompt": "a"}], ("promt", None), "--prompt_column 'promt': there is no such column"),
        ([{"prompt": "a"}], (None, "answer"), "--response_column 'answer': there is no such column"),
        ([{"prompt": "a", "n": 1}], ("n", None), "'n' holds neither text nor messages"),
        ([{"prompt": "a"}, {"prompt": None}], (None, None), "which column is the prompt"),
    ],
)
def test_what_cannot_be_told(records: list[dict[str, Any]], named: tuple[Any, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        layout_of(records, *named)
