"""N that grows: a function of the updates made, the same for a rollout and an accumulated update, and told of."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn

from tests.modules.fake import FakeTrainer, attach
from tests.modules.one_update import set_up
from tests.modules.setting import Picky, make_data, make_files, make_module, make_trainer
from tests.modules.test_policy_gradient import Record
from vbon_lightning import VBoN
from vbon_lightning.modules import NSchedule
from vbon_lightning.rewards import RewardCalls

LINEAR = NSchedule(start=2.0, updates=4, shape="linear")
FITTING = SimpleNamespace(fn=TrainerFn.FITTING)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


def way(files: Path, directory: Path, batches: int, *, accumulated: int = 1, **options: Any) -> list[float]:
    """Return N as each of so many batches, five an epoch, logs it."""
    data, record = make_data(files, val=None, batch_size=2), Record()
    module = make_module("annealed", data, **({"n": 6.0, "n_schedule": LINEAR} | options))
    trainer = make_trainer(
        directory, callbacks=[record], steps=-1, max_epochs=2, enable_checkpointing=False,
        accumulate_grad_batches=accumulated,
    )  # fmt: skip
    trainer.fit(module, data)
    return [logged.get("n", math.nan) for logged in record.logged[:batches]]


def test_n_counts_updates_also_that_of_what_an_epoch_leaves(files: Path, tmp_path: Path) -> None:
    found = way(files, tmp_path, 10, accumulated=2)
    assert found == [2.0, 2.0, 3.0, 3.0, 4.0, 5.0, 5.0, 6.0, 6.0, 6.0], "the fifth batch is an update by itself"


def test_n_is_one_for_all_updates_on_a_rollout(files: Path, tmp_path: Path) -> None:
    found = way(files, tmp_path, 9, estimator="clipped", epochs_per_rollout=3)
    assert found[::3] == [2.0, 5.0, 6.0], "logged with the rollout"
    module, batch = set_up("annealed", files, n=6.0, n_schedule=LINEAR)
    module._sample(batch, 0)
    module.updates = 2
    assert module.current_n == 2.0
    module._sample(batch, 1)
    assert module.current_n == 4.0


def test_the_target_is_that_of_the_current_n(files: Path) -> None:
    module, batch = set_up("annealed", files, n=6.0, n_schedule=LINEAR)
    other, _ = set_up("vbon", files, n=4.0)
    last, _ = set_up("vbon", files, n=6.0)
    rollout, _ = module._evaluate_responses(module._sample(batch, 0))
    module._updates_before = 2
    for fixed in (other, last):  # 4 after two updates, 6 in the end
        found, expected = module.target(rollout), fixed.target(rollout)
        assert found.kl_coef == expected.kl_coef
        assert torch.equal(found.score, expected.score)
        module._updates_before = 50


def test_a_value_model_hears_the_current_n(files: Path) -> None:
    module: Any = make_module("annealed", make_data(files), n=6.0, n_schedule=LINEAR)
    scorer = SimpleNamespace(
        log_cdf=lambda prompts, rewards: torch.zeros(2, 3), bon_log_weights=lambda log_cdf, n: torch.full((2, 2), n)
    )
    module.actors = SimpleNamespace(value=scorer)
    module._updates_before = 1
    weights = module.bin_log_weights(SimpleNamespace(prompts=None, reference_rewards=1, reference_log_cdf=None))
    assert weights.tolist() == [[3.0, 3.0]] * 2


def test_n_is_logged_and_the_final_one_is_what_the_export_says(files: Path, tmp_path: Path) -> None:
    data, record = make_data(files, val=None), Record()
    module = make_module("annealed", data, n=6.0, n_schedule=LINEAR)
    make_trainer(tmp_path, record, steps=6).fit(module, data)
    assert [logged["n"] for logged in record.logged] == [2.0, 3.0, 4.0, 5.0, 6.0, 6.0]
    assert dict(module.hparams)["n"] == 6.0
    assert dict(module.hparams)["n_schedule"] == {"start": 2.0, "updates": 4, "shape": "linear"}
    loaded = VBoN.load_from_checkpoint(tmp_path / "last.ckpt", actors=data.actors)
    assert (loaded.n, loaded.n_schedule) == (6.0, LINEAR)


@pytest.mark.parametrize("limit", [{"steps": 3}, {"steps": -1, "max_epochs": 1, "limit_train_batches": 3}], ids=str)
def test_a_training_that_ends_before_its_n_warns(limit: dict[str, int], files: Path, tmp_path: Path) -> None:
    data = make_data(files, val=None, batch_size=2)
    module: Any = make_module("annealed", data, n=6.0, n_schedule=LINEAR)
    with pytest.warns(UserWarning, match="ends after 3 .*: its last rollout, sampled after 2, is of n = 4, .* says 6"):
        make_trainer(tmp_path, callbacks=[], enable_checkpointing=False, **limit).fit(module, data)


def test_a_rollout_of_several_updates_counts_by_where_it_was_sampled(files: Path, tmp_path: Path) -> None:
    """Six updates of three a rollout: the last rollout is sampled after three, amid the four of the schedule."""
    data = make_data(files, val=None)
    module: Any = make_module("annealed", data, n=6.0, n_schedule=LINEAR, estimator="clipped", epochs_per_rollout=3)
    with pytest.warns(UserWarning, match="its last rollout, sampled after 3, is of n = 5, while the export says 6"):
        make_trainer(tmp_path, callbacks=[], steps=6, enable_checkpointing=False).fit(module, data)


@pytest.mark.parametrize(
    ("updates", "batches", "last"),
    [
        (4, {}, "after 3, is of n = 5"),  # the fourth update's N, not that of the policy after it
        (2, {"batches_per_update": 2}, "after 1, is of n = 3"),
        (7, {"batches_per_rollout": 4}, None),
        (4, {"batches_per_rollout": 4}, "after 0, is of n = 2"),
        (1, {}, "after 0, is of n = 2"),
        (0, {}, None),
        (5, {}, None),
        (5, {"batches_per_update": 3}, None),
        (-1, {}, None),
        (math.inf, {}, None),
    ],
)
def test_what_the_last_rollout_is_of(
    updates: float, batches: dict[str, int], last: str | None, recwarn: pytest.WarningsRecorder
) -> None:
    LINEAR.check_length(6.0, updates, **batches)
    assert [last in str(warning.message) for warning in recwarn.list if last] == ([True] if last else [])
    assert len(recwarn.list) == (last is not None)


def test_a_schedule_that_stays_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    NSchedule(start=6.0, updates=10).check_length(6.0, 5)
    assert not recwarn.list


@pytest.mark.parametrize("start", [1.5, 20.0])
def test_the_largest_n_must_be_told_apart(start: float, files: Path) -> None:
    """There are 16 reference rewards."""
    module: Any = make_module(
        "annealed", make_data(files), n=20.0 if start < 2 else 1.5, n_schedule=NSchedule(start, 2)
    )
    attach(module, FakeTrainer(max_steps=10))
    with pytest.raises(ValueError, match="M = 16 reference rewards a prompt, fewer than n = 20"):
        module.setup("fit")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": 1.0}, "model.n_schedule.start must be a number > 1, got 1.0"),
        ({"start": float("inf")}, "model.n_schedule.start must be a number > 1, got inf"),
        ({"updates": 0}, "model.n_schedule.updates must be an integer >= 1, got 0"),
        ({"updates": 2.5}, "model.n_schedule.updates must be an integer >= 1, got 2.5"),
        ({"shape": "x"}, "model.n_schedule.shape must be one of linear, geometric, cosine; got 'x'"),
    ],
)
def test_schedules_that_are_none(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        NSchedule(**changes)


def test_one_update_is_a_schedule() -> None:
    assert [NSchedule(start=2.0, updates=1).at(update, 8.0) for update in (0, 1, 2)] == pytest.approx([2.0, 8.0, 8.0])


def test_a_resume_knows_the_n_of_its_rollout(files: Path, tmp_path: Path) -> None:
    """Also between two updates on one, when more updates were made than before it was sampled."""
    data = make_data(files, val=None)

    def annealed() -> Any:
        return make_module("annealed", data, n=6.0, n_schedule=LINEAR, estimator="clipped", epochs_per_rollout=3)

    module = annealed()
    with pytest.warns(UserWarning, match="its last rollout"):
        make_trainer(tmp_path, steps=5).fit(module, data)
    assert (module.updates, module.current_n) == (5, 5.0), "sampled after three"
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    again = annealed()
    again.on_load_checkpoint(checkpoint)
    assert again.current_n == 2.0, "what is only evaluated begins where it is"
    for kept, expected in ((checkpoint["vbon_lightning"], 5.0), (older(checkpoint["vbon_lightning"]), 6.0)):
        again = annealed()
        attach(again, FakeTrainer(world_size=1, precision="32-true", gradient_clip_val=None, state=FITTING))
        again.on_load_checkpoint(checkpoint | {"vbon_lightning": kept})
        assert again.current_n == expected
    plain: Any = make_module("vbon", data)
    make_trainer(tmp_path / "plain", steps=1).fit(plain, data)
    attach(plain, FakeTrainer(world_size=1, precision="32-true", gradient_clip_val=None, state=FITTING))
    plain.on_load_checkpoint(torch.load(tmp_path / "plain" / "last.ckpt", weights_only=True))
    assert plain._updates_before == 0, "without a schedule nothing is counted"


def older(kept: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds that does not say when its rollout was sampled."""
    return {name: value for name, value in kept.items() if name != "updates_before"}


