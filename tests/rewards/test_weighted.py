"""Several rewards in one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from vbon_lightning.rewards import ExactMatchReward, RegexReward, RewardError, RewardModel, WeightedReward, ask_reward

RESPONSES = [["ab", "b"], ["a", "ccc"]]
PROMPTS = ["p", "q"]


class Saying(RewardModel):
    """Says what it is told to."""

    def __init__(self, of: Callable[[str], float | None], device: str = "cpu") -> None:
        self.of, self.device = of, device

    def __call__(self, prompts: Sequence[str], responses: Any, token_ids: Any) -> Any:
        return [[self.of(response) for response in row] for row in responses]

    def identity(self) -> dict[str, str]:
        return {"class": "Saying"}

    def to(self, device: Any) -> Any:
        self.device = str(device)
        return self


def test_parts_add_up_by_their_weights() -> None:
    reward = WeightedReward({"length": Saying(len), "b": RegexReward("b")}, {"length": -0.5})
    found = ask_reward(reward, PROMPTS, RESPONSES, [])
    assert found.tolist() == [[-1 + 1, -0.5 + 1], [-0.5, -1.5]]
    assert {name: part.tolist() for name, part in reward.with_parts(PROMPTS, RESPONSES)[1].items()} == {
        "length": [[2, 1], [1, 3]],
        "b": [[1, 1], [0, 0]],
    }
    assert reward.part_names == ("length", "b")
    assert reward.weights == {"length": -0.5, "b": 1.0}


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_a_part_that_does_not_apply_adds_nothing(nothing: Any) -> None:
    sometimes = Saying(lambda text: nothing if "a" in text else 2.0)
    always = Saying(lambda text: 1.0)
    reward = WeightedReward({"sometimes": sometimes, "always": always})
    assert ask_reward(reward, PROMPTS, RESPONSES, []).tolist() == [[1, 3], [1, 3]]
    assert reward.with_parts(PROMPTS, RESPONSES, [])[1]["sometimes"].isnan().tolist() == [[True, False], [True, False]]
    with pytest.raises(RewardError, match=r"row 0, response 0 is nan \(2 such .* \(data.reward_calls.on_missing"):
        ask_reward(WeightedReward({"sometimes": sometimes}), PROMPTS, RESPONSES, [])
    infinite = WeightedReward({"always": always, "broken": Saying(lambda text: math.inf)})
    with pytest.raises(RewardError, match="the reward of row 0, response 0 is inf"):
        ask_reward(infinite, PROMPTS, RESPONSES, [])


def test_parts_get_their_columns_and_their_device() -> None:
    saying = Saying(len)
    reward = WeightedReward({"right": ExactMatchReward("gold"), "again": ExactMatchReward("gold"), "length": saying})
    assert reward.columns == ("gold",)
    found = ask_reward(reward, PROMPTS, RESPONSES, [], {"gold": ["b", "a"]})
    assert found.tolist() == [[2, 3], [3, 3]]
    reward.to("meta")
    assert saying.device == "meta"
    with pytest.raises(RewardError, match="reads the column 'gold'"):
        ask_reward(reward, PROMPTS, RESPONSES, [])


def test_identity_knows_parts_and_weights() -> None:
    parts = {"a": RegexReward("a"), "b": RegexReward("b")}
    made = [
        WeightedReward(parts),
        WeightedReward(parts, {"a": 2.0}),
        WeightedReward({"a": RegexReward("a")}),
        WeightedReward({"b": RegexReward("a"), "a": RegexReward("b")}),
    ]
    assert len({str(one.identity()) for one in made}) == len(made)
    assert WeightedReward(parts, {"a": 1}).identity() == made[0].identity()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rewards": {}}, "`rewards` names no reward"),
        ({"rewards": {"a": RegexReward("a")}, "weights": {"b": 1}}, "`weights` names 'b', which is none of .*: a"),
        ({"rewards": {"a": RegexReward("a")}, "weights": {"a": math.inf}}, "`weights` has inf for 'a'"),
        ({"rewards": {"a": RegexReward("a")}, "weights": {"a": True}}, "`weights` has True for 'a'"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        WeightedReward(**arguments)


def test_tensors_may_abstain_too() -> None:
    class Tensors(Saying):
        def __call__(self, prompts: Any, responses: Any, token_ids: Any) -> Any:
            return torch.tensor([[math.nan, 1.0], [2.0, 3.0]])

    reward = WeightedReward({"a": Tensors(len), "b": RegexReward("c")})
    assert ask_reward(reward, PROMPTS, RESPONSES, []).tolist() == [[0, 1], [2, 4]]
