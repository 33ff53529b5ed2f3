"""Text for eyes: what a terminal would obey, and what nobody could see, is written out."""

from __future__ import annotations

import re
import unicodedata
from functools import cache

_SUSPECT = re.compile(r"[^\x20-\x7e\n\t]")
_FILLERS = "\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0"
"""Letters and marks without a shape of their own, as fonts draw them."""
_JOINER = re.compile(r"(?<=[^\x00-\x7f])[\u200c\u200d](?=[^\x00-\x7f])")
"""Joins letters of Persian, Hindi and their like, and the parts of one emoji."""


def visible(text: str) -> str:
    r"""Write out control characters, changes of direction, spaces without width and their like as ``\x1b``, ``\u202e``.

    Line feeds, tabs and whatever has a shape stay as they are.

    Args:
        text: Any text.
    """
    if text.isascii() and _SUSPECT.search(text) is None:
        return text
    joined = {match.start() for match in _JOINER.finditer(text)}
    return "".join(
        escaped(letter) if is_hidden(letter) and place not in joined else letter for place, letter in enumerate(text)
    )


def visible_json(line: str) -> str:
    """Write out the same in JSON, which then says what it said before.

    Args:
        line: JSON, as ``json.dumps`` has it.
    """

    def written(match: re.Match[str]) -> str:
        if not is_hidden(match[0]):
            return match[0]
        units = match[0].encode("utf-16-be", "surrogatepass")
        return "".join(f"\\u{units[place]:02x}{units[place + 1]:02x}" for place in range(0, len(units), 2))

    return _SUSPECT.sub(written, line)


def is_text(value: str) -> bool:
    """Say whether text is made of whole characters; JSON and YAML can write halves of them, lone surrogates."""
    return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)


@cache
def is_hidden(letter: str) -> bool:
    """Say whether a character is a command to whatever shows it, or shows nothing."""
    if letter in "\n\t":
        return False
    kind = unicodedata.category(letter)
    unseen = 0xE0100 <= ord(letter) <= 0xE01EF or letter in _FILLERS or ord(letter) & 0xFFFE == 0xFFFE
    return kind in ("Cc", "Cf", "Cs", "Zl", "Zp") or unseen


def escaped(letter: str) -> str:
    """Return a character's number as Python and JSON write it."""
    code = ord(letter)
    if letter == "\r":
        return "\\r"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def shorten(text: str, limit: int = 80) -> str:
    """Quote a text for a message, its middle left out where it is long.

    Args:
        text: The text.
        limit: Characters to keep.
    """
    if len(text) > limit:
        text = f"{text[: limit // 2]} ... {text[-limit // 2 :]}"
    return repr(text)
