"""The lexicon reward."""

from __future__ import annotations

import sys

import pytest
import torch

from vbon_lightning.rewards import RewardError, VaderReward

pytest.importorskip("vaderSentiment")


def test_scores_are_the_compound_scores_of_the_right_texts():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    score = SentimentIntensityAnalyzer().polarity_scores
    prompts, responses = ["I love ", "I hate "], [["it", "bad food"], ["it", "a great day"]]
    alone = [[score(text)["compound"] for text in row] for row in responses]
    joined = [[score(p + text)["compound"] for text in row] for p, row in zip(prompts, responses, strict=True)]
    torch.testing.assert_close(VaderReward()(prompts, responses), torch.tensor(alone), rtol=0, atol=0)
    together = VaderReward(text="prompt_and_response")(prompts, responses)
    torch.testing.assert_close(together, torch.tensor(joined), rtol=0, atol=0)
    assert together[0, 0] > 0 > together[1, 0]


def test_texts_without_a_lexicon_word_tie_at_exactly_zero():
    rewards = VaderReward()(["p"], [["the table", "a chair", "", "wonderful"]])
    assert rewards[0, :3].tolist() == [0.0, 0.0, 0.0]
    assert rewards[0, 3] > 0


def test_identity_and_arguments():
    assert VaderReward("response").identity() != VaderReward("prompt_and_response").identity()
    assert VaderReward().identity()["vaderSentiment"]
    with pytest.raises(RewardError, match="`text` is 'prompt'"):
        VaderReward(text="prompt")


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(RewardError, match="pip install vaderSentiment"):
        VaderReward()(["p"], [["a"]])
