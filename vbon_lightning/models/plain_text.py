"""Text that is only text: a special token that it spells, such as ``</s>``, is not one of its tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from vbon_lightning.models.tokenizer import drop_repeated_opening, encode_whole_texts, opening_ids, tokenize

Hidden = Mapping[int, str]
"""Private characters that stand for those that begin what is only text, for ``str.translate``."""

_PRIVATE = range(0xE000, 0xF900)
"""Characters that Unicode leaves to private use."""


class Pieces(NamedTuple):
    """A text as token ids, and where each token stands in it."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    """First character and the one behind the last, by token; all (0, 0) where the tokenizer does not know."""


class PlainText:
    """Encodes text of which special tokens are not meant, by itself or within what a template wrote.

    Templates and the tokenizer itself make special tokens; what data, users and models say makes none. The tokens of a
    text that spells none are those of the tokenizer's own call, bit for bit. Tokens that were added to the vocabulary
    and are not special are ordinary ones.

    Args:
        tokenizer: The tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        added = {place: token for place, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special = frozenset({*added, *tokenizer.all_special_ids} - {tokenizer.unk_token_id})
        """Ids that text must not come to."""
        names = {str(tokenizer.convert_ids_to_tokens(one)) for one in self.special}
        self._names = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")
        self._shortest = min(names, key=len, default="")
        self._normalized = any(token.normalized for token in added.values())

    def encode(self, text: str) -> list[int]:
        """Encode text without any special token."""
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return ids if self.special.isdisjoint(ids) else self._as_text(text).ids

    def encode_texts(self, texts: Sequence[str], *, max_length: int | None = None) -> list[list[int]]:
        """Encode texts with the special tokens that the tokenizer puts around each, such as its BOS.

        Args:
            texts: The texts.
            max_length: Cut to this many tokens, special ones included.
        """
        if not texts:
            return []
        found = tokenize(self.tokenizer, texts, max_length, return_special_tokens_mask=True)
        encoded = [list(ids) for ids in found["input_ids"]]
        for place, (ids, added) in enumerate(zip(encoded, found["special_tokens_mask"], strict=True)):
            if self._spells(ids, added):
                encoded[place] = self._put_around(self._as_text(texts[place]).ids, *_around(ids, added), max_length)
        return encoded

    def split_texts(
        self, texts: Sequence[str], max_length: int, hidden: Sequence[Hidden] | None = None
    ) -> list[tuple[int, list[int]]]:
        """Encode texts in pieces of ``max_length`` tokens, the tokenizer's special tokens around each piece.

        Args:
            texts: The texts.
            max_length: The longest piece, special tokens included.
            hidden: Where special tokens that a text spells are meant, what private characters in it stand for.

        Returns:
            The text's place and the token ids of each piece.
        """
        found = self.tokenizer(
            list(texts),
            truncation=True,
            max_length=max_length,
            return_overflowing_tokens=True,
            return_special_tokens_mask=True,
        )
        columns = (found["overflow_to_sample_mapping"], found["input_ids"], found["special_tokens_mask"])
        pieces = [(place, list(ids), added) for place, ids, added in zip(*columns, strict=True)]
        if hidden is None:
            spelt = {place for place, ids, added in pieces if self._spells(ids, added)}
        else:
            spelt = {place for place, text in enumerate(texts) if text.translate(hidden[place]) != text}
        opening = [] if hidden is None else opening_ids(self.tokenizer)
        split: list[tuple[int, list[int]]] = []
        for place, ids, added in pieces:
            if place not in spelt:
                split.append((place, drop_repeated_opening(ids, opening)))
            elif not split or split[-1][0] != place:
                (before, after), text = _around(ids, added), texts[place]
                bare = self._as_text(text).ids if hidden is None else self.encode_hidden(text, hidden[place]).ids
                bare = bare[len(opening) :] if opening and bare[: len(opening)] == opening else bare
                room = max_length - len(before) - len(after)
                split += [(place, before + bare[at : at + room] + after) for at in range(0, len(bare), room)]
        return split

    # -- text within a template --------------------------------------------------------------------

    def hide(self, value: Any) -> tuple[Any, Hidden]:
        """Put private characters in the place of those that special tokens in some text begin with.

        A template then renders the text beside special tokens of its own, and :meth:`encode_hidden` tells them apart.

        Args:
            value: Text, or lists and mappings that hold some, such as messages.

        Returns:
            The same with its special tokens hidden, and what the private characters stand for; without any, the value
            itself and nothing.
        """
        texts = list(dict.fromkeys(_texts(value)))
        private = _Private(texts)
        changed = {text: found for text in texts if (found := self._hidden(text, private, [(0, len(text))])) != text}
        return (_mapped(value, changed), private.hidden) if changed else (value, {})

    def hide_within(self, texts: Sequence[str], spans: Sequence[Sequence[tuple[int, int]]]) -> tuple[list[str], Hidden]:
        """Hide special tokens that texts spell, wholly or in part, within some of their characters.

        Args:
            texts: The texts.
            spans: What of each is only text: first characters and those behind the last ones.
        """
        private = _Private(texts)
        return [self._hidden(text, private, own) for text, own in zip(texts, spans, strict=True)], private.hidden

    def encode_hidden(self, text: str, hidden: Hidden) -> Pieces:
        """Encode a text of which special tokens are meant, but for the hidden ones, which are text.

        Args:
            text: What a template made of text with :meth:`hide`; no special tokens are put around it.
            hidden: What the private characters in it stand for.
        """
        whole = self._call(text)
        if text.translate(hidden) == text:
            return whole
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        at = known = 0  # characters and tokens that are done
        for mark, start, stop in [*self._marks(text, whole), (len(whole.ids), len(text), len(text))]:
            part, written = text[at:start], text[at:start].translate(hidden)
            if written != part:
                found = self._behind_mark(written) if at else self._as_text(written)
                ids += found.ids
                offsets += [(at + first, at + last) for first, last in found.offsets]
            else:  # as it was within the whole
                ids += whole.ids[known:mark]
                offsets += whole.offsets[known:mark]
            ids += whole.ids[mark : mark + 1]
            offsets += whole.offsets[mark : mark + 1]
            at, known = stop, mark + 1
        return Pieces(ids, offsets)

    def encode_marked_texts(
        self, texts: Sequence[str], hidden: Sequence[Hidden], *, max_length: int | None = None
    ) -> list[list[int]]:
        """Encode texts with their special tokens, but for hidden ones, and those that the tokenizer puts around each.

        One that begins with the opening that the tokenizer puts before it has it once.

        Args:
            texts: The texts.
            hidden: What private characters stand for in each.
            max_length: Cut to this many tokens, special ones included.
        """
        encoded = encode_whole_texts(self.tokenizer, texts, max_length=max_length)
        for place, (text, private) in enumerate(zip(texts, hidden, strict=True)):
            if text.translate(private) != text:
                found = self.tokenizer(text, return_special_tokens_mask=True)
                before, after = _around(list(found["input_ids"]), found["special_tokens_mask"])
                bare = self.encode_hidden(text, private).ids
                before = [] if bare[: len(before)] == before else before
                encoded[place] = self._put_around(bare, before, after, max_length)
        return encoded

    # -- parts -------------------------------------------------------------------------------------

    def _spells(self, ids: Sequence[int], added: Sequence[int]) -> bool:
        """Say whether there are special tokens among those that the tokenizer did not add by itself."""
        return any(token in self.special and not own for token, own in zip(ids, added, strict=True))

    def _put_around(self, bare: list[int], before: list[int], after: list[int], max_length: int | None) -> list[int]:
        room = len(bare) if max_length is None else max(0, max_length - len(before) - len(after))
        kept = bare[max(0, len(bare) - room) :] if self.tokenizer.truncation_side == "left" else bare[:room]
        return before + kept + after

    def _call(self, text: str, **options: Any) -> Pieces:
        fast = bool(self.tokenizer.is_fast)
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, **options)
        ids = list(found["input_ids"])
        return Pieces(ids, [(a, b) for a, b in found["offset_mapping"]] if fast else [(0, 0)] * len(ids))

    def _as_text(self, text: str) -> Pieces:
        """Encode text that spells special tokens."""
        found = self._call(text, split_special_tokens=True)
        if self.special.isdisjoint(found.ids):
            return found
        # Some vocabularies have a special token among their ordinary pieces: letter by letter it is not found.
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for token, span in zip(*found, strict=True):
            apart = self._letters(token) if token in self.special else [token]
            ids += apart
            offsets += [span] * len(apart)
        return Pieces(ids, offsets)

    def _letters(self, token: int) -> list[int]:
        """Encode a special token's own text letter by letter; what the vocabulary has no letter for is unknown."""
        unknown = self.tokenizer.unk_token_id
        letters = (
            self.tokenizer.convert_tokens_to_ids(one) for one in str(self.tokenizer.convert_ids_to_tokens(token))
        )
        known = [unknown if one in self.special else one for one in letters]
        return [one for one in known if isinstance(one, int)]

    def _behind_mark(self, text: str) -> Pieces:
        """Encode text that stands behind a special token: some tokenizers begin the whole with a space, and no part."""
        if self._call(f"{self._shortest}a").ids[1:] == self._call("a").ids:
            return self._as_text(text)
        for before in ("\n", "a", "1"):
            found = self._as_text(before + text)
            behind = [place for place, (_, last) in enumerate(found.offsets) if last > 1]
            if behind and all(found.offsets[place][0] >= 1 for place in behind):
                offsets = [(first - 1, last - 1) for first, last in found.offsets]
                return Pieces([found.ids[place] for place in behind], [offsets[place] for place in behind])
        return self._as_text(text)

    def _marks(self, text: str, found: Pieces) -> list[tuple[int, int, int]]:
        """Find special tokens: the place of each among the tokens, and where in the text it begins and ends."""
        places = [place for place, token in enumerate(found.ids) if token in self.special]
        if self.tokenizer.is_fast:
            return [(place, *found.offsets[place]) for place in places]
        spans = (match.span() for match in self._names.finditer(text))
        return [(place, *span) for place, span in zip(places, spans, strict=False)]

    def _hidden(self, text: str, private: _Private, spans: Sequence[tuple[int, int]]) -> str:
        while found := [
            start for start, stop in self._spelt(text) if any(start < last and first < stop for first, last in spans)
        ]:
            for start in found:
                text = text[:start] + private.of(text[start]) + text[start + 1 :]
        return text

    def _spelt(self, text: str) -> list[tuple[int, int]]:
        """Find where a text spells special tokens; one that is normalized may be spelt otherwise than it is named."""
        if not self._normalized and not self._names.search(text):
            return []
        found = [(start, stop) for _, start, stop in self._marks(text, self._call(text))]
        # The space around it, which some tokens take with them, stays.
        return [(stop - len(text[start:stop].lstrip()), stop) for start, stop in found if text[start:stop].strip()]


class _Private:
    """Chooses private characters that given texts do not have."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.hidden: dict[int, str] = {}
        self._texts = texts
        self._standing: dict[str, str] = {}

    def of(self, letter: str) -> str:
        """Return the character that stands for a letter."""
        if letter not in self._standing:
            taken = set().union(*map(set, self._texts), self._standing.values())
            self._standing[letter] = next(chr(code) for code in _PRIVATE if chr(code) not in taken)
            self.hidden[ord(self._standing[letter])] = letter
        return self._standing[letter]


def _around(ids: list[int], added: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the special tokens that a tokenizer put before and behind a text."""
    first = next((place for place, own in enumerate(added) if not own), len(ids))
    last = next((place for place in range(len(ids), first, -1) if not added[place - 1]), first)
    return ids[:first], ids[last:]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from _texts(name)
            yield from _texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)


def _mapped(value: Any, changed: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return changed.get(value, value)
    if isinstance(value, Mapping):
        return {_mapped(name, changed): _mapped(part, changed) for name, part in value.items()}
    return [_mapped(part, changed) for part in value] if isinstance(value, list | tuple) else value
