"""BOND: its reward by hand, vBoN as its special case, and Best-of-4 as the end of two stages of Best-of-2."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import readable
from tests.modules.setting import make_data, make_files, make_module, make_trainer, prepared
from tests.modules.test_convergence import LENGTH, adam, best_of_n, decay, divergence
from tests.modules.test_convergence import data as data  # a fixture
from vbon_lightning import BOND


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


def rolled(files: Path, **options: Any) -> tuple[Any, Any]:
    brought = make_data(files, val=None)
    module = prepared("bond", brought, n=4, **options)
    batch = brought._collate_prompts([(i, True, row) for i, row in enumerate(brought.prompts("train")[:4])])
    rollout, _ = module.loaded.statistics(module._sample(batch, 0), anchored=True)
    return module, rollout


def test_the_reward_without_its_second_term_by_hand(files: Path) -> None:
    module, rollout = rolled(files, second_term=False)
    target = module.target(rollout)
    assert target.kl_coef == pytest.approx(1 / 3)
    for row, references in enumerate(rollout.reference_rewards.tolist()):
        for sample, reward in enumerate(rollout.rewards[row].tolist()):
            up_to = (sum(other <= reward for other in references) + 0.5) / (len(references) + 1)
            assert target.score[row, sample].item() == pytest.approx(math.log(up_to), abs=1e-5)


def test_with_it_the_target_is_vbons(files: Path) -> None:
    module, rollout = rolled(files, log_ratio_floor=-2.0)
    plain = prepared("vbon", make_data(files), n=4, log_ratio_floor=-2.0)
    assert torch.equal(module.target(rollout).score, plain.target(rollout).score)
    other, _ = rolled(files, second_term=False)
    assert not torch.equal(other.target(rollout).score, plain.target(rollout).score)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"second_term": False, "bound": "lower"}, "model.second_term=false is a target of its own: leave model.bound"),
        ({"second_term": False, "log_ratio_floor": -4.0}, "model.log_ratio_floor ends the tail of the exact log-ratio"),
        ({"n": 1.0}, "model.n must be a number > 1"),
        ({"anchor_every": -1}, "model.anchor_every must be an integer >= 0"),
    ],
    ids=readable,
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str, files: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_module("bond", make_data(files), **options)


def test_an_anchor_that_stays_may_read_a_table(files: Path) -> None:
    brought = make_data(files, reference_table="somewhere")
    module: Any = make_module("bond", brought, anchor_every=0, reference_samples=0)
    assert (module.batch_kind, module.anchor_moves) == ("responses", False)
    assert make_module("bond", brought).batch_kind == "prompts"  # type: ignore[attr-defined]


def fourfold(log_p: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    """Return log of Best-of-4."""
    return best_of_n(log_p, rewards)


def test_two_stages_of_best_of_2_end_at_best_of_4(data: Any, tmp_path: Path) -> None:
    assert LENGTH == 3
    module = BOND(
        data.actors, n=2, divergence="jeffreys", anchor_every=30, samples_per_prompt=16, reference_samples=32,
        forward_responses=16, optimizer=adam, lr_scheduler=decay,
    )  # fmt: skip
    module.configure_model()
    before = divergence(module, data, fourfold)
    make_trainer(tmp_path, steps=60, callbacks=[], enable_checkpointing=False).fit(module, data)
    after = divergence(module, data, fourfold)
    assert before > 0.5
    assert after < 0.2 * before
