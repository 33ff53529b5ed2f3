"""Right answers, to the letter."""

from __future__ import annotations

import pytest

from vbon_lightning.rewards import ExactMatchReward, RewardError, ask_reward


def scores(reward: ExactMatchReward, responses: list[str], answer: object) -> list[float]:
    return ask_reward(reward, ["q"], [responses], [], {"answer": [answer]})[0].tolist()


def test_a_response_is_the_answer_or_not() -> None:
    reward = ExactMatchReward()
    assert scores(reward, ["Paris", " Paris\n", "paris", "Paris."], "Paris") == [1, 1, 0, 0]
    assert scores(ExactMatchReward(ignore_case=True), ["Paris", "PARIS", "Rome"], "paris") == [1, 1, 0]
    assert scores(reward, ["42", "42.0"], 42) == [1, 0]
    assert scores(reward, ["Rome", "Roma", "Paris"], ["Rome", "Roma"]) == [1, 1, 0]


def test_what_counts_is_extracted_from_both_sides() -> None:
    reward = ExactMatchReward(extract=r"####\s*(\S+)")
    assert scores(reward, ["2 + 2 #### 4", "#### 3 no, #### 4", "4", "#### 5"], "so it is #### 4") == [1, 1, 0, 0]
    assert scores(reward, ["#### 4"], "4") == [1]  # an answer without the signs is taken whole
    assert scores(ExactMatchReward(extract=r"\d+"), ["about 7 or 8", "none"], "8") == [1, 0]


def test_columns_and_identity() -> None:
    reward = ExactMatchReward(column="gold")
    assert reward.columns == ("gold",)
    assert ask_reward(reward, ["p", "q"], [["a"], ["a"]], [], {"gold": ["a", "b"]}).tolist() == [[1], [0]]
    with pytest.raises(RewardError, match="ExactMatchReward reads the column 'gold' .* came with none"):
        ask_reward(reward, ["p"], [["a"]], [])
    made = [
        ExactMatchReward(),
        ExactMatchReward("gold"),
        ExactMatchReward(extract="a"),
        ExactMatchReward(ignore_case=True),
    ]
    assert len({str(one.identity()) for one in made}) == 4
    with pytest.raises(RewardError, match=r"`extract` is '\(', which is no regular expression"):
        ExactMatchReward(extract="(")


def test_of_a_row_without_an_answer_nothing_is_said() -> None:
    found = ExactMatchReward()(["a", "b"], [["1"], ["None"]], columns={"answer": ["1", None]})
    assert found[0].tolist() == [1.0]
    assert found[1].isnan().all()
