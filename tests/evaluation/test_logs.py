"""A comparison in TensorBoard, read back from its event files, and in other loggers."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from vbon_lightning.evaluation import PolicyReport, ScoredText, TextSample, write_comparison
from vbon_lightning.evaluation.logs import loggers_of
from vbon_lightning.loggers import COMPARED

SAMPLES = [TextSample("Once", {"reference": [ScoredText("a", -0.25)], "vBoN": [ScoredText("c", 1.0)]})]


COLUMNS = {"policy", "method", "reward", "kl", "win_rate"}


def read(directory: Path) -> EventAccumulator:
    return EventAccumulator(str(directory)).Reload()


def runs(directory: Path) -> set[str]:
    return {str(path.parent.relative_to(directory)) for path in directory.rglob("events.out.tfevents.*")}


def test_picture_table_and_texts(tmp_path: Path, reports: list[PolicyReport]) -> None:
    write_comparison(reports, tmp_path, title="A title", samples=SAMPLES)
    events = read(tmp_path)
    assert events.Tags()["images"] == ["vs_kl/pareto"]
    assert events.Tags()["scalars"] == []  # no charts of one point
    (table,) = events.Tensors("comparison/text_summary")
    assert table.tensor_proto.string_val[0].decode() == (tmp_path / "comparison.md").read_text()
    assert events.Tensors("samples/text_summary")


def test_the_picture_of_costs(tmp_path: Path, reports: list[PolicyReport]) -> None:
    for report in reports:
        report.cost = {"generated_tokens": 8.0}
    write_comparison(reports, tmp_path, title="A title")
    assert read(tmp_path).Tags()["images"] == ["vs_kl/pareto", "vs_cost/pareto"]


def test_curves_are_over_kl_a_run_a_method(tmp_path: Path, reports: list[PolicyReport]) -> None:
    write_comparison(reports, tmp_path, title="A title")
    assert {name for name in runs(tmp_path) if "table" not in name} == {".", "Best-of-N", "vBoN", "KL-RL"}
    for method, names in (
        ("Best-of-N", ["reference", "Best-of-2", "Best-of-4", "Best-of-8"]),
        ("vBoN", ["vBoN | N=4"]),
    ):
        events, own = read(tmp_path / method), {report.name: report for report in reports}
        for metric in ("reward", "win_rate"):
            points = {event.step: event.value for event in events.Scalars(f"vs_kl/{metric}")}
            expected = {round(1000 * own[name].kl.mean): getattr(own[name], metric).mean for name in names}
            assert points == pytest.approx(expected)
            assert list(points) == sorted(points)
    assert "vs_kl/win_rate_vs_bon4" in read(tmp_path / "KL-RL").Tags()["scalars"]
    assert "vs_kl/kl" not in read(tmp_path / "KL-RL").Tags()["scalars"]


def test_training_curves_come_before_a_comparisons() -> None:
    assert sorted(["vs_kl/reward", "train/reward", "val/reward"])[-1] == "vs_kl/reward"


def test_a_row_a_policy(tmp_path: Path, reports: list[PolicyReport]) -> None:
    write_comparison(reports, tmp_path, title="A title")
    rows: list[dict[str, Any]] = []
    for name in sorted(runs(tmp_path)):
        events = read(tmp_path / name)
        for content in events.PluginTagToContent("hparams").values() if "table" in name else ():
            data = HParamsPluginData.FromString(content)
            if data.HasField("experiment"):
                assert {info.name.tag for info in data.experiment.metric_infos} == set(COMPARED)
                assert {info.name for info in data.experiment.hparam_infos} == COLUMNS
            if data.HasField("session_start_info"):
                rows.append(
                    {
                        key: value.number_value or value.string_value
                        for key, value in data.session_start_info.hparams.items()
                    }
                )
                assert set(data.session_start_info.hparams) == COLUMNS
    assert {row["policy"] for row in rows} == {report.name for report in reports}
    for row in rows:
        (report,) = [report for report in reports if report.name == row["policy"]]
        assert row["method"] == report.method
        assert row["reward"] == pytest.approx(report.reward.mean, abs=1e-4)


def test_a_later_comparison_takes_an_earlier_ones_place(tmp_path: Path, reports: list[PolicyReport]) -> None:
    others = tmp_path / "events.out.tfevents.1.of.a.run"
    write_comparison(reports, tmp_path, title="old")
    others.touch()
    kept = [report for report in reports if report.name not in ("Best-of-8", "vBoN | N=4")]
    write_comparison(kept, tmp_path, title="new")
    assert len(read(tmp_path / "Best-of-N").Scalars("vs_kl/reward")) == 3
    assert runs(tmp_path) == {
        *(".", "Best-of-N", "KL-RL", "table/reference", "table/Best-of-2", "table/Best-of-4"),
        *("table/KL-RL_0.1", "table/KL-RL_0.3"),
    }
    assert len(read(tmp_path).Tensors("comparison/text_summary")) == 1
    assert others.exists()


def test_other_loggers_get_tables_and_the_picture(tmp_path: Path, reports: list[PolicyReport]) -> None:
    logger: Any = create_autospec(WandbLogger, instance=True)
    reports[2].cost = {"generated_tokens": 8.5}
    write_comparison(reports, tmp_path, title="A title", samples=SAMPLES, logger=[logger, CSVLogger(tmp_path / "csv")])
    assert not runs(tmp_path)
    table, samples = (call.kwargs for call in logger.log_table.call_args_list)
    assert [row[0] for row in table["data"]] == [report.name for report in reports]
    assert table["data"][2][table["columns"].index("kl")] == pytest.approx(reports[2].kl.mean)
    costs = [row[table["columns"].index("generated_tokens")] for row in table["data"]]
    assert costs[2] == 8.5 and set(costs) == {8.5, None}
    assert samples["data"] == [["Once", "reference", "a", -0.25], ["Once", "vBoN", "c", 1.0]]
    assert [call.args[0] for call in logger.log_image.call_args_list] == ["vs_kl/pareto", "vs_cost/pareto"]
    assert logger.finalize.called


def test_loggers_as_the_trainer_takes_them(tmp_path: Path) -> None:
    (default,) = loggers_of(True, tmp_path)
    assert isinstance(default, TensorBoardLogger) and Path(default.log_dir) == tmp_path
    assert loggers_of(False, tmp_path) == []
    own = CSVLogger(tmp_path)
    assert loggers_of(own, tmp_path) == loggers_of([own], tmp_path) == [own]
