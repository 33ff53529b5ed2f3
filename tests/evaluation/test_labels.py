"""Labels of many points: apart from each other, each there, and legible."""

from __future__ import annotations

import io
import itertools
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.image import imread

from tests.evaluation.crowd import FAMILIES, crowd
from vbon_lightning.evaluation import pareto_figure
from vbon_lightning.evaluation.cost_drawing import cost_figure
from vbon_lightning.evaluation.drawing import STYLES, policy_styles
from vbon_lightning.evaluation.labels import MOST_NAMES, ink_of, tags_of

CROWD = crowd(25)


def draw(name: str) -> Figure:
    figure = {"pareto": pareto_figure, "cost": cost_figure}[name](CROWD, title="Many")
    assert figure is not None
    return figure


@pytest.fixture(scope="module", params=["pareto", "cost"])
def figure(request: pytest.FixtureRequest) -> Figure:
    with rc_context({"figure.facecolor": "black", "axes.facecolor": "none", "savefig.transparent": False}):
        return draw(request.param)


def test_every_row_is_named_once_and_found_in_every_panel(figure: Figure) -> None:
    key, curves = figure.legends
    listed = [text.get_text() for text in key.get_texts()]
    named = [report.name for report in CROWD if report.method != "Best-of-N"]
    assert all(axes.get_window_extent().width > 4.5 * figure.dpi for axes in figure.axes), (
        "the key takes no room of theirs"
    )
    assert listed == [f"{number}  {name}" for number, name in enumerate(named, 1)]
    methods = [text.get_text() for text in curves.get_texts()]
    assert methods[0] == "Best-of-N" and methods[-len(FAMILIES) :] == list(FAMILIES)
    for axes in figure.axes:
        tags = [text.get_text() for text in axes.texts if text.get_text()]
        assert sorted(tags) == sorted([*map(str, range(1, len(named) + 1)), "N=2", "N=4", "N=8", "N=16"])


def test_no_text_lies_on_another_or_is_cut_off(figure: Figure) -> None:
    """All texts of the figure, those of the key, the axes and the titles among them."""
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    texts = [text for axes in figure.axes for text in axes.texts if text.get_text()]
    for axes in figure.axes:
        texts += [axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
            texts += [label for place, label in ticks if low <= place <= high]
    texts += [text for legend in figure.legends for text in legend.get_texts()]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts]
    assert not [(a, b) for (a, one), (b, other) in itertools.combinations(boxes, 2) if one.overlaps(other)]
    page = figure.bbox
    assert not [name for name, box in boxes if not (page.contains(box.x0, box.y0) and page.contains(box.x1, box.y1))]


def test_the_key_has_the_looks_of_the_points(figure: Figure) -> None:
    key = figure.legends[0]
    looks = [(line.get_color(), line.get_marker()) for line in key.get_lines()]
    styles = dict(zip(FAMILIES, policy_styles(len(FAMILIES)), strict=True))
    assert looks[1:] == [styles[report.method] for report in CROWD if report.n is None]
    assert looks[0] == ("#333333", "*")


def test_it_is_white_on_any_page(figure: Figure) -> None:
    """Whatever the user's own style is: black on nothing could not be read on a dark page."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    pixels = imread(io.BytesIO(drawn.getvalue()))
    assert pixels[..., 3].min() == 1.0
    assert (pixels[..., :3] == 1.0).all(-1).mean() > 0.8
    vector = io.BytesIO()
    figure.savefig(vector, format="svg")
    assert "#ffffff" in vector.getvalue().decode() and ElementTree.fromstring(vector.getvalue()) is not None


def luminance(colour: str) -> float:
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_letters_are_dark_enough() -> None:
    """By the contrast ratio of the Web Content Accessibility Guidelines, 4.5 for text."""
    for colour, _ in STYLES:
        assert 1.05 / (luminance(ink_of(colour)) + 0.05) >= 4.5, colour


def test_looks_differ_for_many_methods() -> None:
    styles = policy_styles(40)
    assert len(set(styles)) == 40
    assert styles[: len(STYLES)] == list(STYLES)


def test_names_stand_at_their_points_until_they_are_many() -> None:
    names = [f"a ${place}$" for place in range(MOST_NAMES)]
    assert tags_of(names)[3] == r"a \$3\$"
    assert tags_of([*names, "b"]) == [str(number) for number in range(1, MOST_NAMES + 2)]


def test_a_row_has_one_number_in_both_pictures() -> None:
    """Also where one of them leaves a row out."""
    reports = crowd(25)
    policies = [report for report in reports if report.method not in ("Best-of-N", "reference")]
    left_out = policies[3].name
    reports = [replace(report, kl_is_bound=report.name == left_out) for report in reports]
    costs = cost_figure(reports)
    assert costs is not None
    keys = [
        {name: number for number, name in (text.get_text().split(maxsplit=1) for text in figure.legends[0].get_texts())}
        for figure in (pareto_figure(reports), costs)
    ]
    assert keys[1].keys() - keys[0].keys() == {left_out}
    assert keys[0].items() < keys[1].items()
