"""Reward models: from texts to numbers."""

from vbon_lightning.rewards.base import (
    RewardError,
    RewardFailure,
    RewardModel,
    ask_reward,
    check_rewards,
    join_texts,
)
from vbon_lightning.rewards.calls import RewardCalls
from vbon_lightning.rewards.classifier import ClassifierReward
from vbon_lightning.rewards.exact_match import ExactMatchReward
from vbon_lightning.rewards.function import CallableReward
from vbon_lightning.rewards.json_validity import JsonReward
from vbon_lightning.rewards.mathematics import MathReward
from vbon_lightning.rewards.per_response import ResponseReward
from vbon_lightning.rewards.regular_expression import RegexReward
from vbon_lightning.rewards.threshold import ThresholdReward
from vbon_lightning.rewards.vader import VaderReward
from vbon_lightning.rewards.weighted import WeightedReward

__all__ = [
    "CallableReward",
    "ClassifierReward",
    "ExactMatchReward",
    "JsonReward",
    "MathReward",
    "RegexReward",
    "ResponseReward",
    "RewardCalls",
    "RewardError",
    "RewardFailure",
    "RewardModel",
    "ThresholdReward",
    "VaderReward",
    "WeightedReward",
    "ask_reward",
    "check_rewards",
    "join_texts",
]
