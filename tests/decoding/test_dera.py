"""Decoding-time realignment against the mixture of two models, and where it is one of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.decoding.setting import (
    OPTIONS,
    PROMPT,
    Continuations,
    assert_distributed,
    decode,
    load,
    next_probs,
    save_models,
    statistic,
)
from tests.sampling.test_decode import batch_of
from vbon_lightning.actors import Actors
from vbon_lightning.decoding import DeRa
from vbon_lightning.models import ModelError, load_causal_lm

TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def actors(files: Path) -> Actors:
    return load(files, 2, temperature=TEMPERATURE)


@pytest.fixture(scope="module")
def other(files: Path) -> Any:
    return load_causal_lm(str(files / "other"), trainable=False)


def mixture(policy: Any, reference: Any, strength: float) -> Continuations:
    def probs(response: Any) -> list[float]:
        pairs = zip(*(next_probs(model, response, TEMPERATURE) for model in (policy, reference)), strict=True)
        mixed = [ours**strength * theirs ** (1 - strength) for ours, theirs in pairs]
        return [one / sum(mixed) for one in mixed]

    return Continuations(policy, probs)


@pytest.mark.parametrize("strength", [0.4, 1.7, -0.5])
def test_its_distribution(strength: float, files: Path, actors: Actors, other: Any) -> None:
    """The named policy's strength, where the reference is decoded from; and the other way about."""
    expected = dict(mixture(other, actors.policy, strength).after((), 2))
    assert_distributed(decode(DeRa(strength, policy=str(files / "other")), actors, 3000), expected)
    found = decode(DeRa(1 - strength, reference=str(files / "other")), actors, 3000)
    assert_distributed(found, expected)
    assert statistic(found, dict(mixture(other, actors.policy, 1 - strength).after((), 2))) > 1.5


@pytest.mark.parametrize("role", ["policy", "reference"])
def test_at_its_ends_it_is_one_of_the_two(role: str, files: Path, actors: Actors, other: Any) -> None:
    for strength in (0.0, 1.0):
        found = decode(DeRa(strength, **{role: str(files / "other")}), actors, 40)
        named = (strength == 1) == (role == "policy")
        drawn = actors.sample(other if named else actors.policy, batch_of([PROMPT]), num_samples=40, **OPTIONS)
        for name in ("tokens", "mask", "finished"):
            assert torch.equal(getattr(found, name), getattr(drawn, name))
        assert found.token_kl is not None
        assert bool(found.token_kl.any()) == (strength == 1)


def test_the_kl_at_each_token_and_what_it_costs(files: Path, other: Any) -> None:
    actors = load(files, 5, temperature=TEMPERATURE)
    found = decode(DeRa(0.6, policy=str(files / "other")), actors, 12)
    chances = mixture(other, actors.policy, 0.6)
    assert found.token_kl is not None
    read = len(PROMPT)
    for place, response in enumerate(actors.token_ids(found)[0]):
        read += len(response) - 1  # no token is chosen by what the last one leads to
        for at in range(len(response)):
            prefix = tuple(response[:at])
            mixed = [share for _, share in chances.after(prefix, 1)]
            base = next_probs(actors.policy, prefix, TEMPERATURE)
            kl = sum(ours * math.log(ours / theirs) for ours, theirs in zip(mixed, base, strict=True))
            assert float(found.token_kl[0, place, at]) == pytest.approx(kl, abs=1e-5)
    assert not found.token_kl[~found.mask].any()
    assert found.cost[:3] == (int(found.mask.sum()), read, 0)
    assert actors.reward.asked == []  # type: ignore[union-attr]


def test_from_one_n_to_another() -> None:
    turned = DeRa.from_n(5, 3, policy="somewhere")
    assert (turned.strength, turned.n) == (0.5, 3)
    assert DeRa(policy_n=4, n=16, policy="somewhere").strength == 5
    assert DeRa(0.25, policy="somewhere").strength == 0.25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "a"}, "give DeRa its strength, or the policy's N and the one to come to: policy_n and n"),
        ({"policy": "a", "strength": 1.0, "n": 3}, "give DeRa its strength, or"),
        ({"policy": "a", "policy_n": 3}, "give DeRa its strength, or"),
        ({"policy": "a", "strength": 1.0, "policy_n": 3, "n": 2}, "give DeRa its strength, or"),
        ({"strength": 1.0}, "DeRa mixes the model that is decoded from with another one: name it as policy"),
        ({"strength": 1.0, "policy": "a", "reference": "b"}, "DeRa mixes the model"),
        ({"strength": math.inf, "policy": "a"}, "strength must be finite, got inf"),
        ({"policy": "a", "policy_n": 1, "n": 2}, "n must be greater than 1, got 1"),
        ({"policy": "a", "policy_n": 2, "n": 0.5}, "wanted must be at least 1, got 0.5"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        DeRa(**options)


@pytest.mark.parametrize("strength", [1e39, -1e308])
def test_a_strength_that_makes_no_mixture(strength: float, files: Path, actors: Actors) -> None:
    with pytest.raises(ValueError, match=r"^DeRa's strength -?1e\+\d+ takes the mixed logits beyond all numbers"):
        decode(DeRa(strength, policy=str(files / "other")), actors, 1)
    found = decode(DeRa(math.copysign(40.0, strength), policy=str(files / "other")), actors, 4)
    assert found.token_kl is not None and bool(found.token_kl.isfinite().all()), "far out, but a distribution"


def test_a_policy_of_other_tokens(files: Path, actors: Actors) -> None:
    with pytest.raises(ModelError, match=r"^the decoder's policy '.*strange': it and the model that is decoded from"):
        decode(DeRa(0.5, policy=str(files / "strange")), actors, 1)
