"""Responses of a certain form."""

from __future__ import annotations

from typing import Any

import pytest

from vbon_lightning.rewards import RegexReward, RewardError, ask_reward

RESPONSES = ["<think>a</think> b", "x <THINK>a</think>", "<think>a\nb</think>", "none"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 0, 0, 0]),
        ({"ignore_case": True}, [1, 1, 0, 0]),
        ({"dot_all": True}, [1, 0, 1, 0]),
        ({"where": "whole"}, [0, 0, 0, 0]),
        ({"where": "whole", "dot_all": True}, [0, 0, 1, 0]),
    ],
)
def test_a_response_has_the_form_or_not(options: dict[str, Any], expected: list[int]) -> None:
    reward = RegexReward("<think>.*</think>", **options)
    assert ask_reward(reward, ["q"], [RESPONSES], [])[0].tolist() == expected
    assert reward.columns == ()
    assert (reward.identity() == RegexReward("<think>.*</think>").identity()) == (options == {})


def test_what_is_refused() -> None:
    with pytest.raises(RewardError, match="`pattern` is '\\*', which is no regular expression: nothing to repeat"):
        RegexReward("*")
    with pytest.raises(RewardError, match="`where` is 'end', expected 'anywhere' or 'whole'"):
        RegexReward("a", where="end")  # type: ignore[arg-type]
