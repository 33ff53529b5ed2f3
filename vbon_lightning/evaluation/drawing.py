"""The Pareto figure: what each policy gains for the distance it went from the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vbon_lightning.evaluation.intervals import Estimate
from vbon_lightning.evaluation.labels import GREY, MOST_NAMES, draw_key, ink_of, label_of, place_labels, tags_of
from vbon_lightning.evaluation.reports import BEST_OF_N, REFERENCE, PolicyReport
from vbon_lightning.functional import bon_kl_bound, bon_win_rate_bound

# Okabe and Ito's colours, which readers with any common colour vision tell apart, each with its own marker.
STYLES = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
    ("#8C6D00", "X"),
)
BON_COLOUR = "#333333"
_FONT = 9.0
_LIMIT = "Best-of-N without ties"


def pareto_figure(reports: Sequence[PolicyReport], *, title: str = "") -> Figure:
    """Draw win rate and reward over the KL divergence from the reference, with 95% intervals over prompts.

    Best-of-N is a curve whose points carry their N; each policy is a labelled point, and policies of one
    method share colour and marker. Where policies are many, their labels are numbers, with a key beside the panels.
    The dotted curve is what Best-of-N reaches where rewards never tie.

    Args:
        reports: Policies and Best-of-N, in any order; those of whose KL a bound alone is known are left out.
        title: Title of the figure.

    Raises:
        ValueError: If there is nothing to draw.
    """
    every, reports = reports, [report for report in reports if not report.kl_is_bound]  # their place is not known
    if not reports:
        raise ValueError("a figure needs at least one report, got none")
    marks = marks_of(every, reports)
    figure = new_figure((11.0, 6.2 if marks.numbered else 4.8), title)
    left, right = figure.subplots(1, 2)
    kl = "KL(policy || reference) per response (nats)"
    won = [(report, report.kl, report.win_rate) for report in reports if report.win_rate is not None]
    draw_panel(left, won, marks, kl, "win rate over the reference")
    draw_panel(right, [(report, report.kl, report.reward) for report in reports], marks, kl, "mean reward")
    if any(report.method == BEST_OF_N for report, _, _ in won):
        draw_limit(left, max(report.n or 1 for report, _, _ in won))
    if won:
        left.axhline(0.5, color=GREY, linewidth=0.7, zorder=0)
    else:
        left.text(0.5, 0.5, "no reference rewards", transform=left.transAxes, ha="center", color=GREY)
    finish_figure(figure, (left, right), marks)
    return figure


def new_figure(size: tuple[float, float], title: str) -> Figure:
    """Return an empty figure of the look of all here, on white whatever the page's colour, which no window shows.

    Args:
        size: Width and height in inches.
        title: Title of the figure.
    """
    figure = Figure(figsize=size, layout="constrained", dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(label_of(title), fontsize=12)
    return figure


def finish_figure(figure: Figure, panels: Sequence[Axes], marks: Marks) -> None:
    """Add legend and key, settle the layout, and put the labels where there is room.

    Args:
        figure: The figure.
        panels: Its panels, drawn by :func:`draw_panel`.
        marks: How reports look.
    """
    if marks.numbered:
        draw_key(figure, marks.tags, [marks.styles[method] for method in marks.methods.values()])
    handles = _legend_handles(panels)
    if handles:
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside lower center",
            ncols=min(6, len(handles)),
            frameon=False,
        )
    # Labels are placed in pixels, so the layout must be settled first.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in panels:
        place_labels(figure, axes)


def policy_styles(count: int) -> list[tuple[str, str]]:
    """Return a colour and a marker for each of so many policies; colours come again with another marker."""
    size = len(STYLES)
    return [(STYLES[place % size][0], STYLES[(place + place // size) % size][1]) for place in range(count)]


class Marks(NamedTuple):
    """How the reports of a figure look."""

    styles: dict[str, tuple[str, str]]
    """Colour and marker by method."""
    tags: dict[str, str]
    """What stands beside the point of each report by its name; Best-of-N's have their N."""
    methods: dict[str, str]
    """The method of each of these."""
    numbered: bool
    """Whether the labels are numbers."""


