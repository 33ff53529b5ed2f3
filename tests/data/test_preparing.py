"""From rows to what each kind of module reads."""

from __future__ import annotations

import pytest

from tests.data.test_conversations import ALPHABET, ASSISTANT, MORE, TALK, TEMPLATE, USER
from tests.helpers import tiny_tokenizer
from vbon_lightning.data.conversations import ConversationError
from vbon_lightning.data.encoding import EncodedJudged, EncodedPrompt, EncodedText, PromptError
from vbon_lightning.data.preparing import prepare_rows
from vbon_lightning.data.sources import TextRow, TextSource, as_row

TOKENIZER = tiny_tokenizer(alphabet=ALPHABET)


def test_each_kind_becomes_what_its_modules_read() -> None:
    pair = TextRow(1, "ab", "cd", "ab", rejected="e", label="good")
    (prompt,) = prepare_rows([pair], "prompts", TOKENIZER, max_prompt_tokens=1, too_long="truncate_left")
    assert isinstance(prompt, EncodedPrompt)
    assert prompt.text == "b"
    (text,) = prepare_rows([pair], "text", TOKENIZER, max_text_tokens=3)
    assert isinstance(text, EncodedText)
    assert len(text.tokens) == 3
    (ended,) = prepare_rows([pair], "text", TOKENIZER, end_tokens=["d"])
    assert len(ended.tokens) == 4  # and no EOS behind the token that ends it
    (judged,) = prepare_rows([pair], "labelled", TOKENIZER, labels=["bad", "good"])
    assert isinstance(judged, EncodedJudged)
    assert judged.label == 1
    (compared,) = prepare_rows([pair], "comparisons", TOKENIZER)
    assert [len(tokens) for tokens in compared.texts] == [4, 3]
    with pytest.raises(PromptError, match=r"a\.txt, row 1: the prompt has 2 tokens"):
        prepare_rows([pair], "prompts", TOKENIZER, max_prompt_tokens=1, source=TextSource("a.txt"))


def test_key_columns_tell_prompts_apart() -> None:
    rows = [TextRow(1, "ab", None, "ab", columns={"answer": answer}) for answer in (1, 2)]
    keyed = prepare_rows(rows, "prompts", TOKENIZER, key_columns=("answer",))
    assert keyed[0].key != keyed[1].key
    assert len({one.key for one in prepare_rows(rows, "prompts", TOKENIZER)}) == 1


def test_preferences_without_labels_are_told_of_the_other_objective() -> None:
    with pytest.raises(PromptError, match="has no label: .* set model.objective to preference"):
        prepare_rows([TextRow(1, "ab", "c", "ab", rejected="d")], "labelled", TOKENIZER, labels=["a"])


def test_conversations_are_rendered_first() -> None:
    rows = [as_row(TALK[:1], 1)]
    with pytest.raises(ConversationError, match="no chat template"):
        prepare_rows(rows, "prompts", TOKENIZER)
    (prompt,) = prepare_rows(rows, "prompts", TOKENIZER, chat={"template": TEMPLATE})
    assert prompt.text == "[u]ab</s>\n[a]"
    (text,) = prepare_rows([as_row(TALK, 1)], "text", TOKENIZER, chat={"template": TEMPLATE})
    assert text.learnt is not None
    pair = TextRow(1, "ab", None, "ab", messages=[USER], answer=[ASSISTANT], worse=[MORE])
    (compared,) = prepare_rows([pair], "comparisons", TOKENIZER, chat={"template": TEMPLATE})
    assert len(compared.texts) == 2
    judged = [pair._replace(label=1), as_row(TALK[:2], 2)._replace(label=0)]
    found = prepare_rows(judged, "labelled", TOKENIZER, labels=["bad", "good"], chat={"template": TEMPLATE})
    assert [one.label for one in found] == [1, 0]
    whole = list(TOKENIZER.apply_chat_template(TALK[:2], chat_template=TEMPLATE, return_dict=False))
    assert [one.tokens for one in found] == [whole, whole]  # a prompt with its answer is the same conversation
    (cut, _) = prepare_rows(
        judged, "labelled", TOKENIZER, labels=["bad", "good"], chat={"template": TEMPLATE}, max_text_tokens=3
    )
    assert cut.tokens == whole[:3]


def test_a_labelled_response_is_read_behind_its_prompt() -> None:
    (judged,) = prepare_rows([TextRow(1, "ab", "cd", "ab", label=0)], "labelled", TOKENIZER, labels=["bad"])
    (plain,) = prepare_rows([TextRow(1, "abcd", None, "abcd", label=0)], "labelled", TOKENIZER, labels=["bad"])
    assert judged.tokens == plain.tokens
