"""Texts of the same prompts side by side."""

from __future__ import annotations

import itertools

from tests.rollouts import make_rollout, silence
from vbon_lightning.evaluation import ScoredText, text_samples
from vbon_lightning.evaluation.texts import samples_markdown


def test_texts_of_the_same_prompts_side_by_side() -> None:
    before = [make_rollout(prompts=2, seed=1, fillers=1), make_rollout(prompts=2, seed=2, first=2)]
    after = [make_rollout(prompts=4, seed=3)]
    samples = text_samples({"reference": iter(before), "vBoN": after}, prompts=2, samples=3)
    assert [sample.prompt for sample in samples] == ["prompt | 0", "prompt | 2"]
    assert [list(sample.responses) for sample in samples] == [["reference", "vBoN"]] * 2
    assert samples[1].responses["vBoN"][2] == ScoredText(
        "response 2.2", after[0].rewards[2, 2].item(), after[0].completions.finished[2, 2].item()
    )


def test_only_as_many_rollouts_as_needed_are_read() -> None:
    endless = (make_rollout(prompts=2, seed=i, first=2 * i) for i in itertools.count())
    assert len(text_samples({"reference": endless}, prompts=3)) == 3


def test_conversations_are_shown_turn_by_turn() -> None:
    rollout = make_rollout(prompts=2)
    talks = [[{"role": "user", "content": "Hello"}], [{"role": "user", "content": "Hi"}]]
    talked = rollout._replace(prompts=rollout.prompts._replace(messages=talks))
    samples = text_samples({"reference": [talked], "vBoN": [talked]}, prompts=2)
    assert [sample.prompt for sample in samples] == ["user: Hello", "user: Hi"]
    assert [list(sample.responses) for sample in samples] == [["reference", "vBoN"]] * 2
    assert "## 1. user: Hello\n" in samples_markdown(samples)


def test_a_response_without_a_reward_is_shown_with_a_dash() -> None:
    found = text_samples({"mine": [silence(make_rollout(), (0, 0))]}, prompts=1, samples=2)
    assert [one.reward is None for one in found[0].responses["mine"]] == [True, False]
    assert samples_markdown(found).splitlines()[4].endswith("| - |")
