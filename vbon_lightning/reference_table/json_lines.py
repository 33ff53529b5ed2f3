"""Exchange tables with the JSON Lines files that the authors' code reads and writes.

Two layouts: ``{"prompt", "text", "reward"}`` on a line for each response ("response"), and
``{"prompt", "responses": [...], "rewards": [...]}`` on a line for each prompt ("prompt").
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vbon_lightning._json_lines import read_json_lines
from vbon_lightning._visible import shorten
from vbon_lightning.reference_table.reader import ReferenceTable
from vbon_lightning.reference_table.shards import ReferenceTableError, TableRow, prompt_key
from vbon_lightning.reference_table.store import TablePath, table_file
from vbon_lightning.reference_table.store import table_path as as_path
from vbon_lightning.reference_table.writer import ReferenceTableWriter

_PROMPTS_A_SHARD = 1024
_LARGEST = float(np.finfo(np.float32).max)
"""Larger rewards would be infinite where they are stored."""


def import_jsonl(
    path: str | Path,
    table_path: str | TablePath,
    *,
    encode: Callable[[str], list[int]],
    encode_response: Callable[[str], list[int]],
    fingerprint: Mapping[str, Any],
    shard: str | None = None,
) -> int:
    """Import a JSON Lines file of either layout into a reference table.

    All responses to the same prompt tokens are gathered into one row, wherever they stand in the file. The
    files tell neither log-probabilities nor whether a response was truncated: both are unknown in the table,
    and reading them is an error. Prompts that the table holds already are passed over, so an import that was
    killed can be run again.

    Args:
        path: the file or its URL, plain or ``.gz``; its lines may follow either layout.
        table_path: directory of the table, made if absent, or its URL.
        encode: prompt -> token ids, as they will be looked up: ``lambda text: encode_prompt_ids(tokenizer, [text])[0]``
            of :mod:`vbon_lightning.data.encoding` has them as ``data.train`` does.
        encode_response: response -> token ids, without special tokens, also where it spells some:
            ``vbon_lightning.models.plain_text.PlainText(tokenizer).encode``.
        fingerprint: what made the responses and rewards.
        shard: name of the table's shards, which no other process may use; by default one that nobody has.

    Returns:
        The number of prompts written.

    Raises:
        FingerprintMismatch: if the table was made under other settings.
        ReferenceTableError: for a line that does not fit, naming its number, and for a file without lines.
    """
    file = path
    gathered: dict[str, TableRow] = {}
    for number, record in read_json_lines(file, ReferenceTableError):
        where = f"file {file}, line {number}"
        prompt, responses, rewards = _parsed(record, where)
        tokens = list(encode(prompt))
        try:
            key = prompt_key(tokens)
        except ValueError as problem:
            raise ReferenceTableError(f"{where}: the prompt {shorten(prompt)}: {problem}") from problem
        row = gathered.setdefault(key, TableRow(key, prompt, tokens, [], [], [], None, None))
        if row.prompt != prompt:
            raise ReferenceTableError(
                f"{where}: the prompt {shorten(prompt)} has the tokens of {shorten(row.prompt)}, "
                "which stands before it, and would share its row: leave one of the two out, or write both alike"
            )
        row.responses.extend(responses)
        row.rewards.extend(rewards)
    if not gathered:
        raise ReferenceTableError(f"file {file} holds no prompts")
    writer = ReferenceTableWriter(table_path, fingerprint, shard=shard)
    known = writer.finished_keys()
    if known:
        table = ReferenceTable.open(table_path)
        for key, row in gathered.items():
            table.check_text(key, row.prompt)
    waiting = (row for key, row in gathered.items() if key not in known)
    written = 0
    while chunk := list(islice(waiting, _PROMPTS_A_SHARD)):
        for row in chunk:
            row.response_tokens.extend(list(encode_response(response)) for response in row.responses)
        writer.write(chunk)
        written += len(chunk)
    return written


def export_jsonl(
    table: ReferenceTable, path: str | TablePath, layout: Literal["response", "prompt"] = "prompt"
) -> None:
    """Export a table's prompts, responses and rewards; the file appears when it is complete.

    Args:
        table: the table.
        path: the file to write, or its URL; a name ending in ``.gz`` is compressed.
        layout: "response" for a line a response, "prompt" for a line a prompt.

    Raises:
        ValueError: for another layout.
    """
    if layout not in ("response", "prompt"):
        raise ValueError(f"layout must be 'response' or 'prompt', got {layout!r}")
    target = as_path(path)
    with table_file(target) as raw:
        stream = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if target.suffix == ".gz" else raw
        text = io.TextIOWrapper(stream, encoding="utf-8", newline="\n")
        for row in table.rows():
            for record in _records(row, layout):
                text.write(json.dumps(record, ensure_ascii=False) + "\n")
        text.flush()
        text.detach()
        if stream is not raw:
            stream.close()


def _records(row: TableRow, layout: str) -> Iterator[dict[str, Any]]:
    # The shortest decimal that reads back as the same float32, instead of float64's 17 digits.
    rewards = [float(str(np.float32(reward))) for reward in row.rewards]
    if layout == "prompt":
        yield {"prompt": row.prompt, "responses": row.responses, "rewards": rewards}
    else:
        for response, reward in zip(row.responses, rewards, strict=True):
            yield {"prompt": row.prompt, "text": response, "reward": reward}


def _parsed(record: dict[str, Any], where: str) -> tuple[str, list[str], list[float]]:
    if {"prompt", "text", "reward"} <= record.keys():
        responses, rewards = [record["text"]], [record["reward"]]
    elif {"prompt", "responses", "rewards"} <= record.keys():
        responses, rewards = record["responses"], record["rewards"]
    else:
        raise ReferenceTableError(
            f"{where}: expected the fields prompt, text, reward or prompt, responses, rewards, "
            f"got {', '.join(sorted(record))}"
        )
    prompt = record["prompt"]
    if not isinstance(prompt, str) or not prompt:
        raise ReferenceTableError(f"{where}: the prompt must be text that is not empty, got {prompt!r}")
    if not isinstance(responses, list) or not isinstance(rewards, list):
        raise ReferenceTableError(f"{where}: responses and rewards must be lists")
    if not responses or len(responses) != len(rewards):
        raise ReferenceTableError(
            f"{where}: expected as many rewards as responses and at least one, "
            f"got {len(responses)} responses and {len(rewards)} rewards"
        )
    for response, reward in zip(responses, rewards, strict=True):
        if not isinstance(response, str):
            raise ReferenceTableError(f"{where}: a response must be text, got {response!r}")
        if isinstance(reward, bool) or not isinstance(reward, int | float) or not abs(reward) <= _LARGEST:
            raise ReferenceTableError(f"{where}: the reward of response {response!r} must be finite, got {reward!r}")
    return prompt, responses, [float(reward) for reward in rewards]
