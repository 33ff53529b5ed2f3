"""Responses to take away are the policy's samples, or the best of several, whatever the batch size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import save_tiny_model
from tests.modules.setting import ALPHABET, VowelReward
from vbon_lightning import sample
from vbon_lightning.actors import Actors
from vbon_lightning.data.encoding import EncodedPrompt
from vbon_lightning.decoding import BestOfN, Drawn, NoiseKey, ValueGuided
from vbon_lightning.decoding.drawing import STREAM, draw, sampling_spec
from vbon_lightning.models import ModelError
from vbon_lightning.sampling import prompt_noise

PROMPTS = ["ab", "c", "deffg"]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("policy") / "llama", alphabet=ALPHABET, seed=1, spread=2.0)


def drawn(policy: str, **options: Any) -> list[Drawn]:
    given: dict[str, Any] = {"reward": VowelReward(), "max_new_tokens": 5, "samples": 2, "seed": 3, "device": "cpu"}
    return list(sample(policy, PROMPTS, **(given | options)))


def test_each_response_is_a_sample_with_its_log_probability(policy: str) -> None:
    found = drawn(policy, temperature=0.7)
    assert [(one.row, one.sample) for one in found] == [(row, place) for row in range(3) for place in range(2)]
    actors = Actors.load(sampling_spec(policy, None, 5, 0.7), trainable=False, reference=False)
    for one in found:
        ids = actors.tokenizer(one.prompt).input_ids
        noise = prompt_noise([one.row], num_samples=2, length=5, seed=3, stream=STREAM, step=0)
        tokens, log_prob = list(ids), 0.0
        for place, token in enumerate(one.tokens):
            with torch.no_grad():
                log_probs = (actors.policy(torch.tensor([tokens])).logits[0, -1] / 0.7).double().log_softmax(-1)
            log_prob += log_probs[token].item()
            # The token's quantile is the noise's: between what is before it and it.
            before = log_probs.exp()[:token].sum().item()
            assert before - 1e-5 <= noise[0, one.sample, place].item() <= before + log_probs[token].exp().item() + 1e-5
            tokens.append(token)
        assert one.log_prob == pytest.approx(log_prob, abs=1e-4)
        assert one.response == actors.tokenizer.decode(one.tokens, skip_special_tokens=True)
        assert one.finished == (one.tokens[-1] in actors.end_ids)
        assert one.reward == pytest.approx(sum(c in "ae" for c in one.response) - 0.1 * len(one.tokens), abs=1e-6)
        assert one.prompt == PROMPTS[one.row]


def test_best_of_n_is_the_best_of_the_same_samples(policy: str) -> None:
    many = drawn(policy, samples=6)
    best = drawn(policy, samples=2, decoder=BestOfN(3))
    for one in best:
        group = [other for other in many if other.row == one.row][3 * one.sample : 3 * one.sample + 3]
        assert one.reward == max(other.reward for other in group)
        twin = next(other for other in group if other.tokens == one.tokens)
        assert one.log_prob == pytest.approx(twin.log_prob, abs=1e-4)
        assert one.finished == twin.finished


@pytest.mark.parametrize("decoder", [None, BestOfN(2)])
def test_the_batch_size_changes_nothing_and_the_seed_does(decoder: Any, policy: str) -> None:
    whole = drawn(policy, decoder=decoder, batch_size=8)
    for size in (1, 2):
        assert [one.tokens for one in drawn(policy, decoder=decoder, batch_size=size)] == [one.tokens for one in whole]
    assert [one.tokens for one in drawn(policy, decoder=decoder, seed=4)] != [one.tokens for one in whole]


def test_a_decoder_gets_the_rewards_of_its_own_prompts(policy: str) -> None:
    actors = Actors.load(sampling_spec(policy, VowelReward(), 5, 1.0), trainable=False, reference=False)
    seen: list[Any] = []

    class Reading(BestOfN):
        def decode(self, actors: Actors, prompts: Any, key: NoiseKey) -> Any:
            seen.append(prompts.reference_rewards.tolist())
            return super().decode(actors, prompts, key)

    encoded = [EncodedPrompt([3 + place], "ab", "") for place in range(3)]
    rewards = torch.arange(6.0).view(3, 2)
    list(draw(actors, enumerate(encoded), decoder=Reading(2), batch_size=2, reference_rewards=rewards))
    assert seen == [[[0, 1], [2, 3]], [[4, 5]]]


def test_the_penalty_and_the_value_model_are_named_in_python_too(policy: str) -> None:
    plain, fined = drawn(policy), drawn(policy, missing_eos_penalty=2.0)
    for one, other in zip(plain, fined, strict=True):
        assert one.reward is not None and other.reward == pytest.approx(one.reward - 2 * (not one.finished))
    with pytest.raises(ModelError, match="nowhere"):
        drawn(policy, decoder=ValueGuided(2), value_model="./nowhere")


def test_length_and_temperature_are_the_exports_unless_they_are_given(tmp_path: Path) -> None:
    told = {"do_sample": True, "temperature": 0.25, "max_new_tokens": 3, "eos_token_id": 2, "pad_token_id": 0}
    policy = save_tiny_model(tmp_path / "told", alphabet=ALPHABET, generation=told)
    spec = sampling_spec(policy, None, None, None)
    assert (spec.max_new_tokens, spec.temperature) == (3, 0.25)
    spec = sampling_spec(policy, None, 7, 0.5)
    assert (spec.max_new_tokens, spec.temperature) == (7, 0.5)
    untold = save_tiny_model(tmp_path / "untold", alphabet=ALPHABET)
    spec = sampling_spec(untold, None, None, None)
    assert (spec.max_new_tokens, spec.temperature) == (32, 1.0)
    assert all(len(one.tokens) <= 3 for one in drawn(policy, max_new_tokens=None))


def test_without_a_reward_there_is_none(policy: str) -> None:
    assert {one.reward for one in drawn(policy, reward=None)} == {None}
    with pytest.raises(ValueError, match="^BestOfN chooses by a reward, and none is named: give `reward`$"):
        drawn(policy, reward=None, decoder=BestOfN(2))
    with pytest.raises(ValueError, match=r"^ValueGuided needs a value model: name one as data\.value_model$"):
        drawn(policy, decoder=ValueGuided(2))


@pytest.mark.parametrize("name", ["samples", "batch_size"])
@pytest.mark.parametrize("count", [0, 1.5, True])
def test_counts_are_checked(name: str, count: Any, policy: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be an integer >= 1, got {count!r}$"):
        drawn(policy, **{name: count})
