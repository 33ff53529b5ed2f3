"""The committed results: runs, and Best-of-N on the same prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vbon_lightning.evaluation import PolicyReport
from vbon_lightning.evaluation.reports import BEST_OF_N

ORDER = ("equal_tilted", "equal_vbon", "vbon", "vbon_lower", "kl_rl", "kl_rl_ppo", "bon_sft", "dpo")
"""How methods are listed; others follow by name."""
SYMBOLS = {"n": "N", "b": "β", "m": "M", "r": "rate"}


@dataclass(frozen=True)
class Result:
    """One run: what it was, what it cost, what it is worth."""

    run: str
    method: str
    title: str
    setting: str
    group: str
    table: bool
    """Whether it learnt from the reference table."""
    short: str
    value: float
    seed: int
    training: dict[str, Any]
    report: PolicyReport

    @property
    def strength(self) -> str:
        """Return the strength as it is written, such as ``N=4``."""
        return f"{SYMBOLS.get(self.short, self.short)}={self.value:g}"

    @property
    def kl(self) -> float:
        """Return the KL in nats."""
        return self.report.kl.mean

    @property
    def reward(self) -> float:
        """Return the mean reward."""
        return self.report.reward.mean

    @property
    def win_rate(self) -> float:
        """Return the win rate against one response of the reference."""
        assert self.report.win_rate is not None
        return self.report.win_rate.mean

    @property
    def judge(self) -> float | None:
        """Return the judge's reward, where there was a judge."""
        return None if self.report.judge_reward is None else self.report.judge_reward.mean


@dataclass(frozen=True)
class Baseline:
    """The reference and Best-of-N in a setting, and what the reference table took."""

    setting: str
    table: dict[str, Any]
    reports: list[PolicyReport]

    @property
    def win_rates(self) -> dict[int, float]:
        """Return Best-of-N's win rates by N."""
        return {report.n or 1: report.win_rate.mean for report in self._best if report.win_rate is not None}

    @property
    def kls(self) -> dict[int, float]:
        """Return Best-of-N's KL by N."""
        return {report.n or 1: report.kl.mean for report in self._best}

    @property
    def _best(self) -> list[PolicyReport]:
        return [report for report in self.reports if report.method == BEST_OF_N]


def read_results(directory: str | Path) -> tuple[list[Result], dict[str, Baseline]]:
    """Read all results of a directory.

    Args:
        directory: Where ``record.py`` put them.

    Returns:
        The runs, sorted by method, strength and seed, and the baselines by setting.

    Raises:
        ValueError: If a file is not a result, or there is no baseline for a setting that runs are in.
    """
    runs, baselines = [], {}
    for path in sorted(Path(directory).glob("*.json")):
        plain = json.loads(path.read_text(encoding="utf-8"))
        if "reports" in plain:
            reports = [PolicyReport.from_dict(report) for report in plain["reports"]]
            baselines[plain["setting"]] = Baseline(plain["setting"], plain["table"], reports)
        elif "run" in plain:
            runs.append(_result(plain))
        else:
            raise ValueError(f"{path} is neither a run's result nor a baseline")
    if missing := sorted({run.setting for run in runs} - set(baselines)):
        raise ValueError(f"{directory} has runs on {', '.join(missing)}, but no bon.json of that setting")
    rank = {method: number for number, method in enumerate(ORDER)}
    runs.sort(key=lambda run: (rank.get(run.method, len(rank)), run.method, run.value, run.seed))
    return runs, baselines


def _result(plain: dict[str, Any]) -> Result:
    own = {key: plain[key] for key in ("run", "method", "title", "setting", "group", "table", "seed", "training")}
    strength = plain["strength"]
    return Result(
        **own, short=strength["short"], value=strength["value"], report=PolicyReport.from_dict(plain["report"])
    )


def grouped(runs: Iterable[Result], key: Callable[[Result], Any]) -> dict[Any, list[Result]]:
    """Group runs by a key, in order of appearance."""
    groups: dict[Any, list[Result]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups
