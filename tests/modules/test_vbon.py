"""vBoN's own target by hand, and its options that make no sense."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import readable
from tests.modules.setting import make_data, make_files, make_module, make_table
from vbon_lightning import VBoN

N = 4


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_files(tmp_path_factory.mktemp("files"))
    make_table(directory)
    return directory


def rolled(files: Path, kind: str = "vbon", **options: Any) -> tuple[Any, Any]:
    """Return a module whose policy has left its reference, and a rollout of it."""
    data = make_data(files, val=None, reference_table=str(files / "table"))
    module: Any = make_module(kind, data, **({"reference_samples": 0, "n": N} | options))
    module.configure_model()
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.policy.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise))
    batch = data.table_batch(data.prompts("train")[:4]).prompts
    return module, module.loaded.rollout(batch, num_samples=8, seed=1, stream="a", step=0)


ESTIMATES = {
    "jeffreys": lambda k, m: (k + 0.5) / (m + 1),
    "add_one": lambda k, m: min(1.0, (k + 1) / (m + 1)),
    "laplace": lambda k, m: (k + 1) / (m + 2),
}


def log_ratio_by_hand(reward: float, references: list[float], log_reference: float, estimator: str) -> float:
    """log(pi_bon / ref) of one response, F_lt and F_le consistent with its own probability."""
    estimate, count, own = ESTIMATES[estimator], len(references), math.exp(log_reference)
    low = min(estimate(sum(other < reward for other in references), count), 1 - own)
    high = min(1.0, max(estimate(sum(other <= reward for other in references), count), low + own))
    return math.log((high**N - low**N) / (high - low))


@pytest.mark.parametrize("floor", [None, -1.0])
@pytest.mark.parametrize("estimator", ESTIMATES)
def test_the_target_by_hand(estimator: str, floor: float | None, files: Path) -> None:
    module, rollout = rolled(files, cdf_estimator=estimator, log_ratio_floor=floor)
    target = module.target(rollout)
    assert target.kl_coef == pytest.approx(1 / (N - 1))
    mask = rollout.completions.mask
    for row, references in enumerate(rollout.reference_rewards.tolist()):
        for sample, reward in enumerate(rollout.rewards[row].tolist()):
            log_reference = rollout.reference_log_probs[row, sample][mask[row, sample]].double().sum().item()
            expected = log_ratio_by_hand(reward, references, log_reference, estimator)
            expected = (expected if floor is None else max(expected, floor)) / (N - 1)
            assert target.score[row, sample].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    lowest = target.score.min().item() * (N - 1)
    assert lowest == pytest.approx(-1.0) if floor is not None else lowest < -1.5


def test_the_target_is_of_the_reference_and_not_of_the_policy(files: Path) -> None:
    module, rollout = rolled(files)
    assert (rollout.log_probs - rollout.reference_log_probs).abs().max() > 0.1
    score = module.target(rollout).score
    other_policy = rollout._replace(log_probs=rollout.log_probs - 1.0, token_kl=rollout.token_kl + 1.0)
    assert torch.equal(module.target(other_policy).score, score)
    likelier = rollout._replace(reference_log_probs=rollout.reference_log_probs * 0.1)
    assert not torch.equal(module.target(likelier).score, score)


@pytest.mark.parametrize(
    ("cls", "changes", "message"),
    [
        (VBoN, {"n": 1}, "model.n must be a number > 1"),
        (VBoN, {"n": float("nan")}, "model.n must be a number > 1"),
        (VBoN, {"n": float("inf")}, "model.n must be a number > 1"),
        (VBoN, {"bound": "upper"}, "model.bound must be one of exact, lower, untied; got 'upper'"),
        (VBoN, {"log_ratio_floor": 4.0}, r"model.log_ratio_floor must be negative \(nats\), got 4.0"),
        (
            VBoN,
            {"log_ratio_floor": -4.0, "bound": "lower"},
            "log_ratio_floor is for model.bound=exact, got lower",
        ),
        (VBoN, {"cdf_estimator": "x"}, "model.cdf_estimator must be one of"),
    ],
    ids=readable,
)
def test_options_that_make_no_sense(cls: Any, changes: dict[str, Any], message: str, files: Path) -> None:
    with pytest.raises(ValueError, match=message):
        cls(make_data(files).actors, **changes)
