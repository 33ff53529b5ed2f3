"""Inference-time pessimism against the rejection sampling that it is, and at its ends."""

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
    Outcomes,
    Tokens,
    Told,
    assert_distributed,
    decode,
    decode_apart,
    load,
    save_models,
    statistic,
)
from tests.decoding.setting import score as reward_of
from tests.sampling.test_decode import batch_of
from vbon_lightning.actors import Actors
from vbon_lightning.decoding import InferenceTimePessimism, inference_time_pessimism
from vbon_lightning.rewards import RewardCalls


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def actors(files: Path) -> Actors:
    return load(files)


def level_by_bisection(rewards: list[float], beta: float) -> float:
    low, high = min(rewards) - 2 * beta, max(rewards)
    for _ in range(100):
        middle = (low + high) / 2
        mean = sum(max((reward - middle) / beta, 0.0) for reward in rewards) / len(rewards)
        low, high = (middle, high) if mean > 1 else (low, middle)
    return low


def expected_of(actors: Actors, n: int, beta: float, reward_max: float | None = None) -> Outcomes:
    whole = Continuations(actors.policy).after((), 2)
    expected = Outcomes()
    for group, probability in Continuations(actors.policy).groups([()] * n, 2):
        rewards = [reward_of(response) for response in group]
        level = level_by_bisection(rewards, beta)
        best = max(rewards) if reward_max is None else reward_max
        accepted: list[tuple[Tokens, float]] = [
            (response, share * min(max(reward_of(response) - level, 0.0) / (best - level), 1.0))
            for response, share in whole
        ]
        rate = sum(share for _, share in accepted)
        for response, share in accepted:
            expected.add(response, probability * share * sum((1 - rate) ** turn for turn in range(n)))
        for response, share in whole:  # after n that were refused, the next one
            expected.add(response, probability * share * (1 - rate) ** n)
    return expected


@pytest.mark.parametrize(("beta", "reward_max"), [(0.2, None), (1.0, None), (0.5, 1.5)])
def test_its_distribution(beta: float, reward_max: float | None, actors: Actors) -> None:
    found = decode(InferenceTimePessimism(2, beta, reward_max), actors, 3000)
    expected = expected_of(actors, 2, beta, reward_max)
    assert_distributed(found, expected)
    assert_distributed(decode_apart(InferenceTimePessimism(2, beta, reward_max), actors, 3000), expected)
    if reward_max is None:
        assert statistic(found, expected_of(actors, 2, 30.0)) > 1.5


def test_a_large_beta_makes_it_a_sample(actors: Actors) -> None:
    found = decode(InferenceTimePessimism(3, beta=1e9), actors, 50)
    drawn = actors.sample(actors.policy, batch_of([PROMPT]), num_samples=200, **OPTIONS)
    assert torch.equal(found.tokens[0, :, : drawn.tokens.shape[-1]], drawn.tokens[0, ::4])
    assert found.cost.reward_calls == 50 * (3 + 3), "which took one round each"
    assert found.cost.fallbacks == 0


