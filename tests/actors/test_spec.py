"""What a run is to have, before anything is loaded."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from tests.actors.test_loaded import Lengths, models
from vbon_lightning.actors import ActorSpec
from vbon_lightning.models import ModelSpec
from vbon_lightning.rewards import RewardCalls

__all__ = ["models"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"temperature": -0.7}, "temperature must be positive and finite, got -0.7"),
        ({"temperature": math.nan}, "temperature must be positive and finite, got nan"),
        ({"temperature": math.inf}, "temperature must be positive and finite, got inf"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty is subtracted, so it must be finite and >= 0, got -1.0"),
        ({"missing_eos_penalty": math.nan}, "finite and >= 0, got nan"),
    ],
)
def test_spec_refuses_what_makes_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        ActorSpec("model", **settings)


def test_the_reference_is_the_policy_unless_named():
    assert ActorSpec("a").reference_spec == ModelSpec(name="a")
    assert ActorSpec("a", "b").reference_spec == ModelSpec(name="b")
    assert ActorSpec("a", "b").policy_spec == ModelSpec(name="a")


def spec(models: dict[str, str], **settings: Any) -> ActorSpec:
    entries: dict = {"policy": models["policy"], "reference": models["reference"], "reward": Lengths()}
    return ActorSpec(**(entries | settings))


IDENTITY_CHANGES = {
    "policy": lambda models: {"policy": models["dropout"]},
    "reference": lambda models: {"reference": models["policy"]},
    "reward": lambda models: {"reward": Lengths("other")},
    "no reward": lambda models: {"reward": None},
    "max_new_tokens": lambda models: {"max_new_tokens": 31},
    "temperature": lambda models: {"temperature": 0.5},
    "missing_eos_penalty": lambda models: {"missing_eos_penalty": 1.0},
}


@pytest.mark.parametrize("change", IDENTITY_CHANGES)
def test_identity_is_plain_and_changes_with_each_setting(models, change):
    identity = spec(models).identity()
    assert json.loads(json.dumps(identity)) == identity
    assert spec(models).identity() == identity
    assert spec(models, **IDENTITY_CHANGES[change](models)).identity() != identity


@pytest.mark.parametrize("change", ["reference", "reward", "max_new_tokens", "temperature"])
def test_fingerprint_changes_with_what_the_table_depends_on(models, change):
    fingerprint = spec(models).table_fingerprint(seed=4)
    assert json.loads(json.dumps(fingerprint)) == fingerprint
    assert spec(models, **IDENTITY_CHANGES[change](models)).table_fingerprint(seed=4) != fingerprint
    assert spec(models).table_fingerprint(seed=5) != fingerprint


@pytest.mark.parametrize("change", ["policy", "missing_eos_penalty"])
def test_fingerprint_does_not_change_with_what_it_does_not(models, change):
    # The penalty is subtracted when the table is read.
    changed = spec(models, **IDENTITY_CHANGES[change](models))
    assert changed.table_fingerprint(seed=4) == spec(models).table_fingerprint(seed=4)


def test_fingerprint_needs_a_reward(models):
    with pytest.raises(ValueError, match=r"a reference table needs a reward: set `data.reward`"):
        spec(models, reward=None).table_fingerprint(seed=0)


def test_the_table_says_that_missing_rewards_are_skipped(models: dict[str, str]) -> None:
    stop = ActorSpec(models["policy"], reward=Lengths())
    skip = stop.replaced(reward_calls=RewardCalls(on_missing="skip"))
    assert skip.table_fingerprint(seed=0) == stop.table_fingerprint(seed=0) | {"on_missing": "skip"}
