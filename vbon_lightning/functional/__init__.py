"""Pure functions on tensors: the maths of Best-of-N and of learning it, usable without Lightning."""

from __future__ import annotations

from vbon_lightning.functional.best_of_n import (
    bon_expected_reward,
    bon_kl_bound,
    bon_kl_estimate,
    bon_log_prob,
    bon_log_ratio,
    bon_log_ratio_bound,
    bon_order_weights,
    bon_selection_weights,
    bon_self_win_rate,
    bon_win_rate,
    bon_win_rate_bound,
    kl_weight,
)
from vbon_lightning.functional.kl import (
    TokenStatistics,
    kl_k1,
    kl_k2,
    kl_k3,
    token_statistics,
    vocabulary_kl,
)
from vbon_lightning.functional.policy_gradient import (
    AdvantageEstimate,
    SurrogateLoss,
    clipped_surrogate_loss,
    clipped_value_loss,
    cost_to_go,
    generalized_advantage_estimation,
    leave_one_out,
    normalise_advantages,
    reinforce_loss,
)
from vbon_lightning.functional.preference import PreferenceLoss, bonbon_beta, bonbon_loss, dpo_loss
from vbon_lightning.functional.reward_cdf import CDF_ESTIMATORS, RewardCDF, reward_cdf
from vbon_lightning.functional.reward_modelling import bradley_terry_loss
from vbon_lightning.functional.selection import GroupExtremes, group_extremes, systematic_resampling
from vbon_lightning.functional.sequences import response_mask, sequence_log_prob, token_log_probs
from vbon_lightning.functional.targets import (
    Target,
    kl_penalty,
    kl_rl_target,
    rao_blackwell_advantages,
    sampled_kl_advantages,
    token_rewards,
    vbon_target,
)

__all__ = [
    "CDF_ESTIMATORS",
    "AdvantageEstimate",
    "GroupExtremes",
    "PreferenceLoss",
    "RewardCDF",
    "SurrogateLoss",
    "Target",
    "TokenStatistics",
    "bon_expected_reward",
    "bon_kl_bound",
    "bon_kl_estimate",
    "bon_log_prob",
    "bon_log_ratio",
    "bon_log_ratio_bound",
    "bon_order_weights",
    "bon_selection_weights",
    "bon_self_win_rate",
    "bon_win_rate",
    "bon_win_rate_bound",
    "bonbon_beta",
    "bonbon_loss",
    "bradley_terry_loss",
    "clipped_surrogate_loss",
    "clipped_value_loss",
    "cost_to_go",
    "dpo_loss",
    "generalized_advantage_estimation",
    "group_extremes",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kl_penalty",
    "kl_rl_target",
    "kl_weight",
    "leave_one_out",
    "normalise_advantages",
    "rao_blackwell_advantages",
    "reinforce_loss",
    "response_mask",
    "reward_cdf",
    "sampled_kl_advantages",
    "sequence_log_prob",
    "systematic_resampling",
    "token_log_probs",
    "token_rewards",
    "token_statistics",
    "vbon_target",
    "vocabulary_kl",
]
