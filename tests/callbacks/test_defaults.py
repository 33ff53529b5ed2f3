"""What comes with a module, and what takes its place."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger

from tests.modules.setting import make_data, make_files, make_module, make_trainer
from vbon_lightning import VBoN
from vbon_lightning.callbacks import BestOfNWinRate, KLMonitor, RewardMonitor, SampleTable, TensorBoardLayout

ALL = [KLMonitor, RewardMonitor, BestOfNWinRate, SampleTable, TensorBoardLayout]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


def fit(files: Path, directory: Path, *callbacks: Callback, kind: str = "vbon", **arguments: Any) -> Trainer:
    data = make_data(files)
    options: dict[str, Any] = {
        "logger": CSVLogger(directory),
        "callbacks": list(callbacks),
        "steps": 1,
        "val_check_interval": 1,
    }
    trainer = make_trainer(directory, **(options | {"enable_checkpointing": False, "log_every_n_steps": 1} | arguments))
    trainer.fit(make_module(kind, data), data)
    return trainer


def kinds(trainer: Trainer) -> Counter[type]:
    return Counter(type(part) for part in trainer.callbacks if isinstance(part, tuple(ALL)))


def test_a_plain_trainer_gets_all_of_them_once(files: Path, tmp_path: Path) -> None:
    trainer = fit(files, tmp_path)
    assert kinds(trainer) == Counter(ALL)
    data = make_data(files, test=make_data(files).sources["val"])
    trainer.test(make_module("vbon", data), data, verbose=False)
    assert kinds(trainer) == Counter(ALL)
    assert {"test/kl", "test/reward", "test/win_rate", "test/win_rate_vs_bon4"} <= trainer.callback_metrics.keys()


def test_what_the_trainer_was_given_takes_their_place(files: Path, tmp_path: Path) -> None:
    class Own(KLMonitor):
        pass

    mine = [BestOfNWinRate([2]), Own()]
    trainer = fit(files, tmp_path, *mine)
    assert kinds(trainer) == Counter([Own, RewardMonitor, BestOfNWinRate, SampleTable, TensorBoardLayout])
    assert mine[0] in trainer.callbacks
    assert {name for name in trainer.callback_metrics if "vs_bon" in name} == {"train/win_rate_vs_bon2"} | {
        "val/win_rate_vs_bon2"
    }


@pytest.mark.parametrize(
    ("kind", "names"), [(KLMonitor, {"kl"}), (RewardMonitor, {"reward"}), (BestOfNWinRate, {"win_rate"})]
)
def test_each_can_be_switched_off(kind: Any, names: set[str], files: Path, tmp_path: Path) -> None:
    logged = {name.removeprefix("val/") for name in fit(files, tmp_path, kind(enabled=False)).callback_metrics}
    assert {"kl", "reward", "win_rate"} - logged == names


def test_samples_can_be_switched_off(files: Path, tmp_path: Path) -> None:
    fit(files, tmp_path / "on")
    fit(files, tmp_path / "off", SampleTable(enabled=False))
    assert {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("val-*.jsonl")} == {"on"}


def test_without_a_logger_there_is_no_place_for_samples(files: Path, tmp_path: Path) -> None:
    trainer = fit(files, tmp_path, logger=False, default_root_dir=tmp_path)
    assert kinds(trainer) == Counter(ALL) - Counter([SampleTable])
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_module_says_what_watches_it(files: Path, tmp_path: Path) -> None:
    class Unwatched(VBoN):
        watched_by = ()

    data = make_data(files)
    trainer = make_trainer(tmp_path, steps=1, callbacks=[], enable_checkpointing=False)
    trainer.fit(Unwatched(data.actors, n=4, reference_samples=8), data)
    assert not kinds(trainer)
