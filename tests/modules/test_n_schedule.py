"""N that grows: a function of the batches seen, the same for a rollout and an accumulated update, and told of."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.modules.fake import FakeTrainer, attach
from tests.modules.one_update import set_up
from tests.modules.setting import make_data, make_files, make_module, make_trainer
from vbon_lightning import VBoN
from vbon_lightning.modules import NSchedule

LINEAR = NSchedule(start=2.0, updates=4, shape="linear")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


def way(module: Any, batches: int) -> list[float]:
    """Return N in the training step of each batch."""
    found = []
    for seen in range(1, batches + 1):  # a step has counted its batch
        module.batches_seen = seen
        found.append(module.current_n)
    return found


def test_n_follows_from_the_batches_seen(files: Path) -> None:
    module: Any = make_module("annealed", make_data(files), n=6.0, n_schedule=LINEAR)
    assert module.current_n == 2.0, "before the first batch too"
    assert way(module, 7) == [2.0, 3.0, 4.0, 5.0, 6.0, 6.0, 6.0]
    assert way(make_module("annealed", make_data(files), n=6.0, n_schedule=None), 3) == [6.0] * 3


def test_n_is_one_for_all_updates_on_a_rollout(files: Path) -> None:
    several = {"estimator": "clipped", "epochs_per_rollout": 3}
    module: Any = make_module("annealed", make_data(files), n=6.0, n_schedule=LINEAR, **several)
    assert way(module, 9) == [2.0] * 3 + [5.0] * 3 + [6.0] * 3


def test_n_counts_updates_and_not_the_batches_of_one(files: Path) -> None:
    module: Any = make_module("annealed", make_data(files), n=6.0, n_schedule=LINEAR)
    attach(module, FakeTrainer(accumulate_grad_batches=2))
    assert way(module, 9) == [2.0, 2.0, 3.0, 3.0, 4.0, 4.0, 5.0, 5.0, 6.0]


def test_the_target_is_that_of_the_current_n(files: Path) -> None:
    module, batch = set_up("annealed", files, n=6.0, n_schedule=LINEAR)
    other, _ = set_up("vbon", files, n=4.0)
    last, _ = set_up("vbon", files, n=6.0)
    rollout, _ = module._evaluate_responses(module._sample(batch, 0))
    module.batches_seen = 3
    for fixed in (other, last):  # 4 at the third batch, 6 in the end
        found, expected = module.target(rollout), fixed.target(rollout)
        assert found.kl_coef == expected.kl_coef
        assert torch.equal(found.score, expected.score)
        module.batches_seen = 50


def test_a_value_model_hears_the_current_n(files: Path) -> None:
    module: Any = make_module("annealed", make_data(files), n=6.0, n_schedule=LINEAR)
    scorer = SimpleNamespace(
        log_cdf=lambda prompts, rewards: torch.zeros(2, 3), bon_log_weights=lambda log_cdf, n: torch.full((2, 2), n)
    )
    module.actors = SimpleNamespace(value=scorer)
    module.batches_seen = 2
    weights = module.bin_log_weights(SimpleNamespace(prompts=None, reference_rewards=1, reference_log_cdf=None))
    assert weights.tolist() == [[3.0, 3.0]] * 2


def test_n_is_logged_and_the_final_one_is_what_the_export_says(files: Path, tmp_path: Path) -> None:
    from tests.modules.test_policy_gradient import Record

    data, record = make_data(files, val=None), Record()
    module = make_module("annealed", data, n=6.0, n_schedule=LINEAR)
    make_trainer(tmp_path, record, steps=6).fit(module, data)
    assert [logged["n"] for logged in record.logged] == [2.0, 3.0, 4.0, 5.0, 6.0, 6.0]
    assert dict(module.hparams)["n"] == 6.0
    assert dict(module.hparams)["n_schedule"] == {"start": 2.0, "updates": 4, "shape": "linear"}
    loaded = VBoN.load_from_checkpoint(tmp_path / "last.ckpt", actors=data.actors)
    assert (loaded.n, loaded.n_schedule) == (6.0, LINEAR)


def test_a_training_that_ends_before_its_n_warns(files: Path) -> None:
    module: Any = make_module("annealed", make_data(files), n=6.0, n_schedule=LINEAR)
    attach(module, FakeTrainer(max_steps=3))
    with pytest.warns(UserWarning, match="the last update is of n = 4, not of model.n = 6"):
        module.setup("fit")


@pytest.mark.parametrize("max_steps", [4, -1])
def test_a_training_that_is_long_enough_does_not(max_steps: int, recwarn: pytest.WarningsRecorder) -> None:
    LINEAR.check_length(6.0, max_steps)
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
