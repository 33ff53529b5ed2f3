"""The figure of costs: where each report stands."""

from __future__ import annotations

import pytest
from matplotlib.axes import Axes

from tests.evaluation.crowd import crowd
from vbon_lightning.evaluation import PolicyReport
from vbon_lightning.evaluation.cost_drawing import cost_figure


@pytest.fixture
def reports() -> list[PolicyReport]:
    return crowd(3)  # the first is a decoder


def points(axes: Axes) -> dict[str, tuple[float, float]]:
    return {text.get_text(): text.xy for text in axes.texts if text.get_text()}  # type: ignore[attr-defined]


def intervals(axes: Axes) -> list[tuple[float, float]]:
    """Return what the horizontal error bars reach over."""
    lines = [path.vertices for bars in axes.collections for path in bars.get_paths()]
    flat = [line for line in lines if line[0][1] == line[1][1]]
    return sorted((float(line[0][0]), float(line[1][0])) for line in flat)


def test_every_report_stands_at_its_cost_and_its_gain(reports: list[PolicyReport]) -> None:
    figure = cost_figure(reports, title="Costs")
    assert figure is not None and figure.get_suptitle() == "Costs"
    panels = {(axes.get_xlabel().split()[0], axes.get_ylabel().split()[0]): axes for axes in figure.axes}
    assert set(panels) == {(across, up) for across in ("tokens", "seconds") for up in ("win", "mean")}
    for (across, up), axes in panels.items():
        found = points(axes)
        for report in reports:
            height = report.reward if up == "mean" else report.win_rate
            assert report.cost is not None and height is not None
            x = report.cost["generated_tokens" if across == "tokens" else "seconds"]
            tag = f"N={report.n}" if report.method == "Best-of-N" else report.name
            assert found.pop(tag) == (x, height.mean)
        assert not found and axes.get_xscale() == "log"


def test_tokens_of_samples_have_the_intervals_of_their_lengths(reports: list[PolicyReport]) -> None:
    decoder, *policies = reports[5:]
    assert decoder.cost is not None
    decoder.cost["generated_tokens"] = 40.0
    middles = [(11.0 * n, 0.1 * n) for n in (1, 2, 4, 8, 16)]
    middles += [(report.length.mean, 0.1) for report in policies if report.length is not None]
    figure = cost_figure(reports)
    assert figure is not None
    tokens, seconds = figure.axes[:2]
    expected = sorted((middle - half, middle + half) for middle, half in middles)
    for found, wanted in zip(intervals(tokens), expected, strict=True):  # of the decoder's 40 tokens there is none
        assert found == pytest.approx(wanted)
    assert not intervals(seconds)


def test_what_is_not_known_is_left_out(reports: list[PolicyReport]) -> None:
    for report in reports:
        assert report.cost is not None
        del report.cost["seconds"]
        report.win_rate = None
    reports[-1].cost = None
    figure = cost_figure(reports)
    assert figure is not None
    (axes,) = figure.axes
    assert reports[-1].name not in points(axes) and reports[-2].name in points(axes)
    for report in reports:
        report.cost = {}
    assert cost_figure(reports) is None and cost_figure([]) is None


@pytest.mark.filterwarnings("error")
def test_costs_that_are_all_the_same_have_room(reports: list[PolicyReport]) -> None:
    for report in reports:
        report.cost = {"generated_tokens": 8.0}
    figure = cost_figure(reports)
    assert figure is not None
    assert figure.axes[0].get_xlim() == (4.0, 16.0)
