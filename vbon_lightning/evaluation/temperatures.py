"""How policies do when they are sampled at other temperatures than they were trained at."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from vbon_lightning._markdown import markdown_cell, markdown_table
from vbon_lightning.evaluation.drawing import GREY, policy_styles, style_axes
from vbon_lightning.evaluation.intervals import Estimate, estimate_mean
from vbon_lightning.functional import bon_win_rate
from vbon_lightning.reference_table.shards import atomic_file
from vbon_lightning.types import Rollout


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
def evaluate_temperature(rollouts: Iterable[Rollout], *, name: str, temperature: float) -> TemperatureReport:
    """Average rollouts that were sampled at a temperature over prompts.

    Args:
        rollouts: Rollouts with reference rewards; filler rows count nowhere.
        name: What to call the policy.
        temperature: The temperature they were sampled at.

    Raises:
        ValueError: If there are no rollouts, or they bring no reference rewards.
    """
    columns: dict[str, list[Tensor]] = {"reward": [], "win_rate": [], "length": [], "finished": []}
    for rollout in rollouts:
        if rollout.reference_rewards is None:
            raise ValueError(f"win rates of {name!r} need reference rewards: name a reference table")
        valid, rewards = rollout.prompts.valid, rollout.rewards.double()
        found = {
            "reward": rewards,
            "win_rate": bon_win_rate(rewards, rollout.reference_rewards.double(), n=1),
            "length": rollout.completions.mask.sum(-1).double(),
            "finished": rollout.completions.finished.double(),
        }
        for column, values in found.items():
            columns[column].append(values.mean(-1)[valid].cpu())
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
        f"# {title}: win rate by sampling temperature\n\n{table}\n"
        f"- Against one response of the reference at its own temperature, {trained_at:g}; a tie counts one half.\n"
        f"- Means over prompts ± half of the 95% interval.\n"
    )


def temperature_figure(reports: Sequence[TemperatureReport], *, title: str, trained_at: float) -> Figure:
    """Draw win rate and mean reward over the sampling temperature, a line a policy."""
    figure = Figure(figsize=(11.0, 4.6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    names = list(dict.fromkeys(report.name for report in reports))
    for axes, key, what in zip(
        panels, ("win_rate", "reward"), ("win rate over the reference", "mean reward"), strict=True
    ):
        for name, (colour, marker) in zip(names, policy_styles(len(names)), strict=True):
            line = sorted((r for r in reports if r.name == name), key=lambda report: report.temperature)
            heights = [getattr(report, key) for report in line]
            axes.errorbar(
                [report.temperature for report in line],
                [height.mean for height in heights],
                yerr=[height.half_width or 0.0 for height in heights],
                color=colour,
                marker=marker,
                capsize=2,
                linewidth=1.2,
                label=name,
            )
        axes.axvline(trained_at, color=GREY, linewidth=0.7, linestyle=":", zorder=0)
        style_axes(axes, "sampling temperature (dotted: that of the reference table)", what)
    panels[0].axhline(0.5, color=GREY, linewidth=0.7, zorder=0)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(names)), frameon=False)
    figure.suptitle(title, fontsize=12)
    return figure


def write_temperatures(
    reports: Sequence[TemperatureReport], directory: str | Path, *, title: str, trained_at: float
) -> dict[str, Path]:
    """Write ``temperatures.json``, ``temperatures.md`` and ``temperatures.png``, each atomically."""
    image = io.BytesIO()
    temperature_figure(reports, title=title, trained_at=trained_at).savefig(image, format="png")
    plain = {"title": title, "reports": [report.to_dict() for report in reports]}
    contents = {
        "temperatures.json": (json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode(),
        "temperatures.md": temperature_markdown(reports, title=title, trained_at=trained_at).encode(),
        "temperatures.png": image.getvalue(),
    }
    written = {}
    for name, content in contents.items():
        written[name] = Path(directory) / name
        with atomic_file(written[name]) as stream:
            stream.write(content)
    return written
