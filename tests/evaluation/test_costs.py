"""What a response takes."""

from __future__ import annotations

import time

import pytest
import torch

from tests.helpers import tiny_llama, tiny_tokenizer
from vbon_lightning.actors import Actors
from vbon_lightning.evaluation import Estimate
from vbon_lightning.evaluation.costs import TimedSampler, sample_cost, scoring_seconds, timed_sampling
from vbon_lightning.models import new_tilted_lm
from vbon_lightning.sampling import SamplingRequest, sample_completions
from vbon_lightning.sampling.passes import InPasses
from vbon_lightning.types import Completions, PromptBatch


def test_best_of_n_takes_n_samples_and_scores_each() -> None:
    length = Estimate(11.0, 0.5)
    assert sample_cost(length, 0.25) == {
        "generated_tokens": 11.0, "value_tokens": 0, "reward_calls": 0, "seconds": 0.25
    }  # fmt: skip
    assert sample_cost(length, 0.25, n=4) == {
        "generated_tokens": 44.0, "value_tokens": 0, "reward_calls": 4, "seconds": 1.0
    }  # fmt: skip
    assert sample_cost(length, None, n=2)["reward_calls"] == 2
    assert sample_cost(None, 0.25, n=2) == {"seconds": 0.5}
    # Each of its samples is scored; a policy's one sample is not. A tilted policy's tower reads what the model samples.
    assert sample_cost(length, 0.25, n=4, scoring=0.5)["seconds"] == 3.0
    assert sample_cost(length, 0.25, scoring=0.5)["seconds"] == 0.25
    assert sample_cost(length, None, value_tokens=12.0)["value_tokens"] == 12
    assert "seconds" not in sample_cost(length, None)


class Slow:
    """Takes a while, and knows how far its log-probabilities are off."""

    mismatch = 0.125

    def __call__(self, model: object, request: SamplingRequest) -> Completions:
        time.sleep(0.02)
        batch, samples, length = request.noise.shape
        shape = (batch, samples, length)
        return Completions(
            torch.zeros(shape, dtype=torch.long),
            torch.ones(shape, dtype=torch.bool),
            torch.ones(batch, samples, dtype=torch.bool),
            torch.zeros(shape),
        )


def request(rows: int = 4) -> SamplingRequest:
    tokens = torch.ones(rows, 3, dtype=torch.long)
    return SamplingRequest(tokens, tokens.bool(), torch.rand(rows, 2, 5), (2,), 0, 1.0)


@pytest.mark.parametrize("max_rows", [None, 4])
def test_sampling_is_timed_alone_and_for_a_while(max_rows: int | None) -> None:
    sampler = Slow() if max_rows is None else InPasses(Slow(), max_rows)
    actors = Actors(tiny_llama(), None, None, tiny_tokenizer(), (2,), 5, 1.0, sampler=sampler)
    began = time.perf_counter()
    with timed_sampling(actors) as watch:
        assert watch.seconds_a_response is None
        assert isinstance(actors.sampler, InPasses) is (max_rows is not None)
        actors.sampler(actors.policy, request())
        time.sleep(0.1)  # what else is done does not count
        assert getattr(actors.sampler, "mismatch", None) == pytest.approx(0.125)
    assert actors.sampler is sampler
    passes = 1 if max_rows is None else 2
    assert watch.responses == 8 and 0.02 * passes <= watch.seconds < time.perf_counter() - began - 0.1
    assert watch.seconds_a_response == watch.seconds / 8
    assert TimedSampler(Slow()).tower_tokens_a_response == watch.tower_tokens_a_response == 0, "it has none"


@pytest.mark.parametrize("max_rows", [None, 4])
def test_what_a_tower_reads_is_shared_by_the_responses(max_rows: int | None) -> None:
    policy = new_tilted_lm(tiny_llama(), tiny_llama(seed=1).base_model).eval()
    sampler = sample_completions if max_rows is None else InPasses(sample_completions, max_rows)
    actors = Actors(policy, None, None, tiny_tokenizer(), (10_000,), 5, 1.0, sampler=sampler)
    with timed_sampling(actors) as watch:
        actors.sampler(policy, request()._replace(end_ids=(10_000,)))  # no response ends
    # Four prompts of three tokens, read once each, and all but the last of five tokens of eight responses.
    assert watch.tower_tokens == 4 * 3 + 8 * 4 and watch.tower_tokens_a_response == 5.5


def prompt_batch(rows: int) -> PromptBatch:
    tokens = torch.full((rows, 2), 3)
    index = torch.arange(rows)
    return PromptBatch(index, torch.ones(rows, dtype=torch.bool), tokens, tokens.bool(), ["ab"] * rows)


def test_scoring_is_timed_for_a_response() -> None:
    asked: list[list[str]] = []

    def reward(prompts: list[str], responses: list[list[str]], ids: object) -> torch.Tensor:
        asked.extend(responses)
        time.sleep(0.06)
        return torch.zeros(len(responses), len(responses[0]))

    actors = Actors(tiny_llama(), None, reward, tiny_tokenizer(), (2,), 5, 1.0)
    prompts = prompt_batch(2)
    found = actors.sample(actors.policy, prompts, num_samples=3, seed=0, stream="x", step=0)
    began = time.perf_counter()
    assert 0.01 <= scoring_seconds(actors, prompts, found) <= (time.perf_counter() - began) / 6, (
        "each of six has its share"
    )
    assert [len(group) for group in asked] == [3, 3]


def test_it_samples_what_the_sampler_samples() -> None:
    model, asked = tiny_llama(), request(2)
    timed = TimedSampler(sample_completions)(model, asked)
    for one, other in zip(timed, sample_completions(model, asked), strict=True):
        assert torch.equal(one, other)
    assert TimedSampler(sample_completions).mismatch is None


def test_what_is_scored_is_read_behind_its_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    actors = Actors(tiny_llama(), None, None, tiny_tokenizer(), (2,), 5, 1.0)
    asked: list[object] = []
    monkeypatch.setattr(Actors, "decode", lambda self, ids, prompts=None: asked.append(prompts))
    monkeypatch.setattr(Actors, "score", lambda *_: torch.zeros(()))
    prompts = prompt_batch(2)
    tokens = torch.full((2, 1, 3), 4)
    found = Completions(tokens, tokens.bool(), torch.zeros(2, 1, dtype=torch.bool), torch.zeros(2, 1, 3))
    scoring_seconds(actors, prompts, found)
    assert asked == [prompts]