def marks_of(reports: Sequence[PolicyReport], shown: Sequence[PolicyReport]) -> Marks:
    """Settle how reports look, which is the same in all panels and pictures.

    Args:
        reports: Policies and Best-of-N, all of a comparison.
        shown: Those that a picture has.
    """
    own = (BEST_OF_N, REFERENCE)
    methods = dict.fromkeys(report.method for report in reports if report.method not in own)
    styles = dict(zip(methods, policy_styles(len(methods)), strict=True))
    named = {report.name: report.method for report in reports if report.method != BEST_OF_N}
    tags, there = dict(zip(named, tags_of(list(named)), strict=True)), {report.name for report in shown}
    return Marks(
        styles=styles | {BEST_OF_N: (BON_COLOUR, "o"), REFERENCE: (BON_COLOUR, "*")},
        tags={name: tag for name, tag in tags.items() if name in there},
        methods={name: method for name, method in named.items() if name in there},
        numbered=len(named) > MOST_NAMES,
    )


def style_axes(axes: Axes, x: str, y: str) -> None:
    """Label axes and give them the look of all figures here.

    Args:
        axes: The axes.
        x: Label of the horizontal axis.
        y: Label of the vertical one.
    """
    axes.set_facecolor("white")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E6E6E6", linewidth=0.6)
    axes.set_axisbelow(True)


def draw_panel(
    axes: Axes,
    points: Sequence[tuple[PolicyReport, Estimate, Estimate]],
    marks: Marks,
    across: str,
    up: str,
) -> None:
    """Draw reports as points with their intervals, Best-of-N's joined by a line.

    Args:
        axes: The panel.
        points: Each report with its place across and up.
        marks: How reports look.
        across: Label of the horizontal axis.
        up: Label of the vertical one.
    """
    style_axes(axes, across, up)
    on_curve = [point for point in points if point[0].method in (BEST_OF_N, REFERENCE)]
    curve = [(x.mean, y.mean) for _, x, y in sorted(on_curve, key=lambda point: point[0].n or 1)]
    if len(curve) > 1:
        axes.plot(*zip(*curve, strict=True), color=BON_COLOUR, linewidth=1.2, zorder=2)
    for report, x, y in points:
        colour, marker = marks.styles[report.method]
        hollow = report.method == BEST_OF_N
        axes.errorbar(
            x.mean,
            y.mean,
            xerr=x.half_width,
            yerr=y.half_width,
            fmt=marker,
            color=colour,
            markerfacecolor="white" if hollow else colour,
            markersize=11 if marker == "*" else (5.5 if hollow or marks.numbered else 7.5),
            elinewidth=0.7 if marks.numbered else 1.0,
            capsize=0 if marks.numbered else 2,
            zorder=3 if hollow else 4,
            label=None if report.method == REFERENCE else label_of(report.method),
        )
        # Best-of-N's points are many and on a curve that the legend names: their N is label enough.
        axes.annotate(
            f"N={report.n}" if hollow else marks.tags[report.name],
            (x.mean, y.mean),
            xytext=(0, 0),
            textcoords="offset points",
            color=GREY if hollow else ink_of(colour),
            fontsize=_FONT - 1 if hollow else _FONT,
            fontweight="normal" if hollow else "bold",
            zorder=6,
        )
    axes.margins(x=0.12, y=0.14)


def draw_limit(axes: Axes, largest: int) -> None:
    """Draw the win rate that Best-of-N reaches without ties, over its KL.

    Args:
        axes: Axes of KL and win rate.
        largest: The largest N to draw.
    """
    n = np.geomspace(1, largest, 100)
    axes.plot(
        [bon_kl_bound(float(value)) for value in n],
        [bon_win_rate_bound(float(value)) for value in n],
        color=GREY,
        linestyle=":",
        linewidth=1.3,
        zorder=1,
        label=_LIMIT,
    )


def _legend_handles(panels: Sequence[Axes]) -> dict[str, Any]:
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    # Best-of-N and its limit first, then the methods in the order of the reports.
    own = [label for label in (BEST_OF_N, _LIMIT) if label in handles]
    return {label: handles[label] for label in [*own, *(label for label in handles if label not in own)]}
