"""Markdown tables."""

from __future__ import annotations

import re
from collections.abc import Sequence

_RULES = {"l": ":---", "r": "---:"}


def markdown_cell(text: str) -> str:
    """Make any text fit into one cell of a Markdown table."""
    escaped = text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`")
    return "<br>".join(escaped.splitlines()) if escaped.strip() else "(empty)"


def markdown_code(text: str) -> str:
    """Show any text of one line as code, between more backticks in a row than it holds."""
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    line = " ".join(text.splitlines())
    return f"{fence} {line} {fence}" if len(fence) > 1 else f"`{line}`"


def reward_cell(reward: float | None) -> str:
    """Format a reward for a Markdown table; a dash where a response has none."""
    return "-" if reward is None else f"{reward:.3f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, align: str) -> str:
    """Format a Markdown table of escaped cells; ``align`` has a letter ``l`` or ``r`` a column."""
    if len(align) != len(header) or any(len(row) != len(header) for row in rows):
        raise ValueError(f"a table of {len(header)} columns needs as many cells a row and letters in {align!r}")
    lines = [header, [_RULES[letter] for letter in align], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
