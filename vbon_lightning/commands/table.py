"""``vbon table``: what a reference table holds and what made it."""

from __future__ import annotations

import json
from collections.abc import Sequence

from vbon_lightning._visible import shorten, visible
from vbon_lightning.commands.parsers import ArgumentParser, description_of
from vbon_lightning.data.conversations import readable
from vbon_lightning.paths import resolve_path
from vbon_lightning.reference_table import ReferenceTable, table_summary


def describe_table(path: str, rows: int = 3, responses: int = 2) -> str:
    """Describe a reference table: numbers, what made it, and a few of its prompts with their best and worst responses.

    Args:
        path: The table's directory.
        rows: Prompts to show.
        responses: Responses to show of each, from the best down and from the worst up.
    """
    for name, count in (("rows", rows), ("responses", responses)):
        if count < 0:
            raise ValueError(f"--{name} must be at least 0, got {count}")
    table = ReferenceTable.open(resolve_path(path))
    lines = [f"{name}: {_number(value)}" for name, value in table_summary(table).items()]
    lines += ["", "made by"]
    lines += [
        f"  {name}: {visible(value) if isinstance(value, str) else json.dumps(value)}"
        for name, value in table.fingerprint.items()
    ]
    for key in table.keys()[:rows]:
        row = table.row(key)
        lines += ["", f"prompt {_prompt(row.prompt)}"]
        order = sorted(range(len(row.rewards)), key=lambda place: -row.rewards[place])
        best, worst = order[:responses], [place for place in order[len(order) - responses :] if responses]
        lines += [
            f"  {row.rewards[place]:8.3f}  {shorten(row.responses[place])}" for place in dict.fromkeys(best + worst)
        ]
    return "\n".join(lines)


def _prompt(text: str) -> str:
    turns = readable(text)
    return shorten(text if turns == text else turns.replace("\n\n", " | "))


def _number(value: object) -> str:
    return "unknown" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def build_parser() -> ArgumentParser:
    """Return the parser of ``vbon table``."""
    parser = ArgumentParser(prog="vbon table", description=description_of(describe_table))
    parser.add_function_arguments(describe_table, as_positional=True)
    return parser


def main(args: Sequence[str]) -> None:
    """Parse the arguments of ``vbon table`` and print what it says."""
    print(describe_table(**build_parser().parse_args(list(args)).as_dict()))
