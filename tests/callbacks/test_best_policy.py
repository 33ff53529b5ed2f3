"""The best checkpoint: which validation's it is, through a resume, and as an export."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.callbacks.replay import make_trainer
from tests.callbacks.tiny import Tiny
from tests.modules.setting import make_data, make_files, make_module
from tests.modules.setting import make_trainer as make_run
from vbon_lightning.callbacks import BestPolicy, PolicyExport

# By epoch of two steps: the win rate peaks at step 6, when the KL is over 1; within 1 nat it does at steps 4 and 8.
WIN_RATE = [0.5, 0.7, 0.9, 0.7, 0.6]
KL = [0.1, 0.8, 1.5, 1.0, 1.2]


class Peaks(Tiny):
    """A run that is best before its end."""

    win_rate, kl = WIN_RATE, KL

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        epoch = self.trainer.current_epoch
        self.log_dict({"val/win_rate": self.win_rate[epoch], "val/kl": self.kl[epoch], "val/reward": -self.kl[epoch]})


def fit(directory: Path, best: BestPolicy, *callbacks: Any, module: Tiny | None = None, **arguments: Any) -> Trainer:
    options: dict[str, Any] = {"max_epochs": 5, "enable_checkpointing": True, "logger": False}
    resumed = {"ckpt_path": arguments.pop("ckpt_path", None)}
    trainer = make_trainer(directory, best, *callbacks, **(options | {"default_root_dir": str(directory)} | arguments))
    trainer.fit(module or Peaks(), **resumed)
    return trainer


def kept(best: BestPolicy) -> list[int]:
    """Return the steps of the files that are there."""
    names = [path.name for path in Path(str(best.dirpath)).glob("best-*.ckpt")]
    return sorted(int(re.findall(r"step=(\d+)", name)[0]) for name in names)


@pytest.mark.parametrize(
    ("options", "step"),
    [
        ({}, 6),
        ({"max_kl": 1.5}, 6),
        ({"max_kl": 1.0}, 4),  # at step 8 it is as good, and later
        ({"max_kl": 0.5}, 2),
        ({"monitor": "val/reward"}, 2),
        ({"monitor": "val/kl", "mode": "min"}, 2),
        ({"max_kl": 0.55, "kl": "val/win_rate"}, 2),
    ],
    ids=str,
)
def test_the_best_within_the_bound(options: dict[str, Any], step: int, tmp_path: Path) -> None:
    best = BestPolicy(**options)
    fit(tmp_path, best)
    assert kept(best) == [step]
    assert best.best_model_path == str(tmp_path / "checkpoints" / f"best-step={step}.ckpt")
    assert torch.load(best.best_model_path, weights_only=True)["global_step"] == step


def test_several_of_the_best_and_where_to(tmp_path: Path) -> None:
    best = BestPolicy(max_kl=1.2, save_top_k=2, dirpath=tmp_path / "mine", filename="good-{step}")
    fit(tmp_path, best)
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["good-step=4.ckpt", "good-step=8.ckpt"]


def test_weights_only(tmp_path: Path) -> None:
    for weights in (True, False):
        best = BestPolicy(dirpath=tmp_path / str(weights), save_weights_only=weights)
        fit(tmp_path, best)
        assert ("optimizer_states" in torch.load(best.best_model_path, weights_only=True)) != weights


def test_the_export_is_of_the_best(tmp_path: Path) -> None:
    best, export = BestPolicy(max_kl=1.0), PolicyExport(best=True)
    module = Peaks()
    fit(tmp_path, best, export, module=module)
    weights = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export").state_dict()
    assert all(torch.equal(value, weights[f"policy.{name}"]) for name, value in exported.items())
    assert not torch.equal(weights["policy.lm_head.weight"], module.policy.lm_head.weight)
    card = (tmp_path / "export" / "README.md").read_text()
    assert "- **Weights:** after step 4, the best `val/win_rate` (0.7)\n" in card


@pytest.mark.parametrize(("max_kl", "steps"), [(1.0, [4]), (1.2, [4])])
def test_a_resumed_run_knows_what_was_best(max_kl: float, steps: list[int], tmp_path: Path) -> None:
    last = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_epochs=1, save_on_train_epoch_end=True)
    fit(tmp_path, BestPolicy(max_kl=max_kl), last, max_epochs=3)
    again = BestPolicy(max_kl=max_kl)
    fit(tmp_path, again, ckpt_path=tmp_path / "last.ckpt")
    assert kept(again) == steps
    assert again.best_model_score == pytest.approx(0.7)


def test_what_was_best_under_another_bound_is_forgotten(tmp_path: Path) -> None:
    last = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_epochs=1, save_on_train_epoch_end=True)
    fit(tmp_path, BestPolicy(), last, max_epochs=3)
    again = BestPolicy(max_kl=1.1)
    fit(tmp_path, again, ckpt_path=tmp_path / "last.ckpt")
    assert Path(again.best_model_path).name == "best-step=8.ckpt"


def test_nothing_within_the_bound_is_said(tmp_path: Path) -> None:
    best = BestPolicy(max_kl=0.05)
    with pytest.warns(UserWarning, match=r"kept no checkpoint: no validation had val/kl <= 0.05"):
        fit(tmp_path, best)
    assert not best.best_model_path
    assert not list(tmp_path.rglob("*.ckpt"))


def test_what_is_no_number_is_not_the_best(tmp_path: Path) -> None:
    class Fails(Peaks):
        win_rate = [float("nan"), 0.2, float("nan"), 0.1, 0.1]

    best = BestPolicy()
    fit(tmp_path, best, module=Fails())
    assert kept(best) == [4]
    Fails.win_rate = [float("nan")] * 5
    best = BestPolicy(dirpath=tmp_path / "none")
    fit(tmp_path, best, module=Fails())
    assert kept(best) == []


def test_steps_behind_the_last_validation_have_no_score(tmp_path: Path) -> None:
    best = BestPolicy(save_top_k=2)
    fit(tmp_path, best, max_steps=3)
    assert kept(best) == [2]


@pytest.mark.parametrize("options", [{"monitor": "val/rewrad"}, {"max_kl": 1.0, "kl": "val/lk"}], ids=str)
def test_a_metric_that_is_not_logged_is_named(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"BestPolicy looks at val/(rewrad|lk), .* val/kl, val/reward, val/win_rate"):
        fit(tmp_path, BestPolicy(**options))


def test_it_is_named_before_training(tmp_path: Path) -> None:
    module = Peaks()
    before = module.policy.lm_head.weight.clone()
    with pytest.raises(ValueError, match="BestPolicy looks at val/rewrad"):
        fit(tmp_path, BestPolicy(monitor="val/rewrad"), module=module, num_sanity_val_steps=1)
    assert torch.equal(module.policy.lm_head.weight, before)


@pytest.mark.parametrize("max_kl", [0.0, -1.0, float("nan")])
def test_the_bound_is_positive(max_kl: float) -> None:
    with pytest.raises(ValueError, match="max_kl must be a positive number"):
        BestPolicy(max_kl=max_kl)


def test_a_run_without_validation_is_refused(tmp_path: Path) -> None:
    data = make_data(make_files(tmp_path / "files"), val=None)
    trainer = make_run(tmp_path, callbacks=[BestPolicy()], steps=1)
    with pytest.raises(ValueError, match="there is no validation data: set data.val"):
        trainer.fit(make_module("vbon", data), data)


def test_a_real_run(tmp_path: Path) -> None:
    data = make_data(make_files(tmp_path / "files"))
    best = BestPolicy(max_kl=50.0)
    trainer = make_run(tmp_path, callbacks=[best], steps=4, val_check_interval=1, default_root_dir=tmp_path)
    trainer.fit(make_module("vbon", data), data)
    assert len(kept(best)) == 1
    assert 0 < float(best.best_model_score or 0) < 1


@pytest.mark.parametrize(
    ("monitor", "mode"),
    [("val/win_rate", "max"), ("val/reward", "max"), ("val/accuracy", "max"), ("val/margin", "max")]
    + [
        (f"val/{name}", "min")
        for name in ("nll", "perplexity", "loss", "kl", "kl_per_token", "value_loss", "tied_groups")
    ],
)
def test_what_is_best_is_told_by_the_metric(monitor: str, mode: str) -> None:
    assert BestPolicy(monitor=monitor).mode == mode
    assert BestPolicy(monitor=monitor, mode="max").mode == "max"
