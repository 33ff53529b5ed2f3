"""A comparison in the model cards of the exports that took part in it: a table to read and metadata for programs."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from yaml import YAMLError

from vbon_lightning._markdown import markdown_cell, markdown_table
from vbon_lightning._visible import visible
from vbon_lightning.evaluation.intervals import Estimate
from vbon_lightning.evaluation.reports import PolicyReport
from vbon_lightning.whole_files import atomic_file

TAG = "vbon-lightning"
"""What tells a card of this package's exports from another's, which is left alone."""

_BEGIN, _END = "<!-- vbon compare: begin -->", "<!-- vbon compare: end -->"
_SECTION = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}\n\n?", re.DOTALL)
_BEFORE = "## How to load it\n"

_METRICS = {
    "win_rate": "Win rate over the reference",
    "reward": "Reward",
    "kl": "KL to the reference (nats)",
    "judge_reward": "Judge's reward",
}


def write_cards(
    reports: Sequence[PolicyReport],
    directories: Mapping[str, str | os.PathLike[str]],
    *,
    dataset: str,
    split: str,
    settings: Mapping[str, str],
) -> list[Path]:
    """Write a comparison into the model card of each export in it, in place of an earlier one.

    Args:
        reports: The whole comparison.
        directories: Directory of each policy by its name; those without a card of this package are passed over.
        dataset: Name of the data whose prompts were used.
        split: Which split of it.
        settings: What else the numbers depend on, by name.

    Returns:
        The cards that were written.
    """
    places: dict[Path, list[str]] = {}
    for name, directory in directories.items():
        places.setdefault(Path(directory), []).append(name)
    written = []
    for directory, names in places.items():
        path = directory / "README.md"
        if not path.is_file():
            continue
        own = [report for report in reports if report.name in names]
        shown = [report for report in reports if report.name in names or report.n is not None]
        section = _section(shown, dataset, split, settings)
        results = [result for report in own for result in _results(report, dataset, split, len(own) > 1)]
        try:
            text = _with_results(path.read_text(encoding="utf-8"), section, results, _name(directory))
            if text is None:
                continue
            with atomic_file(path) as stream:
                stream.write(text.encode())
        except (OSError, ValueError, YAMLError) as problem:  # the comparison itself is written: a card is an extra
            warnings.warn(f"the model card {path} did not get the comparison: {problem}", stacklevel=2)
            continue
        written.append(path)
    return written


def _with_results(text: str, section: str, results: list[EvalResult], name: str) -> str | None:
    """Return a card with a section and metadata in place of those of an earlier comparison; None if not ours."""
    card = ModelCard(text)
    data = cast(ModelCardData, card.data)
    if TAG not in (data.tags or []):
        return None
    data.model_name, data.eval_results = data.model_name or name, results
    bare = _SECTION.sub("", str(card))
    marked = f"{_BEGIN}\n{section}{_END}\n\n"
    before, heading, after = bare.partition(_BEFORE)
    return before + marked + heading + after if heading else f"{bare.rstrip()}\n\n{marked}"


def _name(directory: Path) -> str:
    place = directory.resolve()
    return place.parent.name if place.name == "export" else place.name


def _section(reports: Sequence[PolicyReport], dataset: str, split: str, settings: Mapping[str, str]) -> str:
    shown = [key for key in _METRICS if any(getattr(report, key) is not None for report in reports)]
    rows = [
        [
            f"**{markdown_cell(report.name)}**" if report.n is None else markdown_cell(report.name),
            *(_cell(getattr(report, key)) for key in shown),
        ]
        for report in reports
    ]
    table = markdown_table(["policy", *(_METRICS[key] for key in shown)], rows, align="l" + "r" * len(shown))
    drawn = {report.samples for report in reports if report.n is None}
    notes = {
        "prompts": f"{reports[-1].prompts}, the {split} split of {dataset}",
        "responses a prompt": ", ".join(map(str, sorted(drawn))),
        **settings,
    }
    listed = "".join(f"- {markdown_cell(key)}: {markdown_cell(value)}\n" for key, value in notes.items())
    return (
        f"## Compared with Best-of-N\n\n{table}\n"
        f"Means over prompts ± half of the 95% interval; a tie counts as half a win.\n\n{listed}\n"
    )


def _cell(value: Estimate | None) -> str:
    return "-" if value is None else str(value)


def _results(report: PolicyReport, dataset: str, split: str, several: bool) -> list[EvalResult]:
    """Return a report as the hub's metadata has it; where a directory has several, each says which it is."""
    found: list[EvalResult] = []
    values: dict[str, tuple[str, Estimate | None]] = {
        key: (name, getattr(report, key)) for key, name in _METRICS.items()
    }
    values |= {
        f"win_rate_vs_bon{n}": (f"Win rate over Best-of-{n}", value) for n, value in report.win_rate_vs_bon.items()
    }
    for key, (name, value) in values.items():
        if value is None:
            continue
        arguments: dict[str, Any] = {"prompts": report.prompts, "samples": report.samples}
        if value.half_width is not None:
            arguments["half_width_95"] = round(value.half_width, 6)
        found.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=visible(dataset),
                dataset_name=visible(dataset),
                dataset_split=split,
                metric_type=key,
                metric_name=f"{visible(report.name)}: {name}" if several else name,
                metric_value=round(value.mean, 6),
                metric_args=arguments,
            )
        )
    return found