def test_a_small_beta_takes_only_the_best(actors: Actors) -> None:
    """The first that is as good as the best of the n, or, after n, whatever comes next."""
    n, samples = 4, 50
    found = decode(InferenceTimePessimism(n, beta=1e-9), actors, samples)
    options = {"num_samples": n * samples, "seed": 3, "step": 2}
    first = actors.sample(actors.policy, batch_of([PROMPT]), stream="test/level", **options)
    fresh = actors.sample(actors.policy, batch_of([PROMPT]), **(OPTIONS | {"num_samples": (n + 1) * samples}))
    known, new = ([tuple(ids) for ids in actors.token_ids(drawn)[0]] for drawn in (first, fresh))
    refused = 0
    for place, response in enumerate(actors.token_ids(found)[0]):
        best = max(map(reward_of, known[n * place : n * place + n]))
        mine = new[(n + 1) * place : (n + 1) * place + n + 1]
        good = [one for one in mine[:n] if reward_of(one) >= best - 1e-6]
        assert tuple(response) == (good[0] if good else mine[n])
        refused += not good
    assert found.cost.fallbacks == refused > 0


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_how_many_are_drawn_at_once_changes_the_cost_alone(at_once: int, files: Path) -> None:
    actors: Any = load(files, 3)
    n, samples = 5, 20
    one, many = (decode(InferenceTimePessimism(n, 0.1, at_once=count), actors, samples) for count in (1, at_once))
    assert torch.equal(one.tokens, many.tokens) and torch.equal(one.mask, many.mask)
    actors.reward.asked.clear()
    found = decode(InferenceTimePessimism(n, 0.1, at_once=at_once), actors, samples)
    drawn = actors.sample(actors.policy, batch_of([PROMPT]), **(OPTIONS | {"num_samples": (n + 1) * samples}))
    fresh = [tuple(ids) for ids in actors.token_ids(drawn)[0]]
    assert found.cost.reward_calls == len(actors.reward.asked)
    assert found.cost.generated_tokens == sum(map(len, actors.reward.asked))
    # Each goes through its own until one is taken, so many at a time.
    taken = [tuple(ids) for ids in actors.token_ids(found)[0]]
    for place, response in enumerate(taken):
        assert response in fresh[(n + 1) * place : (n + 1) * place + n + 1]
    calls = one.cost.reward_calls - n * samples
    assert samples <= calls <= (n + 1) * samples and found.cost.reward_calls >= one.cost.reward_calls
    assert found.kl_bound == pytest.approx(math.log(n + 1))


@pytest.mark.parametrize(("n", "beta"), [(2, 0.2), (8, 0.2), (32, 0.2), (4, 0.01)])
def test_how_often_none_is_accepted(n: int, beta: float, actors: Actors) -> None:
    """It is counted; by the rewards of the n a fresh one is accepted as often as beta is of R_max less the level."""
    samples = 300
    found = decode(InferenceTimePessimism(n, beta), actors, samples)
    options = {"num_samples": n * samples, "seed": 3, "step": 2}
    first = actors.sample(actors.policy, batch_of([PROMPT]), stream="test/level", **options)
    known = [reward_of(ids) for ids in actors.token_ids(first)[0]]
    whole = Continuations(actors.policy).after((), 2)
    mean = variance = 0.0
    for place in range(samples):
        rewards = known[n * place : n * place + n]
        level, best = level_by_bisection(rewards, beta), max(rewards)
        assert beta / (best - level) >= beta / (beta + best - sum(rewards) / n) - 1e-9, "which the documentation says"
        rate = sum(share * min(max(reward_of(one) - level, 0.0) / (best - level), 1.0) for one, share in whole)
        none = (1 - rate) ** n
        mean, variance = mean + none, variance + none * (1 - none)
    assert abs(found.cost.fallbacks - mean) < 4 * math.sqrt(variance) + 1
    if n == 32:  # more than three times 1 + (R_max - mean) / beta
        assert found.cost.fallbacks < 0.05 * samples


@pytest.mark.filterwarnings("ignore:the reward says None")
def test_where_none_is_accepted_and_the_next_has_no_reward(files: Path) -> None:
    """The first of the level's that has one; and without a level the first fresh one that has one."""
    n, samples, silent = 3, 200, [3, 4]
    actors = load(files, 2, reward=Told(silent=silent), reward_calls=RewardCalls(on_missing="skip"))
    found = decode(InferenceTimePessimism(n, beta=1e-9, at_once=1), actors, samples)
    options = {"seed": 3, "step": 2}
    level = actors.sample(actors.policy, batch_of([PROMPT]), stream="test/level", num_samples=n * samples, **options)
    fresh = actors.sample(actors.policy, batch_of([PROMPT]), stream="test", num_samples=(n + 1) * samples, **options)
    begun, new = ([tuple(ids) for ids in actors.token_ids(drawn)[0]] for drawn in (level, fresh))
    spare = without = 0
    for place, response in enumerate(tuple(ids) for ids in actors.token_ids(found)[0]):
        known = [one for one in begun[n * place : n * place + n] if one[0] not in silent]
        mine = new[(n + 1) * place : (n + 1) * place + n + 1]
        told = [one for one in mine if one[0] not in silent]
        if not known:
            without += 1
            assert response == (told[0] if told else begun[n * place])
            continue
        good = [one for one in told if one in mine[:n] and reward_of(one) >= max(map(reward_of, known)) - 1e-6]
        expected = good[0] if good else mine[n]
        spare += expected[0] in silent
        assert response == (known[0] if expected[0] in silent else expected)
    assert spare and without
    assert found.kl_bound == pytest.approx(math.log(2 * n + 1))


