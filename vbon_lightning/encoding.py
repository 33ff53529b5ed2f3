"""Rows of text -> token ids -> padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vbon_lightning.reference_table import prompt_key
from vbon_lightning.sources import TextRow, TextSource
from vbon_lightning.types import PromptBatch, TextBatch


class PromptError(ValueError):
    """A prompt or text cannot be used; the message names its row."""


class EncodedPrompt(NamedTuple):
    """A prompt as token ids."""

    tokens: list[int]
    text: str
    key: str
    """The reference table's key: a hash of ``tokens``."""


class EncodedText(NamedTuple):
    """A text for supervised fine-tuning as token ids."""

    tokens: list[int]
    context: int
    """Number of leading tokens that are given and not learnt."""


def encode_prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encode a prompt with the tokenizer's own opening tokens (BOS), without an EOS it would close texts with.

    An EOS that the prompt itself ends with, as in a template, stays.
    """
    tokens = list(tokenizer(text, add_special_tokens=True)["input_ids"])
    if len(tokens) > 1 and tokens[-1] == tokenizer.eos_token_id:
        bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if tokens[-len(bare) :] != bare or not bare:
            tokens.pop()
    return tokens


def encode_prompts(
    rows: Sequence[TextRow],
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: TextSource | None = None,
    max_tokens: int | None = None,
    too_long: Literal["error", "truncate_left"] = "error",
) -> list[EncodedPrompt]:
    """Encode prompts, refusing or shortening those over ``max_tokens``.

    Raises:
        PromptError: Naming the row of a prompt that is too long or has no tokens.
    """
    if max_tokens is not None and max_tokens < 1:
        raise PromptError(f"data.max_prompt_tokens must be at least 1, got {max_tokens}")
    where = "" if source is None else f"{source.path}, "
    encoded = []
    for row in rows:
        tokens, text = encode_prompt_ids(tokenizer, row.prompt), row.prompt
        if not tokens:
            raise PromptError(f"{where}row {row.row}: the prompt {row.prompt!r} has no tokens")
        if max_tokens is not None and len(tokens) > max_tokens:
            if too_long == "error":
                raise PromptError(
                    f"{where}row {row.row}: the prompt has {len(tokens)} tokens, over data.max_prompt_tokens="
                    f"{max_tokens}: raise it, set data.too_long=truncate_left, or shorten the prompt"
                )
            opening = tokens[:1] if tokens[0] == tokenizer.bos_token_id else []
            if len(opening) == max_tokens:
                raise PromptError(
                    f"{where}row {row.row}: data.max_prompt_tokens={max_tokens} leaves nothing of the prompt "
                    "but its BOS token: raise it"
                )
            tokens = opening + tokens[len(tokens) - max_tokens + len(opening) :]
            text = str(tokenizer.decode(tokens, skip_special_tokens=True))
        encoded.append(EncodedPrompt(tokens, text, prompt_key(tokens)))
    return encoded


def encode_texts(
    rows: Sequence[TextRow],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int | None = None,
    long_text: Literal["truncate", "split"] = "truncate",
) -> list[EncodedText]:
    """Encode texts for supervised fine-tuning, each closed by the EOS unless it is cut.

    A prompt/response pair is learnt on the response and its EOS only; plain text on all but its first token.
    Pieces of a split text share one token, the last of one piece and the first of the next, so that every token
    but the text's first is learnt once.

    Raises:
        PromptError: If the tokenizer has no EOS, a text has no tokens, or a prompt leaves no room for its
            response.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise PromptError("the tokenizer has no EOS token: a model trained with it would never learn to stop")
    if max_tokens is not None and max_tokens < 2:
        raise PromptError(f"data.max_text_tokens must be at least 2, got {max_tokens}")
    encoded = []
    for row in rows:
        if row.response is None:
            tokens = [*encode_prompt_ids(tokenizer, row.text), eos]
            context = 1
            if len(tokens) == 1:
                raise PromptError(f"row {row.row}: the text {row.text!r} has no tokens")
        else:
            prompt = encode_prompt_ids(tokenizer, row.prompt)
            tokens = [*prompt, *tokenizer(row.response, add_special_tokens=False)["input_ids"], eos]
            context = len(prompt)
            if not prompt:
                raise PromptError(f"row {row.row}: the prompt {row.prompt!r} has no tokens")
            if max_tokens is not None and context >= max_tokens:
                raise PromptError(
                    f"row {row.row}: its prompt of {context} tokens leaves no room for a response within "
                    f"data.max_text_tokens={max_tokens}"
                )
        if max_tokens is None or len(tokens) <= max_tokens:
            pieces = [tokens]
        elif long_text == "truncate" or row.response is not None:
            pieces = [tokens[:max_tokens]]
        else:
            starts = range(0, len(tokens) - 1, max_tokens - 1)
            pieces = [tokens[start : start + max_tokens] for start in starts]
        encoded += [EncodedText(piece, context) for piece in pieces]
    return encoded


def collate_prompts(items: Sequence[tuple[int, bool, EncodedPrompt]], *, pad_id: int) -> PromptBatch:
    """Pad prompts on the left."""
    index, valid, rows = zip(*items, strict=True)
    tokens, mask = _pad([row.tokens for row in rows], pad_id=pad_id, left=True)
    return PromptBatch(torch.tensor(index), torch.tensor(valid), tokens, mask, [row.text for row in rows])


def collate_texts(items: Sequence[tuple[int, bool, EncodedText]], *, pad_id: int) -> TextBatch:
    """Pad texts on the right."""
    _, valid, rows = zip(*items, strict=True)
    tokens, mask = _pad([row.tokens for row in rows], pad_id=pad_id, left=False)
    learnt = torch.arange(tokens.shape[1]) >= torch.tensor([row.context for row in rows])[:, None]
    return TextBatch(tokens, mask, mask & learnt, torch.tensor(valid))


def _pad(rows: Sequence[Sequence[int]], *, pad_id: int, left: bool) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    tokens = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for place, row in enumerate(rows):
        span = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[place, span] = torch.tensor(row)
        mask[place, span] = True
    return tokens, mask
