"""InfAlign-CTRL's target by hand, its defaults, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.modules.fake import FakeTrainer, attach
from tests.modules.one_update import set_up
from tests.modules.setting import make_data, make_files, make_module, make_trainer
from vbon_lightning import InfAlignCTRL
from vbon_lightning.functional import reward_cdf, vbon_target


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


def by_hand(reward: float, references: list[float], worst: bool, ties: str) -> float:
    """exp(-7 (1 - u)) of the quantile, or minus its mirror image, as counted."""
    low = (sum(other < reward for other in references) + 0.5) / (len(references) + 1)
    high = (sum(other <= reward for other in references) + 0.5) / (len(references) + 1)
    if ties == "middle":
        u = (low + high) / 2
        return -math.exp(-7 * u) if worst else math.exp(-7 * (1 - u))
    places = [low + (place + 0.5) / 2000 * (high - low) for place in range(2000)]
    return sum(-math.exp(-7 * u) if worst else math.exp(-7 * (1 - u)) for u in places) / 2000


@pytest.mark.parametrize("ties", ["middle", "average"])
@pytest.mark.parametrize("procedure", ["best_of_n", "worst_of_n"])
def test_the_target_by_hand(procedure: str, ties: str, files: Path) -> None:
    module, batch = set_up("infalign", files, n=4, procedure=procedure, ties=ties, beta=0.2)
    rollout, _ = module._evaluate_responses(module._sample(batch, 0))
    target = module.target(rollout)
    assert target.kl_coef == 0.2
    for row, references in enumerate(rollout.reference_rewards.tolist()):
        expected = [by_hand(one, references, procedure == "worst_of_n", ties) for one in rollout.rewards[row].tolist()]
        assert target.score[row].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_log_is_vbons_lower_bound(files: Path) -> None:
    module, batch = set_up("infalign", files, n=5, transform="log", ties="below")
    rollout, _ = module._evaluate_responses(module._sample(batch, 0))
    cdf = reward_cdf(rollout.rewards, rollout.reference_rewards)
    bound = vbon_target(torch.zeros_like(rollout.rewards), cdf, n=5, bound="lower")
    ours = module.target(rollout)
    assert ours.kl_coef == bound.kl_coef
    torch.testing.assert_close(ours.score.diff(dim=1), bound.score.diff(dim=1), rtol=1e-4, atol=1e-6)
    tied = cdf.log_at_or_below > cdf.log_below
    assert tied.any() and not tied.all()
    for ties in ("middle", "average"):
        other, _ = set_up("infalign", files, n=5, transform="log", ties=ties)
        apart = other.target(rollout).score - ours.score
        assert torch.equal(apart > 1e-4, tied), "the bound where nothing ties, and above it where something does"
        assert apart[~tied].abs().max() < 1e-6


def test_beta_is_that_of_the_paper_times_exp_of_minus_t(files: Path) -> None:
    """``exp(t u)`` with the weight b has the optimum of what is computed with ``exp(-t) b``."""
    slope, weight = 3.0, 2.0
    module, batch = set_up("infalign", files, slope=slope, beta=math.exp(-slope) * weight)
    rollout, _ = module._evaluate_responses(module._sample(batch, 0))
    cdf = reward_cdf(rollout.rewards, rollout.reference_rewards)
    ours, quantile = module.target(rollout), (cdf.log_below.exp() + cdf.log_at_or_below.exp()) / 2
    torch.testing.assert_close(ours.score / ours.kl_coef, (slope * quantile).exp() / weight)


def test_defaults_follow_from_n(files: Path) -> None:
    data = make_data(files)
    exp, log = InfAlignCTRL(data.actors, n=3.5), InfAlignCTRL(data.actors, n=3.5, transform="log")
    assert (exp.slope, exp.beta, log.beta) == (6.0, 0.1, 0.4)
    assert InfAlignCTRL(data.actors, slope=2.0).slope == 2.0


@pytest.mark.parametrize("given", [{"slope": 3.0}, {"transform": "log", "beta": 0.5}], ids=str)
def test_n_is_still_what_decodes_where_the_loss_has_none_of_it(given: dict[str, Any], files: Path) -> None:
    (few, batch), (many, _) = (set_up("infalign", files, n=n, **given) for n in (2, 16))
    rollout, _ = few._evaluate_responses(few._sample(batch, 0))
    assert torch.equal(few.target(rollout).score, many.target(rollout).score)
    assert few.target(rollout).kl_coef == many.target(rollout).kl_coef
    assert {name: many.hparams[name] for name in ("n", *given)} == {"n": 16, **given}, "the record has both"
    data = make_data(files)
    module: Any = make_module("infalign", data, n=30, **given)
    attach(module, FakeTrainer(datamodule=data))
    with pytest.raises(ValueError, match="fewer than n = 30"):
        module.setup("fit")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 1.0}, "model.n must be a number > 1"),
        ({"procedure": "x"}, "model.procedure must be one of best_of_n, worst_of_n; got 'x'"),
        ({"transform": "x"}, "model.transform must be one of exp, log; got 'x'"),
        ({"ties": "x"}, "model.ties must be one of middle, average, below; got 'x'"),
        ({"transform": "log", "procedure": "worst_of_n"}, "model.transform=log is for best_of_n and has no slope"),
        ({"transform": "log", "slope": 3.0}, "model.transform=log is for best_of_n and has no slope"),
        ({"slope": 0.0}, "model.slope must be a number > 0, got 0.0"),
        ({"beta": 0.0}, "model.beta must be a number > 0, got 0.0"),
        ({"cdf_estimator": "x"}, "model.cdf_estimator must be one of jeffreys, add_one, laplace, digamma; got 'x'"),
    ],
)
def test_options_that_make_no_sense(changes: dict[str, Any], message: str, files: Path) -> None:
    with pytest.raises(ValueError, match=message):
        InfAlignCTRL(make_data(files).actors, **changes)


def test_a_value_model_does_not_stand_in_for_reference_rewards(files: Path) -> None:
    data = make_data(files, value_model=str(files / "llama"))
    with pytest.raises(ValueError, match="^InfAlignCTRL has no use for a value model"):
        InfAlignCTRL(data.actors, value_model=True)
    module: Any = make_module("infalign", data, reference_samples=0)
    assert not module.uses_value_model
    attach(module, FakeTrainer(datamodule=data))
    with pytest.raises(ValueError, match=r"^InfAlignCTRL needs reference rewards: name a table"):
        module.setup("fit")


def test_without_reference_rewards_there_is_no_target(files: Path, tmp_path: Path) -> None:
    module, batch = set_up("infalign", files, reference_samples=0)
    with pytest.raises(ValueError, match="^InfAlignCTRL needs reference rewards"):
        module._on_policy_update(module._sample(batch, 0))
    data = make_data(files)
    with pytest.raises(ValueError, match="fewer than n = 4: Best-of-n cannot be estimated from them"):
        make_trainer(tmp_path).fit(make_module("infalign", data, reference_samples=3), data)
