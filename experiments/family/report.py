"""Keep what `make family` measured, and bring docs/family.md up to date with it.

python -m experiments.family.report            # from runs/family/sheet: the result, the pictures, and the page's block
python -m experiments.family.report --page     # the page alone, from the committed result
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.family.plan import COUNTS
from vbon_lightning._markdown import markdown_cell, markdown_table
from vbon_lightning.evaluation import PolicyReport
from vbon_lightning.evaluation.fronts import gain_at, gain_share
from vbon_lightning.evaluation.reports import BEST_OF_N, REFERENCE
from vbon_lightning.whole_files import atomic_file

ROOT = Path(__file__).parents[2]
RESULT = Path(__file__).parent / "results" / "family.json"
PAGE = ROOT / "docs" / "family.md"
PICTURES = ROOT / "docs" / "family"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->"
NOTHING_YET = (
    "Nothing is committed yet: `make family` measures, and `python -m experiments.family.report` puts it here.\n"
)
HALF, OFTEN = 0.5, 0.05


def measured(result: Mapping[str, Any] | None) -> str:
    """Return the page's block of measured rows; what does not work comes first.

    Args:
        result: The committed ``family.json``; None where there is none.
    """
    if result is None:
        return NOTHING_YET
    bounded = {plain["name"] for plain in result["reports"] if plain.get("kl_is_bound")}
    reports = [PolicyReport.from_dict(plain) for plain in result["reports"]]
    shares = {report.name: _share(report, reports) for report in reports if report.name not in bounded}
    seeds, prompts = result["seeds"], reports[0].prompts
    counted, also = ("one seed", "") if len(seeds) == 1 else (f"{len(seeds)} seeds", " and seeds")
    return (
        f"{_failures(result, reports, shares, bounded)}\n"
        "![Win rate and reward against KL](family/pareto.png)\n\n"
        "![Win rate and reward against tokens and seconds a response](family/cost.png)\n\n"
        f"{_table(result, reports, shares, bounded)}\n"
        f"Made by `make family`: {prompts} held-out prompts, {counted}, means ± half of the 95% interval over "
        f"prompts{also}. *Gain kept* is the share of Best-of-N's gain in win rate at the row's own KL. Seconds and "
        "milliseconds are of one thread, with another run beside it; a response's are its share of a batch of "
        f"{result['responses_at_once']}, rewards included where a reward chooses it. Seconds of training are without "
        "the stages that it stands on. Where a KL is only known to be at most so large, nothing is said of the gain "
        "kept, and the row is not in the first picture.\n\n"
        "What each training took, of `configs/demo/NAME.yaml`. Settings were tried by hand in a few runs each, whose "
        "validation prompts are 16 of these 48; none was searched for.\n\n"
        f"{_settings(result)}"
    )


def _settings(result: Mapping[str, Any]) -> str:
    """Return the table of what each training took."""
    rows = []
    for title, own in result["settings"].items():
        took = [f"`{name}: {own[name]}`" for name in COUNTS if name in own]
        rows.append(
            [markdown_cell(title), str(own["updates"]), str(own["prompts"]), ", ".join(took) or "two of the table's",
             f"{float(own['learning_rate']):g}", ", ".join(own["also"]) or "-"]
        )  # fmt: skip
    header = ["training", "updates", "prompts", "responses a prompt", "learning rate", "a model beside the reference"]
    return markdown_table(header, rows, align="lrrlrl")


def _share(report: PolicyReport, reports: Sequence[PolicyReport]) -> float:
    """Return which share of Best-of-N's gain a row keeps at its own KL; NaN where nothing is known of that."""
    curve = [
        (one.kl.mean, one.win_rate.mean) for one in reports if one.method == BEST_OF_N and one.win_rate is not None
    ]
    if report.n is not None or report.win_rate is None or not curve:
        return math.nan
    best = gain_at(curve, max(report.kl.mean, 0.0))
    return gain_share(report.win_rate.mean, best) if best > HALF else math.nan


