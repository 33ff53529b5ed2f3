"""A comparison in TensorBoard and other loggers: the picture, the table, texts, curves over KL, and HPARAMS rows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from matplotlib.figure import Figure

from vbon_lightning.evaluation.intervals import Estimate
from vbon_lightning.evaluation.reports import BEST_OF_N, REFERENCE, PolicyReport
from vbon_lightning.evaluation.texts import TextSample, samples_markdown
from vbon_lightning.loggers import COMPARED, log_figure, log_table

MILLINATS = 1000
"""TensorBoard's steps are whole numbers: those of a comparison are thousandths of a nat of KL."""

_OURS = ".comparison"
"""What the names of a comparison's event files end with: a later one removes them, and no others."""
_ROW = ("reward", "kl", "win_rate")
"""With policy and method as many columns as HPARAMS shows at first."""
_OF_RUNS = dict.fromkeys(COMPARED, 0.0)
"""The columns of training runs, which HPARAMS shows in the same table; the values are not written."""
_NUMBERS = ("reward", "kl", "win_rate", "judge_reward", "length", "finished")


def loggers_of(logger: bool | Logger | Sequence[Logger], directory: Path) -> list[Logger]:
    """Return the loggers that are meant, as ``Trainer`` takes them: True is TensorBoard in the directory."""
    if isinstance(logger, bool):
        return [TensorBoardLogger(directory, name="", version="", filename_suffix=_OURS)] if logger else []
    return [logger] if isinstance(logger, Logger) else list(logger)


def log_comparison(
    logger: Logger,
    reports: Sequence[PolicyReport],
    *,
    figures: Mapping[str, Figure],
    table: str,
    samples: Sequence[TextSample] = (),
) -> None:
    """Log the pictures, the table and the texts; to TensorBoard also curves over KL and a row of HPARAMS a policy.

    Curves are named ``vs_kl/...``, behind ``train/`` and ``val/`` in the alphabet. Each method has a run
    and each policy a point on it, at the step :data:`MILLINATS` times its KL. What an earlier comparison wrote to the
    same place is removed.

    Args:
        logger: Where to.
        reports: Policies and Best-of-N.
        figures: The pictures by the names to log them under.
        table: The reports as Markdown.
        samples: Responses to read.
    """
    if isinstance(logger, TensorBoardLogger):
        for path in Path(logger.log_dir).rglob(f"events.out.tfevents.*{_OURS}"):
            path.unlink()
    costs = dict.fromkeys(field for report in reports for field in report.cost or {})
    rows = [
        [report.name, report.method, *_means(report).values(), *((report.cost or {}).get(field) for field in costs)]
        for report in reports
    ]
    log_table(logger, "comparison", ["policy", "method", *_NUMBERS, *costs], rows, markdown=table, step=0)
    if samples:
        texts = [
            [sample.prompt, name, response.text, response.reward]
            for sample in samples
            for name, responses in sample.responses.items()
            for response in responses
        ]
        columns = ["prompt", "policy", "response", "reward"]
        log_table(logger, "samples", columns, texts, markdown=samples_markdown(samples), step=0)
    for name, figure in figures.items():
        log_figure(logger, name, figure, step=0)
    if isinstance(logger, TensorBoardLogger):
        _log_curves(reports, Path(logger.log_dir))
        _log_rows(reports, Path(logger.log_dir))
    logger.finalize("success")


def _means(report: PolicyReport) -> dict[str, float | None]:
    values: dict[str, Estimate | None] = {name: getattr(report, name) for name in _NUMBERS}
    if report.kl_is_bound:
        values["kl"] = None
    return {name: None if value is None else value.mean for name, value in values.items()}


def _log_curves(reports: Sequence[PolicyReport], directory: Path) -> None:
    by_method: dict[str, list[PolicyReport]] = {}
    for report in sorted((one for one in reports if not one.kl_is_bound), key=lambda report: report.kl.mean):
        method = BEST_OF_N if report.method == REFERENCE else report.method  # it is Best-of-1
        by_method.setdefault(method, []).append(report)
    for method, line in by_method.items():
        with _writer(directory / file_name(method)) as writer:
            for report in line:
                step = round(MILLINATS * report.kl.mean)
                values = {name: mean for name, mean in _means(report).items() if name != "kl"}
                values |= {f"win_rate_vs_bon{n}": value.mean for n, value in report.win_rate_vs_bon.items()}
                for name, mean in values.items():
                    if mean is not None:
                        writer.add_scalar(f"vs_kl/{name}", mean, global_step=step)


def _log_rows(reports: Sequence[PolicyReport], directory: Path) -> None:
    """Write a row a policy, its numbers as columns: as scalars they would be charts of one point."""
    from torch.utils.tensorboard.summary import hparams

    for report in reports:
        with _writer(directory / "table" / file_name(report.name)) as writer:
            numbers = {name: mean for name, mean in _means(report).items() if name in _ROW and mean is not None}
            rounded = {name: round(mean, 4) for name, mean in numbers.items()}
            for summary in hparams({"policy": report.name, "method": report.method, **rounded}, _OF_RUNS):
                writer.file_writer.add_summary(summary)


@contextmanager
def _writer(directory: Path) -> Iterator[Any]:
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and only needed here

    with SummaryWriter(str(directory), filename_suffix=_OURS) as writer:
        yield writer


def file_name(text: str) -> str:
    """Return a name that a directory can have, and no other place, and that TensorBoard shows as it is."""
    return re.sub(r"[^\w.=+-]+", "_", text).strip("_.") or "_"
