"""One valid call of every function of tensors, on any device: what tests of all of them start from."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import vbon_lightning.functional as functional
from vbon_lightning.functional import Candidates, Quantiles, RewardBins, RewardCDF, Target

B, G, T, V, M, K, Q, S, H = 2, 4, 5, 7, 8, 3, 4, 6, 2


def _values(*shape: int) -> Callable[[str], Tensor]:
    return lambda device: torch.linspace(0.1, 2.0, math.prod(shape), device=device).view(shape)


def _logs(*shape: int) -> Callable[[str], Tensor]:
    return lambda device: -_values(*shape)(device)


def _long(*shape: int) -> Callable[[str], Tensor]:
    return lambda device: torch.zeros(shape, dtype=torch.long, device=device)


def _bool(*shape: int) -> Callable[[str], Tensor]:
    return lambda device: torch.ones(shape, dtype=torch.bool, device=device)


def _edges(device: str) -> Tensor:
    return _bins(device).edges


def _bins(device: str) -> RewardBins:
    return RewardBins(_values(K - 1)("cpu").double(), _values(K, Q)("cpu").double())  # where they always are


def _cdf(device: str) -> RewardCDF:
    return RewardCDF(_logs(B, G)(device) - 1, _logs(B, G)(device))


def _quantiles(device: str) -> Quantiles:
    return Quantiles(_values(B, G)(device) / 4, _values(B, G)(device) / 2)


def _target(device: str) -> Target:
    return Target(_values(B, G)(device), 0.5)


def _candidates(rest: bool) -> Callable[[str], Candidates]:
    return lambda device: Candidates(
        _long(B, T, 2)(device), _logs(B, T, 2)(device), _logs(B, T)(device) if rest else None
    )


_PAIR = {"best_log_ratio": _values(B), "worst_log_ratio": _logs(B)}
_REFERENCE = {"reference_rewards": _values(B, M)}
_TOKENS = {"log_probs": _logs(B, G, T), "mask": _bool(B, G, T)}
_BOTH = {"log_probs": _logs(B, G, T), "reference_log_probs": _logs(B, G, T)}
_REGRESSED = {"log_ratio": _values(B, G), "learnt": _bool(B, G)}
_BINNED = {"log_cdf": _logs(B, K + 1), "bins": _bins}

CALLS: dict[str, dict[str, Any]] = {
    "a_star_po_loss": {**_REGRESSED, "rewards": _values(B, G), "values": _values(B), "beta": 0.1},
    "bin_labels": {"rewards": _values(B, G), "edges": _edges},
    "binned_bon_kl": {**_BINNED, "n": 4.0},
    "binned_bon_reward": {**_BINNED, "n": 4.0},
    "binned_bon_win_rate": {**_BINNED, "n": 4.0, "m": 2.0},
    "binned_reward_cdf": {"rewards": _values(B, G), **_BINNED},
    "bon_bin_log_weights": {"log_cdf": _logs(B, T, K + 1), "n": 4.0},
    "bon_expected_reward": {**_REFERENCE, "n": 4},
    "bon_kl": {**_REFERENCE, "n": 4.0},
    "bon_kl_estimate": {"log_reference": _logs(B, G), "n": 4.0},
    "bon_log_prob": {"log_reference": _logs(B), "log_below": _logs(B), "n": 4.0, "log_at_or_below": _logs(B)},
    "bon_log_ratio": {"log_reference": _logs(B), "log_below": _logs(B), "n": 4.0, "log_at_or_below": _logs(B)},
    "bon_log_ratio_bound": {"log_below": _logs(B, G), "n": 4.0},
    "bon_regression_loss": {**_REGRESSED, "cdf": _cdf, "n": 4.0},
    "bon_selection_weights": {**_REFERENCE, "n": 4},
    "bon_self_win_rate": {**_REFERENCE, "n": 4},
    "bon_win_rate": {"rewards": _values(B, G), **_REFERENCE, "n": 4},
    "bon_cross_entropy": {"log_probs": _logs(B, M), **_REFERENCE, "n": 4},
    "bond_target": {"log_anchor": _logs(B, G), "cdf": _cdf, "n": 4.0},
    "bonbon_gap": {**_REFERENCE, "n": 4},
    "bonbon_loss": {"best_log_prob": _logs(B), **_PAIR, "n": 4, "goal": _values(B), "told_apart": _bool(B)},
    "bradley_terry_loss": {"chosen": _values(B), "rejected": _values(B)},
    "branch_places": {"scores": _values(B, G), "finished": _bool(B, G), "branches": 2},
    "candidate_teacher": {
        "candidates": _candidates(True),
        "log_values": _values(B, T, 2),
        "state_log_values": _values(B, T),
    },
    "clipped_surrogate_loss": {"old_log_probs": _logs(B, G, T), "advantages": _values(B, G, T), **_TOKENS},
    "clipped_value_loss": {
        "values": _values(B, G, T),
        "old_values": _values(B, G, T),
        "returns": _values(B, G, T),
        "mask": _bool(B, G, T),
    },
    "cost_to_go": {"costs": _values(B, G, T)},
    "dpo_loss": {**_PAIR, "beta": 0.1, "told_apart": _bool(B)},
    "draw_candidates": {
        "log_reference": lambda device: _logs(B, T, V)(device).log_softmax(-1),
        "top": 2,
        "draws": 2,
        "uniforms": lambda device: torch.full((B, T, 2), 0.5, device=device),
    },
    "effective_samples": {"log_weights": _logs(B, G)},
    "edge_log_cdf": {**_REFERENCE, "edges": _edges},
    "exponential_bin_log_weights": {"atoms": _values(K, Q), "beta": 0.5},
    "filter_counts": {
        "probabilities": _values(B, G),
        "offsets": lambda device: torch.full((B,), 0.5, device=device),
        "count": 3,
    },
    "filter_probabilities": {"rewards": _values(B, G), "strategy": "best_random", "kept": _bool(B, G)},
    "forecast_head": {"features": _values(S, H), "rewards": _values(S), "bins": _bins, "fit": _bool(S)},
    "forecast_log_probs": {"outputs": _values(B, T, K + 2), "bins": _bins},
    "forward_divergence": {"logits": _values(B, T, V), "teacher": _values(B, T, V)},
    "generalized_advantage_estimation": {
        "token_rewards": _values(B, G, T),
        "values": _values(B, G, T),
        "mask": _bool(B, G, T),
    },
    "group_extremes": {
        "rewards": _values(B, M),
        "order": lambda device: torch.arange(M, device=device).expand(B, M),
        "n": 4,
        "groups": 2,
    },
    "group_normalised_advantages": {"rewards": _values(B, G), "kept": _bool(B, G)},
    "infalign_target": {"cdf": _cdf, "beta": 0.5},
    "j_bond_rewards": {"rewards": _values(B, G), "anchor_rewards": _values(B, M)},
    "implicit_reward": {"log_ratio": _values(B, G, T), "mask": _bool(B, G, T)},
    "kl_k1": _BOTH,
    "kl_k2": _BOTH,
    "kl_k3": _BOTH,
    "kl_penalty": {"token_kl": _values(B, G, T), "mask": _bool(B, G, T)},
    "kl_rl_target": {"rewards": _values(B, G), "beta": 0.1},
    "leave_one_out": {"values": _values(B, G), "kept": _bool(B, G)},
    "log_ratio_regression": {**_REGRESSED, "goal": _values(B, G)},
    "length_weights": {"mask": _bool(B, G, T), "norm": "dapo", "max_length": T},
    "max_at_k_advantages": {"rewards": _values(B, G), "k": 2, "kept": _bool(B, G)},
    "leave_one_out_of_all": {"values": _values(B, G, T), "kept": _bool(B, G)},
    "mixed_log_cdf": {"log_cdf": _logs(B, G), "prior": _logs(B, G), "samples": M, "prior_samples": 2.0},
    "normalise_advantages": {"advantages": _values(B, G), "mask": _bool(B, G)},
    "optimal_value": {**_REFERENCE, "beta": 0.1},
    "pooled_reward_cdf": {"rewards": _values(B, G), **_REFERENCE},
    "particle_weights": {"log_weights": _logs(B, G)},
    "pessimistic_acceptance": {"rewards": _values(B, G), "level": _logs(B), "best": _values(B), "beta": 0.5},
    "pessimistic_level": {"rewards": _values(B, G), "beta": 0.5},
    "predicted_log_cdf": {"bin_log_probs": _logs(B, T, K)},
    "prefix_log_values": {"bin_log_probs": _logs(B, T, K), "log_weights": _values(K)},
    "qrpo_goal": {"quantiles": _quantiles, "beta": 0.1},
    "qrpo_loss": {**_REGRESSED, "quantiles": _quantiles, "beta": 0.1},
    "ranked_probability_score": {"bin_log_probs": _logs(B, T, K), "labels": _long(B, T)},
    "rao_blackwell_advantages": {
        "target": _target,
        "token_kl": _values(B, G, T),
        "mask": _bool(B, G, T),
        "log_ratio": _values(B, G, T),
    },
    "realigned_logits": {"policy": _values(B, V), "reference": _logs(B, V), "strength": 0.5},
    "reinforce_loss": {"advantages": _values(B, G), **_TOKENS},
    "response_mask": {"tokens": _long(B, G, T), "eos_id": (1, 2)},
    "reverse_divergence": {
        "logits": _values(B, T, V),
        "log_reference": lambda device: _logs(B, T, V)(device).log_softmax(-1),
        "candidates": _candidates(False),
        "log_values": _values(B, T, 2),
        "state_log_values": _values(B, T),
    },
    "reward_cdf": {"rewards": _values(B, G), **_REFERENCE, "estimator": "digamma"},
    "reward_quantiles": {"rewards": _values(B, G), **_REFERENCE},
    "sampled_kl_advantages": {"target": _target, **_BOTH, "mask": _bool(B, G, T)},
    "sequence_log_prob": {"token_log_probs": _logs(B, G, T), "mask": _bool(B, G, T)},
    "soft_selection_probs": {"rewards": _values(B, G), "temperature": 0.5},
    "systematic_resampling": {"weights": _values(B, M), "offsets": _values(B), "count": 3},
    "teacher_probs": {
        "reference_probs": _values(B, T, V),
        "tokens": _long(B, T, 2),
        "correction": _values(B, T, 2),
        "scale": _values(B, T),
    },
    "token_log_probs": {"logits": _values(B, T, V), "tokens": _long(B, T)},
    "token_rewards": {"target": _target, **_BOTH, "mask": _bool(B, G, T)},
    "token_statistics": {
        "logits": _values(B, T, V),
        "reference_logits": _values(B, T, V),
        "tokens": _long(B, T),
        "temperature": 0.7,
    },
    "value_advantages": {
        "target": _target,
        "log_values": _values(B, G, T + 1),
        "token_kl": _values(B, G, T),
        "mask": _bool(B, G, T),
    },
    "vbon_target": {"log_reference": _logs(B, G), "cdf": _cdf, "n": 4.0},
    "vocabulary_kl": {"logits": _values(B, T, V), "reference_logits": _values(B, T, V)},
    "win_rate_by_cdf": {"cdf": _cdf, "n": 4.0},
    "wind_log_ratio": {
        "log_probs": _logs(B, G),
        "anchor_log_probs": _logs(B, G),
        "reference_log_probs": _logs(B, G),
        "beta": 0.5,
        "step_size": 2.0,
    },
    "wind_loss": {"log_ratio": _values(B, G), "rewards": _values(B, G), "fit": "kl"},
    "with_exact_end": {"log_values": _values(B, G, T + 1), "log_weight": _values(B, G), "mask": _bool(B, G, T)},
}


def arguments(name: str, device: str = "cpu") -> dict[str, Any]:
    """The keyword arguments of a valid call, made anew."""
    return {key: value(device) if callable(value) else value for key, value in CALLS[name].items()}


def call(name: str, **changed: Any) -> Any:
    """Call a function with the valid arguments, some of them exchanged."""
    return getattr(functional, name)(**{**arguments(name), **changed})
