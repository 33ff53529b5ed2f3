"""Draw the pictures and write the tables of the experiment from the committed results.

Where the output has a document, ``sentiment.md``, its tables and the README's are brought up to date: what stands
between ``<!-- table NAME -->`` and ``<!-- end -->`` is replaced.

python experiments/sentiment/report.py
python experiments/sentiment/report.py --results experiments/sentiment/results --output docs/experiments
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import budgets
import tables
from pictures import fronts_figure, judge_figure, samples_figure
from results import Result, read_results

ROOT = Path(__file__).parents[2]
_BESIDE = {("equal_tilted", 4), ("equal_vbon", 4), ("kl_rl", 0.7), ("equal_bon_sft", 4), ("equal_dpo", 0.5)}
"""Methods and strengths of the first table that stand beside the rest of the family."""


def write_report(results: str | Path, output: str | Path, documents: Sequence[str | Path] = ()) -> list[Path]:
    """Write all tables and pictures that the results allow.

    Args:
        results: Directory of the results.
        output: Where to: pictures there, tables in ``tables``.
        documents: Other documents with marks for tables.

    Returns:
        The files written.

    Raises:
        ValueError: If there are no results.
    """
    runs, baselines = read_results(results)
    if not runs:
        raise ValueError(f"{results} has no run's result; make some with Snakemake (experiments/README.md)")
    output, written = Path(output), []
    (output / "tables").mkdir(parents=True, exist_ok=True)

    made: dict[str, str] = {}

    def write(name: str, text: str) -> None:
        made[name] = text
        written.append(output / "tables" / f"{name}.md")
        written[-1].write_text(text, encoding="utf-8")

    def draw(name: str, figure: object) -> None:
        written.append(output / f"{name}.png")
        figure.savefig(written[-1])  # type: ignore[attr-defined]

    main, bon = _group(runs, "methods"), baselines.get("main")
    if main and bon:
        draw("fronts", fronts_figure(main, bon))
        if any(run.judge is not None for run in main):
            draw("judge", judge_figure(main, bon))
        write("gain", budgets.gain_table(main, bon))
        write("closeness", tables.closeness_table(main, bon))
        write("corners", budgets.corners_table(main, bon))
        write("fronts", tables.front_table(main))
        write("costs", budgets.costs_table(main, bon))
        write("break_even", tables.break_even_table(main, bon))
        if family := _group(runs, "family"):
            known = [run for run in main if run.seed == 0 and (run.method, run.value) in _BESIDE]
            write("family", budgets.family_table([*family, *known], bon))
    for name, one, other in (("bounds", "vbon", "vbon_lower"), ("ties", "ties_exact", "ties_untied")):
        pair = [[run for run in runs if run.method == method] for method in (one, other)]
        if all(pair):
            write(name, tables.paired_table(*pair))
    if varied := _group(runs, "table_samples"):
        (n,) = {run.training["settings"]["module"].get("n") for run in varied}
        draw("table_samples", samples_figure(varied, baselines[varied[0].setting], n))
        write("table_samples", tables.samples_table(varied))
    if varied := _group(runs, "budget"):
        write("budget", tables.budget_table([*varied, *(run for run in runs if run.method == "vbon")]))
    for name in ("long", "floor", "few", "unequal"):
        if own := _group(runs, name):
            write(name, tables.closeness_table(own, baselines[own[0].setting]))
    if longer := _group(runs, "long"):
        draw("long", fronts_figure(longer, baselines[longer[0].setting]))
    write("runs", tables.runs_table(runs))
    for document in (output / "sentiment.md", *map(Path, documents)):
        if document.exists():
            document.write_text(with_tables(document.read_text(encoding="utf-8"), made), encoding="utf-8")
            written.append(document)
    return written


def with_tables(text: str, made: dict[str, str]) -> str:
    """Put tables between the marks that ask for them; a table that was not made stays as it is.

    Raises:
        ValueError: If a mark is not closed.
    """
    opened, closed = text.count("<!-- table "), len(_MARKED.findall(text))
    if opened != closed:
        raise ValueError(f"{opened} tables begin with <!-- table NAME -->, but {closed} of them end with <!-- end -->")
    return _MARKED.sub(lambda found: f"{found[1]}\n{made.get(found[2], found[3])}{found[4]}", text)


_MARKED = re.compile(r"(<!-- table (\w+) -->)\n((?:(?!<!-- table ).)*?)(<!-- end -->)", re.DOTALL)


def _group(runs: Sequence[Result], name: str) -> list[Result]:
    return [run for run in runs if run.group == name]


def main() -> None:
    """Write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default=Path(__file__).with_name("results"))
    parser.add_argument("--output", default=ROOT / "docs" / "experiments")
    args = parser.parse_args()
    documents = (
        [ROOT / "README.md", ROOT / "docs" / "family.md"]
        if Path(args.output).resolve() == ROOT / "docs" / "experiments"
        else []
    )
    for path in write_report(args.results, args.output, documents):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
