"""Supervised fine-tuning beyond what the modules share."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from tests.modules.setting import make_data, make_files, make_module
from vbon_lightning import TextSource


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
