"""Tables and pictures, by clients that record what they are asked for with the loggers' own signatures."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, create_autospec

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vbon_lightning.loggers import log_figure, log_table

COLUMNS, ROWS = ("step", "response"), [[3, "a"], [3, "b"]]


class MlflowClient:
    """What mlflow's client takes."""

    def log_table(
        self, run_id: str, data: dict[str, Any], artifact_file: str, extra_columns: list[str] | None = None
    ) -> None: ...

    def log_text(self, run_id: str, text: str, artifact_file: str) -> None: ...

    def log_figure(
        self, run_id: str, figure: Figure, artifact_file: str, *, save_kwargs: dict[str, Any] | None = None
    ) -> None: ...


def table(logger: Logger) -> None:
    log_table(logger, "val/samples", COLUMNS, ROWS, markdown="| step |", step=3)


def drawing() -> Figure:
    figure = Figure(figsize=(2, 1), dpi=50)
    figure.subplots().plot([0, 1])
    return figure


def mlflow() -> Any:
    logger = create_autospec(MLFlowLogger, instance=True)
    logger.experiment, logger.run_id = create_autospec(MlflowClient, instance=True), "run"
    return logger


def test_weights_and_biases() -> None:
    logger: Any = create_autospec(WandbLogger, instance=True)
    table(logger)
    logger.log_table.assert_called_once_with(
        "val/samples", columns=["step", "response"], data=[[3, "a"], [3, "b"]], step=3
    )
    log_figure(logger, "pareto", drawing(), step=4)
    (name, pictures), options = logger.log_image.call_args
    assert (name, options) == ("pareto", {"step": 4})
    assert pictures[0].size == (100, 50)
    assert len(pictures[0].convert("L").getcolors()) > 1


def test_mlflow() -> None:
    logger = mlflow()
    table(logger)
    client: MagicMock = logger.experiment
    client.log_table.assert_called_once_with("run", {"step": [3, 3], "response": ["a", "b"]}, "val/samples.json")
    client.log_text.assert_called_once_with("run", "| step |", "val/samples-00000003.md")
    figure = drawing()
    log_figure(logger, "pareto", figure, step=4)
    client.log_figure.assert_called_once_with("run", figure, "pareto-00000004.png")


def test_tensorboard(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    table(logger)
    log_figure(logger, "pareto", drawing(), step=4)
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path)).Reload()
    (text,) = events.Tensors("val/samples/text_summary")
    assert (text.step, text.tensor_proto.string_val[0]) == (3, b"| step |")
    (picture,) = events.Images("pareto")
    assert (picture.step, picture.width, picture.height) == (4, 100, 50)


def test_csv_is_unaffected(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    table(logger)
    log_figure(logger, "pareto", drawing(), step=4)
    logger.save()
    assert not list(tmp_path.rglob("*.png"))
