"""How all commands take their options, and how they say what is wrong with one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonargparse
import pytest

from vbon_lightning import cli

Said = Callable[..., str]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Said:
    """Run a command that fails, and return the one line that it says."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["vbon", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        found = capsys.readouterr()
        assert not found.out and stop.value.code not in (0, None)
        line = stop.value.code if isinstance(stop.value.code, str) else found.err.rstrip("\n")
        assert line.startswith("vbon: ") and "\n" not in line and line.isprintable()
        return line

    return run


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_what_is_wrong_with_an_option_is_one_line(name: str, said: Said) -> None:
    assert "--nosuch" in said(name, "--nosuch", "3")
    assert "\\x1b" in said(name, "--no\x1bsuch", "3")


OPTIONS = {
    "fit": ("--trainer.max_st", "3"), "predict": ("--trainer.max_st", "3"), "validate": ("--seed_every", "1"),
    "test": ("--data.batch", "2"), "compare": ("--sampl", "3"), "sample": ("--data.max_new", "3"),
    "init": ("--meth", "sft"), "table": ("--row", "3"), "dial": ("--outp", "x"),
}  # fmt: skip


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_an_abbreviated_option_is_none(name: str, said: Said) -> None:
    option, value = OPTIONS[name]
    line = said(name, option, value)
    assert f"unrecognized arguments: {option}" in line
    assert f"(an option is given by its whole name: {option}" in line


def test_the_option_that_may_have_been_meant_is_named(said: Said) -> None:
    assert said("fit", "--trainer.maxsteps=3").endswith("(an option is given by its whole name: --trainer.max_steps?)")
    assert said("fit", "--trainer.m", "3").endswith("arguments: --trainer.m 3")  # too many begin so
    assert said("compare", "--nothing_like_it", "3").endswith("arguments: --nothing_like_it 3")


REPEATED = {
    "top": ("data: {policy: a}\nseed_everything: 1\ndata: {policy: b}\n", 3, "data", 1),
    "nested": ("data:\n  train:\n    path: a\n    stop: 3\n    path: b\n", 5, "path", 3),
    "in a list": ("trainer:\n  callbacks:\n  - {class_path: A, class_path: B}\n", 3, "class_path", 3),
    "quoted": ("data: {policy: a}\n'data': 1\n", 2, "data", 1),
}


@pytest.mark.parametrize("name", ["fit", "predict", "compare", "sample", "dial"])
@pytest.mark.parametrize("where", REPEATED)
def test_a_key_that_stands_twice_is_refused_with_its_place(name: str, where: str, said: Said, tmp_path: Path) -> None:
    text, line, key, before = REPEATED[where]
    (tmp_path / "config.yaml").write_text(text)
    assert f"config.yaml, line {line}: the key '{key}' is there a second time, after line {before}" in said(
        name, "--config", "config.yaml"
    )


def test_such_a_key_on_the_command_line(said: Said) -> None:
    assert "the key 'mine' is there a second time" in said("compare", "--policies", "{mine: a, mine: b}")


def test_yaml_that_repeats_nothing_is_taken_as_ever(tmp_path: Path) -> None:
    load: Any = jsonargparse.get_loader("yaml")
    merged = "a: &x {b: 1, c: 2}\nd: {<<: *x, b: 3}\ne: *x\n"
    assert load(merged) == {"a": {"b": 1, "c": 2}, "d": {"b": 3, "c": 2}, "e": {"b": 1, "c": 2}}


def test_half_characters_are_none(said: Said, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text('title: "x\\ud800"\n')
    assert "invalid Unicode character escape" in said("compare", "--config", "config.yaml")
    (tmp_path / "config.yaml").write_bytes(b"title: \xff\n")
    assert "utf-8" in said("compare", "--config", "config.yaml")
    assert "argument 3, '\\udcff', is not UTF-8 text" in said("compare", "--title", "\udcff")


def test_a_description_goes_without_the_arguments() -> None:
    parser: argparse.ArgumentParser = cli.command_module("table").build_parser()
    assert parser.description is not None and "Args:" not in parser.description


def test_what_ends_the_program_while_it_is_imported_is_named(
    said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "leaving.py").write_text("import sys\n\n\nclass Reward:\n    pass\n\n\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = ("--policies", "{mine: a}", "--data.policy", "a", "--data.reward")
    line = said("compare", *arguments, "leaving.Reward")
    assert "sys.exit(0)" in line and "leaving.py, line 8" in line


@pytest.mark.parametrize(
    ("source", "said_of_it"),
    [
        ("x = 1\nraise RuntimeError('boom')\n", "(RuntimeError in {file}, line 2)"),
        ("import nowhere.at_all\n", "(ModuleNotFoundError in {file}, line 1)"),
        ("\ndef f(:\n", "(SyntaxError in {file}, line 2)"),
    ],
)
def test_a_module_of_ones_own_that_breaks_is_named_with_its_line(
    source: str, said_of_it: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"mine_{abs(hash(source))}"
    file = tmp_path / f"{name}.py"
    file.write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    for asked, expected in ((f"{name}.Method", said_of_it.format(file=file)), ("absent.Method", "")):
        monkeypatch.setattr(sys, "argv", ["vbon", "fit", "--model", asked])
        monkeypatch.setenv("VBON_TRACEBACK", "0")
        with pytest.raises(SystemExit):
            cli.main()
        printed = capsys.readouterr().err
        assert (
            printed.count("\n") == 1 and printed.rstrip().endswith(expected) and ("line" in printed) == bool(expected)
        )
    monkeypatch.setenv("VBON_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["vbon", "fit", "--model", f"{name}.Method"])
    with pytest.raises(SystemExit):
        cli.main()
    assert f'File "{file}", line' in capsys.readouterr().err
