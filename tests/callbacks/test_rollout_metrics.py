"""What the callbacks log, read back from TensorBoard, against sums made by hand."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from tests.callbacks.replay import Replay, logged, make_trainer, valid
from tests.ranks import run_two
from tests.rollouts import make_rollout
from vbon_lightning.callbacks import BestOfNWinRate, KLMonitor, RewardMonitor
from vbon_lightning.types import Rollout


def stream(count: int, seed: int = 0, **arguments) -> list[Rollout]:
    sizes = [2, 4, 3]
    return [
        make_rollout(prompts=sizes[i % 3], seed=seed + i, fillers=i % 2, first=4 * i, **arguments) for i in range(count)
    ]


def pooled(rollouts: list[Rollout], get) -> Tensor:
    return torch.cat([valid(rollout, get(rollout)) for rollout in rollouts])


def expected(rollouts: list[Rollout]) -> dict[str, float]:
    rewards = pooled(rollouts, lambda r: r.rewards)
    kl = pooled(rollouts, lambda r: r.token_kl).sum(-1)
    mask = pooled(rollouts, lambda r: r.completions.mask)
    ratio = pooled(rollouts, lambda r: r.log_probs - r.reference_log_probs).sum(-1)
    reference = pooled(rollouts, lambda r: r.reference_rewards)[:, None, :]
    mine = rewards[..., None]
    return {
        "reward": rewards.mean().item(),
        "reward_std": rewards.std().item(),
        "response_length": mask.sum(-1).mean().item(),
        "finished": pooled(rollouts, lambda r: r.completions.finished).mean().item(),
        "kl": kl.mean().item(),
        "kl_per_token": (kl.sum() / mask.sum()).item(),
        "kl_sampled": ratio.mean().item(),
        "win_rate": ((mine > reference).double() + 0.5 * (mine == reference)).mean().item(),
    }


def all_monitors() -> list:
    return [KLMonitor(), RewardMonitor(), BestOfNWinRate()]


def test_training_values_cover_the_steps_since_the_last(tmp_path: Path) -> None:
    rollouts = stream(7)
    make_trainer(tmp_path, *all_monitors(), log_every_n_steps=3, limit_val_batches=0).fit(Replay(rollouts))
    for name in expected(rollouts):
        values = logged(tmp_path, f"train/{name}")
        # Lightning numbers the first step 0, so the third and sixth are 2 and 5.
        assert list(values) == [2, 5]
        assert values[2] == pytest.approx(expected(rollouts[:3])[name], rel=1e-5, abs=1e-6)
        assert values[5] == pytest.approx(expected(rollouts[3:6])[name], rel=1e-5, abs=1e-6)


def test_accumulated_batches_count_for_their_step(tmp_path: Path) -> None:
    rollouts = stream(8)
    trainer = make_trainer(
        tmp_path, *all_monitors(), log_every_n_steps=2, accumulate_grad_batches=2, limit_val_batches=0
    )
    trainer.fit(Replay(rollouts))
    values = logged(tmp_path, "train/reward")
    assert list(values) == [1, 3]
    assert values[1] == pytest.approx(expected(rollouts[:4])["reward"], rel=1e-5)
    assert values[3] == pytest.approx(expected(rollouts[4:])["reward"], rel=1e-5)


def test_validation_and_test_cover_their_epoch(tmp_path: Path) -> None:
    train, val, test = stream(2), stream(3, seed=20), stream(2, seed=40)
    module = Replay(train, val, test=test)
    trainer = make_trainer(tmp_path, *all_monitors(), max_epochs=2)
    trainer.fit(module)
    for name, value in expected(val).items():
        assert trainer.callback_metrics[f"val/{name}"].item() == pytest.approx(value, rel=1e-5, abs=1e-6)
    (results,) = trainer.test(module, verbose=False)
    assert {name: results[f"test/{name}"] for name in expected(test)} == pytest.approx(expected(test), rel=1e-5)


def test_a_checkpoint_can_be_chosen_by_them(tmp_path: Path) -> None:
    best = ModelCheckpoint(str(tmp_path), monitor="val/win_rate", mode="max")
    trainer = make_trainer(tmp_path, *all_monitors(), best, enable_checkpointing=True)
    val = stream(2, seed=5)
    trainer.fit(Replay(stream(2), val))
    assert best.best_model_score.item() == pytest.approx(expected(val)["win_rate"], rel=1e-5)


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


def test_no_references_are_warned_of(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, BestOfNWinRate(), limit_val_batches=0)
    with pytest.warns(UserWarning, match="needs reference rewards"):
        trainer.fit(Replay(stream(1, references=None)))
    assert not [name for name in trainer.callback_metrics if "win" in name]


@pytest.mark.parametrize("n", [[0], [2, -1]])
def test_opponents_are_checked(n: list[int]) -> None:
    with pytest.raises(ValueError, match="n >= 1"):
        BestOfNWinRate(n)


def test_supervised_fine_tuning_is_left_alone(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, *all_monitors())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Replay(steps=3))
    assert not trainer.callback_metrics
    assert not [w for w in caught if "compute" in str(w.message) or "BestOfN" in str(w.message)]


def with_kl(rollout: Rollout, exact: float, sampled: float) -> Rollout:
    mask = rollout.completions.mask
    return rollout._replace(
        token_kl=torch.where(mask, exact, 0.0),
        log_probs=torch.where(mask, rollout.reference_log_probs + sampled, 0.0),
    )


@pytest.mark.parametrize(
    ("exact", "sampled", "warns"),
    [(0.1, 0.1, False), (0.0, 0.0, False), (-1e-6, 0.0, False), (-0.01, 0.1, True), (0.1, -0.5, True)],
)
def test_negative_kl_is_warned_of_once(tmp_path: Path, exact: float, sampled: float, warns: bool) -> None:
    rollouts = [with_kl(rollout, exact, sampled) for rollout in stream(4)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(tmp_path, KLMonitor()).fit(Replay(rollouts, rollouts))
    about = [w for w in caught if "sampling and scoring disagree" in str(w.message)]
    assert len(about) == int(warns)


def test_a_noisy_sampled_kl_is_no_alarm(tmp_path: Path) -> None:
    """A mean log-ratio that is negative by chance, within three standard errors of zero."""
    rollout = make_rollout(prompts=2, samples=2, length=1)
    signs = torch.tensor([[1.0, -1.5], [1.0, -1.5]])[..., None]
    noisy = rollout._replace(log_probs=torch.where(rollout.completions.mask, rollout.reference_log_probs + signs, 0.0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(tmp_path, KLMonitor(), limit_val_batches=0).fit(Replay([noisy]))
    assert (noisy.log_probs - noisy.reference_log_probs).sum(-1).mean() < -1e-2
    assert not [w for w in caught if "disagree" in str(w.message)]


@pytest.mark.slow
def test_two_processes_log_over_all_of_their_prompts(tmp_path: Path) -> None:
    train, val = stream(6), stream(4, seed=30)
    run_two("tests.callbacks.distributed", str(tmp_path))
    for name in expected(train):
        assert list(logged(tmp_path, f"train/{name}")) == [2]
        assert logged(tmp_path, f"train/{name}")[2] == pytest.approx(expected(train)[name], rel=1e-5, abs=1e-6)
        for rank in range(2):
            value = torch.load(tmp_path / f"rank{rank}.pt")[f"val/{name}"]
            assert value == pytest.approx(expected(val)[name], rel=1e-5, abs=1e-6)
