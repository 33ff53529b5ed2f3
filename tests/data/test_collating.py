"""From encoded rows to padded batches."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import EOS, PAD, tiny_tokenizer
from vbon_lightning.data.collating import batch_keys, collate_judged, collate_prompts, collate_texts
from vbon_lightning.data.encoding import EncodedJudged, encode_prompts, encode_texts
from vbon_lightning.data.sources import TextRow, as_row
from vbon_lightning.types import select_prompts

PLAIN = tiny_tokenizer(alphabet="abcd")
A, B, C, D = 3, 4, 5, 6


def row(text: str, response: str | None = None) -> TextRow:
    return TextRow(1, text, response, text)


@pytest.mark.parametrize("pad_id", [PAD, EOS, A])
def test_prompts_are_padded_on_the_left(pad_id):
    rows = encode_prompts([row("abc"), row("d")], PLAIN)
    batch = collate_prompts([(5, True, rows[0]), (0, False, rows[1])], pad_id=pad_id)
    assert batch.index.tolist() == [5, 0]
    assert batch.valid.tolist() == [True, False]
    assert batch.tokens.tolist() == [[A, B, C], [pad_id, pad_id, D]]
    assert batch.mask.tolist() == [[True, True, True], [False, False, True]]
    assert batch.text == ["abc", "d"]
    assert batch.reference_rewards is None


@pytest.mark.parametrize("pad_id", [PAD, EOS, A])
def test_texts_are_padded_on_the_right_and_the_eos_is_learnt(pad_id):
    rows = encode_texts([row("abc"), row("a", "b")], PLAIN)
    batch = collate_texts([(0, True, rows[0]), (1, False, rows[1])], pad_id=pad_id)
    assert batch.tokens.tolist() == [[A, B, C, EOS], [A, B, EOS, pad_id]]
    assert batch.mask.tolist() == [[True, True, True, True], [True, True, True, False]]
    assert batch.loss_mask.tolist() == [[False, True, True, True], [False, True, True, False]]
    assert batch.valid.tolist() == [True, False]
    assert batch.loss_mask.dtype == torch.bool


def test_judged_texts_stand_side_by_side() -> None:
    rows = [EncodedJudged([[A, B], [C]], None), EncodedJudged([[D], [A, B, C]], None)]
    batch = collate_judged([(0, True, rows[0]), (1, False, rows[1])], pad_id=PAD)
    assert batch.tokens.tolist() == [[[A, B, PAD], [C, PAD, PAD]], [[D, PAD, PAD], [A, B, C]]]
    assert batch.mask.sum(-1).tolist() == [[2, 1], [1, 3]]
    assert (batch.labels, batch.valid.tolist()) == (None, [True, False])
    labelled = collate_judged([(0, True, EncodedJudged([[A]], 2))], pad_id=PAD)
    assert labelled.labels is not None
    assert labelled.labels.tolist() == [2]


def test_columns_and_messages_come_along_row_by_row() -> None:
    talk = [{"role": "user", "content": "ab"}]
    rows = [as_row(talk, 1)._replace(prompt="ab", columns={"answer": 3}), as_row(talk, 2)._replace(prompt="c")]
    rows[1] = rows[1]._replace(columns={"answer": 4})
    encoded = encode_prompts(rows, PLAIN, key_columns=("answer", "messages"))
    batch = collate_prompts([(place, True, one) for place, one in enumerate(encoded)], pad_id=PAD)
    assert batch.columns == {"answer": [3, 4]}
    assert batch.messages == [talk, talk]
    assert batch.beside == {"answer": [3, 4], "messages": [talk, talk]}
    assert batch_keys(batch) == [one.key for one in encoded]  # the messages of a conversation are in its tokens
    (second,) = select_prompts(batch, [1]).beside["answer"]
    assert second == 4
    plain = collate_prompts([(0, True, encode_prompts([row("a")], PLAIN)[0])], pad_id=PAD)
    assert (plain.columns, plain.messages, plain.beside) == (None, None, None)
