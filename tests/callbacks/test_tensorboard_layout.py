"""The layout of custom scalars, read back from the event file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from tests.callbacks.replay import Replay, make_trainer
from tests.rollouts import make_rollout
from vbon_lightning.callbacks import BestOfNWinRate, KLMonitor, RewardMonitor, TensorBoardLayout

TAG = "custom_scalars__config__"


def layout_of(directory: Path) -> Layout | None:
    events = EventAccumulator(str(directory)).Reload()
    if TAG not in events.Tags()["tensors"]:
        return None
    return Layout.FromString(events.Tensors(TAG)[0].tensor_proto.string_val[0])


def test_reward_kl_and_win_rate_come_first(tmp_path: Path) -> None:
    callbacks = [TensorBoardLayout(), RewardMonitor(), KLMonitor(), BestOfNWinRate([2])]
    make_trainer(tmp_path, *callbacks).fit(Replay([make_rollout()], [make_rollout()]))
    layout = layout_of(tmp_path / "run/0")
    assert layout is not None
    charts = [chart for category in layout.category for chart in category.chart]
    tags = EventAccumulator(str(tmp_path / "run/0")).Reload().Tags()["scalars"]
    shown = [[tag for tag in tags if re.match(pattern, tag)] for c in charts for pattern in c.multiline.tag]
    assert shown[:4] == [["val/reward"], ["val/kl"], ["val/win_rate"], ["val/win_rate_vs_bon2"]]
    assert ["train/reward"] in shown
    assert layout.category[0].chart[1].title == "KL to the reference (nats)"


@pytest.mark.parametrize("enabled", [False, True])
def test_it_is_written_if_asked_for(enabled: bool, tmp_path: Path) -> None:
    make_trainer(tmp_path, TensorBoardLayout(enabled=enabled)).fit(Replay([make_rollout()], [make_rollout()]))
    assert (layout_of(tmp_path / "run/0") is not None) == enabled


def test_other_loggers_are_left_alone(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, TensorBoardLayout(), logger=CSVLogger(tmp_path))
    trainer.fit(Replay([make_rollout()], [make_rollout()]))
    assert trainer.global_step == 1
