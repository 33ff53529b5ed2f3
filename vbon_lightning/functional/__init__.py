"""Pure functions on tensors: the maths of Best-of-N and of learning it, usable without Lightning."""

from __future__ import annotations

from vbon_lightning.functional.a_star_po import a_star_po_loss, optimal_value
from vbon_lightning.functional.annealing import AnnealingShape, annealed_n
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
from vbon_lightning.functional.binned_best_of_n import (
    binned_bon_kl,
    binned_bon_reward,
    binned_bon_win_rate,
    win_rate_by_cdf,
)
from vbon_lightning.functional.bon_regression import bon_regression_loss, pooled_reward_cdf
from vbon_lightning.functional.bond import bond_target
from vbon_lightning.functional.distillation import (
    Candidates,
    Teacher,
    candidate_teacher,
    draw_candidates,
    forward_divergence,
    reverse_divergence,
    teacher_probs,
)
from vbon_lightning.functional.empirical_kl import bon_kl
from vbon_lightning.functional.forward_kl import bon_cross_entropy
from vbon_lightning.functional.grpo import LengthNorm, group_normalised_advantages, length_weights
from vbon_lightning.functional.infalign import InfAlignTies, InfAlignTransform, infalign_slope, infalign_target
from vbon_lightning.functional.j_bond import j_bond_rewards, leave_one_out_of_all
from vbon_lightning.functional.kl import (
    TokenStatistics,
    kl_k1,
    kl_k2,
    kl_k3,
    token_statistics,
    vocabulary_kl,
)
from vbon_lightning.functional.log_ratio_regression import RegressionLoss, log_ratio_regression
from vbon_lightning.functional.max_at_k import MaxAtKForm, max_at_k_advantages
from vbon_lightning.functional.policy_filtration import FilterStrategy, filter_counts, filter_probabilities
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
from vbon_lightning.functional.preference import (
    BonbonGap,
    PreferenceLoss,
    bonbon_beta,
    bonbon_gap,
    bonbon_loss,
    dpo_loss,
)
from vbon_lightning.functional.prefix_values import (
    prefix_log_values,
    ranked_probability_score,
    value_advantages,
    with_exact_end,
)
from vbon_lightning.functional.qrpo import Quantiles, qrpo_goal, qrpo_log_partition, qrpo_loss, reward_quantiles
from vbon_lightning.functional.reward_bins import (
    RewardBins,
    bin_labels,
    binned_reward_cdf,
    bon_bin_log_weights,
    edge_log_cdf,
    exponential_bin_log_weights,
    forecast_head,
    forecast_log_probs,
    predicted_log_cdf,
    reward_bins,
)
from vbon_lightning.functional.reward_cdf import CDF_ESTIMATORS, RewardCDF, mixed_log_cdf, reward_cdf
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
from vbon_lightning.functional.wind import WIND_FITS, wind_log_ratio, wind_loss

__all__ = [
    "CDF_ESTIMATORS",
    "WIND_FITS",
    "AdvantageEstimate",
    "AnnealingShape",
    "BonbonGap",
    "Candidates",
    "FilterStrategy",
    "GroupExtremes",
    "InfAlignTies",
    "InfAlignTransform",
    "LengthNorm",
    "MaxAtKForm",
    "PreferenceLoss",
    "Quantiles",
    "RegressionLoss",
    "RewardBins",
    "RewardCDF",
    "SurrogateLoss",
    "Target",
    "Teacher",
    "TokenStatistics",
    "a_star_po_loss",
    "annealed_n",
    "bin_labels",
    "binned_bon_kl",
    "binned_bon_reward",
    "binned_bon_win_rate",
    "binned_reward_cdf",
    "bon_bin_log_weights",
    "bon_cross_entropy",
    "bon_expected_reward",
    "bon_kl",
    "bon_kl_bound",
    "bon_kl_estimate",
    "bon_log_prob",
    "bon_log_ratio",
    "bon_log_ratio_bound",
    "bon_order_weights",
    "bon_regression_loss",
    "bon_selection_weights",
    "bon_self_win_rate",
    "bon_win_rate",
    "bon_win_rate_bound",
    "bonbon_beta",
    "bonbon_gap",
    "bonbon_loss",
    "bond_target",
    "bradley_terry_loss",
    "candidate_teacher",
    "clipped_surrogate_loss",
    "clipped_value_loss",
    "cost_to_go",
    "dpo_loss",
    "draw_candidates",
    "edge_log_cdf",
    "exponential_bin_log_weights",
    "filter_counts",
    "filter_probabilities",
    "forecast_head",
    "forecast_log_probs",
    "forward_divergence",
    "generalized_advantage_estimation",
    "group_extremes",
    "group_normalised_advantages",
    "infalign_slope",
    "infalign_target",
    "j_bond_rewards",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kl_penalty",
    "kl_rl_target",
    "kl_weight",
    "leave_one_out",
    "leave_one_out_of_all",
    "length_weights",
    "log_ratio_regression",
    "max_at_k_advantages",
    "mixed_log_cdf",
    "normalise_advantages",
    "optimal_value",
    "pooled_reward_cdf",
    "predicted_log_cdf",
    "prefix_log_values",
    "qrpo_goal",
    "qrpo_log_partition",
    "qrpo_loss",
    "ranked_probability_score",
    "rao_blackwell_advantages",
    "reinforce_loss",
    "response_mask",
    "reverse_divergence",
    "reward_bins",
    "reward_cdf",
    "reward_quantiles",
    "sampled_kl_advantages",
    "sequence_log_prob",
    "systematic_resampling",
    "teacher_probs",
    "token_log_probs",
    "token_rewards",
    "token_statistics",
    "value_advantages",
    "vbon_target",
    "vocabulary_kl",
    "win_rate_by_cdf",
    "wind_log_ratio",
    "wind_loss",
    "with_exact_end",
]
