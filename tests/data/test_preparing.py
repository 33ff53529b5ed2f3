"""From rows to what each kind of module reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
from tokenizers.processors import TemplateProcessing

from tests.data.test_conversations import ALPHABET, ASSISTANT, MORE, TALK, TEMPLATE, USER
from tests.helpers import BOS, EOS, PAD, tiny_tokenizer
from vbon_lightning.data.conversations import ConversationError
from vbon_lightning.data.encoding import EncodedJudged, EncodedPrompt, EncodedText, PromptError
from vbon_lightning.data.preparing import Kind, prepare_rows
from vbon_lightning.data.readers import SourceError
from vbon_lightning.data.sources import TextRow, TextSource, as_row, read_rows

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


# -- special tokens that data spells ---------------------------------------------------------------

LETTERS = tiny_tokenizer()
CHAT = {"template": "<s>{% for one in messages %}{{ one.role }}: {{ one.content }}</s>{% endfor %}"}


def _from(source: TextSource, kind: Kind, **options: Any) -> list[Any]:
    return prepare_rows(read_rows(source), kind, LETTERS, **options)


def _special(tokens: list[int]) -> list[int]:
    return [token for token in tokens if token in (PAD, BOS, EOS)]


SAID: list[dict[str, Any]] = [{"prompt": "good </s> film", "good": "y</s>", "bad": "<s>z", "label": "b"}]


def test_text_from_data_is_text_for_every_kind() -> None:
    source = TextSource(SAID, column="prompt", response_column="good", rejected_column="bad", label_column="label")
    (prompt,) = _from(source, "prompts")
    assert (_special(prompt.tokens), prompt.text) == ([], SAID[0]["prompt"])
    (pair,) = _from(source, "text")
    assert (_special(pair.tokens), LETTERS.decode(pair.tokens)) == ([EOS], "good </s> filmy</s></s>")
    assert pair.context == len(prompt.tokens)
    (text,) = _from(replace(source, response_column=None, rejected_column=None), "text")
    assert _special(text.tokens) == [EOS] == text.tokens[-1:]
    (compared,) = _from(source, "comparisons")
    assert [_special(tokens) for tokens in compared.texts] == [[], []]
    assert [LETTERS.decode(tokens) for tokens in compared.texts] == ["good </s> filmy</s>", "good </s> film<s>z"]
    (judged,) = _from(source, "labelled", labels=["a", "b"])
    assert _special(judged.tokens) == []
    pieces = _from(source, "labelled", labels=["a", "b"], max_text_tokens=4, long_text="split")
    assert [token for piece in pieces for token in piece.tokens] == judged.tokens
    (cut,) = _from(source, "prompts", max_prompt_tokens=7, too_long="truncate_left")
    assert (cut.text, _special(cut.tokens)) == ("s> film", [])


def test_what_was_rendered_before_is_said_to_be() -> None:
    rows = [{"text": "<s>ab</s>", "answer": "c</s>"}]
    source = TextSource(rows, column="text", response_column="answer", rendered=True)
    (prompt,) = _from(source, "prompts")
    assert (_special(prompt.tokens), prompt.text) == ([BOS, EOS], "<s>ab</s>")
    (pair,) = _from(source, "text")
    assert _special(pair.tokens) == [BOS, EOS, EOS], "the response ends itself"
    assert _special(_from(replace(source, rendered=False), "prompts")[0].tokens) == []
    with pytest.raises(
        SourceError, match="the rows given, row 1: rendered is said of text, and this is a conversation"
    ):
        _from(TextSource([{"messages": [{"role": "user", "content": "a"}]}], rendered=True), "prompts", chat=CHAT)


def test_a_sources_template_means_its_own_tokens_and_not_its_columns() -> None:
    rows = [{"a": "x</s>y", "b": "</s", "c": "good</s>"}]
    source = TextSource(rows, template="<s>user {a}</s>{b}>", response_column="c")
    (prompt,) = _from(source, "prompts")
    assert prompt.text == "<s>user x</s>y</s></s>"
    assert (_special(prompt.tokens), LETTERS.decode(prompt.tokens)) == ([BOS, EOS], prompt.text)
    (pair,) = _from(source, "text")
    assert _special(pair.tokens) == [BOS, EOS, EOS] and LETTERS.decode(pair.tokens).endswith("good</s></s>")
    (rendered,) = _from(replace(source, rendered=True), "prompts")
    assert _special(rendered.tokens) == [BOS, EOS, EOS, EOS], "its columns too, and what both spell together"
    (words,) = _from(replace(source, template="  {a} <s> {c}", first_words=2, response_column=None), "prompts")
    assert (words.text, _special(words.tokens)) == ("x</s>y <s>", [BOS])


def test_a_bos_that_a_sources_template_spells_is_not_doubled() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    for template, spelt in (("<s>{text}", [BOS]), ("{text}", [BOS])):
        for said in ("ab", "<s>ab"):
            rows = read_rows(TextSource([{"text": said}], template=template))
            for kind in ("prompts", "text"):
                (found,) = prepare_rows(rows, cast(Kind, kind), tokenizer)
                assert _special(found.tokens) == spelt + [EOS] * (kind == "text")
            labelled = [row._replace(label=0) for row in rows]
            (whole,) = prepare_rows(labelled, "labelled", tokenizer, labels=["a"])
            pieces = prepare_rows(labelled, "labelled", tokenizer, labels=["a"], max_text_tokens=3, long_text="split")
            assert [one for piece in pieces for one in piece.tokens if one != BOS] == whole.tokens[1:]
            assert all(piece.tokens.count(BOS) == 1 and len(piece.tokens) <= 3 for piece in pieces)


@pytest.mark.parametrize("generation", [False, True])
def test_what_messages_say_is_text_and_the_templates_marks_are_not(generation: bool) -> None:
    said = [{"role": "user", "content": "a</s>user: b"}, {"role": "assistant", "content": "<s>c</s> d"}]
    chat = CHAT
    if generation:
        said_by = "{% if one.role == 'assistant' %}{% generation %}{{ one.content }}</s>{% endgeneration %}"
        other = "{% else %}{{ one.content }}</s>{% endif %}"
        chat = {"template": "<s>{% for one in messages %}" + said_by + other + "{% endfor %}"}
    rows = [as_row(said, 1)]
    (prompt,) = prepare_rows(rows, "prompts", LETTERS, chat=chat)
    assert _special(prompt.tokens) == [BOS, EOS]
    assert LETTERS.decode(prompt.tokens) == prompt.text and "a</s>user: b</s>" in prompt.text
    assert prompt.messages == said[:1], "as the data has them, for rewards and people"
    (text,) = prepare_rows(rows, "text", LETTERS, chat=chat)
    assert _special(text.tokens) == [BOS, EOS, EOS]
    learnt = [token for token, taught in zip(text.tokens, text.learnt, strict=True) if taught]
    assert LETTERS.decode(learnt) == ("" if generation else "assistant: ") + "<s>c</s> d</s>"
    pair = as_row(said[:1], 1)._replace(answer=said[1:], worse=[{"role": "assistant", "content": "</s>"}])
    (compared,) = prepare_rows([pair], "comparisons", LETTERS, chat=chat)
    assert [_special(tokens) for tokens in compared.texts] == [[BOS, EOS, EOS]] * 2
    assert [LETTERS.decode(tokens) for tokens in compared.texts][1].endswith("</s></s>")
    (answered,) = prepare_rows([pair], "text", LETTERS, chat=chat)
    assert answered.tokens == text.tokens
