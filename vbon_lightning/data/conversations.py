"""Conversations: lists of messages, rendered by the tokenizer's own chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from vbon_lightning._json_lines import parse_json

Message = dict[str, Any]
"""``{"role": ..., "content": ...}``, and whatever else a template reads."""


MESSAGES = "messages"
"""What rewards call the messages of a conversation, whatever the column that holds them is called."""


class ConversationError(ValueError):
    """A conversation that cannot be used; the message says why."""


class Rendered(NamedTuple):
    """A conversation as text, and which of it is to be learnt."""

    text: str
    """What the template makes of it, special tokens written out."""
    learnt: list[tuple[int, int]]
    """Where the assistant's turns stand, as characters: from the first of a turn's own to behind its last."""


_TURN = re.compile(
    r"<\|im_start\|>(?P<chatml>\w+)\n|<\|start_header_id\|>(?P<llama>\w+)<\|end_header_id\|>\s*"
    r"|<start_of_turn>(?P<gemma>\w+)\n|<\|(?P<phi>system|user|assistant)\|>"
)
_MARK = re.compile(r"<\|[^<>|]*\|>|<end_of_turn>|</s>")


def as_conversation(value: Any) -> list[Message] | None:
    """Return a column's value as a list of messages, None where it is something else, such as text.

    Args:
        value: A list of mappings with a ``role``, or, as some readers give it, a mapping of lists; or such a list as
            JSON, as tables of plain text have it.

    Raises:
        ConversationError: For a list of messages one of which lacks its role or content.
    """
    if isinstance(value, str) and value.lstrip().startswith("[") and '"role"' in value:
        value = _parsed(value)
    if isinstance(value, Mapping) and isinstance(value.get("role"), list | tuple):
        value = [dict(zip(value, fields, strict=True)) for fields in zip(*value.values(), strict=True)]
    if not isinstance(value, list | tuple) or not value or not all(isinstance(one, Mapping) for one in value):
        return None
    if not any("role" in one for one in value):
        return None
    messages = []
    for number, one in enumerate(value, start=1):
        # Readers of columns fill what a message lacks with None.
        message = {name: part for name, part in one.items() if part is not None}
        if not isinstance(message.get("role"), str):
            raise ConversationError(f"message {number} has no role")
        if "content" not in message and "tool_calls" not in message:
            raise ConversationError(f"message {number}, of the {message['role']}, has no content")
        messages.append(message)
    return messages


def _parsed(text: str) -> Any:
    try:
        json.loads(text)
    except ValueError:
        return None  # text that only looks like it
    try:
        return parse_json(text)
    except ValueError as problem:
        raise ConversationError(f"messages as JSON: {problem}") from problem


def transcript(messages: Sequence[Message]) -> str:
    """Write a conversation readably, a paragraph a message: for people, and for counting words."""
    return "\n\n".join(f"{message['role']}: {message.get('content', '')}" for message in messages)


def readable(text: str) -> str:
    """Write what a chat template made of a conversation as :func:`transcript` does; any other text stays as it is.

    Known are the marks of roles that ChatML, Llama 3, Gemma, Phi and Zephyr have.
    """
    turns = list(_TURN.finditer(text))
    if not turns:
        return text
    ends = [turn.start() for turn in turns[1:]] + [len(text)]
    said = [_MARK.sub("", text[turn.end() : end]).strip() for turn, end in zip(turns, ends, strict=True)]
    return "\n\n".join(f"{turn[turn.lastgroup or 0]}: {what}".strip() for turn, what in zip(turns, said, strict=True))


def shown_prompts(texts: Sequence[str], conversations: Sequence[Sequence[Message]] | None) -> list[str]:
    """Return prompts as people are to read them: conversations turn by turn.

    Args:
        texts: B prompts, conversations as the chat template has them.
        conversations: The same as messages, where the batch has them.
    """
    if conversations is not None:
        return [transcript(messages) for messages in conversations]
    return [readable(text) for text in texts]


def unanswered(messages: Sequence[Message]) -> list[Message]:
    """Return a conversation without the assistant's turn that it ends with: what there is to answer.

    Raises:
        ConversationError: If the assistant says all of it.
    """
    last = next((place for place in range(len(messages), 0, -1) if messages[place - 1]["role"] != "assistant"), 0)
    if not last:
        raise ConversationError("the assistant says all of it, and there is nothing to answer")
    return list(messages[:last])


def split_prompt(chosen: Sequence[Message], rejected: Sequence[Message]) -> tuple[list[Message], ...]:
    """Split two whole conversations into the prompt that they share and what is said differently.

    Raises:
        ConversationError: If they share nothing, or one of them is the prompt of the other.
    """
    shared = next(
        (place for place, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
        min(len(chosen), len(rejected)),
    )
    if not 0 < shared < min(len(chosen), len(rejected)):
        raise ConversationError(
            "chosen and rejected hold whole conversations, which must begin alike and then differ: "
            f"they share {shared} of {len(chosen)} and {len(rejected)} messages"
        )
    return list(chosen[:shared]), list(chosen[shared:]), list(rejected[shared:])


class Chat:
    """Renders conversations with a tokenizer's chat template.

    Args:
        tokenizer: The tokenizer; its own template is used unless ``options`` has one.
        options: ``template`` (Jinja) in place of the tokenizer's, ``system`` for conversations that have no system
            message, and anything else for the template itself, such as ``enable_thinking``.

    Raises:
        ConversationError: If there is no template, or an option that it does not read.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] | None = None) -> None:
        given = dict(options or {})
        self.tokenizer = tokenizer
        self.template = given.pop("template", None) or getattr(tokenizer, "chat_template", None)
        self.system = given.pop("system", None)
        self.arguments = given
        if not self.template:
            raise ConversationError(
                "the tokenizer has no chat template, and the data holds conversations: name an instruct model, or give "
                "a template as data.chat.template"
            )
        for name in self.arguments:
            if not re.search(rf"\b{re.escape(name)}\b", str(self.template)):
                raise ConversationError(
                    f"data.chat.{name}: the chat template reads nothing of that name; `template` and `system` go with "
                    "every template"
                )

    def _render(self, messages: Sequence[Message], *, open_turn: bool = False) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=open_turn,
                **self.arguments,
            )
        except Exception as error:  # a template may raise whatever it likes, mostly about roles
            raise ConversationError(f"the chat template refuses it: {error}") from error
        return str(text)

    def _whole(self, messages: Sequence[Message]) -> list[Message]:
        if self.system is None or (messages and messages[0]["role"] == "system"):
            return list(messages)
        return [{"role": "system", "content": self.system}, *messages]

    def prompt(self, messages: Sequence[Message]) -> str:
        """Render what a response is to be written behind: the conversation, and the opening of the assistant's turn.

        Raises:
            ConversationError: If the conversation ends with the assistant's turn, or the template refuses it.
        """
        if messages[-1]["role"] == "assistant":
            raise ConversationError(
                "it ends with the assistant's turn, and there is nothing to answer: a prompt ends with the user's"
            )
        return self._render(self._whole(messages), open_turn=True)

    def response(self, messages: Sequence[Message], answer: Sequence[Message]) -> str:
        """Render an answer to a prompt: what stands behind the prompt's own text, closing token included.

        Raises:
            ConversationError: If the template renders the prompt otherwise once it is answered.
        """
        prompt = self.prompt(messages)
        whole = self._render([*self._whole(messages), *answer])
        if not whole.startswith(prompt):
            raise ConversationError(_REWRITES)
        return whole[len(prompt) :]

    def text(self, messages: Sequence[Message]) -> Rendered:
        """Render a whole conversation, and say where the assistant's turns are.

        The template marks them, ``{% generation %}``, or else they are found by rendering the conversation up to each.

        Raises:
            ConversationError: If the assistant says nothing, the template's marks hold nothing, or, without marks, the
                template renders a turn otherwise once the conversation goes on.
        """
        whole = self._whole(messages)
        if not any(message["role"] == "assistant" for message in whole):
            raise ConversationError("the assistant says nothing, and nothing is to be learnt")
        text = self._render(whole)
        if re.search(r"{%-?\s*generation\s*-?%}", str(self.template)):
            return Rendered(text, self._marked(whole))
        spans = []
        for place, message in enumerate(whole):
            if message["role"] != "assistant":
                continue
            before = self._render(whole[:place], open_turn=True)
            after = self._render(whole[: place + 1])
            if not (after.startswith(before) and text.startswith(after)):
                raise ConversationError(_REWRITES)
            spans.append((len(before), len(after)))
        return Rendered(text, spans)

    def _marked(self, messages: Sequence[Message]) -> list[tuple[int, int]]:
        """Return what the template marks as generated, as characters."""
        found: Any = self.tokenizer.apply_chat_template(
            list(messages),
            chat_template=self.template,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
            **self.arguments,
        )
        spans: list[tuple[int, int]] = []
        before = False
        for (start, stop), marked in zip(found["offset_mapping"], found["assistant_masks"], strict=True):
            if marked and before:
                spans[-1] = (spans[-1][0], stop)
            elif marked:
                spans.append((start, stop))
            before = bool(marked)
        if not spans:
            raise ConversationError("the chat template marks nothing of it as generated ({% generation %})")
        return spans


_REWRITES = (
    "the chat template renders earlier turns otherwise once the conversation goes on (it rewrites history), so that "
    "what the policy would be taught is not what it would read: give another as data.chat.template"
)
