"""Short names of runs, resumed runs, and HPARAMS."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from vbon_lightning.loggers import RunLogger
from vbon_lightning.loggers.run_logger import run_version


def ran(directory: Path, *names: str) -> Path:
    """Leave behind what runs leave behind."""
    for name in names:
        (directory / name).mkdir(parents=True, exist_ok=True)
        (directory / name / "events.out.tfevents.1.host.2.0").touch()
    return directory


@pytest.mark.parametrize(
    ("before", "resumed_from", "expected"),
    [
        ([], None, ""),
        ([""], None, "version_1"),
        (["", "version_1", "version_10", "version_2", "version_of_mine"], None, "version_11"),
        (["export"], None, ""),  # something else below it
        (["", "version_1"], "checkpoints/last.ckpt", ""),
        (["", "version_1"], "version_1/checkpoints/last.ckpt", "version_1"),
        (["", "version_1"], "../elsewhere/checkpoints/last.ckpt", "version_2"),
        (["", "version_1"], "last", "version_1"),
        ([""], "last", ""),
        ([], "last", ""),
    ],
    ids=str,
)
def test_where_a_run_logs(before: list[str], resumed_from: str | None, expected: str, tmp_path: Path) -> None:
    root = ran(tmp_path / "run", *before)
    root.mkdir(exist_ok=True)
    named = resumed_from if resumed_from in (None, "last") else str(root / resumed_from)
    assert run_version(root, named) == expected
    logger = RunLogger(root, resumed_from=named)
    assert Path(logger.log_dir) == root / expected


def test_it_takes_what_tensorboards_logger_takes(tmp_path: Path) -> None:
    assert Path(RunLogger(tmp_path, version="mine").log_dir) == tmp_path / "mine"


def test_the_epoch_is_no_chart_of_its_own(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path)
    logger.log_metrics({"val/kl": 1.0, "epoch": 3}, step=5)
    logger.finalize("success")
    assert EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"] == ["val/kl", "trainer/epoch"]


def test_hyper_parameters_stand_beside_metrics(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path / "mine", compared=["val/kl"], method="VBoN")
    logger.log_hyperparams({"n": 4, "bound": None, "n_range": [1, 2], "value_model": False})
    logger.log_metrics({"val/kl": 0.5}, step=1)
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path / "mine")).Reload()
    assert events.Tags()["scalars"] == ["val/kl"]  # no hp_metric
    data = [HParamsPluginData.FromString(content) for content in events.PluginTagToContent("hparams").values()]
    experiment = next(part.experiment for part in data if part.HasField("experiment"))
    assert [info.name.tag for info in experiment.metric_infos] == ["val/kl"]
    start = next(part.session_start_info for part in data if part.HasField("session_start_info"))
    assert start.hparams["n"].number_value == 4
    assert start.hparams["n_range"].string_value == "[1, 2]"
    assert start.hparams["value_model"].bool_value is False
    assert "bound" not in start.hparams
    assert [start.hparams[name].string_value for name in ("policy", "method")] == ["mine", "VBoN"]