def test_the_length_of_a_training_is_told_in_updates(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = make_module(
        "annealed", make_data(files), n=6.0, n_schedule=LINEAR, estimator="clipped", epochs_per_rollout=3
    )
    asked: list[tuple[tuple[float, ...], dict[str, int]]] = []
    monkeypatch.setattr(NSchedule, "check_length", lambda self, *given, **how: asked.append((given, how)))
    attach(module, FakeTrainer(estimated_stepping_batches=7, accumulate_grad_batches=2))
    module.on_train_start()
    assert asked == [((6.0, 7), {"batches_per_update": 2, "batches_per_rollout": 3})]


@pytest.mark.filterwarnings("ignore:the reward says None or NaN")
def test_what_is_missing_is_counted_beside_n(files: Path) -> None:
    data = make_data(files, val=None, reward=Picky("a"), reward_calls=RewardCalls(on_missing="skip"))
    module: Any = make_module("annealed", data)
    module.configure_model()
    logged = attach(module, FakeTrainer(world_size=1))
    batch = data._collate_prompts([(i, True, row) for i, row in enumerate(data.prompts("train")[:4])])
    module.on_train_batch_start(batch, 0)
    module.training_step(batch, 0)
    assert logged["train/reward/missing"][0] == int((~module.last_rollout.judged).sum()) > 0
    assert logged["train/n"][0] == 1.5
