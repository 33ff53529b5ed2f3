"""Rows as they were read -> encoded rows of the kind that a module asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from vbon_lightning.data.conversations import Chat
from vbon_lightning.data.encoding import (
    encode_comparisons,
    encode_labelled,
    encode_prompts,
    encode_texts,
    hide_marks,
    render_conversations,
)
from vbon_lightning.data.sources import TextRow, TextSource
from vbon_lightning.models import named_token_ids

Kind = Literal["prompts", "text", "labelled", "comparisons"]
"""What rows become: prompts to answer, texts to learn, labelled texts, or pairs of responses to compare."""


def prepare_rows(
    rows: Sequence[TextRow],
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat: Mapping[str, Any] | None = None,
    source: TextSource | None = None,
    key_columns: Sequence[str] = (),
    end_tokens: Sequence[str] = (),
    labels: Sequence[str] = (),
    max_prompt_tokens: int | None = None,
    too_long: Literal["error", "truncate_left"] = "error",
    max_text_tokens: int | None = None,
    long_text: Literal["truncate", "split"] = "truncate",
) -> list[Any]:
    """Render the conversations among rows, and encode all.

    Args:
        rows: The rows.
        kind: What they are for.
        tokenizer: The tokenizer of the model that reads them.
        chat: How conversations are rendered: the options of :class:`~vbon_lightning.data.conversations.Chat`.
        source: Where the rows come from, for messages.
        key_columns: Those of the rows' columns that the reference table's rewards depend on.
        end_tokens: Tokens that end a text beside the EOS, as the vocabulary writes them.
        labels: Names of the labels, for labelled texts.
        max_prompt_tokens: Longest prompt, in tokens.
        too_long: What to do with a longer one.
        max_text_tokens: Longest text, in tokens.
        long_text: What to do with a longer one.

    Raises:
        ConversationError: If there are conversations and no chat template.
        PromptError: Naming a row that cannot be used.
    """
    if any(row.messages is not None for row in rows):
        rows = render_conversations(rows, Chat(tokenizer, chat), whole=kind in ("text", "labelled"), source=source)
    rows = hide_marks(rows, tokenizer)
    if kind == "prompts":
        return encode_prompts(
            rows, tokenizer, source=source, key_columns=key_columns, max_tokens=max_prompt_tokens, too_long=too_long
        )
    if kind == "labelled":
        return encode_labelled(rows, tokenizer, labels=labels, max_tokens=max_text_tokens, long_text=long_text)
    if kind == "comparisons":
        return encode_comparisons(rows, tokenizer, max_tokens=max_text_tokens)
    ends = named_token_ids(tokenizer, end_tokens)
    return encode_texts(rows, tokenizer, ends=ends, max_tokens=max_text_tokens, long_text=long_text)
