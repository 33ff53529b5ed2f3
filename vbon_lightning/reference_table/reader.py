"""Read a reference table, only the columns and row groups that are asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from vbon_lightning._visible import shorten
from vbon_lightning.reference_table import fingerprint as fingerprints
from vbon_lightning.reference_table.checking import checked_groups
from vbon_lightning.reference_table.shards import (
    ReferenceTableError,
    TableRow,
    open_shard,
    shard_files,
    text_digest,
)
from vbon_lightning.reference_table.store import TablePath, table_path

_T = TypeVar("_T")
_UNKNOWN = {
    "log_probs": "reference log-probabilities",
    "finished": "flags that tell finished from truncated responses",
}


class PromptNotInTable(ReferenceTableError, KeyError):
    """A prompt that the table holds no responses for."""

    def __str__(self) -> str:
        """Return the message as it is; KeyError would quote it."""
        return str(self.args[0])


class OtherPrompt(ReferenceTableError):
    """The row of a prompt's key is another text's, which has the same tokens."""


class _Place(NamedTuple):
    file: TablePath
    group: int
    offset: int
    samples: int
    text: int
    """:func:`text_digest` of the prompt."""


class TokenLists(NamedTuple):
    """Lists of token ids, laid end to end."""

    tokens: Tensor
    """``[sum of lengths]`` int32."""
    lengths: Tensor
    """``[M]`` long: how many of them belong to each list."""


class ReferenceTable:
    """M reference responses and rewards for each prompt, read as they are needed.

    Made by :meth:`open`. Rewards, log-probabilities, flags and the responses' token ids are kept in memory once asked
    for, in tensors a prompt; texts are read from the disk at each :meth:`row`.
    """

    def __init__(self, path: TablePath, fingerprint: dict[str, Any], keys: Collection[str] | None) -> None:
        """Take the parts; :meth:`open` finds them."""
        self.path = path
        self.fingerprint = fingerprint
        """What made the table, as the first writer stored it."""
        self._wanted = None if keys is None else frozenset(keys)
        self._columns: dict[str, dict[str, Tensor | None]] = {}
        self._tokens: dict[str, TokenLists | None] | None = None
        self._samples: int | None = None
        self._read: tuple[TablePath, int, pa.Table] | None = None
        """The row group that a row was read of last: others of it may be asked for next."""
        self._places = self._retrying(self._scan)

    @classmethod
    def open(
        cls,
        path: str | TablePath,
        *,
        fingerprint: Mapping[str, Any] | None = None,
        keys: Collection[str] | None = None,
    ) -> ReferenceTable:
        """Open the table in a directory, or in a folder of a store.

        Args:
            path: the directory, or a URL that fsspec knows (``s3://bucket/table``).
            fingerprint: what this run expects to have made the table; None to take it as it is.
            keys: prompts to restrict the table to; None for all. A key the table lacks is no error here.

        Returns:
            The table.

        Raises:
            FingerprintMismatch: if the table was made under other settings; it names each field.
            ReferenceTableError: if there is no table, it is empty, or a file of it is broken.
            TableStoreError: if the store cannot be reached.
        """
        directory = table_path(path)
        stored = fingerprints.read(directory)
        if fingerprint is not None:
            fingerprints.check(directory, stored, fingerprint)
        return cls(directory, stored, keys)

    def check(self, fingerprint: Mapping[str, Any]) -> None:
        """Refuse a table that was made under other settings than these.

        Raises:
            FingerprintMismatch: naming each field that differs.
        """
        fingerprints.check(self.path, self.fingerprint, fingerprint)

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self._places)

    def __contains__(self, key: object) -> bool:
        """Tell whether the prompt with this key is in the table."""
        return key in self._places

    def keys(self) -> list[str]:
        """Return the prompts' keys, in the table's order."""
        return list(self._places)

    @property
    def samples(self) -> int:
        """M, the number of responses a prompt; the minimum over the prompts where it differs."""
        if self._samples is None:
            if not self._places:
                raise ReferenceTableError(f"none of the prompts asked for is in the reference table {self.path}")
            self._samples = min(place.samples for place in self._places.values())
        return self._samples

    @property
    def most_samples(self) -> int:
        """The most responses that a prompt has: more than :attr:`samples` while a table is being topped up."""
        return max((place.samples for place in self._places.values()), default=0)

    def count(self, key: str) -> int:
        """Return how many responses the table has to the prompt with this key; 0 where it lacks it."""
        place = self._places.get(key)
        return 0 if place is None else place.samples

    def check_text(self, key: str, text: str) -> None:
        """Refuse the row of another text that has the same tokens; a prompt that the table lacks is no error here.

        Args:
            key: the prompt's key.
            text: the prompt.

        Raises:
            OtherPrompt: naming both texts.
        """
        if key in self._places:
            self._place(key, text)

    def rewards(self, key: str, text: str | None = None) -> Tensor:
        """Return the rewards of a prompt's reference responses.

        Args:
            key: the prompt's key.
            text: the prompt, for the error message.

        Returns:
            ``[M]`` float32.

        Raises:
            PromptNotInTable: if the table lacks the prompt.
        """
        return self._values("rewards", key, text)

    def finished(self, key: str, text: str | None = None) -> Tensor:
        """Return which of a prompt's reference responses ended with an EOS.

        Args:
            key: the prompt's key.
            text: the prompt, for the error message.

        Returns:
            ``[M]`` bool.

        Raises:
            PromptNotInTable: if the table lacks the prompt.
            ReferenceTableError: if that is unknown, as in tables imported from JSON Lines.
        """
        return self._values("finished", key, text)

    def log_probs(self, key: str, text: str | None = None) -> Tensor:
        """Return the reference log-probabilities (nats) of a prompt's reference responses.

        Args:
            key: the prompt's key.
            text: the prompt, for the error message.

        Returns:
            ``[M]`` float32, at the table's temperature.

        Raises:
            PromptNotInTable: if the table lacks the prompt.
            ReferenceTableError: if they are unknown, as in tables imported from JSON Lines.
        """
        return self._values("log_probs", key, text)

    def rewards_matrix(self, keys: Sequence[str], texts: Sequence[str] | None = None) -> Tensor:
        """Return :meth:`rewards` of several prompts, cut to the common M: ``[K, samples]`` float32."""
        return self._matrix("rewards", keys, texts)

    def finished_matrix(self, keys: Sequence[str], texts: Sequence[str] | None = None) -> Tensor:
        """Return :meth:`finished` of several prompts, cut to the common M: ``[K, samples]`` bool."""
        return self._matrix("finished", keys, texts)

    def log_probs_matrix(self, keys: Sequence[str], texts: Sequence[str] | None = None) -> Tensor:
        """Return :meth:`log_probs` of several prompts, cut to the common M: ``[K, samples]`` float32."""
        return self._matrix("log_probs", keys, texts)

    def response_tokens(self, key: str, text: str | None = None) -> TokenLists:
        """Return the token ids of a prompt's reference responses, as they were sampled.

        Args:
            key: the prompt's key.
            text: the prompt, for the error message.

        Returns:
            :class:`TokenLists` of M responses, the EOS included where one was sampled.

        Raises:
            PromptNotInTable: if the table lacks the prompt.
            ReferenceTableError: if the table lacks them, as an import without tokens does.
        """
        rewards, found = self.rewards(key, text), self._token_column()[key]
        if found is None or len(found.lengths) != len(rewards) or not len(found.tokens):
            what = f"the prompt with key {key}" if text is None else f"prompt {text!r}"
            raise ReferenceTableError(
                f"the reference table {self.path} lacks the token ids of its {len(rewards)} responses to {what}, and "
                "they are what is learnt from: make the table with `vbon predict`, or import it with an "
                "`encode_response` that gives them"
            )
        return found

    def response_matrix(
        self, keys: Sequence[str], texts: Sequence[str] | None = None, *, pad_id: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Return :meth:`response_tokens` of several prompts, cut to the common M and padded on the right.

        Args:
            keys: K keys of prompts.
            texts: the prompts, for the error message.
            pad_id: what to pad with.

        Returns:
            Token ids ``[K, samples, T]`` long, T the longest of these responses, and the mask of the same shape, True
            on what is no padding.
        """
        rows = [self.response_tokens(key, None if texts is None else texts[i]) for i, key in enumerate(keys)]
        lengths = torch.stack([row.lengths[: self.samples] for row in rows])
        mask = torch.arange(max(1, int(lengths.max()))) < lengths[..., None]
        tokens = torch.full(mask.shape, pad_id, dtype=torch.long)
        kept = [row.tokens[:count] for row, count in zip(rows, lengths.sum(-1).tolist(), strict=True)]
        tokens[mask] = torch.cat(kept).long()
        return tokens, mask

    def check_tokens(self, vocabulary: int | None, end_ids: Sequence[int] | None = None) -> None:
        """Refuse a table with token ids that a model does not have, or with other ends of responses than this run's.

        No response goes on behind a token that ends one, and those and only those that have one are finished.

        Args:
            vocabulary: how many tokens the model has; None where that is unknown, and nothing is checked of it.
            end_ids: tokens that end a response; None where that does not matter.

        Raises:
            ReferenceTableError: naming the prompt and the token.
        """
        if vocabulary is None and end_ids is None:
            return
        found = self._retrying(lambda: self._load("response_tokens", _seen(frozenset(end_ids or ()))))
        finished = {} if end_ids is None else self._column("finished")
        for key, seen in found.items():
            if seen is None:
                continue
            if vocabulary is not None and seen.largest >= vocabulary:
                raise ReferenceTableError(
                    f"the reference table {self.path} has a response to {shorten(self.row(key).prompt)} with the token "
                    f"id {seen.largest}, and the model has {vocabulary} tokens: name the model that the table was made "
                    "with, or make it again in another directory"
                )
            problem = None if end_ids is None else _wrong_end(seen, finished[key])
            if problem is not None:
                raise ReferenceTableError(
                    f"the reference table {self.path} has responses, first to {shorten(self.row(key).prompt)}, that "
                    f"{problem}: make it again, or name the model that it was made with"
                )

    @property
    def knows_finished(self) -> bool:
        """Return whether the table tells finished from truncated responses; JSON Lines imports do not."""
        return all(values is not None for values in self._column("finished").values())

    def row(self, key: str, text: str | None = None) -> TableRow:
        """Read all there is about one prompt.

        Args:
            key: the prompt's key.
            text: the prompt, for the error message.

        Returns:
            The row, texts and tokens included.

        Raises:
            PromptNotInTable: if the table lacks the prompt.
        """

        def read() -> TableRow:
            place = self._place(key, text)
            if self._read is None or self._read[:2] != (place.file, place.group):
                with open_shard(place.file) as file:
                    self._read = place.file, place.group, file.read_row_group(place.group)
            return TableRow(**self._read[2].slice(place.offset, 1).to_pylist()[0])

        return self._retrying(read)

    def rows(self) -> Iterator[TableRow]:
        """Yield all rows in the table's order, holding one row group in memory at a time."""
        at: tuple[TablePath, int] | None = None
        group: list[dict[str, Any]] = []
        for key in self.keys():
            place = self._places[key]
            if (place.file, place.group) != at:
                try:
                    with open_shard(place.file) as file:
                        group = file.read_row_group(place.group).to_pylist()
                except FileNotFoundError:
                    at = None
                    yield self.row(key)
                    continue
                at = (place.file, place.group)
            yield TableRow(**group[place.offset])

    def _scan(self) -> dict[str, _Place]:
        places: dict[str, _Place] = {}
        empty = True
        for path in shard_files(self.path):
            for group, table in enumerate(checked_groups(path, fingerprints.longest_response(self.fingerprint))):
                sizes = pc.list_value_length(table.column("rewards")).to_pylist()
                keys, texts = (table.column(name).to_pylist() for name in ("key", "prompt"))
                for offset, (key, text, samples) in enumerate(zip(keys, texts, sizes, strict=True)):
                    empty = False
                    known = places.get(key)
                    if (self._wanted is None or key in self._wanted) and (known is None or samples > known.samples):
                        places[key] = _Place(path, group, offset, samples, text_digest(text))
        if empty:
            raise ReferenceTableError(f"reference table {self.path} is empty; fill it with `vbon predict`")
        return places

    def _retrying(self, read: Callable[[], _T]) -> _T:
        """Read again when a shard went away because its writer merged it into another."""
        for _ in range(10):
            try:
                return read()
            except FileNotFoundError:
                if hasattr(self, "_places"):
                    self._places = self._retrying(self._scan)
        return read()

    def _place(self, key: str, text: str | None) -> _Place:
        place = self._places.get(key)
        if place is None:
            what = f"prompt {text!r} (key {key})" if text is not None else f"the prompt with key {key}"
            raise PromptNotInTable(
                f"{what} is not among the {len(self)} prompts of the reference table {self.path}; "
                "add it with `vbon predict`, with the tokenizer and the prompt template of the table"
            )
        if text is not None and place.text != text_digest(text):
            raise OtherPrompt(
                f"prompt {shorten(text, 200)} has the tokens of {shorten(self.row(key).prompt, 200)}, "
                f"whose responses and rewards are in the reference table {self.path}: they would be taken for its own. "
                "Leave one of the two out of the data, or write both alike; where data.max_prompt_tokens cut them, "
                "raise it, and make the table anew in another directory"
            )
        return place

    def _column(self, name: str) -> dict[str, Tensor | None]:
        if name not in self._columns:
            self._columns[name] = self._retrying(lambda: self._load(name, _numbers))
        return self._columns[name]

    def _token_column(self) -> dict[str, TokenLists | None]:
        if self._tokens is None:
            self._tokens = self._retrying(lambda: self._load("response_tokens", _token_lists))
        return self._tokens

    def _load(self, name: str, part: Callable[[pa.ListArray], Callable[[int], _T]]) -> dict[str, _T | None]:
        by_file: dict[TablePath, dict[int, list[tuple[str, int]]]] = {}
        for key, place in self._places.items():
            by_file.setdefault(place.file, {}).setdefault(place.group, []).append((key, place.offset))
        loaded: dict[str, _T | None] = {}
        for path, groups in by_file.items():
            with open_shard(path) as file:
                for group, members in groups.items():
                    lists = file.read_row_group(group, columns=[name]).column(0).combine_chunks()
                    known = lists.is_valid().to_pylist()
                    take = part(lists)
                    for key, i in members:
                        loaded[key] = take(i) if known[i] else None
        return loaded

    def _values(self, name: str, key: str, text: str | None) -> Tensor:
        self._place(key, text)
        values = self._column(name)[key]
        if values is None:
            raise ReferenceTableError(
                f"the reference table {self.path} holds no {_UNKNOWN[name]}: JSON Lines imports do not carry "
                "them; make the table with `vbon predict` if they are needed"
            )
        return values

    def _matrix(self, name: str, keys: Sequence[str], texts: Sequence[str] | None) -> Tensor:
        if texts is not None and len(texts) != len(keys):
            raise ValueError(f"expected one text a key, got {len(texts)} texts and {len(keys)} keys")
        rows = [
            self._values(name, key, None if texts is None else texts[i])[: self.samples] for i, key in enumerate(keys)
        ]
        if not rows:
            return torch.zeros(0, self.samples, dtype=torch.bool if name == "finished" else torch.float32)
        return torch.stack(rows)


def _numbers(lists: pa.ListArray) -> Callable[[int], Tensor]:
    bounds, values = lists.offsets.to_pylist(), lists.values.to_numpy(zero_copy_only=False)
    return lambda i: torch.from_numpy(values[bounds[i] : bounds[i + 1]].copy())


class _Seen(NamedTuple):
    """What there is to check of the tokens of a prompt's responses."""

    largest: int
    """The largest token id, -1 where there is none."""
    early: list[int]
    """End tokens that are not a response's last."""
    at_end: Tensor
    """``[M]`` bool: whether a response's last token is one."""


def _seen(end_ids: frozenset[int]) -> Callable[[pa.ListArray], Callable[[int], _Seen]]:
    """Return what finds the largest token and the end tokens of a prompt's responses."""
    ends = torch.tensor(sorted(end_ids), dtype=torch.long)

    def part(lists: pa.ListArray) -> Callable[[int], _Seen]:
        bounds = lists.offsets.to_pylist()
        edges = torch.from_numpy(lists.values.offsets.to_numpy().copy()).long()
        tokens = torch.from_numpy(lists.values.values.to_numpy(zero_copy_only=False).copy()).long()
        early = torch.isin(tokens, ends)
        at_end = torch.zeros(max(0, len(edges) - 1), dtype=torch.bool)
        filled = edges.diff() > 0
        last = edges[1:][filled] - 1
        at_end[filled] = early[last]
        early[last] = False

        def take(i: int) -> _Seen:
            responses = slice(bounds[i], bounds[i + 1])
            own = slice(int(edges[responses.start]), int(edges[responses.stop]))
            largest = int(tokens[own].max()) if own.start < own.stop else -1
            return _Seen(largest, tokens[own][early[own]].tolist(), at_end[responses])

        return take

    return part


def _wrong_end(seen: _Seen, finished: Tensor | None) -> str | None:
    """Say what is wrong with where responses end, or whether they are said to be finished; None where nothing is."""
    if seen.early:
        return f"go on behind the token {seen.early[0]}, which ends a response in this run"
    if finished is None or torch.equal(finished, seen.at_end):
        return None
    place = int((finished != seen.at_end).nonzero()[0])
    if finished[place]:
        return f"are said to be finished though no token at their end (response {place}) ends one in this run"
    return f"are said to be cut though their last token (response {place}) ends one in this run"


def _token_lists(lists: pa.ListArray) -> Callable[[int], TokenLists]:
    bounds = lists.offsets.to_pylist()
    ends = torch.from_numpy(lists.values.offsets.to_numpy().copy()).long()
    values = lists.values.values.to_numpy(zero_copy_only=False)

    def take(i: int) -> TokenLists:
        edges = ends[bounds[i] : bounds[i + 1] + 1]
        return TokenLists(torch.from_numpy(values[edges[0] : edges[-1]].copy()), edges.diff())

    return take