def test_texts_are_read_behind_their_prompts_and_luck_is_its_own(actors: Actors, monkeypatch: Any) -> None:
    behind, streams = list[bool](), set()
    real_decode, real_noise = Actors.decode, inference_time_pessimism.prompt_noise

    def read(self: Actors, ids: Any, prompts: Any = None) -> Any:
        behind.append(prompts is not None)
        return real_decode(self, ids, prompts)

    def noise(*given: Any, stream: str, **options: Any) -> torch.Tensor:
        streams.add(stream)
        return real_noise(*given, stream=stream, **options)

    monkeypatch.setattr(Actors, "decode", read)
    monkeypatch.setattr(inference_time_pessimism, "prompt_noise", noise)
    decode(InferenceTimePessimism(3), actors, 5)
    assert len(behind) > 1 and all(behind)
    assert streams == {"test/acceptance"}


def test_nothing_stands_behind_an_end(files: Path) -> None:
    """Also where the responses that were drawn together are shorter than they may be."""
    actors, decoder, short = load(files, 6), InferenceTimePessimism(2, at_once=1), 0
    for step in range(30):
        found = decoder(actors, batch_of([PROMPT]), num_samples=1, **(OPTIONS | {"step": step}))
        ids = found.tokens[0, 0][found.mask[0, 0]].tolist()
        assert actors.end_ids[0] not in ids[:-1] and (ids[-1] == actors.end_ids[0]) == bool(found.finished[0, 0])
        short += len(ids) < 6
    assert short > 5


def test_what_is_known_of_a_response(actors: Actors) -> None:
    found = decode(InferenceTimePessimism(3), actors, 5)
    assert found.rewards is not None and found.cost.value_tokens == 0
    assert found.rewards[0].tolist() == pytest.approx([reward_of(ids) for ids in actors.token_ids(found)[0]])


def test_the_bound_is_the_highest_reward_that_is_known() -> None:
    rewards = torch.tensor([[[math.nan, -2.0]]])
    for reward_max in (None, -2.0):
        assert InferenceTimePessimism(reward_max=reward_max)._bound(rewards).tolist() == [[-2.0]]


def test_a_bound_that_is_none(actors: Actors) -> None:
    with pytest.raises(ValueError, match=r"^reward_max is -2, and a response has the reward 0\.\d+: give a number"):
        decode(InferenceTimePessimism(8, reward_max=-2.0), actors, 4)
    # One that the level's own responses keep, and a fresh one does not.
    first = actors.sample(actors.policy, batch_of([PROMPT]), stream="test/level", num_samples=1, seed=3, step=2)
    (begun,) = actors.token_ids(first)[0]
    assert reward_of(begun) < 0.5
    with pytest.raises(ValueError, match=r"^reward_max is .*, and a response has the reward"):
        decode(InferenceTimePessimism(1, reward_max=reward_of(begun) + 1e-5), actors, 1)


def test_what_is_not_said() -> None:
    default = InferenceTimePessimism()
    assert (default.n, default.beta, default.reward_max, default.at_once) == (32, 0.5, None, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must be an integer >= 1, got 0"),
        ({"beta": 0.0}, "beta must be greater than 0, got 0.0"),
        ({"beta": math.inf}, "beta must be finite, got inf"),
        ({"reward_max": math.nan}, "reward_max must be finite, got nan"),
        ({"at_once": 0}, "at_once must be an integer >= 1, got 0"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        InferenceTimePessimism(**options)
