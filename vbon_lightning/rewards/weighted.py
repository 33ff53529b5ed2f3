"""Several rewards in one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vbon_lightning.rewards.base import RewardError, RewardModel, call_reward

if TYPE_CHECKING:
    from typing_extensions import Self


class WeightedReward(RewardModel):
    """The weighted sum of several rewards, each of which is logged by its name.

    A part may say None (or NaN) of a response that it does not apply to, such as a checker of code of a question about
    history: it then adds nothing. A response that no part applies to has no reward: ``data.reward_calls.on_missing``.

    Args:
        rewards: The parts by name.
        weights: Their weights by name, 1 where none is given; a negative one makes a penalty of a part.
    """

    reads_columns = True

    def __init__(self, rewards: dict[str, RewardModel], weights: dict[str, float] | None = None) -> None:
        if not rewards:
            raise RewardError("`rewards` names no reward")
        for name, weight in (weights or {}).items():
            if name not in rewards:
                raise RewardError(f"`weights` names {name!r}, which is none of the rewards: {', '.join(rewards)}")
            if isinstance(weight, bool) or not math.isfinite(weight):
                raise RewardError(f"`weights` has {weight!r} for {name!r}: it must be a finite number")
        self.rewards = dict(rewards)
        self.weights = {name: float((weights or {}).get(name, 1.0)) for name in rewards}

    @property
    def part_names(self) -> tuple[str, ...]:
        """Return the names of the parts."""
        return tuple(self.rewards)

    @property
    def judges_alone(self) -> bool:  # type: ignore[override]
        """Return whether all parts judge each response by itself."""
        return all(getattr(reward, "judges_alone", False) for reward in self.rewards.values())

    @property
    def columns(self) -> Sequence[str]:  # type: ignore[override]
        """Return the columns that the parts read."""
        return tuple(dict.fromkeys(name for reward in self.rewards.values() for name in getattr(reward, "columns", ())))

    def __call__(
        self,
        prompts: Sequence[str],
        responses: Sequence[Sequence[str]],
        token_ids: Sequence[Sequence[Sequence[int]]] = (),
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> Tensor:
        """Score responses; see :meth:`RewardModel.__call__`."""
        return self.with_parts(prompts, responses, token_ids, columns)[0]

    def with_parts(
        self,
        prompts: Sequence[str],
        responses: Sequence[Sequence[str]],
        token_ids: Sequence[Sequence[Sequence[int]]] = (),
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Score responses, and also return what each part said, ``[B, G]`` by name; NaN where it does not apply."""
        parts = {
            name: call_reward(reward, prompts, responses, token_ids, columns, abstains=True)[0]
            for name, reward in self.rewards.items()
        }
        weighted = torch.stack([self.weights[name] * part.cpu() for name, part in parts.items()])
        silent = weighted.isnan().all(0)
        return weighted.nan_to_num(0.0).sum(0).masked_fill(silent, math.nan), parts

    def identity(self) -> dict[str, str]:
        """Describe the reward by its parts and their weights."""
        parts = {name: reward.identity() for name, reward in self.rewards.items()}
        return {
            "class": "WeightedReward",
            "rewards": json.dumps(parts, sort_keys=True),
            "weights": json.dumps(self.weights, sort_keys=True),
        }

    def to(self, device: torch.device | str) -> Self:
        """Move the parts to a device.

        Args:
            device: The device.
        """
        for reward in self.rewards.values():
            if hasattr(reward, "to"):
                reward.to(device)
        return self
