"""Any text as Markdown that shows it and follows nothing in it: no link, no picture, no HTML."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vbon_lightning._visible import visible

_RULES = {"l": ":---", "r": "---:"}

_ACTIVE = re.compile(
    r"[\\`*\[\]{}#<|~$]|&(?=#?\w)|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.|^[>=]|^[+-](?= )|(?<=^\d)[.)](?= )",
    re.IGNORECASE,
)
"""What a renderer could take for more than text."""
_ENTITIES = {"<": "&lt;", "&": "&amp;", "|": "&#124;", "~": "&#126;", "$": "&#36;", ":": "&#58;", ".": "&#46;"}
"""What a backslash does not do for in every renderer."""


def markdown_text(text: str) -> str:
    """Show any text as it is written, in a line of Markdown; its own lines are parted by ``<br>``."""
    line = visible(text.replace("\r\n", "\n")).strip(" \n\t").replace("\t", " ")
    return _ACTIVE.sub(lambda match: _ENTITIES.get(match[0], f"\\{match[0]}"), line).replace("\n", "<br>")


def markdown_cell(text: str) -> str:
    """Make any text fit into one cell of a Markdown table."""
    return markdown_text(text) if text.strip() else "(empty)"


def markdown_code(text: str) -> str:
    """Show any text of one line as code, between more backticks in a row than it holds."""
    fence = "`" * _longer(text, 0)
    line = visible(text.replace("\r\n", " ").replace("\n", " "))
    return f"{fence} {line} {fence}" if len(fence) > 1 else f"`{line}`"


def markdown_block(text: str, language: str) -> str:
    """Show any text as a block of code."""
    fence = "`" * _longer(text, 2)
    return f"{fence}{language}\n{visible(text)}\n{fence}\n"


def _longer(text: str, least: int) -> int:
    """Return one more than the most backticks in a row, or than the least."""
    return max([least, *(len(run) for run in re.findall("`+", text))]) + 1


def reward_cell(reward: float | None) -> str:
    """Format a reward for a Markdown table; a dash where a response has none."""
    return "-" if reward is None else f"{reward:.3f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, align: str) -> str:
    """Format a Markdown table of escaped cells; ``align`` has a letter ``l`` or ``r`` a column."""
    if len(align) != len(header) or any(len(row) != len(header) for row in rows):
        raise ValueError(f"a table of {len(header)} columns needs as many cells a row and letters in {align!r}")
    lines = [header, [_RULES[letter] for letter in align], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
