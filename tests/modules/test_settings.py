"""What a module takes and refuses when it is made, what it is by default, and what a checkpoint tells of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.modules.setting import VowelReward
from vbon_lightning import (
    BOND,
    DPO,
    GRPO,
    JBOND,
    KLRL,
    PFPPO,
    QRPO,
    RLOO,
    SFT,
    WIND,
    AStarPO,
    BoNDistillation,
    BoNRegression,
    BoNSFT,
    InfAlignCTRL,
    MaxAtK,
    ReferenceSampler,
    RewardModelling,
    ValueModelling,
    VBoN,
)
from vbon_lightning.actors import ActorSpec
from vbon_lightning.models import as_spec

ONLINE: dict[str, Any] = {
    "samples_per_prompt": 8,
    "estimator": "reinforce",
    "kl_estimator": "rao_blackwell",
    "epochs_per_rollout": 1,
    "minibatches": 1,
    "clip": 0.2,
    "value_clip": 0.2,
    "value_coef": 1.0,
    "gae_lambda": 0.95,
    "normalise": False,
    "reference_samples": 0,
    "value_model": False,
    "value_lambda": 1.0,
}
BEST_OF_N = {"n": 4.0, "bound": "exact", "cdf_estimator": "jeffreys", "log_ratio_floor": None}
GROUPED = {"estimator": "clipped", "kl_estimator": "k3"}
DISTILLED = {
    "n": 4.0,
    "n_range": None,
    "dial_degree": 2,
    "responses_per_prompt": 8,
    "top": 8,
    "draws": 8,
    "states": "best_of_n",
    "divergence": "forward",
    "log_ratio_floor": None,
}
# What a checkpoint says of a module that nothing was asked of.
DEFAULTS: dict[type, dict[str, Any]] = {
    VBoN: ONLINE | BEST_OF_N,
    KLRL: ONLINE | {"beta": 0.1},
    InfAlignCTRL: ONLINE
    | {"n": 4.0, "procedure": "best_of_n", "transform": "exp", "slope": None, "beta": 0.1}
    | {"ties": "middle", "cdf_estimator": "jeffreys"},
    MaxAtK: ONLINE | {"k": 4, "beta": 0.1, "form": "centred"},
    GRPO: ONLINE | GROUPED | {"beta": 0.04, "scale_rewards": True, "length_norm": "grpo", "clip_high": None},
    RLOO: ONLINE | {"beta": 0.1, "kl_estimator": "sampled"},
    PFPPO: ONLINE
    | {"beta": 0.1, "filter": "best_random", "draws": None}
    | {"estimator": "clipped", "kl_estimator": "sampled"},
    BOND: ONLINE
    | BEST_OF_N
    | {"reference_samples": 16, "anchor_every": 1000, "anchor_rate": 0.0, "second_term": True}
    | {"divergence": "jeffreys", "jeffreys_weight": 0.5, "forward_responses": 4},
    JBOND: ONLINE
    | {"samples_per_prompt": 1, "reference_samples": 2, "anchor_every": 0, "anchor_rate": 0.02}
    | {"jeffreys_weight": 0.5, "forward_responses": 1, "regularisation": 0.0},
    WIND: {
        "beta": 0.1,
        "step_size": 1.0,
        "fit": "squared",
        "samples_per_prompt": 8,
        "reference_samples": 0,
        "anchor_every": 20,
        "anchor_rate": 0.0,
    },
    BoNSFT: {"n": 4, "responses_per_prompt": 4, "selection": "weights"},
    DPO: {"n": 4, "beta": 0.1, "pairs_per_prompt": 2, "loss": "dpo", "alpha": 0.005},
    BoNDistillation: DISTILLED,
    QRPO: {"beta": 0.2, "ties": "exact", "responses": "table", "responses_per_prompt": 8},
    AStarPO: {"beta1": 0.1, "beta2": 0.1, "responses": "policy", "responses_per_prompt": 1},
    BoNRegression: {"n": 4.0, "log_ratio_floor": None, "responses": "table", "responses_per_prompt": 8},
    SFT: {"dropout": True},
    RewardModelling: {
        "objective": "classification",
        "labels": ["NEGATIVE", "POSITIVE"],
        "centre": 0.0,
        "dropout": True,
    },
    ValueModelling: {"bins": 32, "atoms": 16, "responses_per_prompt": 8, "probe": 4096, "dropout": False},
    ReferenceSampler: {"samples": 256},
}
# Other values of all of them, as many at a time as go together.
CHANGES: list[tuple[type, dict[str, Any]]] = [
    (
        VBoN,
        {
            "samples_per_prompt": 6,
            "estimator": "clipped",
            "kl_estimator": "sampled",
            "epochs_per_rollout": 3,
            "minibatches": 2,
            "clip": 0.1,
            "normalise": True,
            "reference_samples": 16,
            "value_model": False,
            "seed": 7,
        },
    ),
    (KLRL, {"beta": 0.5, "value_model": True, "value_lambda": 0.0, "samples_per_prompt": 1}),
    (KLRL, {"estimator": "ppo", "samples_per_prompt": 1, "gae_lambda": 1.0}),
    (KLRL, {"estimator": "ppo", "minibatches": 2, "value_clip": 0.3, "value_coef": 0.0, "gae_lambda": 0.0}),
    (KLRL, {"samples_per_prompt": 2, "value_model": False}),
    (VBoN, {"n": 2.5, "bound": "exact", "cdf_estimator": "digamma", "log_ratio_floor": -0.5, "prior_samples": 2.0}),
    (VBoN, {"bound": "untied"}),
    (VBoN, {"n": 1.5}),
    (VBoN, {"bound": "lower", "cdf_estimator": "add_one"}),
    (VBoN, {"n_schedule": {"start": 2.0, "updates": 7, "shape": "cosine"}}),
    (KLRL, {"kl_estimator": "k3"}),
    (
        InfAlignCTRL,
        {"n": 2.5, "procedure": "worst_of_n", "slope": 3.0, "beta": 0.2, "ties": "average", "cdf_estimator": "digamma"},
    ),
    (MaxAtK, {"k": 2, "beta": 0.0, "form": "plain", "estimator": "clipped"}),
    (MaxAtK, {"kl_estimator": "prefix_baseline"}),
    (MaxAtK, {"beta": 0.0, "kl_estimator": "sampled", "normalise": True}),
    (GRPO, {"beta": 0.0, "scale_rewards": False, "length_norm": "dapo", "estimator": "reinforce", "seed": 3}),
    (GRPO, {"clip_high": 0.28, "epochs_per_rollout": 2}),
    (RLOO, {"beta": 0.5, "estimator": "clipped", "kl_estimator": "k3", "minibatches": 2}),
    (PFPPO, {"beta": 0.5, "filter": "best", "draws": 3, "kl_estimator": "rao_blackwell", "epochs_per_rollout": 2}),
    (VBoN, {"divergence": "jeffreys", "jeffreys_weight": 0.25, "forward_responses": None}),
    (VBoN, {"divergence": "forward", "forward_responses": 1, "value_model": False}),
    (KLRL, {"anchor_every": 3, "anchor_rate": 0.0, "value_model": False}),
    (KLRL, {"anchor_every": 0, "anchor_rate": 0.5, "value_model": False}),
    (BOND, {"n": 2.0, "jeffreys_weight": 0.25, "forward_responses": 2, "second_term": False, "anchor_every": 3}),
    (JBOND, {"jeffreys_weight": 1.0, "regularisation": 2.0, "anchor_rate": 0.5, "reference_samples": 3}),
    (JBOND, {"anchor_every": 5, "anchor_rate": 0.0, "samples_per_prompt": 4, "forward_responses": None}),
    (WIND, {"beta": 0.5, "step_size": 2.0, "fit": "nce", "samples_per_prompt": 3, "anchor_every": 1}),
    (BoNSFT, {"n": 2, "responses_per_prompt": 1, "selection": "groups", "seed": 3}),
    (DPO, {"n": 2, "beta": 0.01, "pairs_per_prompt": 1, "seed": 3}),
    (DPO, {"loss": "bonbon", "alpha": 0.0}),
    (DPO, {"loss": "bonbon", "alpha": 1.0}),
    (
        BoNDistillation,
        {
            "n": 1.5,
            "n_range": [1.5, 3.0],
            "dial_degree": 1,
            "responses_per_prompt": 1,
            "top": 2,
            "draws": 0,
            "states": "policy",
            "divergence": "reverse",
            "log_ratio_floor": -0.5,
            "prior_samples": 0.5,
            "seed": 3,
        },
    ),
    (BoNDistillation, {"top": 0, "draws": 2, "states": "reference"}),
    (QRPO, {"beta": 0.01, "ties": "mid", "responses": "policy", "responses_per_prompt": 1, "seed": 3}),
    (QRPO, {"ties": "upper"}),
    (AStarPO, {"beta1": 0.5, "beta2": 0.01, "responses_per_prompt": 2, "seed": 3}),
    (BoNRegression, {"n": 1.5, "log_ratio_floor": -0.5, "responses": "policy", "responses_per_prompt": 1, "seed": 3}),
    (BoNRegression, {"n": 3}),
    (SFT, {"dropout": False, "seed": 3}),
    (RewardModelling, {"labels": ["a", "b", "c"], "centre": 0.0, "dropout": False, "seed": 3}),
    (RewardModelling, {"objective": "preference", "labels": ["x"], "centre": 0.5}),
    (ValueModelling, {"bins": 2, "atoms": 2, "responses_per_prompt": 1, "probe": 0, "dropout": True, "seed": 3}),
    (ReferenceSampler, {"samples": 1, "seed": 3}),
]


def spec(**changes: Any) -> ActorSpec:
    options: dict[str, Any] = {"policy": as_spec("/policy"), "reward": VowelReward(), "value_model": as_spec("/value")}
    return ActorSpec(**(options | changes))


@pytest.mark.parametrize("cls", DEFAULTS, ids=lambda cls: cls.__name__)
def test_what_a_checkpoint_says_of_the_defaults(cls: Any) -> None:
    module = cls(spec(value_model=None))
    assert module._settings == {"seed": 0, **DEFAULTS[cls]}
    assert dict(module.hparams) == module._settings


@pytest.mark.parametrize(("cls", "changes"), CHANGES, ids=str)
def test_what_a_checkpoint_says_of_options(cls: Any, changes: dict[str, Any]) -> None:
    settings = cls(spec(), **changes)._settings
    unvalued = changes.get("kl_estimator") in ("sampled", "k3") or changes.get("estimator") == "ppo"
    implied = {"value_model": not unvalued}
    assert settings == {"seed": 0, **DEFAULTS[cls], **(implied if cls in (VBoN, KLRL) else {}), **changes}


def test_options_that_are_not_recorded_are_kept() -> None:
    for cls in (VBoN, KLRL):
        assert (cls(spec()).eval_samples, cls(spec(), samples_per_prompt=3).eval_samples) == (8, 3)
        assert cls(spec(), eval_samples=1).eval_samples == 1
        assert (cls.uses_value_model, cls(spec()).uses_value_model) == (False, True)
    for cls in (BoNSFT, DPO, BoNDistillation, QRPO, AStarPO, BoNRegression):
        assert (cls(spec()).eval_samples, cls(spec(), eval_samples=1).eval_samples) == (8, 1)
    sampler = ReferenceSampler(spec())
    assert (sampler.rows_per_pass, sampler.overlap_scoring, sampler.responses_from) == (1024, None, None)
    assert (sampler.writer.lease_s, ReferenceSampler(spec(), lease_s=5.0).writer.lease_s) == (60.0, 5.0)
    sampler = ReferenceSampler(spec(), rows_per_pass=1, overlap_scoring=True, responses_from="there")
    assert (sampler.rows_per_pass, sampler.overlap_scoring, sampler.responses_from) == (1, True, "there")
    module = VBoN(spec(), optimizer="optimizer", lr_scheduler="scheduler")
    assert (module._optimizer, module._lr_scheduler) == ("optimizer", "scheduler")
    assert ValueModelling(spec()).body == as_spec("/policy")
    assert ValueModelling(spec(), body="/body").body == as_spec("/body")
    assert RewardModelling(spec(), objective="preference").labels == ["REWARD"]


_FORWARD = {"divergence": "forward"}
_ONE_UPDATE = "model.epochs_per_rollout=1 and model.minibatches=1"
# Options that nothing reads beside those that they come with.
UNUSED: list[tuple[type, str, str, dict[str, Any]]] = [
    *[
        (cls, name, "model.divergence=forward", _FORWARD | {name: value})
        for cls in (VBoN, BOND)
        for name, value in (
            ("bound", "lower"),
            ("cdf_estimator", "laplace"),
            ("log_ratio_floor", -4.0),
            ("prior_samples", 2.0),
            ("estimator", "clipped"),
            ("kl_estimator", "sampled"),
            ("jeffreys_weight", 0.4),
        )
    ],
    (BOND, "second_term", "model.divergence=forward", _FORWARD | {"second_term": False}),
    (VBoN, "jeffreys_weight", "model.divergence=backward", {"jeffreys_weight": 0.4}),
    (BOND, "forward_responses", "model.divergence=backward", {"divergence": "backward", "forward_responses": None}),
    (JBOND, "forward_responses", "model.jeffreys_weight=1", {"jeffreys_weight": 1.0, "forward_responses": 4}),
    (KLRL, "clip", "model.estimator=reinforce", {"clip": 0.1}),
    *[
        (KLRL, name, "model.estimator=clipped", {"estimator": "clipped", "minibatches": 2, name: 0.5})
        for name in ("value_clip", "value_coef", "gae_lambda")
    ],
    *[(KLRL, name, _ONE_UPDATE, {"estimator": "ppo", name: 0.1}) for name in ("clip", "value_clip")],
    *[(GRPO, name, _ONE_UPDATE, {name: 0.1}) for name in ("clip", "clip_high")],
    (GRPO, "kl_estimator", "model.beta=0", {"beta": 0.0, "kl_estimator": "rao_blackwell"}),
    (MaxAtK, "kl_estimator", "model.beta=0", {"beta": 0.0, "kl_estimator": "k3"}),
    (DPO, "beta", "model.loss=bonbon", {"loss": "bonbon", "beta": 0.2}),
    (DPO, "alpha", "model.loss=dpo", {"alpha": 0.5}),
    (BoNDistillation, "dial_degree", "model.n_range=null", {"dial_degree": 3}),
    (RewardModelling, "centre", "model.objective=classification", {"centre": 0.1}),
]
REFUSED: list[tuple[type, dict[str, Any], str]] = [
    (VBoN, {"n": 1.0}, "model.n must be a number > 1 (Best-of-1 is the reference itself), got 1.0"),
    (VBoN, {"n": float("inf")}, "model.n must be a number > 1 (Best-of-1 is the reference itself), got inf"),
    (VBoN, {"bound": "upper"}, "model.bound must be one of exact, lower, untied; got 'upper'"),
    (VBoN, {"cdf_estimator": "x"}, "model.cdf_estimator must be one of jeffreys, add_one, laplace, digamma; got 'x'"),
    (VBoN, {"log_ratio_floor": 0.0}, "model.log_ratio_floor must be negative (nats), got 0.0"),
    (VBoN, {"log_ratio_floor": -1.0, "bound": "untied"}, "model.log_ratio_floor is for model.bound=exact, got untied"),
    (VBoN, {"prior_samples": -0.5}, "model.prior_samples must be a number >= 0, got -0.5"),
    (VBoN, {"prior_samples": True}, "model.prior_samples must be a number >= 0, got True"),
    (VBoN, {"prior_samples": float("inf")}, "model.prior_samples must be a number >= 0, got inf"),
    (VBoN, {"prior_samples": 1.0, "value_model": False}, "model.prior_samples counts a value model's prediction"),
    (KLRL, {"beta": 0.0}, "model.beta must be a number > 0, got 0.0"),
    (KLRL, {"beta": float("inf")}, "model.beta must be a number > 0, got inf"),
    (KLRL, {"samples_per_prompt": 0, "estimator": "ppo"}, "model.samples_per_prompt must be >= 1, got 0"),
    (KLRL, {"samples_per_prompt": 0}, "model.samples_per_prompt must be >= 1, got 0"),
    (KLRL, {"eval_samples": 0}, "model.eval_samples must be >= 1, got 0"),
    (KLRL, {"reference_samples": -1}, "model.reference_samples must be >= 0, got -1"),
    (KLRL, {"clip": 0.0}, "model.clip must be > 0, got 0.0"),
    (KLRL, {"value_clip": 0.0}, "model.value_clip must be > 0, got 0.0"),
    (KLRL, {"value_coef": -0.5}, "model.value_coef must be >= 0, got -0.5"),
    (KLRL, {"gae_lambda": -0.1}, "model.gae_lambda must be in [0, 1], got -0.1"),
    (KLRL, {"gae_lambda": 1.1}, "model.gae_lambda must be in [0, 1], got 1.1"),
    (KLRL, {"value_lambda": -0.1}, "model.value_lambda must be in [0, 1], got -0.1"),
    (KLRL, {"value_lambda": 1.1}, "model.value_lambda must be in [0, 1], got 1.1"),
    (KLRL, {"value_lambda": 0.5, "value_model": False}, "model.value_lambda is that of a value model's advantages"),
    (KLRL, {"estimator": "x"}, "model.estimator must be one of reinforce, clipped, ppo; got 'x'"),
    (KLRL, {"kl_estimator": "x"}, "model.kl_estimator must be one of rao_blackwell, sampled, prefix_baseline, k3; got"),
    (KLRL, {"estimator": "ppo", "kl_estimator": "prefix_baseline"}, "model.kl_estimator=prefix_baseline is a leave-"),
    (KLRL, {"normalise": True}, "model.normalise divides the advantages, and with model.kl_estimator=rao_blackwell"),
    (KLRL, {"epochs_per_rollout": 0}, "model.epochs_per_rollout and model.minibatches must be >= 1, got 0, 1"),
    (KLRL, {"minibatches": 0}, "model.epochs_per_rollout and model.minibatches must be >= 1, got 1, 0"),
    (KLRL, {"epochs_per_rollout": 2}, "REINFORCE is unbiased for one update a rollout only"),
    (KLRL, {"minibatches": 2}, "REINFORCE is unbiased for one update a rollout only"),
    *[
        (cls, options, f"model.{name}={options[name]} has no effect with {why}: leave it out, or set that otherwise")
        for cls, name, why, options in UNUSED
    ],
    (KLRL, {"samples_per_prompt": 1, "value_model": False}, "a leave-one-out baseline needs model.samples_per_prompt"),
    (KLRL, {"value_model": True, "estimator": "ppo"}, "advantages from a value model stand on model.kl_estimator=rao"),
    (KLRL, {"value_model": True, "kl_estimator": "sampled"}, "advantages from a value model stand on model.kl_estim"),
    *[
        (cls, {"n": wrong}, f"model.n must be an integer > 1, got {wrong!r}: {cls.__name__} takes the best of n")
        for cls in (BoNSFT, DPO)
        for wrong in (1, 2.0, True)
    ],
    *[
        (cls, {name: wrong}, f"model.{name} must be an integer >= 1, got {wrong!r}")
        for cls, name in (
            (BoNSFT, "responses_per_prompt"),
            (BoNSFT, "eval_samples"),
            (DPO, "pairs_per_prompt"),
            (BoNDistillation, "dial_degree"),
            (BoNDistillation, "responses_per_prompt"),
            (BoNDistillation, "eval_samples"),
            (ValueModelling, "responses_per_prompt"),
            *((cls, "responses_per_prompt") for cls in (QRPO, AStarPO, BoNRegression)),
            (QRPO, "eval_samples"),
        )
        for wrong in (0, 2.0, True)
    ],
    (BoNSFT, {"selection": "x"}, "model.selection must be one of weights, groups; got 'x'"),
    (DPO, {"beta": 0.0}, "model.beta must be a number > 0, got 0.0"),
    (DPO, {"beta": float("inf")}, "model.beta must be a number > 0, got inf"),
    (DPO, {"loss": "x"}, "model.loss must be one of dpo, bonbon; got 'x'"),
    (DPO, {"alpha": -0.1}, "model.alpha must be in [0, 1], got -0.1"),
    (DPO, {"alpha": 1.1}, "model.alpha must be in [0, 1], got 1.1"),
    *[
        (cls, {"n": wrong}, f"model.n must be a number > 1 (Best-of-1 is the reference itself), got {wrong}")
        for cls in (BoNDistillation, BoNRegression)
        for wrong in (1.0, True, float("inf"))
    ],
    *[
        (cls, {name: wrong}, f"model.{name} must be a number > 0, got {wrong}")
        for cls, name in ((QRPO, "beta"), (AStarPO, "beta1"), (AStarPO, "beta2"))
        for wrong in (0.0, True, float("inf"), float("nan"))
    ],
    (QRPO, {"beta": 1e-9}, "model.beta=1e-09 asks for log-ratios of up to 1.0e+09 nats, whose hundredths float32"),
    (QRPO, {"ties": "x"}, "model.ties must be one of exact, upper, mid; got 'x'"),
    *[
        (cls, {"responses": "x"}, "model.responses must be one of table, policy; got 'x'")
        for cls in (QRPO, BoNRegression)
    ],
    (BoNRegression, {"log_ratio_floor": 0.0}, "model.log_ratio_floor must be negative (nats), got 0.0"),
    (BoNDistillation, {"n": "4"}, "model.n must be a number > 1 (Best-of-1 is the reference itself), got '4'"),
    *[
        (BoNDistillation, {"n_range": wrong}, f"model.n_range must be two numbers, 1 < least < most, got {wrong}")
        for wrong in ([2.0], [2.0, 3.0, 4.0], [1.0, 2.0], [2.0, 2.0], [2.0, float("inf")])
    ],
    *[
        (
            BoNDistillation,
            {"top": top, "draws": draws},
            f"model.top and model.draws must together name at least 2 candidates, got {top}, {draws}",
        )
        for top, draws in ((-1, 8), (8, -1), (1, 0), (0, 1))
    ],
    (BoNDistillation, {"states": "x"}, "model.states must be one of reference, best_of_n, policy; got 'x'"),
    (BoNDistillation, {"divergence": "x"}, "model.divergence must be one of forward, reverse; got 'x'"),
    (BoNDistillation, {"log_ratio_floor": 0.0}, "model.log_ratio_floor must be negative (nats), got 0.0"),
    (BoNDistillation, {"prior_samples": -1.0}, "model.prior_samples must be a number >= 0, got -1.0"),
    (RewardModelling, {"objective": "x"}, "model.objective must be classification or preference, got 'x'"),
    (RewardModelling, {"labels": ["a"]}, "model.labels must name at least two different labels, got ['a']"),
    (
        RewardModelling,
        {"labels": ["a", "b", "a"]},
        "model.labels must name at least two different labels, got ['a', 'b",
    ),
    (RewardModelling, {"centre": -0.5}, "model.centre must be >= 0, got -0.5"),
    (ValueModelling, {"bins": 1}, "model.bins must be at least 2, got 1"),
    (ValueModelling, {"atoms": 1}, "model.atoms must be at least 2, got 1"),
    (ValueModelling, {"probe": -1}, "model.probe must be at least 0, got -1"),
    (ReferenceSampler, {"samples": 0}, "model.samples and model.rows_per_pass must be >= 1, got 0, 1024"),
    (ReferenceSampler, {"lease_s": 0.0}, "model.lease_s must be > 0, got 0.0"),
    (ReferenceSampler, {"rows_per_pass": 0}, "model.samples and model.rows_per_pass must be >= 1, got 256, 0"),
]


@pytest.mark.parametrize(("cls", "changes", "message"), REFUSED, ids=str)
def test_what_is_refused(cls: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}"):
        cls(spec(), **changes)


def test_a_value_model_that_is_on_must_be_named() -> None:
    with pytest.raises(ValueError, match=r"^model\.value_model is on, but none is named: set data\.value_model"):
        KLRL(spec(value_model=None), value_model=True)


@pytest.mark.parametrize("kind", ["bond-backward", "bond-still", "jbond-backward", "wind"])
def test_a_module_is_made_again_from_what_its_checkpoint_says(kind: str) -> None:
    """Also where the class's own defaults are others: ``load_from_checkpoint`` gives the constructor the settings."""
    cls, options = {
        "bond-backward": (BOND, {"divergence": "backward", "second_term": False}),
        "bond-still": (BOND, {"anchor_every": 0}),
        "jbond-backward": (JBOND, {"jeffreys_weight": 1.0, "anchor_rate": 0.0}),
        "wind": (WIND, {"fit": "kl", "anchor_every": 3}),
    }[kind]
    first = cls(spec(value_model=None), **options)  # type: ignore[arg-type]
    kept = {name: value for name, value in first._settings.items() if name != "seed"}
    if cls is WIND:
        kept.pop("anchor_rate")  # Lightning leaves out what the constructor does not take
    assert cls(spec(value_model=None), **kept)._settings == first._settings  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "cls",
    [
        *(VBoN, KLRL, BOND, JBOND, WIND, BoNSFT, DPO, BoNDistillation, ValueModelling, QRPO, AStarPO, BoNRegression),
        *(InfAlignCTRL, MaxAtK, GRPO, RLOO, PFPPO),
    ],
    ids=lambda cls: cls.__name__,
)
def test_a_module_without_its_reward_says_so(cls: Any, tmp_path: Path) -> None:
    module = cls(spec(reward=None))
    module._trainer = type("Trainer", (), {"datamodule": None, "accumulate_grad_batches": 1})()
    with pytest.raises(ValueError, match=rf"^{cls.__name__} needs a reward: set `data\.reward`"):
        module.setup("fit")


def test_what_is_not_loaded_is_named() -> None:
    module = VBoN(spec())
    for read in ("loaded", "tokenizer", "response_room"):
        with pytest.raises(RuntimeError, match=r"^the models are not loaded yet: call configure_model\(\) first"):
            getattr(module, read)
    assert (module.actors, module.policy, module.batches_seen) == (None, None, 0)
    module.check_ends()  # nothing is known of ends yet, and nothing is said


def test_any_prior_asks_for_predictions() -> None:
    assert VBoN(spec(), prior_samples=0.5).predicts_rewards
    assert not VBoN(spec()).predicts_rewards
