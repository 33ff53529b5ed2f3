"""Soft Best-of-N against the distribution that all groups of responses make, and at its ends."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.decoding.setting import (
    OPTIONS,
    PROMPT,
    Continuations,
    Outcomes,
    assert_distributed,
    decode,
    decode_apart,
    load,
    save_models,
)
from tests.decoding.setting import score as reward_of
from tests.sampling.test_decode import batch_of
from vbon_lightning.actors import Actors
from vbon_lightning.decoding import BestOfN, SoftBestOfN


@pytest.fixture(scope="module")
def actors(tmp_path_factory: pytest.TempPathFactory) -> Actors:
    return load(save_models(tmp_path_factory.mktemp("models")))


@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_its_distribution(temperature: float, actors: Actors) -> None:
    expected = Outcomes()
    for group, probability in Continuations(actors.policy).groups([()] * 3, 2):
        weights = [math.exp(reward_of(response) / temperature) for response in group]
        for response, weight in zip(group, weights, strict=True):
            expected.add(response, probability * weight / sum(weights))
    assert_distributed(decode(SoftBestOfN(3, temperature), actors, 3000), expected)
    assert_distributed(decode_apart(SoftBestOfN(3, temperature), actors, 3000), expected)


def test_at_temperature_zero_it_is_best_of_n(actors: Actors) -> None:
    for temperature in (0, 1e-6):
        soft, best = (decode(one, actors, 50) for one in (SoftBestOfN(4, temperature), BestOfN(4)))
        assert torch.equal(soft.tokens, best.tokens) and soft.cost[:3] == best.cost[:3]
        assert (soft.kl_bound is None) == (temperature == 0), "whose KL is known"
    assert not torch.equal(decode(SoftBestOfN(4, 1.0), actors, 50).tokens, best.tokens)


def test_at_an_infinite_temperature_it_is_a_sample(actors: Actors) -> None:
    found = decode(SoftBestOfN(4, math.inf), actors, 3000)
    drawn = actors.sample(actors.policy, batch_of([PROMPT]), num_samples=12000, **OPTIONS)
    groups = drawn.tokens.view(3000, 4, 2)
    same = (groups == found.tokens[0, :, None]).all(-1)
    assert same.any(-1).all()
    assert_distributed(found, dict(Continuations(actors.policy).after((), 2)))


def test_what_it_costs_and_how_far_it_goes(actors: Actors) -> None:
    found = decode(SoftBestOfN(3), actors, 5)
    drawn = actors.sample(actors.policy, batch_of([PROMPT]), num_samples=15, **OPTIONS)
    assert found.cost[:3] == (int(drawn.mask.sum()), 0, 15)
    assert found.kl_bound == pytest.approx(math.log(3))


def test_what_is_not_said() -> None:
    assert (SoftBestOfN().n, SoftBestOfN().temperature) == (4, 1.0)


@pytest.mark.parametrize("options", [{"temperature": -1}, {"temperature": math.nan}, {"n": 0}, {"n": 1.5}], ids=str)
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"^{name} must be"):
        SoftBestOfN(**options)


def test_a_plain_sample_has_no_kl(actors: Actors) -> None:
    for temperature, bound in ((math.inf, 0.0), (1e9, math.log(4)), (0, None)):
        found = SoftBestOfN(4, temperature)(actors, batch_of([PROMPT]), num_samples=2, **OPTIONS)
        assert found.kl_bound == bound
