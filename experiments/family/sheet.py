"""One sheet of several comparisons: policies joined over seeds, and decoders beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vbon_lightning.evaluation import Estimate, PolicyReport, write_comparison
from vbon_lightning.evaluation.intervals import estimate_over_seeds
from vbon_lightning.whole_files import atomic_file

TITLE = "All methods of the package, on film reviews"


def write_sheet(
    directory: Path,
    by_seed: Mapping[int, Path],
    *,
    decoders: Path | None,
    trainings: Mapping[str, Sequence[Mapping[str, Any]]],
    settings: Mapping[str, Mapping[str, Any]],
    responses_at_once: int,
    failed: Mapping[str, str],
) -> None:
    """Write table and pictures of all, and ``family.json``, from which the documentation is made.

    Args:
        directory: Where to.
        by_seed: ``comparison.json`` of each seed's policies.
        decoders: That of the decoders.
        trainings: What each policy's trainings recorded, by its title.
        settings: What each training takes (:meth:`~experiments.family.plan.Plan.settings`), by the same titles.
        responses_at_once: Of how many responses a batch was.
        failed: Why jobs were not done, by name.
    """
    reports = joined([read_reports(path) for path in by_seed.values()])
    if decoders is not None:
        known = {report.name for report in reports}
        reports += [report for report in read_reports(decoders) if report.name not in known]
    (directory / "family.json").unlink(missing_ok=True)
    write_comparison(reports, directory, title=TITLE, command="make family", logger=False)
    plain = {
        "title": TITLE,
        "seeds": list(by_seed),
        "trainings": {
            title: [{key: run[key] for key in ("command", "seconds")} for run in runs]
            for title, runs in trainings.items()
            if runs
        },
        "settings": {title: dict(own) for title, own in settings.items() if trainings.get(title)},
        "responses_at_once": responses_at_once,
        "failed": dict(failed),
        "reports": [report.to_dict() for report in reports],
    }
    with atomic_file(directory / "family.json") as stream:
        stream.write((json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_reports(path: Path) -> list[PolicyReport]:
    """Read the reports of a ``comparison.json``."""
    return [PolicyReport.from_dict(plain) for plain in json.loads(path.read_text(encoding="utf-8"))["reports"]]


def joined(runs: Sequence[Sequence[PolicyReport]]) -> list[PolicyReport]:
    """Join the reports of several seeds by name: means over seeds, intervals over seeds and prompts.

    The reference and Best-of-N are the table's, the same for all seeds.

    Args:
        runs: The reports of each seed.
    """
    by_name: dict[str, list[PolicyReport]] = {}
    for reports in runs:
        for report in reports:
            by_name.setdefault(report.name, []).append(report)
    return [own[0] if own[0].n is not None else _mean_of(own) for own in by_name.values()]


def _mean_of(reports: Sequence[PolicyReport]) -> PolicyReport:
    def over(values: Sequence[Estimate | None]) -> Any:
        known = [value for value in values if value is not None]
        return estimate_over_seeds(known) if known else None

    names = ("reward", "kl", "kl_check", "win_rate", "length", "finished", "judge_reward")
    opponents = sorted({n for report in reports for n in report.win_rate_vs_bon})
    costs = [report.cost for report in reports if report.cost]
    fields = dict.fromkeys(field for cost in costs for field in cost)
    return replace(
        reports[0],
        **{name: over([getattr(report, name) for report in reports]) for name in names},
        win_rate_vs_bon={n: over([report.win_rate_vs_bon.get(n) for report in reports]) for n in opponents},
        cost={field: sum(cost[field] for cost in costs) / len(costs) for field in fields} or None,
        missing=sum(report.missing for report in reports),
    )
