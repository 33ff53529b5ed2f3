"""Tables and pictures, for loggers that take them: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger
from matplotlib.figure import Figure
from PIL import Image


def log_table(
    logger: Logger, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, markdown: str, step: int
) -> None:
    """Log a table: as Markdown to TensorBoard, as a table to Weights & Biases, as an artifact to MLflow.

    Loggers without texts or tables, such as ``CSVLogger``, get nothing.

    Args:
        logger: One of the Trainer's.
        name: What to call it, such as ``val/samples``.
        columns: Names of the columns.
        rows: The cells, plain values; those of an earlier step are not repeated.
        markdown: The same for people to read, for loggers that show text.
        step: The optimizer step.
    """
    if isinstance(logger, WandbLogger):
        logger.log_table(name, columns=list(columns), data=[list(row) for row in rows], step=step)
    elif isinstance(logger, MLFlowLogger):
        by_column = {column: [row[place] for row in rows] for place, column in enumerate(columns)}
        logger.experiment.log_table(logger.run_id, by_column, f"{name}.json")
        logger.experiment.log_text(logger.run_id, markdown, f"{name}-{step:08d}.md")
    elif callable(add_text := _writer_of(logger, "add_text")):
        add_text(name, markdown, global_step=step)


def log_figure(logger: Logger, name: str, figure: Figure, *, step: int) -> None:
    """Log a picture to TensorBoard, Weights & Biases or MLflow; other loggers get nothing.

    Args:
        logger: One of the Trainer's.
        name: What to call it, such as ``pareto``.
        figure: The picture.
        step: The optimizer step.
    """
    if isinstance(logger, WandbLogger):
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
        logger.log_image(name, [Image.open(picture)], step=step)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_figure(logger.run_id, figure, f"{name}-{step:08d}.png")
    elif callable(add_figure := _writer_of(logger, "add_figure")):
        add_figure(name, figure, global_step=step)


def _writer_of(logger: Logger, method: str) -> Any:
    """Return a method of the writer behind TensorBoard's logger, or one like it; None for others."""
    return getattr(getattr(logger, "experiment", None), method, None)
