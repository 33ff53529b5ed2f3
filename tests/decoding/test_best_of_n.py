"""Best-of-N itself: the best of each group, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.modules.setting import Picky, VowelReward, make_files
from tests.sampling.test_decode import batch_of
from vbon_lightning.actors import Actors, ActorSpec
from vbon_lightning.decoding import BestOfN, Decoded
from vbon_lightning.functional import sequence_log_prob
from vbon_lightning.rewards import RewardCalls
from vbon_lightning.types import Completions

PROMPTS = [[3, 4, 5], [6], [7, 8, 3, 4]]
OPTIONS: dict[str, Any] = {"seed": 3, "stream": "test", "step": 2}


class Constant(VowelReward):
    """Every response is as good as every other."""

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[Sequence[str]], token_ids: Sequence[Sequence[Sequence[int]]]
    ) -> Tensor:
        return torch.zeros(len(responses), len(responses[0]))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


def load(files: Path, **changes: Any) -> Actors:
    spec: dict[str, Any] = {
        "policy": str(files / "llama"),
        "reference": str(files / "gpt2"),
        "reward": VowelReward(),
        "max_new_tokens": 8,
        "temperature": 0.9,
    }
    return Actors.load(ActorSpec(**(spec | changes)), trainable=False)


def drawn_by(actors: Actors, count: int) -> tuple[Completions, Tensor]:
    """Sample from the policy and return the responses with their rewards."""
    prompts = batch_of(PROMPTS)
    found = actors.sample(actors.policy, prompts, num_samples=count, **OPTIONS)
    ids = actors.token_ids(found)
    return found, actors.score(prompts, actors.decode(ids, prompts), ids, found.finished)


def assert_picked(found: Decoded, drawn: Completions, picks: list[list[int]]) -> None:
    for place, row in enumerate(picks):
        for sample, pick in enumerate(row):
            for name in ("tokens", "mask", "finished"):
                ours, theirs = getattr(found, name), getattr(drawn, name)
                assert torch.equal(ours[place, sample], theirs[place, pick])


@pytest.mark.parametrize("penalty", [0.0, 2.0])
def test_keeps_the_best_of_each_group(penalty: float, files: Path) -> None:
    actors, prompts = load(files, missing_eos_penalty=penalty), batch_of(PROMPTS)
    found = BestOfN(n=4)(actors, prompts, num_samples=5, **OPTIONS)
    drawn, rewards = drawn_by(actors, 20)
    picks = [[max(range(4 * g, 4 * g + 4), key=row.__getitem__) for g in range(5)] for row in rewards.tolist()]
    assert_picked(found, drawn, picks)
    assert 0 < drawn.finished.float().mean() < 1
    ids = actors.token_ids(found)
    kept = actors.score(prompts, actors.decode(ids, prompts), ids, found.finished)
    assert torch.equal(kept, rewards.view(3, 5, 4).amax(-1))
    assert found.token_kl is None
    assert found.cost[:3] == (int(drawn.mask.sum()), 0, 60)


def test_the_first_of_a_tie(files: Path) -> None:
    actors = load(files, reward=Constant())
    found = BestOfN(n=3)(actors, batch_of(PROMPTS), num_samples=2, **OPTIONS)
    assert_picked(found, drawn_by(actors, 6)[0], [[0, 3]] * 3)


def test_the_best_of_one_is_a_sample(files: Path) -> None:
    actors = load(files)
    found = BestOfN(n=1)(actors, batch_of(PROMPTS), num_samples=4, **OPTIONS)
    drawn, _ = drawn_by(actors, 4)
    assert all(torch.equal(getattr(found, name), getattr(drawn, name)) for name in ("tokens", "mask", "finished"))
    assert found.cost[:3] == (int(drawn.mask.sum()), 0, 12)


@pytest.mark.parametrize("change", [{"seed": 4}, {"stream": "other"}, {"step": 3}], ids=str)
def test_what_the_noise_depends_on(change: dict[str, Any], files: Path) -> None:
    actors, decoder = load(files), BestOfN(n=2)
    one, same = (decoder(actors, batch_of(PROMPTS), num_samples=4, **OPTIONS) for _ in range(2))
    other = decoder(actors, batch_of(PROMPTS), num_samples=4, **(OPTIONS | change))
    assert torch.equal(one.tokens, same.tokens)
    assert actors.token_ids(one) != actors.token_ids(other)


def test_it_is_no_sample_of_a_policy(files: Path) -> None:
    found: Any = BestOfN(n=2)(load(files), batch_of(PROMPTS), num_samples=1, **OPTIONS)
    assert not isinstance(found, Completions)
    with pytest.raises(AttributeError, match="log_probs"):
        sequence_log_prob(found.log_probs, found.mask)
    assert not BestOfN.needs_value_model


@pytest.mark.parametrize("n", [0, -1, 2.5, True])
def test_an_n_that_makes_no_sense(n: Any) -> None:
    with pytest.raises(ValueError, match="n must be an integer >= 1, got"):
        BestOfN(n=n)


def test_it_needs_a_reward(files: Path) -> None:
    with pytest.raises(ValueError, match="this needs a reward"):
        BestOfN(n=2)(load(files, reward=None), batch_of(PROMPTS), num_samples=1, **OPTIONS)


@pytest.mark.filterwarnings("ignore:the reward says None")
def test_a_response_without_a_reward_is_not_the_best(files: Path) -> None:
    skip = RewardCalls(on_missing="skip")
    actors = load(files, reward=Picky("abcd"), reward_calls=skip)
    found = BestOfN(3)(actors, batch_of(PROMPTS), num_samples=8, **OPTIONS)
    _, rewards = drawn_by(load(files), 24)
    texts = actors.decode(actors.token_ids(drawn_by(load(files), 24)[0]), batch_of(PROMPTS))
    assert found.rewards is not None
    missing = 0
    for row in range(len(PROMPTS)):
        for place in range(8):
            group = range(3 * place, 3 * place + 3)
            left = [float(rewards[row, i]) for i in group if not texts[row][i].startswith(("a", "b", "c", "d"))]
            missing += not left
            said = float(found.rewards[row, place])
            assert said == pytest.approx(max(left)) if left else said != said
    assert missing < 24
    silent = BestOfN(3)(load(files, reward=Picky([""]), reward_calls=skip), batch_of(PROMPTS), num_samples=2, **OPTIONS)
    assert silent.rewards is not None and silent.rewards.isnan().all()
