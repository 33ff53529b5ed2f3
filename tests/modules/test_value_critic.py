"""Advantages from a value model: by hand, where they are used, and vBoN without a reference table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from tests.helpers import readable
from tests.models.setting import bins_after, save_value_model
from tests.modules.setting import (
    KillAt,
    Killed,
    make_data,
    make_files,
    make_module,
    make_table,
    make_trainer,
    prepared,
    weights,
)
from tests.sampling.test_distilling import worth
from vbon_lightning.callbacks import KLMonitor, RewardMonitor
from vbon_lightning.checks import ConfigMismatchError
from vbon_lightning.functional import (
    RewardCDF,
    binned_reward_cdf,
    bon_bin_log_weights,
    edge_log_cdf,
    predicted_log_cdf,
    reward_cdf,
    sequence_log_prob,
    vbon_target,
)
from vbon_lightning.types import Rollout

SEVERAL = {"estimator": "clipped", "epochs_per_rollout": 2, "minibatches": 2}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_files(tmp_path_factory.mktemp("files"))
    make_table(directory)
    for seed, name in enumerate(("value", "other")):
        save_value_model(make_data(directory), directory / name, seed=seed)
    return directory


def value_data(files: Path, *, table: bool = False, **changes: Any) -> Any:
    named = {"value_model": str(files / "value"), "reference_table": str(files / "table") if table else None}
    return make_data(files, **(named | changes))


def rolled(files: Path, kind: str, *, table: bool = False, **model: Any) -> tuple[Any, Rollout]:
    """Return a module away from its reference, and a rollout with its log-probabilities and KL."""
    data = value_data(files, table=table)
    module = prepared(kind, data, value_model=True, **model)
    if table:
        batch = data._collate_prompts([(i, True, row) for i, row in enumerate(data.prompts("train")[:4])])
        batch = batch._replace(reference_rewards=data.table_rewards(data.prompts("train")[:4]))
    else:
        batch = data._collate_without_rewards([(i, True, row) for i, row in enumerate(data.prompts("train")[:4])])
    rollout = module._sample(batch, 0)
    with torch.no_grad():
        rollout, _ = module._evaluate_responses(rollout)
    return module, rollout


def log_values_by_hand(module: Any, rollout: Rollout, log_weights: Tensor) -> Tensor:
    """Return log W of each prefix relative to its prompt's, each run by itself: ``[B, G, T + 1]``."""
    mask = rollout.completions.mask
    found = torch.zeros(*mask.shape[:-1], mask.shape[-1] + 1)
    for place in range(len(mask)):
        prompt = rollout.prompts.tokens[place][rollout.prompts.mask[place]].tolist()
        weight = log_weights[min(place, len(log_weights) - 1)]
        for sample in range(mask.shape[1]):
            response = rollout.completions.tokens[place, sample][mask[place, sample]].tolist()
            for length in range(len(response) + 1):
                whole = torch.tensor([prompt + response[:length]])
                found[place, sample, length] = worth(module.loaded.value, whole, length, weight).log()
    return found - found[..., :1]


def advantages_by_hand(
    log_values: Tensor, rollout: Rollout, score: Tensor, coefficient: float, lam: float, siblings: bool
) -> Tensor:
    mask = rollout.completions.mask
    found = torch.zeros(mask.shape)
    for place, sample in torch.ones(mask.shape[:2]).nonzero().tolist():
        size = int(mask[place, sample].sum())
        values = [*log_values[place, sample, :size].tolist(), float(score[place, sample]) / coefficient]
        ahead = 0.0
        for at in reversed(range(size)):
            ahead = values[at + 1] - values[at] - float(rollout.token_kl[place, sample, at]) + lam * ahead
            found[place, sample, at] = coefficient * ahead
    if siblings:
        others = (found.sum(1, keepdim=True) - found) / (mask.shape[1] - 1)
        found = found - others
    return torch.where(mask, found, 0.0)


# -- the advantages --


