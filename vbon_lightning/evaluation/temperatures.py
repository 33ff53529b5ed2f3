"""How policies do when they are sampled at other temperatures than they were trained at."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from vbon_lightning._markdown import markdown_cell, markdown_table
from vbon_lightning.evaluation.drawing import BON_COLOUR, policy_styles, style_axes
from vbon_lightning.evaluation.intervals import Estimate, estimate_mean
from vbon_lightning.evaluation.labels import GREY, label_of
from vbon_lightning.evaluation.reports import REFERENCE, mean_of, win_rates
from vbon_lightning.evaluation.writing import write_together
from vbon_lightning.prefix_scorer import PrefixScorer
from vbon_lightning.types import ScoredResponses


@dataclass(frozen=True)
class TemperatureReport:
    """A policy sampled at one temperature: means over prompts with 95% intervals."""

    name: str
    temperature: float
    reward: Estimate
    win_rate: Estimate
    """Against one response of the reference table, which keeps its own temperature; a tie counts half."""
    length: Estimate
    finished: Estimate

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self)


@torch.no_grad()
def evaluate_temperature(
    rollouts: Iterable[ScoredResponses], *, name: str, temperature: float, scorer: PrefixScorer | None = None
) -> TemperatureReport:
    """Average rollouts that were sampled at a temperature over prompts.

    Args:
        rollouts: Rollouts with reference rewards, or their predicted distribution; filler rows count nowhere.
        name: What to call the policy.
        temperature: The temperature they were sampled at.
        scorer: The value model that predicted the distributions.

    Raises:
        ValueError: If there are no rollouts, or they bring no reference rewards.
    """
    columns: dict[str, list[Tensor]] = {"reward": [], "win_rate": [], "length": [], "finished": []}
    for rollout in rollouts:
        judged, rewards, cdf = rollout.judged, rollout.rewards.double().nan_to_num(0.0), None
        valid = rollout.prompts.valid & judged.any(-1)
        if scorer is not None and rollout.reference_log_cdf is not None:
            cdf = scorer.reward_cdf(rewards, rollout.reference_log_cdf)
        won = win_rates(rewards, rollout.reference_rewards, cdf, n_values=())
        if not won:
            raise ValueError(f"win rates of {name!r} need reference rewards: name a reference table")
        found = {
            "reward": rewards,
            "win_rate": won[1],
            "length": rollout.completions.mask.sum(-1).double(),
            "finished": rollout.completions.finished.double(),
        }
        for column, values in found.items():
            columns[column].append(mean_of(values, judged)[valid].cpu())
    if not columns["reward"]:
        raise ValueError(f"there are no prompts to evaluate {name!r} on")
    estimates = {column: estimate_mean(torch.cat(parts)) for column, parts in columns.items()}
    return TemperatureReport(name=name, temperature=temperature, **estimates)


def temperature_markdown(reports: Sequence[TemperatureReport], *, title: str, trained_at: float) -> str:
    """Format win rates by policy and temperature as a Markdown table."""
    temperatures = sorted({report.temperature for report in reports})
    rows = []
    for name in dict.fromkeys(report.name for report in reports):
        by = {report.temperature: report for report in reports if report.name == name}
        rows.append([markdown_cell(name), *(str(by[t].win_rate) if t in by else "-" for t in temperatures)])
    table = markdown_table(["policy", *(f"T = {t:g}" for t in temperatures)], rows, align="l" + "r" * len(temperatures))
    return (
        f"# {markdown_cell(title)}: win rate by sampling temperature\n\n{table}\n"
        f"- Against one response of the reference at its own temperature, {trained_at:g}; a tie counts one half.\n"
        f"- Means over prompts ± half of the 95% interval.\n"
    )


def temperature_figure(reports: Sequence[TemperatureReport], *, title: str, trained_at: float) -> Figure:
    """Draw win rate and mean reward over the sampling temperature, a line a policy."""
    figure = Figure(figsize=(11.0, 4.6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    names = list(dict.fromkeys(report.name for report in reports))
    temperatures = sorted({report.temperature for report in reports})
    styles, shifts = _line_styles(names), _shifts(len(names), temperatures)
    for axes, key, what in zip(
        panels, ("win_rate", "reward"), ("win rate over the reference", "mean reward"), strict=True
    ):
        for name, shift in zip(names, shifts, strict=True):
            line = sorted((r for r in reports if r.name == name), key=lambda report: report.temperature)
            heights = [getattr(report, key) for report in line]
            colour, marker = styles[name]
            axes.errorbar(
                [report.temperature + shift for report in line],
                [height.mean for height in heights],
                yerr=[height.half_width or 0.0 for height in heights],
                color=colour,
                marker=marker,
                markersize=10 if marker == "*" else 6,
                capsize=2,
                linewidth=1.4,
                elinewidth=0.9,
                label=label_of(name),
            )
        # Above the grid, or it would hide them, and below the lines.
        axes.axvline(
            trained_at, color=GREY, linewidth=1.2, linestyle=":", zorder=1, label="temperature of the reference table"
        )
        style_axes(axes, "sampling temperature", what)
        axes.set_xticks(temperatures, [f"{temperature:g}" for temperature in temperatures])
    panels[0].axhline(0.5, color=GREY, linewidth=0.9, zorder=1)
    handles, labels = panels[0].get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda place: labels[place] not in map(label_of, names))  # policies first
    figure.legend(
        [handles[place] for place in order],
        [labels[place] for place in order],
        loc="outside lower center",
        ncols=min(6, len(labels)),
        frameon=False,
    )
    figure.suptitle(label_of(title), fontsize=12)
    return figure


def _line_styles(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return a colour and a marker for each name; the reference looks as it does in the Pareto figure."""
    policies = [name for name in names if name != REFERENCE]
    styles = dict(zip(policies, policy_styles(len(policies)), strict=True))
    return styles | {REFERENCE: (BON_COLOUR, "*")}


def _shifts(count: int, temperatures: Sequence[float]) -> list[float]:
    """Return how far to move each policy's line along the axis, so that no interval hides another."""
    gap = min((upper - lower for lower, upper in pairwise(temperatures)), default=0.2)
    step = min(0.04, 0.4 / count) * gap
    return [step * (place - (count - 1) / 2) for place in range(count)]


def write_temperatures(
    reports: Sequence[TemperatureReport], directory: str | Path, *, title: str, trained_at: float
) -> dict[str, Path]:
    """Write ``temperatures.json``, ``temperatures.md`` and ``temperatures.png``, all of them or none."""
    image = io.BytesIO()
    temperature_figure(reports, title=title, trained_at=trained_at).savefig(image, format="png")
    plain = {"title": title, "reports": [report.to_dict() for report in reports]}
    contents = {
        "temperatures.json": (json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode(),
        "temperatures.md": temperature_markdown(reports, title=title, trained_at=trained_at).encode(),
        "temperatures.png": image.getvalue(),
    }
    return write_together(Path(directory), contents)
