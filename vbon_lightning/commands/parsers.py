"""What the parsers of the commands share: how they fail, their descriptions, that they read the YAML of a run too."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import traceback
from argparse import SUPPRESS
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

import jsonargparse
import yaml
from jsonargparse import get_loader, set_loader

from vbon_lightning._visible import visible

TRACEBACK = "VBON_TRACEBACK"
"""Environment variable: set it to 1 to see where an error comes from."""

RUN_SECTIONS = ("seed_everything", "model", "trainer", "ckpt_path", "weights_only")
"""What a run's YAML says beside its data."""


PADDING = (
    "Does not validate against any of the Union",
    "Subtypes:",
    "Errors:",
    "Given value",
    "Expected a <class 'NoneType'>",
)
"""How lines begin that jsonargparse puts around the reason of an error."""


_UNKNOWN = re.compile(r"[Uu]nrecognized arguments: (--\S+)")
_CLASS_PATH = re.compile(r"(?:Given value: |class_path ')'?([A-Za-z_]\w*(?:\.\w+)+)")
_MOST_NAMED = 3


class ConfigError(ValueError):
    """YAML that says a thing twice."""


def wants_traceback() -> bool:
    """Say whether errors are to be shown with where they come from."""
    return os.environ.get(TRACEBACK, "0") not in ("", "0")


class OneLineErrors:
    """Lets a parser say in one line what is wrong, and take an option by its whole name alone."""

    exit_on_error: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.allow_abbrev = False

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Leave with the reason in one line, without a page of usage before it."""
        broken = broken_import(message) if self.exit_on_error else None
        if broken is not None and wants_traceback():
            traceback.print_exception(broken)
        if not self.exit_on_error or wants_traceback():
            super().error(message, ex)  # type: ignore[misc]
        where = "" if broken is None else f" ({type(broken).__name__} in {_last_line(broken)})"
        self.exit(2, visible(f"vbon: {_brief(message)}{where}{_meant(self, message)}\n"))  # type: ignore[attr-defined]
        raise AssertionError("unreachable")

    def parse_path(self, cfg_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Parse a file; what is wrong with its YAML is said with its name."""
        try:
            return super().parse_path(cfg_path, *args, **kwargs)  # type: ignore[misc]
        except ConfigError as problem:
            raise ConfigError(f"{cfg_path}, {problem}") from problem


class ArgumentParser(OneLineErrors, jsonargparse.ArgumentParser):
    """The parser of a command of this package."""


def broken_import(message: str) -> Exception | None:
    """Import the modules of the classes that an error names again, and return what one raises: the error hides it.

    Args:
        message: What jsonargparse says.
    """
    for name in dict.fromkeys(_CLASS_PATH.findall(message)):
        module = name.rpartition(".")[0]
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as missing:
            if missing.name is None or not f"{module}.".startswith(f"{missing.name}."):
                return missing
        except Exception as problem:
            return problem
    return None


def _last_line(problem: Exception) -> str:
    if isinstance(problem, SyntaxError):
        return f"{problem.filename}, line {problem.lineno}"
    frame = traceback.extract_tb(problem.__traceback__)[-1]
    return f"{frame.filename}, line {frame.lineno}"


def _meant(parser: Any, message: str) -> str:
    """Return which options may have been meant by one that there is not."""
    found = _UNKNOWN.search(message)
    if found is None:
        return ""
    given, known = found[1].partition("=")[0], _options(parser)
    longer = sorted(name for name in known if name.startswith(given))
    near = longer or get_close_matches(given, known, n=1, cutoff=0.8)
    return f" (an option is given by its whole name: {', '.join(near)}?)" if 0 < len(near) <= _MOST_NAMED else ""


def _options(parser: Any) -> set[str]:
    """Return the options of a parser, and of those of its subcommands."""
    known = {name for name in parser._option_string_actions if name.startswith("--")}
    for action in parser._actions:
        for below in (getattr(action, "_name_parser_map", None) or {}).values():
            known |= _options(below)
    return known


def _brief(message: str) -> str:
    """Leave out what jsonargparse says about types and values around the reason."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    kept = [line for line in lines if line and not line.startswith(PADDING)]
    return " ".join(kept) or message


def _strict(load: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a loader of YAML that refuses repeated keys, of which YAML itself takes the last in silence."""

    def loaded(text: str) -> Any:
        if isinstance(text, str) and ":" in text:
            try:
                found = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
            except yaml.YAMLError:
                found = None  # which the loader itself says, or takes for text
            _check_node(found)
        return load(text)

    return loaded


def _check_node(node: yaml.Node | None) -> None:
    """Refuse what repeats a key, anywhere below a node."""
    waiting, seen = [node], set[int]()
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in one.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    line = key.start_mark.line + 1
                    if key.value in lines:
                        raise ConfigError(
                            f"line {line}: the key {key.value!r} is there a second time, after line "
                            f"{lines[key.value]}: leave one of them"
                        )
                    lines[key.value] = line
                waiting += [key, value]
        elif isinstance(one, yaml.SequenceNode):
            waiting += one.value


set_loader("yaml", _strict(get_loader("yaml")), (yaml.YAMLError,))


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
