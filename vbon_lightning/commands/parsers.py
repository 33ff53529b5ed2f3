"""What the parsers of the commands share: their descriptions, and that they read the YAML of a training run too."""

from __future__ import annotations

import inspect
from argparse import SUPPRESS
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ArgumentParser

RUN_SECTIONS = ("seed_everything", "model", "trainer", "ckpt_path", "weights_only")
"""What a run's YAML says beside its data."""


def description_of(command: Callable[..., Any]) -> str:
    """Return what a command's docstring says before its arguments, which have lines of their own in the help."""
    return inspect.cleandoc(command.__doc__ or "").split("\n\nArgs:")[0]


def pass_over_run(parser: ArgumentParser) -> None:
    """Let a parser's ``--config`` be that of a training run, of which it reads the ``data`` alone."""
    for name in RUN_SECTIONS:
        parser.add_argument(f"--{name}", type=Any, help=SUPPRESS)


def parse_beside_run(parser: ArgumentParser, args: Sequence[str]) -> dict[str, Any]:
    """Parse arguments and make their classes, except for what :func:`pass_over_run` lets through."""
    config = parser.parse_args(list(args))
    for name in RUN_SECTIONS:
        config.pop(name, None)
    values = dict(parser.instantiate_classes(config).items())
    values.pop("config", None)
    return values