@pytest.mark.parametrize("table", [False, True], ids=["predicted", "table"])
@pytest.mark.parametrize(("lam", "samples"), [(1.0, 3), (0.6, 3), (0.6, 1), (0.0, 3)])
def test_advantages_of_vbon(lam: float, samples: int, table: bool, files: Path) -> None:
    module, rollout = rolled(files, "valuecritic", table=table, n=3.5, value_lambda=lam, samples_per_prompt=samples)
    assert samples == 1 or not rollout.completions.mask.all()
    target = module.target(rollout)
    scorer = module.loaded.value
    if table:
        assert rollout.reference_log_cdf is None
        log_cdf = edge_log_cdf(rollout.prompts.reference_rewards, scorer.bins.edges)
    else:
        assert rollout.reference_rewards is None
        log_cdf = rollout.reference_log_cdf
    cdf = log_cdf.exp()
    width = cdf.diff(dim=-1)
    weights = torch.where(width > 0, (cdf**3.5).diff(dim=-1) / width, 3.5 * cdf[:, 1:] ** 2.5).log()
    log_values = log_values_by_hand(module, rollout, weights)
    expected = advantages_by_hand(log_values, rollout, target.score, 1 / 2.5, lam, samples > 1)
    found, returns = module._advantages(target, rollout, None)
    assert returns is None
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    assert found[rollout.completions.mask].abs().mean() > 0.1


@pytest.mark.parametrize("samples", [0, 6], ids=["table", "fresh"])
def test_the_prediction_counts_for_as_many_rewards_as_asked(samples: int, files: Path) -> None:
    options = {"n": 3.5, "table": not samples, "reference_samples": samples}
    module, rollout = rolled(files, "valuecritic", prior_samples=5.0, **options)
    assert rollout.reference_log_cdf is not None, "predicted once, in the rollout"
    rewards, scorer = rollout.reference_rewards, module.loaded.value
    m = rewards.shape[1]
    torch.testing.assert_close(rollout.reference_log_cdf, scorer.log_cdf(rollout.prompts))

    def mixed(known: Tensor, predicted: Tensor) -> Tensor:
        return (m * known.double().exp() + 5 * predicted.double().exp()) / (m + 5)

    edges = mixed(edge_log_cdf(rewards, scorer.bins.edges), rollout.reference_log_cdf)
    torch.testing.assert_close(
        module.bin_log_weights(rollout),
        bon_bin_log_weights(edges.log(), n=3.5),
    )
    known = reward_cdf(rollout.rewards, rewards)
    predicted = binned_reward_cdf(rollout.rewards, rollout.reference_log_cdf, scorer.bins)
    at = [mixed(own, other).log() for own, other in zip(known, predicted, strict=True)]
    log_reference = sequence_log_prob(rollout.reference_log_probs, rollout.completions.mask)
    expected = vbon_target(log_reference, RewardCDF(*(part.float() for part in at)), n=3.5)
    torch.testing.assert_close(module.target(rollout).score, expected.score, atol=1e-5, rtol=1e-4)
    plain, _ = rolled(files, "valuecritic", **options)
    assert (module.target(rollout).score - plain.target(rollout).score).abs().max() > 0.01


def test_a_prediction_that_nothing_makes_is_refused(files: Path) -> None:
    data = value_data(files)
    with pytest.raises(ValueError, match="model.prior_samples must be a number >= 0, got -1"):
        make_module("valuecritic", data, prior_samples=-1)
    with pytest.raises(ValueError, match=r"prior_samples counts a value model's prediction: set data.value_model"):
        make_module("vbon", make_data(files), prior_samples=4)


def test_the_floor_of_log_ratios_is_that_of_the_weights(files: Path) -> None:
    module, rollout = rolled(files, "valuecritic", log_ratio_floor=-0.5)
    plain, _ = rolled(files, "valuecritic")
    floored, whole = (one.bin_log_weights(rollout) for one in (module, plain))
    assert whole.min() < -0.5
    torch.testing.assert_close(floored, whole.clamp(min=-0.5))
    assert not torch.equal(
        module._advantages(module.target(rollout), rollout, None)[0],
        plain._advantages(module.target(rollout), rollout, None)[0],
    )


