"""Encoded rows -> padded batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vbon_lightning.data.encoding import EncodedJudged, EncodedPrompt, EncodedText
from vbon_lightning.reference_table import prompt_key
from vbon_lightning.types import JudgedBatch, PromptBatch, TextBatch


def collate_judged(items: Sequence[tuple[int, bool, EncodedJudged]], *, pad_id: int) -> JudgedBatch:
    """Pad texts on the right."""
    _, valid, rows = zip(*items, strict=True)
    tokens, mask = _pad([text for row in rows for text in row.texts], pad_id=pad_id, left=False)
    shape = (len(rows), len(rows[0].texts), -1)
    labels = None if rows[0].label is None else torch.tensor([row.label for row in rows])
    return JudgedBatch(tokens.view(shape), mask.view(shape), labels, torch.tensor(valid))


def collate_prompts(items: Sequence[tuple[int, bool, EncodedPrompt]], *, pad_id: int) -> PromptBatch:
    """Pad prompts on the left."""
    index, valid, rows = zip(*items, strict=True)
    tokens, mask = _pad([row.tokens for row in rows], pad_id=pad_id, left=True)
    names = rows[0].columns
    return PromptBatch(
        torch.tensor(index),
        torch.tensor(valid),
        tokens,
        mask,
        [row.text for row in rows],
        columns=None if names is None else {name: [row.columns[name] for row in rows] for name in names},
        messages=None if rows[0].messages is None else [row.messages for row in rows],
    )


def batch_keys(batch: PromptBatch) -> list[str]:
    """Return the reference table's key of each prompt of a batch."""
    tokens = [row[keep].tolist() for row, keep in zip(batch.tokens, batch.mask, strict=True)]
    columns = batch.columns or {}
    beside = [{name: values[row] for name, values in columns.items()} for row in range(len(tokens))]
    return [prompt_key(ids, extra) for ids, extra in zip(tokens, beside, strict=True)]


def collate_texts(items: Sequence[tuple[int, bool, EncodedText]], *, pad_id: int) -> TextBatch:
    """Pad texts on the right."""
    _, valid, rows = zip(*items, strict=True)
    tokens, mask = _pad([row.tokens for row in rows], pad_id=pad_id, left=False)
    learnt = torch.arange(tokens.shape[1]) >= torch.tensor([row.context for row in rows])[:, None]
    for place, row in enumerate(rows):
        if row.learnt is not None:
            learnt[place, : len(row.learnt)] &= torch.tensor(row.learnt)
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
