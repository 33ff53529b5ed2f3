"""Win rates over Best-of-N: which are logged, and references that are too few or none."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from tests.callbacks.replay import Replay, make_trainer, pooled, stream
from vbon_lightning.callbacks import BestOfNWinRate


def test_win_rate_against_the_modules_own_n(tmp_path: Path) -> None:
    val = stream(2, levels=None)
    trainer = make_trainer(tmp_path, BestOfNWinRate())
    trainer.fit(Replay(stream(1), val, n=4.0))
    reference = pooled(val, lambda r: r.reference_rewards)
    best = torch.combinations(torch.arange(16), 4)
    beaten = reference[:, best].amax(-1)
    value = (pooled(val, lambda r: r.rewards)[..., None] > beaten[:, None, :]).double().mean()
    assert trainer.callback_metrics["val/win_rate_vs_bon4"].item() == pytest.approx(value.item(), rel=1e-5)
    assert trainer.callback_metrics["val/win_rate"] > trainer.callback_metrics["val/win_rate_vs_bon4"]


def test_win_rates_asked_for(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, BestOfNWinRate(n=[3, 2]))
    trainer.fit(Replay(stream(1), stream(1), n=4.0))
    names = {name for name in trainer.callback_metrics if name.startswith("val/")}
    assert names == {"val/win_rate", "val/win_rate_vs_bon2", "val/win_rate_vs_bon3"}


def test_no_best_of_a_fraction(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, BestOfNWinRate())
    trainer.fit(Replay(stream(1), stream(1), n=2.5))
    assert {name for name in trainer.callback_metrics if name.startswith("val/")} == {"val/win_rate"}


@pytest.mark.parametrize(("n", "warns"), [(4, False), (5, True)])
def test_few_references_are_warned_of(tmp_path: Path, n: int, warns: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(tmp_path, BestOfNWinRate([n]), limit_val_batches=0).fit(Replay(stream(3)))
    about = [warning for warning in caught if "noisy" in str(warning.message)]
    assert len(about) == int(warns)


def test_too_few_references_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"at least 17 reference rewards.* 16"):
        make_trainer(tmp_path, BestOfNWinRate([17]), limit_val_batches=0).fit(Replay(stream(1)))


def test_too_few_references_for_the_modules_own_n_stop_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, BestOfNWinRate(), limit_val_batches=0)
    with pytest.warns(UserWarning, match="no win rate against Best-of-17 is logged: .* there are 16"):
        trainer.fit(Replay(stream(1), n=17.0))
    assert set(trainer.callback_metrics) == {"train/win_rate"}


def test_no_references_are_warned_of(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, BestOfNWinRate(), limit_val_batches=0)
    with pytest.warns(UserWarning, match="needs reference rewards"):
        trainer.fit(Replay(stream(1, references=None)))
    assert not [name for name in trainer.callback_metrics if "win" in name]


@pytest.mark.parametrize("n", [[0], [2, -1]])
def test_opponents_are_checked(n: list[int]) -> None:
    with pytest.raises(ValueError, match="n >= 1"):
        BestOfNWinRate(n)
