"""What the callbacks log, read back from TensorBoard, against sums made by hand."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.callbacks.replay import Replay, logged, make_trainer, pooled, stream
from tests.ranks import run_two
from tests.rollouts import LEFT, MISSING, make_rollout, one_prompt, silence
from vbon_lightning.callbacks import BestOfNWinRate, KLMonitor, RewardMonitor
from vbon_lightning.types import Rollout


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


def test_supervised_fine_tuning_is_left_alone(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, *all_monitors())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Replay(steps=3))
    assert not trainer.callback_metrics
    assert not [w for w in caught if "compute" in str(w.message) or "BestOfN" in str(w.message)]


def test_one_response_a_prompt_ties_with_nothing(tmp_path: Path) -> None:
    """And nobody is warned of a mean of nothing."""
    one = make_rollout(3, seed=4)
    alone = one._replace(
        **{name: getattr(one, name)[:, :1] for name in ("rewards", "log_probs", "reference_log_probs", "token_kl")},
        completions=type(one.completions)(*(part[:, :1] for part in one.completions)),
        responses=[texts[:1] for texts in one.responses],
    )
    trainer = make_trainer(tmp_path, *all_monitors(), limit_train_batches=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.validate(Replay([], val=[alone]))
    assert not [w for w in caught if "compute" in str(w.message)]
    assert "val/tied_groups" not in trainer.callback_metrics
    assert trainer.callback_metrics["val/reward"] == pytest.approx(float(alone.rewards.mean()), rel=1e-5)


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
    # The same processes then train a run that diverges on the second of them.
    for rank in range(2):
        loss, gradient = (tmp_path / f"diverged{rank}.txt").read_text().splitlines()
        assert loss.startswith("2 training stopped at step 3: the loss is nan")
        assert gradient.startswith("2 training stopped at step 3: the gradient of wrong holds NaN or infinity")


def test_what_has_no_reward_is_in_no_number(tmp_path: Path) -> None:
    whole = make_rollout(levels=2, seed=3)
    left = [one_prompt(whole, row, kept) for row, kept in LEFT]
    trainer = make_trainer(tmp_path, *all_monitors(), limit_train_batches=0)
    trainer.validate(Replay([], val=[silence(whole, *MISSING)]))
    found = {name.removeprefix("val/"): float(value) for name, value in trainer.callback_metrics.items()}
    for name in ("reward", "kl", "kl_sampled", "response_length", "finished"):
        values = [expected([part])[name] for part in left]
        assert found[name] == pytest.approx((3 * values[0] + values[1]) / 4, rel=1e-5), name
    assert found["win_rate"] == pytest.approx(sum(expected([part])["win_rate"] for part in left) / 2, rel=1e-5)
    first = left[0].rewards[0]
    assert found["tied_groups"] == float(bool((first == first[0]).all())), "of the one prompt that keeps several"
