"""A comparison as files: numbers for programs, a table and texts for people, and a figure."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from lightning.pytorch.loggers import Logger
from matplotlib.figure import Figure

from vbon_lightning._markdown import markdown_block, markdown_cell, markdown_table
from vbon_lightning.decoding.cost import UNUSUAL, cost_amount, cost_heading
from vbon_lightning.evaluation.cost_drawing import cost_figure
from vbon_lightning.evaluation.drawing import pareto_figure
from vbon_lightning.evaluation.intervals import Estimate
from vbon_lightning.evaluation.logs import log_comparison, loggers_of
from vbon_lightning.evaluation.reports import BEST_OF_N, PolicyReport
from vbon_lightning.evaluation.texts import TextSample, samples_markdown
from vbon_lightning.whole_files import atomic_file

_LOGGED = {"pareto": "vs_kl", "cost": "vs_cost"}
"""Under which names the pictures are logged, behind those of training in the alphabet."""


def write_comparison(
    reports: Sequence[PolicyReport],
    directory: str | os.PathLike[str],
    *,
    title: str,
    command: str | None = None,
    samples: Sequence[TextSample] = (),
    logger: bool | Logger | Sequence[Logger] = True,
) -> dict[str, Path]:
    """Write ``comparison.json``, ``comparison.md``, ``pareto.png``, ``cost.png`` and ``samples.md``, all or none.

    Where ``comparison.json`` is there the others are of the same comparison: it goes first and comes last. Where no
    report says what its responses take there is no ``cost.png``.

    Args:
        reports: Policies and Best-of-N, in the order the table should have.
        directory: Where to; made if needed.
        title: Title of the table and the figure.
        command: The command that made the comparison, to be shown with it.
        samples: Responses to read; without any there is no ``samples.md``.
        logger: Where to log them too: TensorBoard, in the same directory, by default; False for nowhere.

    Returns:
        The files written, by name.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    table = comparison_markdown(reports, title=title, command=command)
    plain = {"title": title, "command": command, "reports": [report.to_dict() for report in reports]}
    contents = {
        "comparison.json": (json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode(),
        "comparison.md": table.encode(),
    }
    costs = cost_figure(reports, title=title)
    figures = {"pareto": pareto_figure(reports, title=title)} | ({} if costs is None else {"cost": costs})
    contents |= {f"{name}.png": _png(figure) for name, figure in figures.items()}
    if samples:
        contents["samples.md"] = f"# {markdown_cell(title)}: samples\n\n{samples_markdown(samples)}".encode()
    written = write_together(directory, contents, gone={"cost.png", "samples.md"} - contents.keys())
    for one in loggers_of(logger, directory):
        log_comparison(
            one,
            reports,
            figures={f"{_LOGGED[name]}/pareto": figure for name, figure in figures.items()},
            table=table,
            samples=samples,
        )
    return written


def _png(figure: Figure) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def write_together(directory: Path, contents: Mapping[str, bytes], *, gone: Collection[str] = ()) -> dict[str, Path]:
    """Write files that belong together: nothing changes before all are on the disk.

    Args:
        directory: Where to.
        contents: What each file is to hold, by its name. The first one is removed before the others are replaced, and
            there again when all of them are.
        gone: Names of files of an earlier time that these have no place for.

    Returns:
        The files, by name.
    """
    written = {name: directory / name for name in contents}
    with ExitStack() as files:  # which are put in place from the last to the first
        for name, content in contents.items():
            stream = files.enter_context(atomic_file(written[name]))
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        for path in (next(iter(written.values())), *(directory / name for name in gone)):
            path.unlink(missing_ok=True)
    return written


def comparison_markdown(reports: Sequence[PolicyReport], *, title: str, command: str | None = None) -> str:
    """Format reports as a Markdown table with 95% intervals, and say below how they were estimated."""
    # Best-of-N against itself is arithmetic; the columns are for what the policies were compared with.
    policies = [report for report in reports if report.n is None] or reports
    opponents = sorted({n for report in policies for n in report.win_rate_vs_bon})
    optional = {
        "judge reward": [report.judge_reward for report in reports],
        "tokens": [report.length for report in reports],
        "finished": [report.finished for report in reports],
    }
    columns: dict[str, list[str]] = {
        "policy": [_bold(report) for report in reports],
        "method": [markdown_cell(report.method) for report in reports],
        "reward": [str(report.reward) for report in reports],
        "KL (nats)": [f"<= {report.kl.mean:.3f}" if report.kl_is_bound else str(report.kl) for report in reports],
        "win rate": [_cell(report.win_rate) for report in reports],
    }
    for n in opponents:
        columns[f"win rate over Best-of-{n}"] = [_cell(report.win_rate_vs_bon.get(n)) for report in reports]
    columns |= {
        name: [_cell(value) for value in values]
        for name, values in optional.items()
        if any(value is not None for value in values)
    }
    rows = list(zip(*columns.values(), strict=True))
    table = markdown_table(list(columns), rows, align="ll" + "r" * (len(columns) - 2))
    shown = "" if command is None else markdown_block(command, "sh") + "\n"
    return f"# {markdown_cell(title)}\n\n{shown}{table}\n{_notes(reports)}{_costs(reports)}"


def _bold(report: PolicyReport) -> str:
    name = markdown_cell(report.name)
    return f"**{name}**" if report.n is None else name


def _costs(reports: Sequence[PolicyReport]) -> str:
    """Format what a response takes to make: a policy's one sample, Best-of-N's N, and whatever decoders say."""
    known = [report for report in reports if report.cost]
    if not known:
        return ""
    fields = dict.fromkeys(field for report in known for field in report.cost or {})
    shown = [field for field in fields if field not in UNUSUAL or any((one.cost or {}).get(field) for one in known)]
    rows = [[_bold(report), *(_amount(field, (report.cost or {}).get(field)) for field in shown)] for report in known]
    table = markdown_table(
        ["a response", *(cost_heading(field) for field in shown)], rows, align="l" + "r" * len(shown)
    )
    tabled = any(report.method == BEST_OF_N for report in known)
    note = "- Best-of-N takes N samples of the reference, and their rewards.\n"
    return f"\n{table}" + (f"\n{note}" if tabled else "")


def _amount(field: str, value: float | None) -> str:
    return "-" if value is None else cost_amount(field, value)


def _cell(value: Estimate | None) -> str:
    return "-" if value is None else str(value)


def _notes(reports: Sequence[PolicyReport]) -> str:
    prompts = sorted({report.prompts for report in reports})
    count = f"{prompts[0]}" if len(prompts) == 1 else f"{prompts[0]} to {prompts[-1]}"
    lines = [
        f"Means over {count} prompts ± half of the 95% interval (Student's t over prompts).",
        "Win rates are against one response of the reference or the best of n; a tie counts one half.",
    ]
    for estimator in dict.fromkeys(report.win_rate_estimator for report in reports if report.win_rate_estimator):
        lines.append(f"Win rates are by {estimator}. That of the sampled reference says how well: 0.5 would be right.")
    for estimator in dict.fromkeys(report.kl_estimator for report in reports):
        lines.append(f"KL of {_names(reports, 'kl_estimator', estimator)}: {estimator}.")
    if any(report.kl_is_bound for report in reports):
        lines.append("Where the KL is a bound the place in the picture is not known, and there is none.")
    for check in dict.fromkeys(report.kl_check_estimator for report in reports if report.kl_check is not None):
        values = [f"{report.name} {report.kl_check}" for report in reports if report.kl_check_estimator == check]
        lines.append(f"KL checked by the {check}: {', '.join(values)}.")
    for report in reports:
        if report.missing:
            lines.append(f"{report.missing} responses of {report.name} have no reward and count nowhere.")
    if any(report.judge_reward is not None for report in reports):
        lines.append("The judge is a second scorer: where it disagrees with the reward, suspect reward hacking.")
    return "".join(f"- {markdown_cell(line)}\n" for line in lines)


def _names(reports: Sequence[PolicyReport], key: str, value: str) -> str:
    return ", ".join(report.name for report in reports if getattr(report, key) == value)
