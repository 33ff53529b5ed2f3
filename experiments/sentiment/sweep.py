"""Read a sweep description into the commands of its runs; needs nothing but PyYAML."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_TOP = {"runs", "results", "trainer", "compare", "reference", "prepare", "settings", "seeds", "first", "methods"}
_NEEDED = {"title", "config"}
_STRENGTH = {"option", "short", "values"}
_METHOD = _NEEDED | _STRENGTH | {"dial", "flags", "setting", "group", "table", "seeds", "after"}


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
class Training:
    """One `vbon fit`."""

    name: str
    setting: str
    table: bool
    """Whether it learns from the reference table."""
    seed: int
    directory: Path
    fit: list[str]
    """Arguments of ``vbon fit``; goes on from the last checkpoint where there is one."""
    first: Training | None
    """The training whose export this one starts from; None where it starts from the reference."""

    @property
    def record(self) -> Path:
        """Return where its costs and settings are written when it has ended."""
        return self.directory / "training.json"


@dataclass(frozen=True)
class Run:
    """A policy: a training, and its comparison."""

    name: str
    method: str
    title: str
    group: str
    """Which runs it is to be compared with."""
    option: str
    short: str
    value: float
    """The strength: what it was trained for, or what one policy of a training was dialled to."""
    training: Training
    result: Path
    compare: list[str]
    """Arguments of ``vbon compare``."""
    comparison: Path
    """Where the comparison is written."""


@dataclass(frozen=True)
class Sweep:
    """All there is to do, the runs by falling priority."""

    directory: Path
    prepare: dict[str, list[str]]
    """Arguments of ``vbon`` by stage, in order."""
    settings: dict[str, Setting]
    runs: list[Run]
    trainings: list[Training]
    """What the runs need, by the same priority; what others start from comes before them."""


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
    _check_methods(plain, str(path))
    runs = _runs(plain)
    names = [run.name for run in runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path}: several runs are called {', '.join(twice)}")
    trainings: dict[str, Training] = {}
    for run in runs:
        chain = [run.training]
        while (first := chain[-1].first) is not None:
            chain.append(first)
        for training in reversed(chain):
            trainings.setdefault(training.name, training)
    return Sweep(directory, prepare, settings, runs, list(trainings.values()))


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


def _check_methods(plain: dict[str, Any], path: str) -> None:
    for method, values in plain["methods"].items():
        where = f"{path}: methods.{method}"
        needed = _NEEDED
        if _STRENGTH & set(values):
            needed = needed | _STRENGTH - ({"option"} if values.get("dial") else set())
        _check_keys(values, _METHOD, needed, where)
        if values.get("setting", "main") not in plain["settings"]:
            raise ValueError(f"{where}: there is no setting {values.get('setting', 'main')!r}")
        if values.get("after", method) not in plain["methods"]:
            raise ValueError(f"{where}: there is no method {values['after']!r} to come after")
        if " " in values["title"]:
            raise ValueError(f"{where}: a title must be one word, got {values['title']!r}")


def _runs(plain: dict[str, Any]) -> list[Run]:
    found = []
    for method, values in plain["methods"].items():
        for seed in values.get("seeds", plain["seeds"]):
            runs = [_run(method, value, seed, plain) for value in values.get("values", [])]
            found += [((seed, place >= plain["first"]), run) for place, run in enumerate(runs)]
    # Sorting is stable: otherwise the order is that of the file.
    return [run for _, run in sorted(found, key=lambda pair: pair[0])]


def _run(method: str, value: float, seed: int, plain: dict[str, Any]) -> Run:
    values = plain["methods"][method]
    training = _training(method, value, seed, plain)
    name = f"{method}-{values['short']}{value}-s{seed}"
    title = f"{values['title']} {values['short']}={value} seed {seed}"
    export, comparison = str(training.directory / "export"), training.directory / "comparison"
    policy: Any = export
    if values.get("dial"):
        policy, comparison = {"name": export, "dial": value}, training.directory / f"comparison-{value}"
    # Best-of-N is judged once, in the setting's own comparison.
    compare = ["compare", *_configs(plain["settings"][training.setting]["data"]), "--config", plain["compare"]]
    compare += ["--judge_table", "false", *_policy(title, policy), "--output", str(comparison)]
    return Run(
        name,
        method,
        values["title"],
        values.get("group", "methods"),
        values.get("option", "dial"),
        values["short"],
        value,
        training,
        Path(plain["results"], f"{name}.json"),
        compare,
        comparison,
    )


def _training(method: str, value: float, seed: int, plain: dict[str, Any]) -> Training:
    values = plain["methods"][method]
    dedicated = "option" in values
    name = f"{method}-{values['short']}{value}-s{seed}" if dedicated else f"{method}-s{seed}"
    directory, setting = Path(plain["runs"], name), values.get("setting", "main")
    first = _training(values["after"], value, seed, plain) if "after" in values else None
    fit = ["fit", *_configs(plain["settings"][setting]["data"]), *_configs([plain["trainer"], values["config"]])]
    flags = list(map(str, values.get("flags", [])))
    if first is not None:
        export = str(first.directory / "export")
        if any("$after" in flag for flag in flags):
            flags = [flag.replace("$after", export) for flag in flags]
        else:
            flags += ["--data.policy", export, "--data.reference", plain["reference"]]
    fit += [*flags, *([f"--{values['option']}", str(value)] if dedicated else []), "--seed_everything", str(seed)]
    fit += ["--trainer.default_root_dir", str(directory), "--trainer.logger.init_args.save_dir", str(directory)]
    fit += ["--ckpt_path", "last"]
    return Training(name, setting, values.get("table", True), seed, directory, fit, first)


def _configs(files: list[str]) -> list[str]:
    return [word for file in files for word in ("--config", file)]


def _policy(name: str, policy: Any) -> list[str]:
    return ["--policies", json.dumps({name: policy})]


def _check_keys(plain: dict[str, Any], known: set[str], needed: set[str], where: str) -> None:
    if missing := sorted(needed - set(plain)):
        raise ValueError(f"{where}: {', '.join(missing)} missing")
    if unknown := sorted(set(plain) - known):
        raise ValueError(f"{where}: {', '.join(unknown)} unknown; known are {', '.join(sorted(known))}")
