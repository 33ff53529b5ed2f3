"""What the options of :class:`~vbon_lightning.modules.policy_gradient.PolicyGradient` may be, and with what."""

from __future__ import annotations

import math

from torch import Tensor

from vbon_lightning.functional import Target
from vbon_lightning.modules.base import check_choice, check_not_negative, check_unused
from vbon_lightning.types import Rollout

ONE_UPDATE = "model.epochs_per_rollout=1 and model.minibatches=1"
"""What leaves clip ranges without effect: the policy is the one that sampled."""


def check_estimator(
    estimator: str, kl_estimator: str, samples: int, epochs: int, minibatches: int, *, valued: bool, normalise: bool
) -> None:
    """Refuse estimators that are not, and options that do not go together.

    Raises:
        ValueError: Naming the option and what to do.
    """
    for name, value, known in (
        ("estimator", estimator, ("reinforce", "clipped", "ppo")),
        ("kl_estimator", kl_estimator, ("rao_blackwell", "sampled", "prefix_baseline", "k3")),
    ):
        check_choice(name, value, known)
    if estimator == "ppo" and kl_estimator == "prefix_baseline":
        raise ValueError(
            "model.kl_estimator=prefix_baseline is a leave-one-out baseline, and ppo has a critic instead: "
            "set rao_blackwell or sampled"
        )
    if normalise and kl_estimator != "sampled":
        raise ValueError(
            f"model.normalise divides the advantages, and with model.kl_estimator={kl_estimator} not the KL's own "
            "gradient: its weight would be another than the one asked for. Set kl_estimator to sampled, or normalise "
            "to false"
        )
    if epochs < 1 or minibatches < 1:
        raise ValueError(f"model.epochs_per_rollout and model.minibatches must be >= 1, got {epochs}, {minibatches}")
    if estimator != "ppo" and samples < 2 and not valued:
        raise ValueError(f"a leave-one-out baseline needs model.samples_per_prompt >= 2, got {samples}")
    if estimator == "reinforce" and epochs * minibatches > 1:
        raise ValueError(
            "REINFORCE is unbiased for one update a rollout only: for several, set model.estimator to clipped or ppo"
        )


def check_value_model_options(used: bool, named: bool, estimator: str, kl_estimator: str, lam: float) -> None:
    """Refuse a value model where there is none, or where nothing reads it.

    Raises:
        ValueError: Naming the option and what to do.
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"model.value_lambda must be in [0, 1], got {lam}")
    if used and not named:
        raise ValueError("model.value_model is on, but none is named: set data.value_model")
    if used and (estimator == "ppo" or kl_estimator != "rao_blackwell"):
        raise ValueError(
            "advantages from a value model stand on model.kl_estimator=rao_blackwell and an estimator without a critic "
            "of its own: set model.value_model to false, or these to rao_blackwell and reinforce or clipped"
        )
    if lam < 1 and not used:
        raise ValueError("model.value_lambda is that of a value model's advantages, and none is in use")


def check_group_estimator(
    method: str, estimator: str, samples: int, *, compares_group: bool, valued: bool, reads_value_model: bool
) -> None:
    """Refuse a critic, or no group, where a method's advantages are those of one, and a value model nothing reads.

    Raises:
        ValueError: Naming the option and what to do.
    """
    if compares_group and samples < 2:
        raise ValueError(
            f"{method} compares the responses to a prompt with each other: set model.samples_per_prompt, which is "
            f"{samples}, to 2 or more"
        )
    if compares_group and estimator == "ppo":
        raise ValueError(
            f"{method} compares the responses to a prompt with each other, and a critic cannot: set model.estimator to "
            "reinforce or clipped"
        )
    if valued and not reads_value_model:
        raise ValueError(f"{method} has no use for a value model: set model.value_model to false")


def check_numbers(
    *,
    samples_per_prompt: int,
    eval_samples: int,
    reference_samples: int,
    clip: float,
    value_clip: float,
    value_coef: float,
    gae_lambda: float,
) -> None:
    """Refuse numbers out of range.

    Raises:
        ValueError: Naming the option and what to do.
    """
    for name, count, least in (
        ("samples_per_prompt", samples_per_prompt, 1),
        ("eval_samples", eval_samples, 1),
        ("reference_samples", reference_samples, 0),
    ):
        if count < least:
            raise ValueError(f"model.{name} must be >= {least}, got {count}")
    for name, width in (("clip", clip), ("value_clip", value_clip)):
        if not width > 0:
            raise ValueError(f"model.{name} must be > 0, got {width}")
    if not value_coef >= 0:
        raise ValueError(f"model.value_coef must be >= 0, got {value_coef}")
    if not 0 <= gae_lambda <= 1:
        raise ValueError(f"model.gae_lambda must be in [0, 1], got {gae_lambda}")


def checked_target(method: str, target: Target) -> Target:
    """Return what a method's ``target`` said, if that is a target.

    Raises:
        TypeError: If it is something else.
        ValueError: If the KL's weight is no number, or below 0.
    """
    if not isinstance(target, Target):
        raise TypeError(f"{method}.target must return Target(score, kl_coef), got {type(target).__name__}")
    weight = target.kl_coef
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        said = f"a {type(weight).__name__}" if isinstance(weight, Tensor) else repr(weight)
        raise ValueError(f"{method}.target must give its kl_coef as a number >= 0, the weight of the KL, got {said}")
    return target


def check_shape_of_responses(method: str, what: str, values: Tensor, rollout: Rollout) -> None:
    """Refuse numbers of a method that are not one a response.

    Raises:
        ValueError: Naming the method's own function and both shapes.
    """
    if values.shape != rollout.rewards.shape:
        raise ValueError(
            f"{method}.{what} must return a number a response, [B, G] = {list(rollout.rewards.shape)}, got "
            f"{list(values.shape)}"
        )


def check_kl_weight(method: type, beta: float, kl_estimator: str, *, normalise: bool) -> None:
    """Refuse a weight that is none, and at 0 an estimator of a KL that is not paid for.

    Raises:
        ValueError: Naming the option and what to do.
    """
    check_not_negative("beta", beta)
    if beta == 0 and not normalise:  # which needs one of them
        check_unused(method, "model.beta=0", kl_estimator=kl_estimator)
