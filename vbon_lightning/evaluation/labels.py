"""Labels of a figure's points where they cover nothing; where names are many, numbers with a key beside the panels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from vbon_lightning._visible import visible

GREY = "#8A8A8A"
MOST_NAMES = 8
"""So many names find a place beside their points; more are numbers there and names in a key."""
_LONGEST = 48
"""Characters of a name in the key."""
_KEY_FONT = 8.0
_Spot = tuple[tuple[float, float], Literal["left", "center", "right"], Literal["bottom", "center", "top"]]


def label_of(text: str) -> str:
    """Return any text as a figure shows it as it is, in one line and without formulas."""
    return visible(" ".join(text.split("\n"))).replace("$", r"\$")


def ink_of(colour: str) -> str:
    """Return a colour's shade that letters on white can have: what suits a marker is too bright for them."""
    red, green, blue = to_rgb(colour)
    return to_hex((0.68 * red, 0.68 * green, 0.68 * blue))


def tags_of(names: Sequence[str]) -> list[str]:
    """Return what stands beside each point: its name, or, of more than :data:`MOST_NAMES`, its number.

    Args:
        names: The points' names, in the order of the key.
    """
    return [label_of(name) if len(names) <= MOST_NAMES else str(number) for number, name in enumerate(names, 1)]


def draw_key(figure: Figure, tags: Mapping[str, str], looks: Sequence[tuple[str, str]]) -> None:
    """List numbered names to the right of the panels, in a figure that is made so much wider.

    Args:
        figure: A figure with a constrained layout.
        tags: The number of each name.
        looks: Colour and marker of each.
    """
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", markersize=8 if marker == "*" else 6)
        for colour, marker in looks
    ]
    listed = [
        label_of(f"{number}  {name if len(name) <= _LONGEST else name[: _LONGEST - 1] + '…'}")
        for name, number in tags.items()
    ]
    width, height = figure.get_size_inches()
    a_column = max(1, int((72 * height - 60) / (1.6 * _KEY_FONT)))
    key = figure.legend(
        handles,
        listed,
        loc="outside right upper",
        ncols=math.ceil(len(tags) / a_column),
        fontsize=_KEY_FONT,
        frameon=False,
    )
    figure.draw_without_rendering()
    figure.set_size_inches(width + key.get_window_extent().width / figure.dpi, height)


def place_labels(figure: Figure, axes: Axes) -> None:
    """Put each of a panel's labels where it covers least of the other labels, points, error bars and curves.

    Args:
        figure: A figure whose layout is settled.
        axes: The panel; its annotations are the labels, the bold ones being placed first.
    """
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    labels = [text for text in axes.texts if isinstance(text, Annotation)]
    dots = _covered_points(axes)
    frame = axes.get_window_extent(renderer)
    taken: list[Bbox] = []
    # Policies first: their names matter more than the N along the curve.
    for label in sorted(labels, key=lambda text: text.get_fontweight() != "bold"):
        size = label.get_window_extent(renderer)
        point = axes.transData.transform(label.xy)
        choices = []
        for rank, spot in enumerate(_candidates()):
            box = _box_at(point, spot, size.width, size.height, figure.dpi / 72)
            choices.append((0.05 * rank + _cost(box, dots, taken, frame), rank, spot))
        _, _, spot = min(choices, key=lambda choice: choice[:2])
        _move(label, spot)
        taken.append(label.get_window_extent(renderer).padded(1.5))
        _add_leader(axes, label, spot[0])


def _move(label: Annotation, spot: _Spot) -> None:
    label.set_position(spot[0])
    label.set_horizontalalignment(spot[1])
    label.set_verticalalignment(spot[2])


_SHARES = {"left": 0.0, "bottom": 0.0, "center": 0.5, "right": 1.0, "top": 1.0}


def _box_at(point: np.ndarray, spot: _Spot, width: float, height: float, scale: float) -> Bbox:
    """Return where a label would be: measuring it there takes too long for so many spots."""
    (across, up), horizontal, vertical = spot
    left = point[0] + scale * across - _SHARES[horizontal] * width
    bottom = point[1] + scale * up - _SHARES[vertical] * height
    return Bbox.from_bounds(left, bottom, width, height).padded(1.5)


def _candidates() -> list[_Spot]:
    spots: list[_Spot] = []
    for reach in (7.0, 16.0, 28.0, 42.0, 58.0, 76.0, 96.0):
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
        if reach > 16.0:  # further out there is room between these
            spots += [
                ((across * reach, up * reach), "left" if across > 0 else "right", "bottom" if up > 0 else "top")
                for across, up in ((0.95, 0.35), (-0.95, 0.35), (0.95, -0.35), (-0.95, -0.35))
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
