"""Another reward as 0 or 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vbon_lightning.rewards import RewardModel, ThresholdReward, check_rewards


class Lengths(RewardModel):
    device = torch.device("cpu")

    def __call__(self, prompts: Any, responses: Any, token_ids: Any) -> Tensor:
        return torch.tensor([[float(len(text)) for text in row] for row in responses])

    def identity(self) -> dict[str, str]:
        return {"class": "Lengths"}

    def to(self, device: Any) -> Lengths:
        self.device = torch.device(device)
        return self


def test_one_above_the_threshold_and_zero_at_it() -> None:
    responses = [["", "ab", "abc"], ["abcd", "a", "ab"]]
    rewards = ThresholdReward(Lengths(), threshold=2)(["x", "y"], responses, [[[1]] * 3] * 2)
    assert rewards.tolist() == [[0, 0, 1], [1, 0, 0]]
    assert torch.equal(check_rewards(rewards, ["x", "y"], responses), rewards)


def test_identity_knows_the_other_reward_and_the_threshold() -> None:
    one = ThresholdReward(Lengths(), threshold=2).identity()
    assert one == ThresholdReward(Lengths(), threshold=2.0).identity()
    assert one != ThresholdReward(Lengths(), threshold=3).identity()
    assert "Lengths" in one["reward"] and all(isinstance(value, str) for value in one.values())


def test_the_other_reward_moves_along() -> None:
    reward = ThresholdReward(Lengths())
    assert reward.to("meta") is reward and reward.reward.device.type == "meta"
