"""The figure of costs: what each way to answer gains for what a response of it takes."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from vbon_lightning.evaluation.drawing import draw_panel, finish_figure, marks_of, new_figure
from vbon_lightning.evaluation.intervals import Estimate
from vbon_lightning.evaluation.labels import GREY
from vbon_lightning.evaluation.reports import BEST_OF_N, REFERENCE, PolicyReport

_ACROSS = {
    "generated_tokens": "tokens generated a response, discarded ones included",
    "seconds": "seconds a response, of a batch shared by its responses",
}
_UP = {"win_rate": "win rate over the reference", "reward": "mean reward"}


def cost_figure(reports: Sequence[PolicyReport], *, title: str = "") -> Figure | None:
    """Draw win rate and reward over the tokens and the seconds that a response takes, with 95% intervals over prompts.

    Policies stand at one sample, decoders at what they were seen to take, Best-of-N at N samples of the reference.
    Intervals across are those of the samples' lengths; decoders and seconds have none. Reports whose cost is not known
    are left out.

    Args:
        reports: Policies, decoders and Best-of-N, in any order.
        title: Title of the figure.

    Returns:
        The figure; None where no cost is known.
    """
    known = [report for report in reports if report.cost and report.cost.get("generated_tokens", 0.0) > 0]
    if not known:
        return None
    across = [key for key in _ACROSS if any((report.cost or {}).get(key, 0.0) > 0 for report in known)]
    up = [key for key in _UP if any(getattr(report, key) is not None for report in known)]
    figure = new_figure((5.5 * len(across), 0.6 + 4.0 * len(up)), title)
    panels = figure.subplots(len(up), len(across), squeeze=False)
    marks = marks_of(reports, known)
    for row, height in zip(panels, up, strict=True):
        for axes, cost in zip(row, across, strict=True):
            places = [(report, _place(report, cost, known), getattr(report, height)) for report in known]
            points = [(report, x, y) for report, x, y in places if x is not None and y is not None]
            axes.set_xscale("log")
            middles = [x.mean for _, x, _ in points]
            if middles and max(middles) < 1.01 * min(middles):  # one place has no width of its own
                axes.set_xlim(min(middles) / 2, 2 * max(middles))
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            draw_panel(axes, points, marks, _ACROSS[cost], _UP[height])
            if height == "win_rate":
                axes.axhline(0.5, color=GREY, linewidth=0.7, zorder=0)
    finish_figure(figure, list(panels.flat), marks)
    return figure


def _place(report: PolicyReport, cost: str, reports: Sequence[PolicyReport]) -> Estimate | None:
    """Return what a response takes, with an interval where it is known; None where nothing is."""
    amount = (report.cost or {}).get(cost, 0.0)
    if amount <= 0:  # a logarithmic axis has no place for it
        return None
    if cost != "generated_tokens":
        return Estimate(amount, None)
    if report.method == BEST_OF_N:
        lengths = [other.length for other in reports if other.method == REFERENCE]
        sample = lengths[0] if lengths else None
    else:
        sample = report.length
    # A decoder's tokens are not N samples' of a length that is known.
    samples = 1 if report.method != BEST_OF_N else report.n or 1
    if sample is None or sample.half_width is None or abs(amount - samples * sample.mean) > 1e-6 * amount:
        return Estimate(amount, None)
    return Estimate(amount, samples * sample.half_width)
