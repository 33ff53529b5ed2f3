"""The figure of a comparison."""

from __future__ import annotations

import io
import itertools

import pytest
import torch

from vbon_lightning.evaluation import Estimate, PolicyReport, bon_reports, pareto_figure


def test_the_figure_shows_every_report(reports: list[PolicyReport]) -> None:
    figure = pareto_figure(reports, title="A title")
    left, right = figure.axes
    names = ["KL-RL 0.1", "KL-RL 0.3", "N=2", "N=4", "N=8", "reference", "vBoN | N=4"]
    for axes in (left, right):
        assert sorted(text.get_text() for text in axes.texts if text.get_text()) == names
        assert "nats" in axes.get_xlabel()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "Best-of-N",
        "Best-of-N without ties",
        "vBoN",
        "KL-RL",
    ]


def test_labels_do_not_cover_each_other() -> None:
    noise = torch.Generator().manual_seed(0)
    crowd = [
        PolicyReport(f"policy {i}", f"method {i}", 5, 1, Estimate(0.5, 0.01), Estimate(1.0, 0.1), "", n=None,
                     win_rate=Estimate(0.6, 0.01))
        for i in range(6)
    ]  # fmt: skip
    figure = pareto_figure([*bon_reports(torch.randn(9, 64, generator=noise), n_values=[2, 4, 8]), *crowd])
    renderer = figure.canvas.get_renderer()
    for axes in figure.axes:
        boxes = [text.get_window_extent(renderer) for text in axes.texts if text.get_text()]
        assert not [(a, b) for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]
        assert all(axes.get_window_extent(renderer).contains(box.x0, box.y0) for box in boxes)


@pytest.mark.parametrize("number", [0, 4])
def test_a_figure_of_one_report(reports: list[PolicyReport], number: int) -> None:
    assert len(pareto_figure([reports[number]]).axes) == 2


def test_a_figure_without_win_rates_says_so(reports: list[PolicyReport]) -> None:
    for report in reports:
        report.win_rate = None
    left, right = pareto_figure(reports).axes
    assert [text.get_text() for text in left.texts] == ["no reference rewards"]
    assert right.lines


def test_a_figure_needs_reports() -> None:
    with pytest.raises(ValueError, match="at least one report"):
        pareto_figure([])


def test_titles_and_names_are_no_formulas(reports: list[PolicyReport]) -> None:
    reports[4].name, reports[4].method = "$\\frac{$\n$ \\$ \x1b", "a $x^2$ b"
    figure = pareto_figure(reports, title="$\\undefined$")  # as formulas these could not be drawn
    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg")
    assert figure.get_suptitle() == r"\$\undefined\$"
    assert drawn.getvalue().startswith(b"<?xml") and b"\x1b" not in drawn.getvalue()
