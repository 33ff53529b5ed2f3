"""Training rows that are streamed: memory over the rows of a file, and rows a second, against ``datasets``.

python -m benchmarks.streaming

A JSON Lines file of up to ten million short prompts is read, tokenised with the demo's tokenizer, shuffled within 1,000
rows and dealt in batches of 256 to the end, once by ``TextSource(streaming=True)`` as training does it, and once by
``datasets.load_dataset(..., streaming=True)`` with ``shuffle`` and ``map``. Each run is a process of its own. Memory is
the most that the process ever held, against the same with the smallest file; time runs from the first batch.
"""

from __future__ import annotations

import json
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from benchmarks.bench import answer, isolated, table, write

WORDS = ("the", "film", "was", "slow", "at", "first", "and", "then", "it", "found", "its", "way", "with", "a", "cast")
BATCH, BUFFER = 256, 1000


def write_rows(path: Path, rows: int) -> None:
    """Write prompts of six words, all different."""
    with path.open("w", encoding="utf-8") as stream:
        for row in range(rows):
            words = [WORDS[(row // 7**place + place) % len(WORDS)] for place in range(6)]
            stream.write(json.dumps({"id": row, "text": f"{' '.join(words)} {row}"}) + "\n")


def stream_here(path: str) -> Iterator[int]:
    """Read a file to its end as a module's training batches; yield the rows of each."""
    from lightning.pytorch import LightningModule

    from vbon_lightning import AlignmentDataModule, TextSource

    class Trainer:
        lightning_module, world_size, global_rank = LightningModule(), 1, 0

    data = AlignmentDataModule(
        policy="package:vbon_lightning/assets/demo_lm",
        train=TextSource(path, streaming=True, buffer_size=BUFFER),
        batch_size=BATCH,
    )
    data.trainer = Trainer()  # type: ignore[assignment]
    return (len(batch.text) for batch in data.train_dataloader())


def stream_there(path: str) -> Iterator[int]:
    """Read a file to its end by ``datasets``; yield the rows of each batch."""
    import datasets
    from torch.utils.data import DataLoader
    from transformers import AutoTokenizer

    from vbon_lightning.paths import resolve_path

    tokenizer = AutoTokenizer.from_pretrained(resolve_path("package:vbon_lightning/assets/demo_lm"))
    rows = datasets.load_dataset("json", data_files=path, split="train", streaming=True)
    rows = rows.shuffle(seed=0, buffer_size=BUFFER).map(lambda row: tokenizer(row["text"]))
    loader = DataLoader(rows, batch_size=BATCH, collate_fn=lambda some: tokenizer.pad(
        [{"input_ids": row["input_ids"]} for row in some], padding_side="left", return_tensors="pt"
    ))  # fmt: skip
    return (len(batch["input_ids"]) for batch in loader)


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Stream a file in this process."""
    batches = (stream_here if job["who"] == "vbon_lightning" else stream_there)(job["path"])
    first = next(batches)
    started = time.perf_counter()
    rows = sum(batches)
    seconds = time.perf_counter() - started
    return {
        "rows": first + rows,
        "seconds": seconds,
        "rows_a_second": rows / seconds,
        "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main(rows: list[int] = [1_000, 100_000, 1_000_000, 10_000_000], peer_rows: int = 1_000_000) -> None:  # noqa: B006
    """Measure and write the results.

    Args:
        rows: Sizes of the file.
        peer_rows: The largest of them that ``datasets`` reads too.
    """
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        for count in rows:
            path = Path(directory, f"{count}.jsonl")
            write_rows(path, count)
            for who in ("vbon_lightning", "datasets") if count <= peer_rows else ("vbon_lightning",):
                done = isolated(__file__, {"who": who, "path": str(path)}, threads=1)
                found.append({"who": who, "file_rows": count, **done})
                print(found[-1], flush=True)
            path.unlink()
    least = {who: min(one["mib"] for one in found if one["who"] == who) for who in ("vbon_lightning", "datasets")}
    shown = [
        [
            one["who"],
            f"{one['file_rows']:,}",
            f"{one['mib']:.0f}",
            f"{one['mib'] - least[one['who']]:+.0f}",
            f"{one['rows_a_second']:,.0f}",
        ]
        for one in found
    ]
    write(
        "streaming",
        "Streamed training rows, tokenised and dealt in batches of 256: memory and rows a second by the file's size.",
        table(["reader", "rows in the file", "MiB at most", "over the least", "rows a second"], shown),
        found,
        ["datasets"],
    )


if __name__ == "__main__" and not answer(work):
    auto_cli(main, as_positional=False)
