"""The Best-of-N regression: a step by hand, on the table's responses and on the policy's."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.modules.fake import FakeTrainer, attach
from tests.modules.offline import TEMPERATURE, assert_gradients_equal, table_data
from tests.modules.regressions import step_of
from tests.modules.setting import make_files, make_module, make_table
from tests.modules.wiring.test_setup import table_of


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_files(tmp_path_factory.mktemp("files"))
    make_table(directory, temperature=TEMPERATURE)
    return directory


@pytest.mark.parametrize("kind", ["bonregression", "bonregression2"])
@pytest.mark.parametrize(("n", "floor"), [(2.5, None), (4, -1.0)])
def test_a_step_by_hand(n: float, floor: float | None, kind: str, files: Path) -> None:
    step = step_of(kind, files, n=n, log_ratio_floor=floor)
    goals = []
    for rewards, groups in zip(step.rewards, step.others, strict=True):
        for reward, others in zip(rewards, groups, strict=True):
            pool = [*others, reward]
            low = sum(other < reward for other in pool) / len(pool)
            high = sum(other <= reward for other in pool) / len(pool)
            goals.append(math.log((high**n - low**n) / (high - low)))
    goal = torch.tensor(goals).view(4, 3)
    if floor is not None:
        assert goal.min() < floor < goal.max()
        goal = goal.clamp(min=floor)
    hand = (step.log_ratio - goal).square().mean()
    assert_gradients_equal(step.module, step.loss, hand)
    assert step.logged["train/goal"] == pytest.approx(goal.mean().item(), rel=1e-5)


def test_the_table_must_tell_what_best_of_n_is(files: Path) -> None:
    for kind, why in (("bonregression", "model.responses_per_prompt = 3"), ("bonregression2", "model.responses = pol")):
        module = make_module(kind, table_data(files), n=5.5)
        attach(module, FakeTrainer(datamodule=table_of(6)))
        module.setup("fit")
        attach(module, FakeTrainer(datamodule=table_of(5)))
        with pytest.raises(ValueError, match=rf"M = 5 responses a prompt, fewer than the 6 that {why}.* and model\.n"):
            module.setup("fit")
