"""Conversations: what is one, and what a chat template makes of it, token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from tests.helpers import tiny_tokenizer
from vbon_lightning.data.collating import collate_texts
from vbon_lightning.data.conversations import (
    Chat,
    ConversationError,
    as_conversation,
    readable,
    shown_prompts,
    split_prompt,
    transcript,
)
from vbon_lightning.data.encoding import (
    PromptError,
    encode_comparisons,
    encode_prompts,
    encode_texts,
    render_conversations,
)
from vbon_lightning.data.sources import SourceError, TextSource, as_row, find_columns, read_rows

ALPHABET = "abcdefgh[]us\n"
TEMPLATE = (
    "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)
USER, ASSISTANT = {"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}
AGAIN, MORE = {"role": "user", "content": "e"}, {"role": "assistant", "content": "fgh"}
TALK = [USER, ASSISTANT, AGAIN, MORE]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    made = tiny_tokenizer(alphabet=ALPHABET)
    made.chat_template = TEMPLATE
    return made


# -- what is one -----------------------------------------------------------------------------------


def test_lists_of_messages_are_conversations_and_nothing_else_is() -> None:
    assert as_conversation(TALK) == TALK
    assert as_conversation({"role": ["user", "assistant"], "content": ["ab", "cd"]}) == [USER, ASSISTANT]
    assert as_conversation([{**USER, "name": None, "tool_calls": None}]) == [USER]
    assert as_conversation([{"role": "assistant", "tool_calls": [1]}]) == [{"role": "assistant", "tool_calls": [1]}]
    for other in ("text", [], None, 3, ["text"], [{"content": "no role"}], {"a": 1}):
        assert as_conversation(other) is None
    with pytest.raises(ConversationError, match="^message 2, of the assistant, has no content$"):
        as_conversation([USER, {"role": "assistant", "content": None}])
    with pytest.raises(ConversationError, match="^message 1 has no role$"):
        as_conversation([{"content": "a"}, USER])
    assert transcript(TALK[:2]) == "user: ab\n\nassistant: cd"


def test_whole_conversations_share_their_prompt() -> None:
    assert split_prompt([USER, ASSISTANT], [USER, MORE]) == ([USER], [ASSISTANT], [MORE])
    assert split_prompt(TALK, [*TALK[:3], ASSISTANT]) == (TALK[:3], [MORE], [ASSISTANT])
    for chosen, rejected in (([USER], [AGAIN]), ([USER, ASSISTANT], [USER, ASSISTANT]), ([USER], [USER, MORE])):
        with pytest.raises(ConversationError, match="must begin alike and then differ"):
            split_prompt(chosen, rejected)


# -- templates -------------------------------------------------------------------------------------


def test_prompts_responses_and_whole_texts(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = Chat(tokenizer)
    assert chat.prompt([USER]) == "[u]ab</s>\n[a]"
    assert chat.response([USER], [ASSISTANT]) == "cd</s>\n"
    text, spans = chat.text(TALK)
    assert text == "[u]ab</s>\n[a]cd</s>\n[u]e</s>\n[a]fgh</s>\n"
    assert [text[start:stop] for start, stop in spans] == ["cd</s>\n", "fgh</s>\n"]


def test_a_system_message_is_put_before_those_without_one(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = Chat(tokenizer, {"system": "ha"})
    assert chat.prompt([USER]) == "[s]ha</s>\n[u]ab</s>\n[a]"
    own = {"role": "system", "content": "b"}
    assert chat.prompt([own, USER]) == "[s]b</s>\n[u]ab</s>\n[a]"
    assert chat.response([USER], [ASSISTANT]) == "cd</s>\n"
    assert chat.text([USER, ASSISTANT]).text == "[s]ha</s>\n[u]ab</s>\n[a]cd</s>\n"


def test_a_template_of_ones_own_and_what_it_is_told(tokenizer: PreTrainedTokenizerBase) -> None:
    template = "{{ messages[0].content }}{% if loud %}h{% endif %}"
    assert Chat(tokenizer, {"template": template}).prompt([USER]) == "ab"
    assert Chat(tokenizer, {"template": template, "loud": True}).prompt([USER]) == "abh"
    tokenizer.chat_template = None
    assert Chat(tokenizer, {"template": template}).prompt([USER]) == "ab"
    with pytest.raises(ConversationError, match=r"no chat template, .* or give a template as data\.chat\.template"):
        Chat(tokenizer)


def test_what_cannot_be_rendered_is_said(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = Chat(tokenizer)
    with pytest.raises(ConversationError, match="it ends with the assistant's turn, and there is nothing to answer"):
        chat.prompt(TALK)
    with pytest.raises(ConversationError, match="the assistant says nothing"):
        chat.text([USER])
    refusing = Chat(tokenizer, {"template": "{{ raise_exception('roles must alternate') }}"})
    with pytest.raises(ConversationError, match="the chat template refuses it: roles must alternate"):
        refusing.prompt([USER])
    # A template that drops what was said before, as some do with thoughts.
    forgetful = (
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}[{{ m.role[0] }}]{{ m.content }}</s>{% endif %}"
    )
    rewriting = Chat(tokenizer, {"template": forgetful + "{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"})
    assert rewriting.text([USER, ASSISTANT]).text.replace("\n", "") == "[u]ab</s>[a]cd</s>"
    with pytest.raises(ConversationError, match=r"rewrites history.*give another as data\.chat\.template"):
        rewriting.text(TALK)
    changing = Chat(tokenizer, {"template": "{{ messages | length }}{% if add_generation_prompt %}[a]{% endif %}"})
    with pytest.raises(ConversationError, match="rewrites history"):
        changing.response([USER], [ASSISTANT])


# -- from files to tokens --------------------------------------------------------------------------


def write(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def read(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(tokens))


def test_a_prompt_has_the_templates_tokens_and_no_others(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"prompt": [USER]}, {"prompt": TALK[:3]})
    rows = read_rows(TextSource(file, column="prompt"))
    assert [row.messages for row in rows] == [[USER], TALK[:3]]
    prompts = encode_prompts(render_conversations(rows, Chat(tokenizer), whole=False), tokenizer)
    for prompt, messages in zip(prompts, ([USER], TALK[:3]), strict=True):
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert prompt.tokens == list(expected)
        assert (prompt.messages, prompt.columns) == (messages, None)
    assert prompts[0].text == "[u]ab</s>\n[a]"
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    (prompt, _) = encode_prompts(render_conversations(rows, Chat(tokenizer), whole=False), tokenizer)
    assert prompt.tokens.count(tokenizer.bos_token_id) == 1


def test_a_conversation_is_learnt_where_the_assistant_speaks(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = read_rows(
        TextSource(write(tmp_path / "a.jsonl", {"messages": TALK}, {"messages": TALK[:2]}), column="messages")
    )
    encoded = encode_texts(render_conversations(rows, Chat(tokenizer), whole=True), tokenizer)
    batch = collate_texts([(place, True, row) for place, row in enumerate(encoded)], pad_id=0)
    whole = tokenizer.apply_chat_template(TALK, return_dict=False)
    assert batch.tokens[0].tolist() == list(whole)
    learnt = [read(tokenizer, row[kept].tolist()) for row, kept in zip(batch.tokens, batch.loss_mask, strict=True)]
    assert learnt == ["cd</s>fgh</s>", "cd</s>"]  # not what the template puts behind a turn's end
    assert not (batch.loss_mask & ~batch.mask).any()
    cut = encode_texts(render_conversations(rows, Chat(tokenizer), whole=True), tokenizer, max_tokens=14)
    assert [len(row.tokens) for row in cut] == [14, len(encoded[1].tokens)]
    with pytest.raises(PromptError, match=r"row 1: nothing that the assistant says .* data\.max_text_tokens=5"):
        encode_texts(render_conversations(rows, Chat(tokenizer), whole=True), tokenizer, max_tokens=5)


@pytest.mark.parametrize("answer", [[ASSISTANT], "cd"])
def test_a_prompt_and_its_completion(answer: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"prompt": [USER], "completion": answer})
    rows = read_rows(TextSource(file, column="prompt", response_column="completion"))
    (row,) = encode_texts(render_conversations(rows, Chat(tokenizer), whole=True), tokenizer)
    assert read(tokenizer, row.tokens[row.context :]) == "cd</s>"
    assert read(tokenizer, row.tokens[: row.context]) == read(
        tokenizer, tokenizer.apply_chat_template([USER], add_generation_prompt=True, return_dict=False)
    )


@pytest.mark.parametrize("implicit", [True, False])
def test_preferences(implicit: bool, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    if implicit:
        record, column = {"chosen": [USER, ASSISTANT], "rejected": [USER, MORE]}, None
    else:
        record, column = {"prompt": [USER], "chosen": [ASSISTANT], "rejected": "fgh"}, "prompt"  # type: ignore[dict-item]
    source = TextSource(
        write(tmp_path / "a.jsonl", record), column=column, response_column="chosen", rejected_column="rejected"
    )
    (row,) = encode_comparisons(render_conversations(read_rows(source), Chat(tokenizer), whole=False), tokenizer)
    expected = [tokenizer.apply_chat_template([USER, last], return_dict=False) for last in (ASSISTANT, MORE)]
    assert row.texts == [list(tokens) for tokens in expected]


def test_parquet_and_datasets_bring_conversations_too(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    import datasets

    made = datasets.Dataset.from_list([{"messages": TALK, "answer": "a"}, {"messages": TALK[:2], "answer": "b"}])
    made.to_parquet(tmp_path / "rows.parquet")
    made.save_to_disk(str(tmp_path / "saved"))
    for path in ("rows.parquet", "saved"):
        rows = read_rows(TextSource(str(tmp_path / path), column="messages"), columns=("answer", "messages"))
        assert [row.messages for row in rows] == [TALK, TALK[:2]]
        assert [row.columns for row in rows] == [{"answer": "a"}, {"answer": "b"}]


def test_rows_that_do_not_fit_are_named(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"text": [USER]}, {"text": "plain"})
    with pytest.raises(PromptError, match="row 2 is plain text, and others are conversations: give them apart"):
        render_conversations(read_rows(TextSource(file)), Chat(tokenizer), whole=False)
    source = TextSource(write(tmp_path / "b.jsonl", {"text": [ASSISTANT]}))
    with pytest.raises(PromptError, match=r"b\.jsonl, row 1: the assistant says all of it"):
        render_conversations(read_rows(source), Chat(tokenizer), whole=False, source=source)
    with pytest.raises(SourceError, match="line 1: message 1, of the user, has no content"):
        read_rows(TextSource(write(tmp_path / "c.jsonl", {"text": [{"role": "user"}]})))
    with pytest.raises(SourceError, match="line 1: first_words cuts texts, and this is a conversation"):
        read_rows(TextSource(write(tmp_path / "d.jsonl", {"text": [USER]}), first_words=1))
    with pytest.raises(SourceError, match="line 1: there are no messages, which the reward reads"):
        read_rows(TextSource(write(tmp_path / "e.jsonl", {"text": "plain"})), columns=("messages",))
    pairs = {"chosen": [USER, ASSISTANT], "rejected": [USER, MORE]}
    with pytest.raises(SourceError, match="line 2: without a column the prompt is what chosen and rejected"):
        read_rows(TextSource(write(tmp_path / "f.jsonl", pairs, {**pairs, "chosen": 3})))


def test_of_a_finished_conversation_the_last_turn_is_the_policys(tokenizer: PreTrainedTokenizerBase) -> None:
    whole, asked = (
        render_conversations([as_row(talk, 1)], Chat(tokenizer), whole=False)[0] for talk in (TALK, TALK[:3])
    )
    assert (whole.prompt, whole.messages) == (asked.prompt, TALK[:3])
    twice = render_conversations([as_row([*TALK, ASSISTANT], 1)], Chat(tokenizer), whole=False)[0]
    assert twice.messages == TALK[:3]


def test_conversations_may_stand_as_json_in_tables_of_text(tmp_path: Path) -> None:
    assert as_conversation(json.dumps(TALK)) == TALK
    for text in ('[{"role": broken', '["role"]', '[1] "role"'):
        assert as_conversation(text) is None
    (tmp_path / "a.csv").write_text('messages\n"' + json.dumps(TALK).replace('"', '""') + '"\n')
    (row,) = read_rows(TextSource(str(tmp_path / "a.csv")))
    assert row.messages == TALK


def test_an_option_that_the_template_does_not_read_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ConversationError, match=r"data\.chat\.sytem: the chat template reads nothing of that name"):
        Chat(tokenizer, {"sytem": "Be brief."})
    Chat(tokenizer, {"template": TEMPLATE + "{{ mood }}", "mood": "good", "system": "a"})


def test_conversations_are_filtered_by_their_words(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"text": [USER]}, {"text": TALK[:3]}, {"text": [USER]})
    assert [row.row for row in read_rows(TextSource(file, min_words=3))] == [2]
    assert [row.row for row in read_rows(TextSource(file, unique=True))] == [1, 2]


# -- columns that nobody named ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "found"),
    [
        ({"text": "a", "prompt": "b"}, ("text", None, None)),
        ({"prompt": "a", "answer": "b"}, ("prompt", None, None)),
        ({"prompt": [USER], "completion": [ASSISTANT]}, ("prompt", "completion", None)),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, ("prompt", "chosen", "rejected")),
        ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [MORE]}, ("prompt", "chosen", "rejected")),
        ({"prompt": "ab", "chosen": [USER, ASSISTANT], "rejected": [USER, MORE]}, (None, "chosen", "rejected")),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, MORE]}, (None, "chosen", "rejected")),
        ({"id": 3, "messages": [USER], "source": "a"}, ("messages", None, None)),
        ({"id": 3, "turns": [USER], "source": "a"}, ("turns", None, None)),
        ({"id": 3, "review": "a"}, ("review", None, None)),
    ],
)
def test_columns_are_found_by_what_they_hold(record: dict[str, Any], found: tuple[str | None, ...]) -> None:
    source = find_columns(TextSource.of([record]))
    assert (source.column, source.response_column, source.rejected_column) == found
    (row,) = read_rows(TextSource.of([record]))
    assert (row.response or row.answer) is not None or found[1] is None


def test_columns_that_are_named_stay() -> None:
    record = {"text": "a", "prompt": "b", "completion": "c", "messages": [USER]}
    for named in ({"column": "prompt"}, {"template": "{prompt}"}):
        assert find_columns(TextSource.of([record], **named)) == TextSource.of([record], **named)
    pairs = {"chosen": [USER, ASSISTANT], "rejected": [USER, MORE], "best": [USER, AGAIN]}
    source = find_columns(TextSource.of([pairs], response_column="best"))
    assert (source.column, source.response_column, source.rejected_column) == (None, "best", "rejected")
    with pytest.raises(SourceError, match=r"which column holds .* as `column`; the columns are 'question', 'answer'"):
        find_columns(TextSource.of([{"question": "a", "answer": "b"}]))


# -- a template that marks what is generated -------------------------------------------------------

MARKED = (
    "{% for m in messages %}[{{ m.role[0] }}]{% if m.role == 'assistant' %}{%- generation -%}"
    "{{ m.content if loop.last else 'h' }}</s>{%- endgeneration -%}{% else %}{{ m.content }}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


def test_marks_of_the_template_say_what_is_learnt(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = MARKED  # rewrites history, which prefixes would refuse and marks allow
    rendered = Chat(tokenizer).text(TALK)
    assert rendered.text == "[u]ab</s>[a]h</s>[u]e</s>[a]fgh</s>"
    assert [rendered.text[start:stop] for start, stop in rendered.learnt] == ["h</s>", "fgh</s>"]
    rows = render_conversations([as_row(TALK, 1)], Chat(tokenizer), whole=True)
    (encoded,) = encode_texts(rows, tokenizer)
    assert encoded.learnt is not None
    kept = [token for token, learnt in zip(encoded.tokens, encoded.learnt, strict=True) if learnt]
    assert read(tokenizer, kept) == "h</s>fgh</s>"
    with pytest.raises(ConversationError, match="rewrites history"):
        Chat(
            tokenizer, {"template": MARKED.replace("generation", "if true", 1).replace("endgeneration", "endif")}
        ).text(TALK)


def test_marks_that_hold_nothing_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    empty = TEMPLATE + "{% generation %}{% endgeneration %}"
    with pytest.raises(ConversationError, match="marks nothing of it as generated"):
        Chat(tokenizer, {"template": empty}).text(TALK)


# -- for people ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rendered", "shown"),
    [
        (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi | you\n\nthere<|im_end|>\n"
            "<|im_start|>assistant\n",
            "system: Be brief.\n\nuser: Hi | you\n\nthere\n\nassistant:",
        ),
        (
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "user: Hi\n\nassistant:",
        ),
        ("<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n", "user: Hi\n\nmodel:"),
        ("<|user|>\nHi<|end|>\n<|assistant|>\n", "user: Hi\n\nassistant:"),
        ("<|user|>\nHi</s>\n<|assistant|>\n", "user: Hi\n\nassistant:"),
        ("the film was <b>good</b> | a < b", "the film was <b>good</b> | a < b"),
        ("", ""),
    ],
)
def test_what_a_template_made_is_shown_turn_by_turn(rendered: str, shown: str) -> None:
    assert readable(rendered) == shown


def test_prompts_are_shown_by_their_messages_where_there_are_some() -> None:
    assert shown_prompts(["[u]ab"], [TALK[:2]]) == ["user: ab\n\nassistant: cd"]
    assert shown_prompts(["<|im_start|>user\nHi<|im_end|>"], None) == ["user: Hi"]
    assert shown_prompts(["plain"], None) == ["plain"]
