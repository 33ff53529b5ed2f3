"""Rows of text -> token ids."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from vbon_lightning.data.conversations import MESSAGES, Chat, ConversationError, Message, unanswered
from vbon_lightning.data.sources import TextRow, TextSource
from vbon_lightning.models.plain_text import Hidden, PlainText
from vbon_lightning.models.tokenizer import shared_start
from vbon_lightning.reference_table import prompt_key


class PromptError(ValueError):
    """A prompt or text cannot be used; the message names its row."""


class EncodedPrompt(NamedTuple):
    """A prompt as token ids."""

    tokens: list[int]
    text: str
    key: str
    """The reference table's key: a hash of ``tokens`` and ``columns``."""
    columns: dict[str, Any] | None = None
    """What the reward reads of the prompt's row beside it, by the columns' names."""
    messages: list[Message] | None = None
    """The prompt as messages, where it is a conversation."""


class EncodedText(NamedTuple):
    """A text for supervised fine-tuning as token ids."""

    tokens: list[int]
    context: int
    """Number of leading tokens that are given and not learnt."""
    learnt: list[bool] | None = None
    """Which tokens are learnt, where it is not all behind the context: a conversation's turns of the assistant."""


class EncodedJudged(NamedTuple):
    """One labelled text, or a preferred text and a worse one, as token ids."""

    texts: list[list[int]]
    """K lists of token ids."""
    label: int | None

    @property
    def tokens(self) -> list[int]:
        """The longest of the texts."""
        return max(self.texts, key=len)


def row_name(row: TextRow, source: TextSource | None) -> str:
    """Name a row for a message, and the file that it is in."""
    where = row.where or (None if source is None else source.called)
    return f"{where}, row {row.row}" if where else f"row {row.row}"


def encode_prompt_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, marked: bool = False
) -> list[list[int]]:
    """Encode prompts with the tokenizer's own opening tokens (BOS), without an EOS it would close texts with.

    Args:
        tokenizer: The tokenizer.
        texts: The prompts.
        marked: Whether special tokens that a prompt spells are meant: an EOS that it ends with stays, and a BOS that it
            begins with gets no other. By default they are text.
    """
    rows = [TextRow(place, text, None, text, marked=marked) for place, text in enumerate(texts, start=1)]
    return _encode_rows(tokenizer, rows, texts)


def _encode_rows(tokenizer: PreTrainedTokenizerBase, rows: Sequence[TextRow], texts: Sequence[str]) -> list[list[int]]:
    """Encode texts of rows, with the tokenizer's opening tokens where no template wrote them, and without its EOS."""
    plain = PlainText(tokenizer)
    encoded = _around_rows(plain, rows, texts)
    for place, (row, tokens) in enumerate(zip(rows, encoded, strict=True)):
        if not row.rendered and len(tokens) > 1 and tokens[-1] == tokenizer.eos_token_id:
            bare = plain.encode_hidden(texts[place], row.hidden).ids if row.marked else plain.encode(texts[place])
            if tokens[-len(bare) :] != bare or not bare:
                tokens.pop()
    return encoded


