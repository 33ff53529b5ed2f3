"""What SFT and reward modelling share: they may be validated before training and in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from tests.modules import test_reward_modelling as judged
from tests.modules.setting import adam, make_data, make_files, make_module, make_trainer
from vbon_lightning import RewardModelling, TextSource


def test_validation_before_and_during_training(tmp_path: Path) -> None:
    """Evaluation runs in inference mode; the metric it leaves behind must not stop a later fit."""
    files = make_files(tmp_path)
    data = make_data(
        files,
        train=TextSource(path=str(files / "texts.txt")),
        val=TextSource(path=str(files / "texts.txt"), stop=3),
    )
    module = make_module("sft", data)
    trainer = Trainer(
        max_steps=2,
        val_check_interval=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )
    before = trainer.validate(module, datamodule=data, verbose=False)[0]["val/nll"]
    trainer.fit(module, datamodule=data)
    during = trainer.callback_metrics["val/nll"].item()
    after = trainer.validate(module, datamodule=data, verbose=False)[0]["val/nll"]
    assert during != before
    assert during == pytest.approx(after)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return judged.make_files(tmp_path_factory.mktemp("rewards"))


def test_it_may_be_validated_before_it_is_fitted(files: Path, tmp_path: Path) -> None:
    data = judged.make_data(files, "classification")
    module = RewardModelling(data.actors, optimizer=adam)
    make_trainer(tmp_path, steps=1).validate(module, data, verbose=False)
    trainer = make_trainer(tmp_path, steps=3)
    trainer.fit(module, data)
    assert "val/accuracy" in trainer.callback_metrics
