"""The Pareto figure: what each policy gains for the distance it went from the reference."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from vbon_lightning._visible import visible
from vbon_lightning.evaluation.intervals import Estimate
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
BON_COLOUR, GREY = "#333333", "#8A8A8A"
_FONT = 9.0
_LIMIT = "Best-of-N without ties"
_Spot = tuple[tuple[float, float], Literal["left", "center", "right"], Literal["bottom", "center", "top"]]


def pareto_figure(reports: Sequence[PolicyReport], *, title: str = "") -> Figure:
    """Draw win rate and reward over the KL divergence from the reference, with 95% intervals over prompts.

    Best-of-N is a curve whose points carry their N; each policy is a labelled point, and policies of one
    method share colour and marker. The dotted curve is what Best-of-N reaches where rewards never tie.

    Args:
        reports: Policies and Best-of-N, in any order; those of whose KL a bound alone is known are left out.
        title: Title of the figure.

    Raises:
        ValueError: If there is nothing to draw.
    """
    reports = [report for report in reports if not report.kl_is_bound]  # their place is not known
    if not reports:
        raise ValueError("a figure needs at least one report, got none")
    figure = Figure(figsize=(11.0, 4.8), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    styles = _method_styles(reports)
    shared = [report for report in reports if report.win_rate is not None]
    _panel(left, [(report, report.win_rate) for report in shared], styles, "win rate over the reference")
    _panel(right, [(report, report.reward) for report in reports], styles, "mean reward")
    if any(report.method == BEST_OF_N for report in shared):
        draw_limit(left, max(report.n or 1 for report in shared))
    if shared:
        left.axhline(0.5, color=GREY, linewidth=0.7, zorder=0)
    else:
        left.text(0.5, 0.5, "no reference rewards", transform=left.transAxes, ha="center", color=GREY)
    handles = _legend_handles((left, right))
    if handles:
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside lower center",
            ncols=min(6, len(handles)),
            frameon=False,
        )
    if title:
        figure.suptitle(label_of(title), fontsize=12)
    # Labels are placed in pixels, so the layout must be settled first.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in (left, right):
        _place_labels(figure, axes)
    return figure


def label_of(text: str) -> str:
    """Return any text as a figure shows it as it is, in one line and without formulas."""
    return visible(" ".join(text.split("\n"))).replace("$", r"\$")


def policy_styles(count: int) -> list[tuple[str, str]]:
    """Return a colour and a marker for each of so many policies."""
    return [STYLES[number % len(STYLES)] for number in range(count)]


def _method_styles(reports: Sequence[PolicyReport]) -> dict[str, tuple[str, str]]:
    own = (BEST_OF_N, REFERENCE)
    methods = dict.fromkeys(report.method for report in reports if report.method not in own)
    styles = dict(zip(methods, policy_styles(len(methods)), strict=True))
    return styles | {BEST_OF_N: (BON_COLOUR, "o"), REFERENCE: (BON_COLOUR, "*")}


def style_axes(axes: Axes, x: str, y: str) -> None:
    """Label axes and give them the look of all figures here.

    Args:
        axes: The axes.
        x: Label of the horizontal axis.
        y: Label of the vertical one.
    """
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E6E6E6", linewidth=0.6)
    axes.set_axisbelow(True)


def _panel(
    axes: Axes,
    points: Sequence[tuple[PolicyReport, Estimate | None]],
    styles: dict[str, tuple[str, str]],
    what: str,
) -> None:
    style_axes(axes, "KL(policy || reference) per response (nats)", what)
    on_curve = [(r, y) for r, y in points if y is not None and r.method in (BEST_OF_N, REFERENCE)]
    curve = [(report.kl.mean, height.mean) for report, height in sorted(on_curve, key=lambda point: point[0].n or 1)]
    if len(curve) > 1:
        axes.plot(*zip(*curve, strict=True), color=BON_COLOUR, linewidth=1.2, zorder=2)
    for report, height in points:
        if height is None:
            continue
        colour, marker = styles[report.method]
        hollow = report.method == BEST_OF_N
        axes.errorbar(
            report.kl.mean,
            height.mean,
            xerr=report.kl.half_width,
            yerr=height.half_width,
            fmt=marker,
            color=colour,
            markerfacecolor="white" if hollow else colour,
            markersize=11 if marker == "*" else (5.5 if hollow else 7.5),
            elinewidth=1.0,
            capsize=2,
            zorder=3 if hollow else 4,
            label=None if report.method == REFERENCE else label_of(report.method),
        )
        # Best-of-N's points are many and on a curve that the legend names: their N is label enough.
        label = f"N={report.n}" if hollow else label_of(report.name)
        axes.annotate(
            label,
            (report.kl.mean, height.mean),
            xytext=(0, 0),
            textcoords="offset points",
            color=GREY if hollow else colour,
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


def _place_labels(figure: Figure, axes: Axes) -> None:
    """Put each label where it covers least of the other labels, points, error bars and curves."""
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    labels = [text for text in axes.texts if isinstance(text, Annotation)]
    dots = _covered_points(axes)
    frame = axes.get_window_extent(renderer)
    taken: list[Bbox] = []
    # Policies first: their names matter more than the N along the curve.
    for label in sorted(labels, key=lambda text: text.get_fontweight() != "bold"):
        choices = []
        for rank, spot in enumerate(_candidates()):
            _move(label, spot)
            box = label.get_window_extent(renderer).padded(1.5)
            choices.append((0.05 * rank + _cost(box, dots, taken, frame), rank, spot, box))
        _, _, spot, box = min(choices, key=lambda choice: choice[:2])
        _move(label, spot)
        taken.append(box)
        _add_leader(axes, label, spot[0])


def _move(label: Annotation, spot: _Spot) -> None:
    label.set_position(spot[0])
    label.set_horizontalalignment(spot[1])
    label.set_verticalalignment(spot[2])


def _candidates() -> list[_Spot]:
    spots: list[_Spot] = []
    for reach in (7.0, 16.0, 28.0, 42.0):
        slant = 0.75 * reach
        spots += [
            ((slant, slant), "left", "bottom"),
            ((-slant, slant), "right", "bottom"),
            ((slant, -slant), "left", "top"),
            ((-slant, -slant), "right", "top"),
            ((0.0, reach), "center", "bottom"),
            ((0.0, -reach), "center", "top"),
            ((reach, 0.0), "left", "center"),
            ((-reach, 0.0), "right", "center"),
        ]
    return spots


def _cost(box: Bbox, dots: np.ndarray, taken: list[Bbox], frame: Bbox) -> float:
    inside = (dots[:, 0] > box.x0) & (dots[:, 0] < box.x1) & (dots[:, 1] > box.y0) & (dots[:, 1] < box.y1)
    overlaps = sum(1 for other in taken if box.overlaps(other))
    outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
    return 100.0 * overlaps + 100.0 * outside + float(np.minimum(inside.sum(), 40))


def _covered_points(axes: Axes) -> np.ndarray:
    """Return points in pixels, a few apart, along everything drawn in the data's coordinates."""
    lines = [line.get_xydata() for line in axes.lines if line.get_transform().contains_branch(axes.transData)]
    paths = [np.asarray(line) for line in lines]
    for collection in axes.collections:
        paths += [np.asarray(path.vertices) for path in collection.get_paths()]
    points = []
    for path in paths:
        pixels = axes.transData.transform(np.asarray(path, dtype=float).reshape(-1, 2))
        points.append(pixels)
        for start, end in pairwise(pixels):
            steps = int(np.hypot(*(end - start)) // 4) + 1
            points.append(start + np.linspace(0, 1, steps, endpoint=False)[:, None] * (end - start))
    return np.concatenate(points) if points else np.empty((0, 2))


def _add_leader(axes: Axes, label: Annotation, offset: tuple[float, float]) -> None:
    if np.hypot(*offset) < 14:
        return
    axes.annotate(
        "",
        label.xy,
        xytext=offset,
        textcoords="offset points",
        arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
    )
