"""Read a sweep description into the commands of its runs; needs nothing but PyYAML."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_TOP = {"runs", "results", "trainer", "compare", "reference", "prepare", "settings", "seeds", "first", "methods"}
_NEEDED = {"title", "config", "option", "short", "values"}
_METHOD = _NEEDED | {"flags", "setting", "group", "table", "seeds", "after"}


@dataclass(frozen=True)
class Setting:
    """Data that runs share, the table made of it, and what is compared on it once: Best-of-N and the reference."""

    name: str
    directory: Path
    """Where its table's record and comparison go."""
    result: Path
    table: list[str]
    """Arguments of ``vbon predict``."""
    compare: list[str]
    """Arguments of ``vbon compare`` with the reference itself as the policy."""


@dataclass(frozen=True)
class Run:
    """One training with one seed, and its comparison."""

    name: str
    method: str
    title: str
    setting: str
    group: str
    """Which runs it is to be compared with."""
    table: bool
    """Whether it learns from the reference table."""
    option: str
    short: str
    value: float
    seed: int
    directory: Path
    result: Path
    fit: list[str]
    """Arguments of ``vbon fit``; goes on from the last checkpoint where there is one."""
    compare: list[str]
    """Arguments of ``vbon compare``."""
    first: Path | None
    """Record of the training whose policy this one starts from; None where it starts from the reference."""


@dataclass(frozen=True)
class Sweep:
    """All there is to do, the runs by falling priority."""

    directory: Path
    prepare: dict[str, list[str]]
    """Arguments of ``vbon`` by stage, in order."""
    settings: dict[str, Setting]
    runs: list[Run]


def read_sweep(path: str | Path) -> Sweep:
    """Read a sweep description.

    Args:
        path: The YAML file.

    Raises:
        ValueError: If a key is missing or unknown, a method names a setting that is not there, or two runs have one
            name.
    """
    plain = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    _check_keys(plain, _TOP, _TOP, str(path))
    directory = Path(plain["runs"])
    prepare = {name: [command, *_configs(files)] for name, (command, *files) in plain["prepare"].items()}
    settings = {name: _setting(name, values, plain) for name, values in plain["settings"].items()}
    runs = _runs(plain, str(path))
    names = [run.name for run in runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path}: several runs are called {', '.join(twice)}")
    return Sweep(directory, prepare, settings, runs)


def _setting(name: str, values: dict[str, Any], plain: dict[str, Any]) -> Setting:
    _check_keys(values, {"data", "table"}, {"data", "table"}, f"settings.{name}")
    data, directory = _configs(values["data"]), Path(plain["runs"], f"bon-{name}")
    # The reference among the policies is a check: its KL is 0 and its win rate 1/2.
    compare = ["compare", *data, "--config", plain["compare"], *_policy("sampled-reference", plain["reference"])]
    return Setting(
        name,
        directory,
        Path(plain["results"], "bon.json" if name == "main" else f"bon-{name}.json"),
        ["predict", *data, "--config", values["table"]],
        [*compare, "--output", str(directory / "comparison")],
    )


def _runs(plain: dict[str, Any], path: str) -> list[Run]:
    found = []
    for method, values in plain["methods"].items():
        where = f"{path}: methods.{method}"
        _check_keys(values, _METHOD, _NEEDED, where)
        if values.get("setting", "main") not in plain["settings"]:
            raise ValueError(f"{where}: there is no setting {values.get('setting', 'main')!r}")
        if values.get("after", method) not in plain["methods"]:
            raise ValueError(f"{where}: there is no method {values['after']!r} to come after")
        if " " in values["title"]:
            raise ValueError(f"{where}: a title must be one word, got {values['title']!r}")
        for seed in values.get("seeds", plain["seeds"]):
            runs = [_run(method, values, value, seed, plain) for value in values["values"]]
            found += [((seed, place >= plain["first"]), run) for place, run in enumerate(runs)]
    # Sorting is stable: otherwise the order is that of the file.
    return [run for _, run in sorted(found, key=lambda pair: pair[0])]


def _run(method: str, values: dict[str, Any], value: float, seed: int, plain: dict[str, Any]) -> Run:
    name = f"{method}-{values['short']}{value}-s{seed}"
    directory, setting = Path(plain["runs"], name), values.get("setting", "main")
    data = _configs(plain["settings"][setting]["data"])
    fit = ["fit", *data, *_configs([plain["trainer"], values["config"]]), *map(str, values.get("flags", []))]
    fit += [f"--{values['option']}", str(value), "--seed_everything", str(seed)]
    fit += ["--trainer.default_root_dir", str(directory), "--trainer.logger.init_args.save_dir", str(directory)]
    first = None
    if "after" in values:
        first = Path(plain["runs"], f"{values['after']}-{values['short']}{value}-s{seed}")
        fit += ["--data.policy", str(first / "export"), "--data.reference", plain["reference"]]
    # Best-of-N is judged once, in the setting's own comparison.
    compare = ["compare", *data, "--config", plain["compare"], "--judge_table", "false"]
    compare += _policy(f"{values['title']} {values['short']}={value} seed {seed}", str(directory / "export"))
    return Run(
        name,
        method,
        values["title"],
        setting,
        values.get("group", "methods"),
        values.get("table", True),
        values["option"],
        values["short"],
        value,
        seed,
        directory,
        Path(plain["results"], f"{name}.json"),
        [*fit, "--ckpt_path", "last"],
        [*compare, "--output", str(directory / "comparison")],
        None if first is None else first / "training.json",
    )


def _configs(files: list[str]) -> list[str]:
    return [word for file in files for word in ("--config", file)]


def _policy(name: str, path: str) -> list[str]:
    return ["--policies", json.dumps({name: path})]


def _check_keys(plain: dict[str, Any], known: set[str], needed: set[str], where: str) -> None:
    if missing := sorted(needed - set(plain)):
        raise ValueError(f"{where}: {', '.join(missing)} missing")
    if unknown := sorted(set(plain) - known):
        raise ValueError(f"{where}: {', '.join(unknown)} unknown; known are {', '.join(sorted(known))}")