def _around_rows(
    plain: PlainText, rows: Sequence[TextRow], texts: Sequence[str], max_length: int | None = None
) -> list[list[int]]:
    """Encode texts of rows with the special tokens that the tokenizer puts around those that no template rendered."""
    encoded: list[list[int]] = [[] for _ in rows]
    groups: dict[tuple[bool, bool], list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault((row.rendered, row.marked), []).append(place)
    for (rendered, marked), places in groups.items():
        some, hidden = [texts[place] for place in places], [rows[place].hidden for place in places]
        if rendered:
            found = _encode_rendered(plain, some, hidden, max_length)
        elif marked:
            found = plain.encode_marked_texts(some, hidden, max_length=max_length)
        else:
            found = plain.encode_texts(some, max_length=max_length)
        for place, tokens in zip(places, found, strict=True):
            encoded[place] = tokens
    return encoded


def _encode_rendered(
    plain: PlainText, texts: Sequence[str], hidden: Sequence[Hidden], max_length: int | None = None
) -> list[list[int]]:
    """Encode what a chat template rendered: it has all its special tokens written out and gets none."""
    tokenizer = plain.tokenizer
    encoded = [list(ids)[:max_length] for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    for place, (text, private) in enumerate(zip(texts, hidden, strict=True)):
        if private:
            encoded[place] = plain.encode_hidden(text, private).ids[:max_length]
    return encoded


def hide_marks(rows: Sequence[TextRow], tokenizer: PreTrainedTokenizerBase) -> list[TextRow]:
    """Hide the special tokens that a template's columns spell, so that its own can be meant.

    Args:
        rows: The rows; those without ``fields`` stay as they are.
        tokenizer: The tokenizer.
    """
    if all(row.fields is None for row in rows):
        return list(rows)
    plain = PlainText(tokenizer)
    return [row if row.fields is None else _without_marks(plain, row, row.fields) for row in rows]


def _without_marks(plain: PlainText, row: TextRow, fields: Sequence[tuple[int, int]]) -> TextRow:
    before = row.text.find(row.prompt)
    cut = [(max(0, start - before), stop - before) for start, stop in fields]
    texts = [row.text, row.prompt, row.response or "", row.rejected or ""]
    whole = [[(0, len(text))] for text in texts[2:]]
    (text, prompt, response, rejected), hidden = plain.hide_within(texts, [fields, cut, *whole])
    return row._replace(
        text=text,
        prompt=prompt,
        response=None if row.response is None else response,
        rejected=None if row.rejected is None else rejected,
        hidden=hidden,
    )


def encode_prompts(
    rows: Sequence[TextRow],
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: TextSource | None = None,
    key_columns: Sequence[str] = (),
    max_tokens: int | None = None,
    too_long: Literal["error", "truncate_left"] = "error",
) -> list[EncodedPrompt]:
    """Encode prompts, refusing or shortening those over ``max_tokens``.

    Args:
        rows: The prompts.
        tokenizer: The policy's tokenizer.
        source: Where they come from, for messages.
        key_columns: Those of the rows' columns that the reference table's rewards depend on.
        max_tokens: Longest prompt, in tokens.
        too_long: What to do with a longer one.

    Raises:
        PromptError: Naming the row of a prompt that is too long or has no tokens.
    """
    if max_tokens is not None and max_tokens < 1:
        raise PromptError(f"data.max_prompt_tokens must be at least 1, got {max_tokens}")
    encoded = []
    for row, tokens in zip(rows, _encode_rows(tokenizer, rows, [row.prompt for row in rows]), strict=True):
        where, text = row_name(row, source), row.prompt.translate(row.hidden)
        if not tokens:
            raise PromptError(f"{where}: the prompt {text!r} has no tokens")
        if max_tokens is not None and len(tokens) > max_tokens:
            if too_long == "error":
                raise PromptError(
                    f"{where}: the prompt has {len(tokens)} tokens, over data.max_prompt_tokens="
                    f"{max_tokens}: raise it, set data.too_long=truncate_left, or shorten the prompt"
                )
            opening = tokens[:1] if tokens[0] == tokenizer.bos_token_id else []
            if len(opening) == max_tokens:
                raise PromptError(
                    f"{where}: data.max_prompt_tokens={max_tokens} leaves nothing of the prompt "
                    "but its BOS token: raise it"
                )
            tokens = opening + tokens[len(tokens) - max_tokens + len(opening) :]
            # As the whole text has it: with a template's special tokens, without a BOS that the tokenizer put before.
            own = row.rendered or row.marked
            spelt = own and row.prompt.startswith(str(tokenizer.bos_token))
            written = tokens if opening and spelt else tokens[len(opening) :]
            text = str(tokenizer.decode(written, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        known = row.columns or {}
        # The messages of a conversation are in its tokens.
        beside = {name: known[name] for name in key_columns if row.messages is None or name != MESSAGES}
        encoded.append(EncodedPrompt(tokens, text, prompt_key(tokens, beside), row.columns, row.messages))
    return encoded


def encode_texts(
    rows: Sequence[TextRow],
    tokenizer: PreTrainedTokenizerBase,
    *,
    ends: Sequence[int] = (),
    max_tokens: int | None = None,
    long_text: Literal["truncate", "split"] = "truncate",
) -> list[EncodedText]:
    """Encode texts for supervised fine-tuning, each closed by the EOS unless it is cut or ends itself.

    A prompt/response pair is learnt on the response and its EOS only; plain text on all but its first token. A pair has
    the tokens of the two written together: one that straddles the seam belongs to the response.
    Pieces of a split text share one token, the last of one piece and the first of the next, so that every token
    but the text's first is learnt once.

    Args:
        rows: The texts.
        tokenizer: The policy's tokenizer.
        ends: Tokens that end a text beside the EOS: one that ends in them gets no EOS.
        max_tokens: Longest text, in tokens.
        long_text: What to do with a longer one.

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
    marked = PlainText(tokenizer)
    # Those whose turns are marked are encoded by themselves, with the places of their tokens.
    plain = [row for row in rows if row.spans is None]
    pairs = [row for row in plain if row.response is not None]
    texts = [row.text if row.response is None else row.prompt + row.response for row in plain]
    wholes = iter(_encode_rows(tokenizer, plain, texts))
    prompts = iter(_encode_rows(tokenizer, pairs, [row.prompt for row in pairs]))
    for row in rows:
        if row.spans is not None:
            encoded.append(_encode_turns(row, marked, {eos, *ends}, max_tokens))
            continue
        tokens, context = next(wholes), 1
        if row.response is None:
            if not tokens:
                raise PromptError(f"row {row.row}: the text {row.text!r} has no tokens")
        else:
            prompt = next(prompts)
            context = max(1, shared_start(prompt, tokens))
            if not prompt:
                raise PromptError(f"row {row.row}: the prompt {row.prompt!r} has no tokens")
            if max_tokens is not None and context >= max_tokens:
                raise PromptError(
                    f"row {row.row}: its prompt of {context} tokens leaves no room for a response within "
                    f"data.max_text_tokens={max_tokens}"
                )
        if row.rendered:
            tokens = _through_the_end(tokens, context, {eos, *ends})
        elif len(tokens) <= context or tokens[-1] not in (eos, *ends):
            tokens = [*tokens, eos]
        if max_tokens is None or len(tokens) <= max_tokens:
            pieces = [tokens]
        elif long_text == "truncate" or row.response is not None:
            pieces = [tokens[:max_tokens]]
        else:
            starts = range(0, len(tokens) - 1, max_tokens - 1)
            pieces = [tokens[start : start + max_tokens] for start in starts]
        encoded += [EncodedText(piece, context) for piece in pieces]
    return encoded


def _through_the_end(tokens: list[int], context: int, ends: Collection[int]) -> list[int]:
    """Drop what a template puts behind the token that ends a response: it is not the policy's to write."""
    closing = [place for place in range(context, len(tokens)) if tokens[place] in ends]
    return tokens[: closing[-1] + 1] if closing else tokens


def _encode_turns(row: TextRow, plain: PlainText, ends: Collection[int], max_tokens: int | None) -> EncodedText:
    """Encode a rendered conversation, to be learnt where the assistant speaks, through the token that ends a turn."""
    tokens, offsets = plain.encode_hidden(row.text, row.hidden)
    learnt = [False] * len(tokens)
    for start, stop in row.spans or ():
        # A token that straddles the seam belongs to the turn, as a response's does.
        turn = [place for place, (first, last) in enumerate(offsets) if last > start and first < stop and last > first]
        closing = [place for place in turn if tokens[place] in ends]
        # What the template puts behind the closing token is not the policy's to write.
        for place in turn if not closing else [place for place in turn if place <= closing[-1]]:
            learnt[place] = True
    if max_tokens is not None:
        tokens, learnt = tokens[:max_tokens], learnt[:max_tokens]
    if not any(learnt[1:]):
        raise PromptError(
            f"row {row.row}: nothing that the assistant says lies within data.max_text_tokens={max_tokens}: raise it"
        )
    return EncodedText(tokens, 1, learnt)


def render_conversations(
    rows: Sequence[TextRow], chat: Chat, *, whole: bool, source: TextSource | None = None
) -> list[TextRow]:
    """Write conversations out as the chat template has them.

    Of a conversation that ends with the assistant's turn the prompt is what comes before: that turn is the policy's.

    Args:
        rows: Rows of messages.
        chat: The template.
        whole: Whether a conversation without an answer beside it is a text to learn from, rather than a prompt.
        source: Where they come from, for messages.

    Raises:
        PromptError: Naming a row that is no conversation, or one that the template cannot render.
    """
    rendered = []
    plain = PlainText(chat.tokenizer)
    for row in rows:
        if row.messages is None:
            raise PromptError(f"{row_name(row, source)} is plain text, and others are conversations: give them apart")
        try:
            (messages, answer, worse), hidden = plain.hide((row.messages, row.answer, row.worse))
            row = row._replace(hidden=hidden, rendered=True)
            if whole and answer is None:
                text, spans = chat.text(messages)
                rendered.append(row._replace(prompt=text, text=text, spans=spans))
                continue
            if answer is None:
                row, messages = row._replace(messages=unanswered(row.messages or [])), unanswered(messages)
            prompt = chat.prompt(messages)
            response, rejected = (None if side is None else chat.response(messages, side) for side in (answer, worse))
        except ConversationError as problem:
            raise PromptError(f"{row_name(row, source)}: {problem}") from problem
        rendered.append(row._replace(prompt=prompt, text=prompt, response=response, rejected=rejected))
    return rendered


def encode_labelled(
    rows: Sequence[TextRow],
    tokenizer: PreTrainedTokenizerBase,
    *,
    labels: Sequence[str],
    max_tokens: int | None = None,
    long_text: Literal["truncate", "split"] = "truncate",
) -> list[EncodedJudged]:
    """Encode labelled texts as a sequence classifier reads them, with the special tokens of its tokenizer.

    A prompt with a response is one text; what a chat template rendered has its special tokens already. A text cut by
    ``first_words`` is learnt as it was cut. The pieces of a split text all have its label.

    Args:
        rows: The texts, each with its label: an index into ``labels`` or one of them.
        tokenizer: The classifier's tokenizer.
        labels: Names of the labels, by index.
        max_tokens: Longest text in tokens.
        long_text: What to do with a longer one.

    Raises:
        PromptError: Naming the row without a label, or with one that is unknown.
    """
    known = {name: index for index, name in enumerate(labels)} | {str(index): index for index in range(len(labels))}
    for row in rows:
        if row.label is None:
            pairs = row.rejected is not None or row.worse is not None
            raise PromptError(
                f"row {row.row} has no label: name the column that holds it (label_column)"
                + (", or, since there are preferences, set model.objective to preference" if pairs else "")
            )
        if str(row.label) not in known:
            raise PromptError(
                f"row {row.row}: the label {row.label!r} is none of model.labels, {', '.join(labels)}, "
                f"nor an index from 0 to {len(labels) - 1}"
            )
    texts = [row.prompt + (row.response or "") for row in rows]
    pieces = _encode_whole(tokenizer, rows, texts, max_tokens, split=long_text == "split")
    return [EncodedJudged([tokens], known[str(rows[row].label)]) for row, tokens in pieces]


def encode_comparisons(
    rows: Sequence[TextRow], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int | None = None
) -> list[EncodedJudged]:
    """Encode pairs of responses to one prompt as a reward model reads them, prompt and response in one text.

    Args:
        rows: Prompts with a response and a worse one.
        tokenizer: The reward model's tokenizer.
        max_tokens: Longest text in tokens; longer ones lose their end.

    Raises:
        PromptError: Naming a row that lacks one of the responses, or whose texts are the same once they are cut.
    """
    texts = []
    for row in rows:
        if row.response is None or row.rejected is None:
            raise PromptError(
                f"row {row.row} lacks {'the response' if row.response is None else 'the worse response'}: name the "
                "columns that hold them (response_column, rejected_column)"
            )
        texts += [row.prompt + row.response, row.prompt + row.rejected]
    twice = [row for row in rows for _ in range(2)]
    tokens = [piece for _, piece in _encode_whole(tokenizer, twice, texts, max_tokens, split=False)]
    encoded = []
    for row, chosen, rejected in zip(rows, tokens[::2], tokens[1::2], strict=True):
        if chosen == rejected:
            raise PromptError(
                f"row {row.row}: both responses are the same {len(chosen)} tokens, and nothing can be learnt from "
                "that: leave the row out, or raise data.max_text_tokens if it cut them"
            )
        encoded.append(EncodedJudged([chosen, rejected], None))
    return encoded


def _encode_whole(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TextRow],
    texts: Sequence[str],
    max_tokens: int | None,
    *,
    split: bool,
) -> list[tuple[int, list[int]]]:
    """Encode texts with their special tokens, cut or split to ``max_tokens``: (place in ``texts``, token ids)."""
    plain = PlainText(tokenizer)
    if max_tokens is None or (rows and rows[0].rendered):
        return list(enumerate(_around_rows(plain, rows, texts, max_tokens)))
    least = tokenizer.num_special_tokens_to_add() + 1
    if max_tokens < least:
        raise PromptError(f"data.max_text_tokens must be at least {least} for this tokenizer, got {max_tokens}")
    if not split:
        return list(enumerate(_around_rows(plain, rows, texts, max_tokens)))
    marked = any(row.marked for row in rows)
    return plain.split_texts(texts, max_tokens, [row.hidden for row in rows] if marked else None)
