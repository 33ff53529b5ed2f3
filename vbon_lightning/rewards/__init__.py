"""Reward models: from texts to numbers."""

from vbon_lightning.rewards.base import RewardError, RewardModel, ask_reward, check_rewards, join_texts
from vbon_lightning.rewards.classifier import ClassifierReward
from vbon_lightning.rewards.function import CallableReward
from vbon_lightning.rewards.threshold import ThresholdReward
from vbon_lightning.rewards.vader import VaderReward

__all__ = [
    "CallableReward",
    "ClassifierReward",
    "RewardError",
    "RewardModel",
    "ThresholdReward",
    "VaderReward",
    "ask_reward",
    "check_rewards",
    "join_texts",
]
