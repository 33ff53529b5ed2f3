"""The report's pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from results import SYMBOLS, Baseline, Result, grouped

from vbon_lightning.evaluation import Estimate, PolicyReport
from vbon_lightning.evaluation.drawing import BON_COLOUR, STYLES, draw_limit, style_axes
from vbon_lightning.evaluation.labels import GREY
from vbon_lightning.evaluation.reports import BEST_OF_N, REFERENCE

Height = Callable[[PolicyReport], Estimate | None]
_KL = "KL(policy || reference) per response (nats)"
_ROOM = 2.0
"""How far to the right of Best-of-N's largest KL a picture goes."""


def fronts_figure(runs: Sequence[Result], bon: Baseline) -> Figure:
    """Draw win rate and reward over KL: a point a run, a line through the means over seeds a method."""
    figure, axes = _figure(2)
    _front(axes[0], runs, bon, lambda report: report.win_rate, "win rate over the reference")
    draw_limit(axes[0], max(bon.win_rates))
    axes[0].axhline(0.5, color=GREY, linewidth=0.7, zorder=0)
    _front(axes[1], runs, bon, lambda report: report.reward, "mean reward")
    _legend(figure, axes[0])
    return figure


def judge_figure(runs: Sequence[Result], bon: Baseline) -> Figure:
    """Draw the reward by a judge that no policy was trained against, over KL."""
    figure, axes = _figure(1)
    _front(axes[0], runs, bon, lambda report: report.judge_reward, "judge's mean reward")
    _legend(figure, axes[0], columns=2)
    return figure


def samples_figure(runs: Sequence[Result], bon: Baseline, n: int | None) -> Figure:
    """Draw win rate and KL over M, the reference rewards a prompt, with Best-of-N's as a line."""
    figure, axes = _figure(2)
    best = {report.n: report for report in bon.reports}.get(n)
    for panel, of, what in (
        (axes[0], lambda report: report.win_rate, "win rate over the reference"),
        (axes[1], lambda report: report.kl, "KL(policy || reference) (nats)"),
    ):
        style_axes(panel, "M, reference rewards a prompt", what)
        _method(panel, runs, of, STYLES[0], lambda run: run.value)
        panel.set_xscale("log", base=2)
        values = sorted({run.value for run in runs})
        panel.set_xticks(values, [f"{value:g}" for value in values])
        panel.minorticks_off()
        height = None if best is None else of(best)
        if height is not None:
            panel.axhline(height.mean, color=BON_COLOUR, linewidth=1.2, linestyle="--", label=f"Best-of-{n:g}")
    _legend(figure, axes[0])
    return figure


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5.6 * panels, 4.6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _front(axes: Axes, runs: Sequence[Result], bon: Baseline, of: Height, what: str) -> None:
    style_axes(axes, _KL, what)
    edge = _ROOM * max(bon.kls.values())
    curve = [report for report in bon.reports if report.method in (REFERENCE, BEST_OF_N)]
    spots = [(report.kl.mean, height.mean) for report in curve if (height := of(report)) is not None]
    axes.plot(*zip(*spots, strict=True), color=BON_COLOUR, marker="o", markerfacecolor="white", markersize=5, zorder=5,
              label=BEST_OF_N)  # fmt: skip
    for report, spot in zip(curve, spots, strict=True):
        if report.method == REFERENCE:
            name, place, side = "reference", (7, -3), "left"
        else:
            name, place, side = f"N={report.n}", (-4, 5), "right"
        axes.annotate(name, spot, xytext=place, textcoords="offset points", ha=side, color=GREY, fontsize=8)
    for number, own in enumerate(grouped(runs, lambda run: run.title).values()):
        _method(axes, own, of, STYLES[number % len(STYLES)], lambda run: run.kl, above=-0.01 * number)
    beyond = sum(run.kl > edge for run in runs)
    axes.set_xlim(min(0.0, *(run.kl for run in runs)) - 0.06 * edge, min(edge, max(run.kl for run in runs) * 1.05))
    axes.set_xlim(right=max(axes.get_xlim()[1], max(bon.kls.values()) * 1.1))
    if beyond:
        axes.text(1, 1.01, f"{beyond} runs beyond the right edge", transform=axes.transAxes, ha="right", color=GREY,
                  fontsize=8)  # fmt: skip


def _method(
    axes: Axes,
    runs: Sequence[Result],
    of: Height,
    style: tuple[str, str],
    x: Callable[[Result], float],
    above: float = 0.0,
) -> None:
    """Draw a method's runs as pale points, and a line through the means over seeds by strength."""
    colour, marker = style
    shown = [(run, height.mean) for run in runs if (height := of(run.report)) is not None]
    axes.scatter([x(run) for run, _ in shown], [y for _, y in shown], color=colour, marker=marker, s=16, alpha=0.35,
                 linewidths=0, zorder=3)  # fmt: skip
    means = []
    for value in sorted({run.value for run, _ in shown}):
        own = [(x(run), y) for run, y in shown if run.value == value]
        means.append((fmean(a for a, _ in own), fmean(b for _, b in own)))
    if means:
        axes.plot(*zip(*means, strict=True), color=colour, marker=marker, markersize=6, linewidth=1.3, zorder=4 + above,
                  label=_label(runs))  # fmt: skip


def _label(runs: Sequence[Result]) -> str:
    values = sorted({run.value for run in runs})
    symbol = SYMBOLS.get(runs[0].short, runs[0].short)
    span = f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"
    return f"{runs[0].title} ({symbol} = {span})"


def _legend(figure: Figure, axes: Axes, columns: int = 4) -> None:
    found = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    # What Best-of-N does comes first.
    labels = sorted(found, key=lambda label: not label.startswith(BEST_OF_N))
    handles = [found[label] for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)), frameon=False)
