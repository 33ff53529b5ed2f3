"""Speculative Rejection against all groups of responses, and what it leaves undone."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.decoding.setting import (
    OPTIONS,
    PROMPT,
    REMEDY,
    Continuations,
    Outcomes,
    Told,
    assert_distributed,
    decode,
    load,
    save_models,
    statistic,
)
from tests.decoding.setting import score as reward_of
from tests.helpers import EOS
from tests.sampling.test_decode import batch_of
from vbon_lightning.actors import Actors
from vbon_lightning.decoding import BestOfN, SpeculativeRejection
from vbon_lightning.rewards import RewardCalls


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def actors(files: Path) -> Actors:
    return load(files)


def test_its_distribution(actors: Actors) -> None:
    """Of three, two go on after their first token: by the rewards of the first tokens, the whole ones among them."""
    expected, best_of_three = Outcomes(), Outcomes()
    for group, probability in Continuations(actors.policy).groups([()] * 3, 2):
        rejected = min(range(3), key=lambda place: (reward_of(group[place][:1]), -place))
        kept = [response for place, response in enumerate(group) if place != rejected]
        expected.add(max(kept, key=reward_of), probability)
        best_of_three.add(max(group, key=reward_of), probability)
    found = decode(SpeculativeRejection(3, alpha=0.34, every=1), actors, 3000)
    assert_distributed(found, expected)
    assert statistic(found, best_of_three) > 3, "which another decoder's is not"


def test_where_nothing_is_rejected_it_is_best_of_n(actors: Actors) -> None:
    ours, theirs = (decode(one, actors, 50) for one in (SpeculativeRejection(4, alpha=0), BestOfN(4)))
    for name in ("tokens", "mask", "finished", "rewards"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert ours.cost[:3] == theirs.cost[:3] and ours.kl_bound is None, "its KL is Best-of-N's"


@pytest.mark.parametrize(("length", "every"), [(2, 1), (4, 1), (5, 2), (16, 4)])
def test_by_default_it_judges_at_each_quarter(length: int, every: int, files: Path) -> None:
    actors = load(files, length)
    ours, theirs = (decode(SpeculativeRejection(4, every=one), actors, 5) for one in (None, every))
    assert torch.equal(ours.tokens, theirs.tokens) and ours.cost[:3] == theirs.cost[:3]


@pytest.mark.parametrize(("length", "every"), [(2, 2), (2, 16), (1, None)])
def test_an_interval_at_which_nothing_is_judged(length: int, every: int | None, files: Path) -> None:
    message = (
        f"^every is {every or 1}, and a response has at most {length} tokens: nothing would be judged on the way. Give "
        "a smaller every, or ask for Best-of-N, which is BestOfN or alpha: 0$"
    )
    with pytest.raises(ValueError, match=message):
        SpeculativeRejection(2, every=every).check_fits(longest=length, max_rows=None)
    with pytest.raises(ValueError, match=message):
        decode(SpeculativeRejection(4, every=every), load(files, length), 1)
    decode(SpeculativeRejection(1, every=every), load(files, length), 1)  # of one there is nothing to reject


def test_more_rows_than_there_may_be_are_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ValueError, match=r"^data\.max_rows is 4, and SpeculativeRejection makes a response of 8 rows"):
        SpeculativeRejection(8, every=2).check_fits(longest=16, max_rows=4)


def test_the_least_that_is_rejected_is_one(actors: Actors) -> None:
    found = decode(SpeculativeRejection(4, alpha=0.2, every=1), actors, 1)
    assert found.kl_bound == pytest.approx(math.log(4)), "which is not Best-of-N"


def test_what_it_costs(files: Path) -> None:
    """Rejected responses are not gone on with, and whole ones are scored once."""
    actors: Any = load(files, 6)
    found = decode(SpeculativeRejection(5, alpha=0.5, every=2), actors, 6)
    asked = sorted(actors.reward.asked)
    drawn = actors.sample(actors.policy, batch_of([PROMPT]), num_samples=30, **OPTIONS)
    responses = [tuple(ids) for ids in actors.token_ids(drawn)[0]]
    tokens, scored, chosen = 0, [], []
    for start in range(0, 30, 5):
        left, known = list(range(start, start + 5)), set()
        for length, kept in ((2, 2), (4, 1), (6, 1)):  # round(2.5) is 2
            tokens += sum(len(responses[row][length - 2 : length]) for row in left)
            if kept < len(left) or length == 6:
                scored += [responses[row][:length] for row in left if row not in known]
                known |= {row for row in left if len(responses[row]) <= length and EOS in responses[row]}
            left = sorted(sorted(left, key=lambda row: -reward_of(responses[row][:length]))[:kept])
        chosen.append(responses[left[0]])
    assert [tuple(ids) for ids in actors.token_ids(found)[0]] == chosen
    assert found.cost.generated_tokens == tokens < int(drawn.mask.sum())
    assert found.cost.reward_calls == len(scored) and asked == sorted(scored)
    assert found.kl_bound == pytest.approx(math.log(5))


def test_a_response_that_goes_on_was_not_cut(actors: Actors) -> None:
    """The penalty for a missing end is for responses at the limit: else those that go on would seem worse."""
    fined = replace(actors, missing_eos_penalty=10.0)
    found = decode(SpeculativeRejection(3, alpha=0.34, every=1), fined, 3000)
    expected = Outcomes()

    def fined_reward(response: tuple[int, ...]) -> float:
        return reward_of(response) - 10.0 * (response[-1] != EOS)

    for group, probability in Continuations(actors.policy).groups([()] * 3, 2):
        rejected = min(range(3), key=lambda place: (reward_of(group[place][:1]), -place))
        kept = [response for place, response in enumerate(group) if place != rejected]
        expected.add(max(kept, key=fined_reward), probability)
    assert_distributed(found, expected)


@pytest.mark.filterwarnings("ignore:the reward says None")
def test_a_response_without_a_reward_is_the_first_to_go(files: Path) -> None:
    actors = load(files, 3, reward=Told(silent=[3, 4]), reward_calls=RewardCalls(on_missing="skip"))
    found = decode(SpeculativeRejection(2, every=1), actors, 200)
    drawn = actors.sample(actors.policy, batch_of([PROMPT]), num_samples=400, **OPTIONS)
    hopeless = (drawn.tokens[0, :, 0] >= 3).view(200, 2).all(-1)
    assert 0 < int(hopeless.sum()) < 200
    assert torch.equal(found.tokens[0, :, 0] >= 3, hopeless)


def test_what_is_not_said() -> None:
    default = SpeculativeRejection()
    assert (default.n, default.alpha, default.every, default.rows) == (16, 0.5, None, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must be an integer >= 1, got 0"),
        ({"alpha": 1.0}, "alpha must be less than 1, got 1.0"),
        ({"alpha": -0.1}, "alpha must be at least 0, got -0.1"),
        ({"n": 2, "alpha": 0.2}, "alpha=0.2 rejects none of n=2 responses, which is Best-of-N: raise one.*"),
        ({"every": 0}, "every must be an integer >= 1, got 0"),
        ({"alpha": 0.0, "every": 2}, f"every=2 has no effect with alpha=0: {REMEDY}"),
        (
            {"n": 4, "alpha": 0.1},
            "alpha=0.1 rejects none of n=4 responses, which is Best-of-N: raise one.*",
        ),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        SpeculativeRejection(**options)
