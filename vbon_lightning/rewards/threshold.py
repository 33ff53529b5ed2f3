"""Another reward as 0 or 1."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vbon_lightning.rewards.base import RewardModel, call_reward

if TYPE_CHECKING:
    from typing_extensions import Self


class ThresholdReward(RewardModel):
    """Score 1 where another reward is above a threshold and 0 elsewhere.

    Such rewards, like those of a checker that passes or fails, tie almost always.

    Args:
        reward: The other reward.
        threshold: What its reward must exceed.
    """

    def __init__(self, reward: RewardModel, threshold: float = 0.0) -> None:
        self.reward, self.threshold = reward, threshold

    reads_columns = True

    @property
    def judges_alone(self) -> bool:  # type: ignore[override]
        """Return whether the other reward judges each response by itself."""
        return getattr(self.reward, "judges_alone", False)

    @property
    def columns(self) -> Sequence[str]:  # type: ignore[override]
        """Return the columns that the other reward reads."""
        return self.reward.columns

    def __call__(
        self,
        prompts: Sequence[str],
        responses: Sequence[Sequence[str]],
        token_ids: Sequence[Sequence[Sequence[int]]] = (),
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> Tensor:
        """Score responses; see :meth:`RewardModel.__call__`."""
        rewards, _ = call_reward(self.reward, prompts, responses, token_ids, columns, abstains=True)
        return (rewards > self.threshold).float().masked_fill(rewards.isnan(), math.nan)

    def identity(self) -> dict[str, str]:
        """Describe the reward by the other one and the threshold."""
        inner = json.dumps(self.reward.identity(), sort_keys=True)
        return {"class": "ThresholdReward", "threshold": str(float(self.threshold)), "reward": inner}

    def to(self, device: torch.device | str) -> Self:
        """Move the other reward to a device.

        Args:
            device: The device.
        """
        self.reward.to(device)
        return self
