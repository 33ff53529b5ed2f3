"""A*-PO: a step by hand, and where it gets V* from."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.modules.offline import TEMPERATURE, assert_gradients_equal, table_data
from tests.modules.regressions import step_of
from tests.modules.setting import make_files, make_table
from vbon_lightning import AStarPO


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_files(tmp_path_factory.mktemp("files"))
    make_table(directory, temperature=TEMPERATURE)
    return directory


@pytest.mark.parametrize("count", [1, 3])
def test_a_step_by_hand(count: int, files: Path) -> None:
    step = step_of("astarpo", files, beta1=0.5, beta2=0.3, responses_per_prompt=count)
    values = [0.5 * math.log(sum(math.exp(r / 0.5) for r in row) / 16) for row in step.table]
    advantages = torch.tensor(step.rewards) - torch.tensor(values)[:, None]
    assert advantages.shape == (4, count)
    hand = (0.3 * step.log_ratio - advantages).square().mean()
    assert_gradients_equal(step.module, step.loss, hand)
    assert step.logged["train/goal"] == pytest.approx(advantages.mean().item() / 0.3, rel=1e-4)


def test_one_response_a_prompt_of_its_own_and_one_temperature_unless_there_are_two(files: Path) -> None:
    actors = table_data(files).actors
    module = AStarPO(actors, beta2=0.3)
    assert (module.beta1, module.responses_per_prompt, module.batch_kind) == (0.3, 1, "prompts")
    assert AStarPO(actors, beta1=0.7, beta2=0.3).beta1 == 0.7
    with pytest.raises(TypeError, match="multiple values for keyword argument 'responses'"):
        AStarPO(actors, responses="table")