class Losses(Callback):
    """Keep the loss of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))


def fit(files: Path, directory: Path, *callbacks: Any, steps: int = 1, data: Any = None, **model: Any) -> Any:
    brought = value_data(files, **(data or {}))
    module = make_module(model.pop("kind", "valuecritic"), brought, **model)
    resume = directory / "last.ckpt"
    make_trainer(directory, *callbacks, steps=steps).fit(module, brought, ckpt_path=resume if resume.exists() else None)
    return module


def last_loss(files: Path, directory: Path, **changes: Any) -> float:
    losses = Losses()
    fit(files, directory, losses, steps=3, **changes)
    return losses.losses[-1]


@pytest.mark.parametrize("kind", ["valuecritic", "klrl"])
@pytest.mark.parametrize("several", [{}, SEVERAL], ids=["reinforce", "clipped"])
def test_value_lambda_and_the_value_model_change_the_loss(
    kind: str, several: dict[str, Any], files: Path, tmp_path: Path
) -> None:
    changes: list[dict[str, Any]] = [{}, {"value_lambda": 0.9}, {"value_lambda": 0.5}, {"value_model": False}]
    found = [
        last_loss(files, tmp_path / str(place), kind=kind, data={"table": True}, **several, **change)
        for place, change in enumerate(changes)
    ]
    assert len({round(loss, 5) for loss in found}) == 4


# -- where it is used --


@pytest.mark.parametrize("kind", ["vbon", "klrl"])
def test_on_by_default_where_one_is_named(kind: str, files: Path) -> None:
    data, without = value_data(files), make_data(files)
    assert make_module(kind, data).uses_value_model
    assert not make_module(kind, data, value_model=False).uses_value_model
    assert not make_module(kind, without).uses_value_model
    assert not make_module(kind, data, estimator="ppo").uses_value_model
    for estimator in ("sampled", "prefix_baseline"):
        assert not make_module(kind, data, kl_estimator=estimator).uses_value_model
    module: Any = make_module(kind, data, value_model=False)
    module.configure_model()
    assert module.loaded.value is None, "what is not used is not loaded"


def test_a_single_sample_needs_no_siblings(files: Path, tmp_path: Path) -> None:
    fit(files, tmp_path, samples_per_prompt=1)
    with pytest.raises(ValueError, match="a leave-one-out baseline needs model.samples_per_prompt >= 2, got 1"):
        make_module("valuecritic", value_data(files), samples_per_prompt=1, value_model=False)


@pytest.mark.parametrize("kind", ["vbon", "klrl"])
@pytest.mark.parametrize(
    ("model", "named", "message"),
    [
        ({"value_model": True}, False, "model.value_model is on, but none is named: set data.value_model"),
        ({"value_model": True, "estimator": "ppo"}, True, "stand on model.kl_estimator=rao_blackwell and an estimator"),
        ({"value_model": True, "kl_estimator": "sampled"}, True, "advantages from a value model stand on"),
        ({"value_model": True, "kl_estimator": "prefix_baseline"}, True, "advantages from a value model stand on"),
        ({"value_lambda": 0.5}, False, "model.value_lambda is that of a value model's advantages, and none is in use"),
        ({"value_lambda": 0.5, "value_model": False}, True, "model.value_lambda is that of a value model's"),
        ({"value_lambda": 1.5}, True, r"model.value_lambda must be in \[0, 1\], got 1.5"),
        ({"value_lambda": -0.1}, True, r"model.value_lambda must be in \[0, 1\], got -0.1"),
    ],
    ids=readable,
)
def test_options_that_make_no_sense(kind: str, model: dict[str, Any], named: bool, message: str, files: Path) -> None:
    data = value_data(files) if named else make_data(files)
    with pytest.raises(ValueError, match=message):
        make_module(kind, data, **model)


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        ("vbon", {"bound": "lower"}),
        ("vbon", {"bound": "untied"}),
        ("bond", {"second_term": False, "anchor_every": 0, "divergence": "backward"}),
    ],
    ids=readable,
)
def test_a_value_model_foretells_the_exact_target_alone(kind: str, target: dict[str, Any], files: Path) -> None:
    """At lambda 1 what it says is a baseline, which may be of anything; below it is a part of the target."""
    data = value_data(files)
    assert prepared(kind, data, **target).uses_value_model
    with pytest.raises(ValueError, match=r"^model.value_lambda=0.5 has the value model foretell the exact log-ratio"):
        make_module(kind, data, value_lambda=0.5, **target)
    exact = {name: value for name, value in target.items() if name not in ("bound", "second_term")}
    assert prepared(kind, data, value_lambda=0.5, **exact).value_lambda == 0.5


# -- without a reference table --


def test_vbon_without_a_table_takes_the_predicted_distribution(files: Path) -> None:
    module, rollout = rolled(files, "valuecritic", bound="exact")
    scorer = module.loaded.value
    prompts = [row[keep].tolist() for row, keep in zip(rollout.prompts.tokens, rollout.prompts.mask, strict=True)]
    predicted = torch.stack([bins_after(scorer.model, prompt, []) for prompt in prompts])
    torch.testing.assert_close(rollout.reference_log_cdf, predicted_log_cdf(predicted), atol=1e-5, rtol=1e-4)
    cdf = binned_reward_cdf(rollout.rewards, predicted_log_cdf(predicted), scorer.bins)
    expected = vbon_target(rollout.reference_log_probs.sum(-1), cdf, n=4, bound="exact")
    found = module.target(rollout)
    torch.testing.assert_close(found.score, expected.score, atol=1e-4, rtol=1e-3)
    assert found.kl_coef == expected.kl_coef == 1 / 3


def test_vbon_without_a_table_trains(files: Path, tmp_path: Path) -> None:
    module = fit(files, tmp_path, KLMonitor(), RewardMonitor(), steps=3)
    assert module.batches_seen == 3
    with pytest.raises(ValueError, match="vBoN needs reference rewards: name a table"):
        fit(files, tmp_path / "off", value_model=False)
    with pytest.raises(ValueError, match=r"or name a value model that predicts them \(data.value_model\)"):
        fit(files, tmp_path / "none", kind="vbon", reference_samples=0, data={"value_model": None})


# -- resuming --


@pytest.mark.parametrize(("options", "kill"), [({"value_lambda": 0.7}, 1), (SEVERAL, 2), (SEVERAL, 4)], ids=readable)
def test_killed_and_resumed(options: dict[str, Any], kill: int, files: Path, tmp_path: Path) -> None:
    expected = weights(fit(files, tmp_path / "whole", steps=5, **options))
    with pytest.raises(Killed):
        fit(files, tmp_path / "killed", KillAt(kill), steps=5, **options)
    found = weights(fit(files, tmp_path / "killed", steps=5, **options))
    assert list(found) == list(expected)
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data": {"value_model": "other"}}, "value_model.weights"),
        ({"value_model": False, "reference_samples": 16}, "value_model: checkpoint has True, this run has False"),
        ({"value_lambda": 0.5}, "value_lambda: checkpoint has 1.0, this run has 0.5"),
    ],
    ids=readable,
)
def test_a_resume_that_disagrees_is_refused(changes: dict[str, Any], named: str, files: Path, tmp_path: Path) -> None:
    fit(files, tmp_path)
    if "data" in changes:
        changes = {"data": {"value_model": str(files / changes["data"]["value_model"])}}
    with pytest.raises(ConfigMismatchError, match=named):
        fit(files, tmp_path, steps=2, **changes)