def _failures(
    result: Mapping[str, Any], reports: Sequence[PolicyReport], shares: Mapping[str, float], bounded: set[str]
) -> str:
    lines = []
    rows = [report for report in reports if report.n is None and report.win_rate is not None]
    if gained_nothing := [
        report.name
        for report in rows
        if report.win_rate is not None and report.win_rate.mean - (report.win_rate.half_width or 0.0) <= HALF
    ]:
        lines.append(f"No better than the reference, within the interval: {_listed(gained_nothing)}.")
    less = sorted((share, name) for name, share in shares.items() if share < HALF and name not in gained_nothing)
    if less:
        lines.append(
            "Less than half of Best-of-N's gain at their own KL: "
            + _listed([f"{name} ({100 * share:.0f}%)" for share, name in less])
            + "."
        )
    furthest = max((report.kl.mean for report in reports if report.method == BEST_OF_N), default=math.inf)
    if beyond := [report.name for report in rows if report.kl.mean > furthest and report.name not in bounded]:
        lines.append(f"Further from the reference than any Best-of-N here, so not compared with it: {_listed(beyond)}.")
    lines += [
        f"{report.name} accepted none of its responses, and fell back to a plain sample, in "
        f"{100 * (report.cost or {}).get('fallbacks', 0.0):.0f}% of cases."
        for report in rows
        if (report.cost or {}).get("fallbacks", 0.0) > OFTEN
    ]
    lines += [f"Not done: {name}, {why.split(':')[0]}." for name, why in result["failed"].items()]
    lines = lines or ["All rows are better than the reference, and keep at least half of Best-of-N's gain."]
    return "What does not work:\n\n" + "".join(f"- {markdown_cell(line)}\n" for line in lines)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)


def _table(
    result: Mapping[str, Any], reports: Sequence[PolicyReport], shares: Mapping[str, float], bounded: set[str]
) -> str:
    rows = []
    for report in reports:
        share, cost = shares.get(report.name, math.nan), report.cost or {}
        runs = result["trainings"].get(report.name, [])
        name = markdown_cell(report.name)
        rows.append(
            [
                name if report.method in (BEST_OF_N, REFERENCE) else f"**{name}**",
                markdown_cell(report.method),
                str(report.reward),
                f"≤ {report.kl.mean:.3f}" if report.name in bounded else str(report.kl),
                "-" if report.win_rate is None else str(report.win_rate),
                "-" if math.isnan(share) else f"{100 * share:.0f}%",
                f"{cost['generated_tokens']:,.1f}" if "generated_tokens" in cost else "-",
                f"{1000 * cost['seconds']:.2f}" if "seconds" in cost else "-",
                f"{sum(run['seconds'] for run in runs) / len(runs):.0f}" if runs else "-",
            ]
        )
    header = ["row", "family", "reward", "KL (nats)", "win rate", "gain kept", "tokens", "ms", "training (s)"]
    return markdown_table(header, rows, align="ll" + "r" * (len(header) - 2))


def filled(page: str, block: str) -> str:
    """Put a block between the page's marks.

    Raises:
        ValueError: If the page has no marks.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no block between {BEGIN.strip()} and {END}")
    return before + begin + block + end + after


def committed() -> dict[str, Any] | None:
    """Return the committed result, None where there is none."""
    return json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else None


def main() -> None:
    """Keep the result and write the page."""
    from experiments.family.run import SHEET

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sheet", default=str(ROOT / SHEET), help="what `make family` left")
    parser.add_argument("--page", action="store_true", help="write the page alone")
    given = parser.parse_args()
    if not given.page:
        sheet = Path(given.sheet)
        if not (sheet / "family.json").is_file():
            parser.error(f"{sheet} has no family.json: run `make family` first")
        for source, target in (
            ("family.json", RESULT),
            ("pareto.png", PICTURES / "pareto.png"),
            ("cost.png", PICTURES / "cost.png"),
        ):
            _keep(target, (sheet / source).read_bytes())
    _keep(PAGE, filled(PAGE.read_text(encoding="utf-8"), measured(committed())).encode())


def _keep(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as stream:
        stream.write(content)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
