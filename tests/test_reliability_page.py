"""Each promise of docs/reliability.md names tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = [line for line in (ROOT / "docs/reliability.md").read_text().splitlines() if line.startswith("| ")]
PROMISES = [row for row in ROWS if row.split(" | ")[-1].strip(" |") not in ("test", ":---")]
NAMED = sorted({name for row in PROMISES for name in re.findall(r"`(tests/[^`]+)`", row)})


def test_every_promise_has_a_test() -> None:
    assert len(PROMISES) > 30
    for row in PROMISES:
        assert re.search(r"`tests/[^`]+`", row.split(" | ")[-1]), row


@pytest.mark.parametrize("name", NAMED)
def test_it_is_there(name: str) -> None:
    file, _, function = name.partition("::")
    text = (ROOT / file).read_text()
    assert "def test_" in text
    if function:
        assert f"def {function}(" in text
