"""What a terminal would obey and what nobody could see."""

from __future__ import annotations

import json
import sys
import unicodedata

import pytest

from vbon_lightning._visible import is_hidden, visible, visible_json

HIDDEN = ["\x00", "\x07", "\x08", "\r", "\x1b", "\x7f", "\x85", "\x9b", "\xad", "\u200b", "\u200d", "\u200e", "\u2028",
          "\u2029", "\u202e", "\u2066", "\u061c", "\u180e", "\ufeff", "\ufff9", "\u3164", "\ud800", "\uffff",
          "\U000e0041", "\U000e0101"]  # fmt: skip


@pytest.mark.parametrize("letter", HIDDEN)
def test_what_cannot_be_seen_is_written_out(letter: str) -> None:
    shown = visible(f"a{letter}b")
    assert shown.isascii() and shown.isprintable() and shown.startswith("a\\") and shown.endswith("b")
    line = json.dumps(f"a{letter}b\n", ensure_ascii=False)
    assert json.loads(visible_json(line)) == f"a{letter}b\n"
    assert visible_json(line).isascii() and visible_json(line).isprintable()


@pytest.mark.parametrize(
    "text",
    [
        "plain\n\ttext",
        "Zürich, 東京, \u0623\u0644\u0641",
        "👩\u200d🔬👍🏽❤️",
        "\u0645\u06cc\u200c\u062e\u0648",
        "e\u0301",
        "\u00a0",
    ],
)
def test_what_has_a_shape_stays(text: str) -> None:
    assert visible(text) == text
    assert json.loads(visible_json(json.dumps(text, ensure_ascii=False))) == text


def test_every_character_that_moves_the_cursor_or_the_direction_is_hidden() -> None:
    for code in range(sys.maxunicode + 1):
        letter = chr(code)
        if unicodedata.category(letter) in ("Cc", "Cf") and letter not in "\n\t":
            assert is_hidden(letter), hex(code)
