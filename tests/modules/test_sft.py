"""Supervised fine-tuning beyond what the modules share."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.modules.setting import make_data, make_files, make_module
from vbon_lightning import TextSource
from vbon_lightning.callbacks import PolicyExport
from vbon_lightning.rewards import ClassifierReward


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


def test_the_reward_of_later_stages_need_not_exist_yet(tmp_path: Path) -> None:
    """One data file serves all stages; SFT is the first of them, and the reward may be a later one's export."""
    files = make_files(tmp_path)

    def fit(steps: int, resume: str | None = None) -> Trainer:
        data = make_data(
            files,
            train=TextSource(path=str(files / "texts.txt")),
            reward=ClassifierReward(str(tmp_path / "reward-to-come")),
        )
        kept = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=1, save_last=True)
        trainer = Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            callbacks=[kept, PolicyExport(tmp_path / "export")],
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(make_module("sft", data), datamodule=data, ckpt_path=resume)
        return trainer

    fit(1)
    assert fit(2, resume=str(tmp_path / "checkpoints" / "last.ckpt")).global_step == 2
    assert "**Reward:** none" in (tmp_path / "export" / "README.md").read_text()
