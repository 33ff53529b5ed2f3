"""What the tests of evaluation share."""

from __future__ import annotations

import pytest
import torch

from tests.evaluation.setting import TABLES
from tests.rollouts import make_rollout
from vbon_lightning.evaluation import PolicyReport, bon_reports, evaluate_policy


@pytest.fixture(params=TABLES)
def table(request: pytest.FixtureRequest) -> torch.Tensor:
    return torch.tensor(TABLES[request.param])


@pytest.fixture
def reports() -> list[PolicyReport]:
    table = (torch.rand(6, 32, generator=torch.Generator().manual_seed(0)) * 9).round()
    policies = [
        evaluate_policy([make_rollout(6, seed=seed)], name=name, method=method, n_values=[4])
        for seed, name, method in (
            (1, "vBoN | N=4", "vBoN"),
            (2, "KL-RL 0.1", "KL-RL"),
            (3, "KL-RL 0.3", "KL-RL"),
        )
    ]
    return [*bon_reports(table, n_values=[2, 4, 8]), *policies]
