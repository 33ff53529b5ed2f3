"""QRPO: a step by hand, on the table's responses and on the policy's."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.modules.offline import TEMPERATURE, assert_gradients_equal
from tests.modules.regressions import step_of
from tests.modules.setting import make_data, make_files, make_module, make_table
from vbon_lightning.modules import qrpo


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_files(tmp_path_factory.mktemp("files"))
    make_table(directory, temperature=TEMPERATURE)
    return directory


def test_the_least_beta_is_taken(files: Path) -> None:
    least = qrpo._LEAST_BETA
    assert make_module("qrpo", make_data(files), beta=least).beta == least  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["qrpo", "qrpo2"])
@pytest.mark.parametrize("ties", ["exact", "upper", "mid"])
def test_a_step_by_hand(ties: str, kind: str, files: Path) -> None:
    beta = 0.3
    step = step_of(kind, files, beta=beta, ties=ties)
    log_partition = math.log(beta * math.expm1(1 / beta))
    goals, tied = [], 0
    for rewards, groups in zip(step.rewards, step.others, strict=True):
        for reward, others in zip(rewards, groups, strict=True):
            low = sum(other < reward for other in others) / len(others)
            high = sum(other <= reward for other in others) / len(others)
            tied += high > low
            scaled = {"upper": high / beta, "mid": (low + high) / 2 / beta}
            if high > low:  # the integral of exp(u / beta) over the quantiles that the tie holds
                mean = beta * (math.exp(high / beta) - math.exp(low / beta)) / (high - low)
                scaled["exact"] = math.log(mean)
            goals.append(scaled.get(ties, high / beta) - log_partition)
    assert tied, "some rewards tie"
    goal = torch.tensor(goals).view(4, 3)
    hand = (beta * (step.log_ratio - goal)).square().mean()
    assert_gradients_equal(step.module, step.loss, hand)
    assert step.logged["train/loss"] == pytest.approx(hand.item(), rel=1e-5)
    assert step.logged["train/goal"] == pytest.approx(goal.mean().item(), rel=1e-5)
    assert step.logged["train/log_ratio"] == pytest.approx(step.log_ratio.mean().item(), rel=1e-4, abs=1e-6)
