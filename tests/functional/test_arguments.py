"""Every function's arguments: what is refused, by which name, and what is still taken at a range's ends."""

from __future__ import annotations

import inspect
import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_leaves, tree_map

import vbon_lightning.functional as functional
from tests.functional.calls import CALLS, B, G, M, T, arguments, call
from vbon_lightning.functional import Quantiles, RewardBins, RewardCDF, Target
from vbon_lightning.functional._validate import working_dtype
from vbon_lightning.functional.sequences import scaled_logits

# What takes numbers only, or cuts bins on the CPU.
WITHOUT_TENSORS = {
    *{"annealed_n", "bon_kl_bound", "bon_order_weights", "bon_win_rate_bound", "bonbon_beta", "infalign_slope"},
    *{"kl_weight", "qrpo_log_partition", "realignment_strength", "reward_bins"},
}
# Tensors whose dtype is not looked at: what a model or another function of this package has just made.
UNCHECKED = {
    ("bin_labels", "edges"),
    ("bonbon_loss", "goal"),
    ("edge_log_cdf", "edges"),
    ("forecast_head", "fit"),
    ("forward_divergence", "teacher"),
    ("mixed_log_cdf", "log_cdf"),
    ("mixed_log_cdf", "prior"),
    ("ranked_probability_score", "labels"),
    ("reverse_divergence", "log_reference"),
    ("reverse_divergence", "log_values"),
    ("reverse_divergence", "state_log_values"),
    ("teacher_probs", "correction"),
    ("teacher_probs", "reference_probs"),
    ("teacher_probs", "scale"),
    ("teacher_probs", "tokens"),
    ("value_advantages", "log_values"),
    ("bon_kl", "reference_rewards"),
    ("draw_candidates", "uniforms"),
}


def test_every_function_is_called() -> None:
    public = {name for name in functional.__all__ if inspect.isfunction(getattr(functional, name))}
    assert set(CALLS) == public - WITHOUT_TENSORS


@pytest.mark.parametrize("name", CALLS)
def test_nothing_leaves_its_device_or_waits_for_it(name: str) -> None:
    # Fake tensors refuse an operation over two devices, and one whose result must be known.
    # Which rows a head is fitted to is known from data only; that is before training, where nothing waits.
    unknown_sizes = ShapeEnv() if name == "forecast_head" else None
    with FakeTensorMode(shape_env=unknown_sizes):
        found = getattr(functional, name)(**arguments(name, "meta"))
    tensors = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
    assert tensors
    assert all(tensor.device.type == "meta" for tensor in tensors)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        (name, key)
        for name in CALLS
        for key, value in arguments(name).items()
        if isinstance(value, Tensor) and (name, key) not in UNCHECKED
    ],
)
def test_a_wrong_dtype_is_named(name: str, argument: str) -> None:
    value = arguments(name)[argument]
    if value.dtype == torch.bool:
        wrong, message = value.float(), "must be a bool tensor, got torch.float32"
    elif value.is_floating_point():
        wrong, message = value.long(), "must have a floating-point dtype, got torch.int64"
    else:
        wrong, message = value.float(), "must hold integers such as token ids, got torch.float32"
    with pytest.raises(TypeError, match=rf"^{argument} {message}"):
        call(name, **{argument: wrong})
    with pytest.raises(TypeError, match=rf"^{argument} must be a tensor, got list"):
        call(name, **{argument: value.tolist()})


SHAPES = [
    # function, argument, the tensor's wrong shape, what is said
    ("a_star_po_loss", "rewards", (4,), "rewards must have shape [B, G], got [4]"),
    ("a_star_po_loss", "rewards", (2, 3), "goal must have the shape of log_ratio, [2, 4], got [2, 3]"),
    ("a_star_po_loss", "values", (3,), "values must have shape [B] = [2], got [3]"),
    ("bin_labels", "edges", (1, 2), "edges must have shape [K - 1], got [1, 2] with 2 dimension(s)"),
    ("binned_bon_kl", "log_cdf", (4,), "log_cdf must have shape [B, K + 1], got [4]"),
    ("binned_bon_kl", "log_cdf", (2, 5), "log_cdf must have shape [B, K + 1] with K = 3 bins, got [2, 5]"),
    ("binned_reward_cdf", "rewards", (4,), "rewards must have shape [B, G], got [4]"),
    ("binned_reward_cdf", "log_cdf", (3, 4), "log_cdf must have shape [B, K + 1] = [2, 4], got [3, 4]"),
    ("binned_reward_cdf", "log_cdf", (2, 3), "log_cdf must have shape [B, K + 1] = [2, 4], got [2, 3]"),
    ("bon_expected_reward", "reference_rewards", (8,), "reference_rewards must have shape [B, M], got [8]"),
    ("bon_selection_weights", "reference_rewards", (8,), "reference_rewards must have shape [B, M], got [8]"),
    ("bon_self_win_rate", "reference_rewards", (8,), "reference_rewards must have shape [B, M], got [8]"),
    ("bon_regression_loss", "log_ratio", (2, 3), "goal must have the shape of log_ratio, [2, 3], got [2, 4]"),
    ("bon_regression_loss", "learnt", (2, 3), "learnt must have the shape of log_ratio, [2, 4], got [2, 3]"),
    ("bon_win_rate", "rewards", (8,), "rewards must have shape [B, G], got [8]"),
    ("bon_win_rate", "reference_rewards", (8,), "reference_rewards must have shape [B, M], got [8]"),
    ("bon_win_rate", "rewards", (3, 4), "rewards [B, G] and reference_rewards [B, M] must agree on B, got [3, 4]"),
    ("bon_win_rate", "reference_rewards", (2, 0), "reference_rewards must hold at least one sample a prompt"),
    ("bon_log_ratio", "log_below", (3,), "log_below must have the shape of log_reference, [2], got [3]"),
    ("bon_log_ratio", "log_at_or_below", (3,), "log_at_or_below must have the shape of log_reference, [2], got [3]"),
    ("bonbon_loss", "best_log_prob", (3,), "best_log_prob must have the shape of best_log_ratio, [2], got [3]"),
    ("bonbon_loss", "worst_log_ratio", (3,), "worst_log_ratio must have the shape of best_log_ratio, [2], got [3]"),
    ("bonbon_loss", "told_apart", (3,), "told_apart must have the shape of best_log_ratio, [2], got [3]"),
    ("bradley_terry_loss", "rejected", (3,), "rejected must have the shape of chosen, [2], got [3]"),
    ("candidate_teacher", "log_values", (2, 5, 3), "log_values must have the shape of candidates.log_mass, [2, 5, 2]"),
    ("candidate_teacher", "state_log_values", (2, 4), "state_log_values must have the shape of candidates.log_rest"),
    ("clipped_surrogate_loss", "log_probs", (2, 4, 4), "log_probs must have the shape of mask, [2, 4, 5]"),
    ("clipped_surrogate_loss", "old_log_probs", (2, 4, 4), "old_log_probs must have the shape of mask, [2, 4, 5]"),
    (
        "clipped_surrogate_loss",
        "advantages",
        (4, 5),
        "advantages must have the shape of the mask, [2, 4, 5], or of its",
    ),
    ("clipped_surrogate_loss", "mask", (), "mask must have shape [..., T], got []"),
    ("clipped_value_loss", "values", (2, 4, 4), "values must have the shape of mask, [2, 4, 5]"),
    ("clipped_value_loss", "old_values", (2, 4, 4), "old_values must have the shape of mask, [2, 4, 5]"),
    ("clipped_value_loss", "returns", (2, 4, 4), "returns must have the shape of mask, [2, 4, 5]"),
    ("cost_to_go", "costs", (), "costs must have shape [..., T], got [] with 0 dimension(s)"),
    ("dpo_loss", "told_apart", (3,), "told_apart must have the shape of best_log_ratio, [2], got [3]"),
    ("draw_candidates", "uniforms", (2, 5, 3), "uniforms must have shape [2, 5, 2], got [2, 5, 3]"),
    ("edge_log_cdf", "reference_rewards", (8,), "reference_rewards must have shape [B, M], got [8]"),
    ("edge_log_cdf", "edges", (1, 2), "edges must have shape [K - 1], got [1, 2]"),
    ("exponential_bin_log_weights", "atoms", (4,), "atoms must have shape [K, Q], got [4]"),
    ("forecast_head", "features", (6,), "features must have shape [S, H], got [6]"),
    ("forecast_head", "rewards", (5,), "rewards must have shape [S] = [6], got [5]"),
    ("forecast_log_probs", "outputs", (2, 5, 4), "outputs must have K + 2 = 5 entries, got 4"),
    ("forward_divergence", "teacher", (2, 5, 6), "teacher must have the shape of logits, [2, 5, 7], got [2, 5, 6]"),
    ("generalized_advantage_estimation", "values", (2, 4, 4), "values must have the shape of mask, [2, 4, 5]"),
    ("generalized_advantage_estimation", "token_rewards", (2, 4, 4), "token_rewards must have the shape of mask"),
    ("group_extremes", "rewards", (8,), "rewards must have shape [B, M], got [8]"),
    ("group_extremes", "rewards", (2, 7), "order must have the shape of rewards, [2, 7], got [2, 8]"),
    ("implicit_reward", "mask", (2, 4, 4), "mask must have the shape of log_ratio, [2, 4, 5], got [2, 4, 4]"),
    ("kl_k1", "reference_log_probs", (2, 4, 4), "reference_log_probs must have the shape of log_probs, [2, 4, 5]"),
    ("kl_penalty", "token_kl", (2, 4, 4), "mask must have the shape of token_kl, [2, 4, 4], got [2, 4, 5]"),
    ("leave_one_out", "values", (4,), "values must have shape [B, G, ...], got [4]"),
    ("leave_one_out", "values", (2, 1), "leave-one-out needs G >= 2 samples a prompt, got G = 1 in [2, 1]"),
    ("log_ratio_regression", "goal", (2, 3), "goal must have the shape of log_ratio, [2, 4], got [2, 3]"),
    ("log_ratio_regression", "learnt", (2, 3), "learnt must have the shape of log_ratio, [2, 4], got [2, 3]"),
    ("mixed_log_cdf", "prior", (2, 3), "prior must have the shape of log_cdf, [2, 4], got [2, 3]"),
    ("normalise_advantages", "advantages", (2, 3), "mask must have the shape of advantages, [2, 3], got [2, 4]"),
    ("optimal_value", "reference_rewards", (8,), "reference_rewards must have shape [B, M], got [8]"),
    ("optimal_value", "reference_rewards", (2, 0), "reference_rewards must hold at least one sample a prompt"),
    ("pooled_reward_cdf", "rewards", (3, 4), "rewards [B, G] and reference_rewards [B, M] must agree on B, got [3, 4]"),
    ("qrpo_loss", "log_ratio", (2, 3), "goal must have the shape of log_ratio, [2, 3], got [2, 4]"),
    ("rao_blackwell_advantages", "token_kl", (2, 4, 4), "token_kl must have the shape of mask, [2, 4, 5]"),
    ("rao_blackwell_advantages", "log_ratio", (2, 4, 4), "log_ratio must have the shape of mask, [2, 4, 5]"),
    ("ranked_probability_score", "labels", (2,), "labels must have shape bin_log_probs.shape[:-1] = [2, 5], got [2]"),
    ("realigned_logits", "reference", (2, 6), "reference must have the shape of policy, [2, 7], got [2, 6]"),
    ("reinforce_loss", "log_probs", (2, 4, 4), "log_probs must have the shape of mask, [2, 4, 5], got [2, 4, 4]"),
    ("reverse_divergence", "log_reference", (2, 5, 6), "log_reference must have the shape of logits, [2, 5, 7]"),
    ("reverse_divergence", "log_values", (2, 5, 3), "log_values must have the shape of candidates.tokens, [2, 5, 2]"),
    ("reward_quantiles", "rewards", (4,), "rewards must have shape [B, G], got [4]"),
    ("reward_quantiles", "reference_rewards", (2, 0), "reference_rewards must hold at least one sample a prompt"),
    ("sampled_kl_advantages", "log_probs", (2, 4, 4), "log_probs must have the shape of mask, [2, 4, 5]"),
    ("sampled_kl_advantages", "reference_log_probs", (2, 4, 4), "reference_log_probs must have the shape of mask"),
    ("sampled_kl_advantages", "mask", (4, 5), "mask must have shape [B, G, T], got [4, 5]"),
    ("sampled_kl_advantages", "mask", (3, 4, 5), "target.score must have shape [B, G] = [3, 4], got [2, 4]"),
    ("sequence_log_prob", "token_log_probs", (2, 4, 4), "mask must have the shape of token_log_probs, [2, 4, 4]"),
    ("systematic_resampling", "weights", (8,), "weights must have shape [B, M], got [8]"),
    ("systematic_resampling", "offsets", (3,), "offsets must have shape [B] = [2], got [3]"),
    ("token_log_probs", "tokens", (2, 4), "tokens must have shape logits.shape[:-1] = [2, 5], got [2, 4]"),
    ("token_rewards", "log_probs", (2, 4, 4), "log_probs must have the shape of mask, [2, 4, 5]"),
    ("token_rewards", "reference_log_probs", (2, 4, 4), "reference_log_probs must have the shape of mask"),
    ("token_statistics", "reference_logits", (2, 5, 6), "reference_logits must have the shape of logits, [2, 5, 7]"),
    ("token_statistics", "tokens", (2, 4), "tokens must have shape logits.shape[:-1] = [2, 5], got [2, 4]"),
    ("value_advantages", "token_kl", (2, 4, 4), "token_kl must have the shape of mask, [2, 4, 5]"),
    ("vocabulary_kl", "reference_logits", (2, 5, 6), "reference_logits must have the shape of logits, [2, 5, 7]"),
    ("wind_loss", "rewards", (4,), "rewards must have shape [B, G], got [4]"),
    ("with_exact_end", "log_values", (2, 4, 5), "log_values must have shape [B, G, T + 1] = [2, 4, 6], got [2, 4, 5]"),
    ("with_exact_end", "log_weight", (2, 5), "log_weight must have shape [B, G] = [2, 4], got [2, 5]"),
]


@pytest.mark.parametrize(("name", "argument", "shape", "message"), SHAPES)
def test_a_wrong_shape_is_named(name: str, argument: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}"):
        call(name, **{argument: torch.ones(shape).to(arguments(name)[argument].dtype)})


@pytest.mark.parametrize(
    ("name", "changed", "error", "message"),
    [
        ("draw_candidates", {"uniforms": None}, ValueError, "uniforms must have shape [2, 5, 2], got None"),
        ("draw_candidates", {"top": 0, "draws": 0}, ValueError, "at least one candidate is needed"),
        ("forecast_head", {"fit": torch.ones(5).bool()}, ValueError, "fit must have shape [S] = [6], got [5]"),
        (
            "reward_cdf",
            {"estimator": "no"},
            ValueError,
            "estimator must be one of jeffreys, add_one, laplace, digamma, ",
        ),
        ("qrpo_goal", {"ties": "no"}, ValueError, "ties must be 'exact', 'upper' or 'mid', got 'no'"),
        *[
            (
                name,
                {"reference_rewards": torch.ones(2, 1), "included": True},
                ValueError,
                "reference_rewards must hold another sample beside the response itself, got M = 1",
            )
            for name in ("reward_quantiles", "pooled_reward_cdf")
        ],
        (
            "bond_target",
            {"second_term": False, "cdf": RewardCDF(torch.zeros(2, 4), torch.zeros(2, 4).long())},
            TypeError,
            "cdf.log_at_or_below must have a floating-point dtype",
        ),
        *[
            ("qrpo_goal", {"quantiles": Quantiles(*parts)}, error, message)
            for parts, error, message in (
                ((torch.zeros(2).long(), torch.ones(2)), TypeError, "quantiles.below must have a floating-point dtype"),
                ((torch.zeros(2), torch.ones(2).long()), TypeError, "quantiles.at_or_below must have a floating-point"),
                ((torch.zeros(2), torch.ones(3)), ValueError, "quantiles.below must have the shape of quantiles.at_"),
            )
        ],
        ("edge_log_cdf", {"estimator": "no"}, ValueError, "estimator must be one of jeffreys, add_one, laplace, dig"),
        ("vbon_target", {"bound": "upper"}, ValueError, "bound must be 'exact', 'untied' or 'lower', got 'upper'"),
        (
            "vbon_target",
            {"bound": "lower", "log_ratio_floor": -3.0},
            ValueError,
            "log_ratio_floor bounds what it costs",
        ),
        (
            "vbon_target",
            {"bound": "untied", "log_reference": torch.zeros(2, 4).long()},
            TypeError,
            "log_reference must",
        ),
        (
            "sampled_kl_advantages",
            {"target": Target(torch.zeros(2, 4).long(), 0.5)},
            TypeError,
            "target.score must have a floating-point dtype",
        ),
    ],
)
def test_a_wrong_setting_is_named(name: str, changed: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^{re.escape(message)}"):
        call(name, **changed)


def test_the_lower_bound_looks_at_the_cdf_it_reads() -> None:
    cdf = arguments("vbon_target")["cdf"]
    with pytest.raises(TypeError, match=r"^cdf\.log_below must have a floating-point dtype"):
        call("vbon_target", bound="lower", cdf=cdf._replace(log_below=torch.zeros(B, G).long()))
    with pytest.raises(
        ValueError, match=r"^cdf\.log_below must have the shape of log_reference, \[2, 4\], got \[2, 3\]"
    ):
        call("vbon_target", bound="lower", cdf=cdf._replace(log_below=torch.zeros(B, 3)))


def _count(limit: int, of: str) -> list[tuple[object, type[Exception], str]]:
    return [
        (0, ValueError, f"n must satisfy 1 <= n <= {limit} ({of}"),
        (limit + 1, ValueError, f"n must satisfy 1 <= n <= {limit} ({of}"),
        (2.0, TypeError, "n counts samples here and must be an integer, got 2.0 of type float"),
        (True, TypeError, "n counts samples here and must be an integer, got True of type bool"),
    ]


def _real(name: str, message: str, *refused: float) -> list[tuple[object, type[Exception], str]]:
    return [(value, ValueError, f"{name} must be {message}, got {value!r}") for value in refused] + [
        ("2", TypeError, f"{name} must be a real number, got '2' of type str"),
        (True, TypeError, f"{name} must be a real number, got True of type bool"),
        (float("inf"), ValueError, f"{name} must be finite, got inf"),
    ]


ABOVE_0, AT_LEAST_0, AT_LEAST_1 = "greater than 0", "at least 0", "at least 1"


def _share(name: str) -> list[tuple[object, type[Exception], str]]:
    return [*_real(name, AT_LEAST_0, -0.1), (1.1, ValueError, f"{name} must be at most 1, got 1.1")]


RANGES: list[tuple[str, str, list[object], list[tuple[object, type[Exception], str]]]] = [
    # function, argument, what is taken, what is refused
    *[(f"binned_bon_{of}", "n", [1.0, 1.5], _real("n", AT_LEAST_1, 0.9)) for of in ("kl", "reward", "win_rate")],
    ("binned_bon_win_rate", "m", [1.0, 1.5], _real("m", AT_LEAST_1, 0.9)),
    ("bon_bin_log_weights", "n", [1.0, 1.5], _real("n", AT_LEAST_1, 0.9)),
    *[(f"bon_{of}", "n", [0.1, 0.5], _real("n", ABOVE_0, 0.0)) for of in ("log_prob", "log_ratio")],
    *[(f"bon_{of}", "n", [1.0, 1.5], _real("n", AT_LEAST_1, 0.9)) for of in ("kl_estimate", "log_ratio_bound")],
    *[
        (f"bon_{of}", "n", [1, M], _count(M, "M, the cached samples a prompt)"))
        for of in ("expected_reward", "selection_weights", "win_rate")
    ],
    ("a_star_po_loss", "beta", [0.5, 2.0], _real("beta", ABOVE_0, 0.0)),
    ("bon_regression_loss", "n", [1.5, 2], _real("n", "greater than 1", 1.0)),
    ("bon_regression_loss", "log_ratio_floor", [-0.5, -1e-3], _real("log_ratio_floor", "less than 0", 0.0)),
    ("log_ratio_regression", "scale", [0.5, 2.0], _real("scale", ABOVE_0, 0.0)),
    *[(name, "beta", [0.5, 2.0], _real("beta", ABOVE_0, 0.0)) for name in ("optimal_value", "qrpo_goal", "qrpo_loss")],
    ("bon_self_win_rate", "n", [1, M - 1], _count(M - 1, "M - 1, one of the M cached samples being the opponent)")),
    ("group_extremes", "n", [1, 4], [(9, ValueError, "n must satisfy 1 <= n <= 8 (M, the cached samples a prompt)")]),
    ("group_extremes", "groups", [1, 2], [(3, ValueError, "groups must satisfy 1 <= groups <= 2 (M // n = 8 // 4)")]),
    ("bonbon_loss", "alpha", [0.0, 1.0], _share("alpha")),
    ("bradley_terry_loss", "centre", [0.0, 0.5], _real("centre", AT_LEAST_0, -0.1)),
    ("clipped_surrogate_loss", "clip", [0.5, 2.0], _real("clip", ABOVE_0, 0.0)),
    ("clipped_surrogate_loss", "clip_high", [0.5, 2.0], _real("clip_high", ABOVE_0, 0.0)),
    ("clipped_value_loss", "clip", [0.5, 2.0], _real("clip", ABOVE_0, 0.0)),
    ("dpo_loss", "beta", [0.5, 2.0], _real("beta", ABOVE_0, 0.0)),
    ("draw_candidates", "top", [0, 1], [(-1, ValueError, "top must be at least 0, got -1")]),
    ("draw_candidates", "draws", [], [(-1, ValueError, "draws must be at least 0, got -1")]),
    ("exponential_bin_log_weights", "beta", [0.5, 2.0], _real("beta", ABOVE_0, 0.0)),
    ("generalized_advantage_estimation", "gamma", [0.0, 1.0], _share("gamma")),
    ("generalized_advantage_estimation", "lam", [0.0, 1.0], _share("lam")),
    ("value_advantages", "lam", [0.0, 1.0], _share("lam")),
    ("kl_rl_target", "beta", [0.0, 0.5], _real("beta", AT_LEAST_0, -0.1)),
    ("mixed_log_cdf", "samples", [1, 2], [(0, ValueError, "samples must be at least 1, got 0")]),
    ("mixed_log_cdf", "prior_samples", [0.0, 0.5], _real("prior_samples", AT_LEAST_0, -0.1)),
    ("normalise_advantages", "eps", [0.0, 0.5], _real("eps", AT_LEAST_0, -0.1)),
    *[(f"pessimistic_{of}", "beta", [0.5, 2.0], _real("beta", ABOVE_0, 0.0)) for of in ("acceptance", "level")],
    ("realigned_logits", "strength", [-1.0, 2.0], _real("strength", "")),
    *[
        (name, "temperature", [0.5, 2.0], _real("temperature", ABOVE_0, 0.0))
        for name in ("token_log_probs", "token_statistics", "vocabulary_kl")
    ],
    (
        "systematic_resampling",
        "count",
        [1, 9],
        [
            (0, ValueError, "count must be at least 1, got 0"),
            (1.0, TypeError, "count must be an integer, got 1.0 of type float"),
            (True, TypeError, "count must be an integer, got True of type bool"),
        ],
    ),
    ("vbon_target", "n", [1.5, 2], _real("n", "greater than 1", 1.0)),
    ("vbon_target", "log_ratio_floor", [-0.5, -1e-3], _real("log_ratio_floor", "less than 0", 0.0)),
    ("win_rate_by_cdf", "n", [1.0, 1.5], _real("n", AT_LEAST_1, 0.9)),
]


@pytest.mark.parametrize(
    ("name", "argument", "value", "error", "message"),
    [(name, argument, *row) for name, argument, _, refused in RANGES for row in refused],
)
def test_a_value_out_of_range_is_named(
    name: str, argument: str, value: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=rf"^{re.escape(message)}"):
        call(name, **{argument: value})


@pytest.mark.parametrize(
    ("name", "argument", "value"), [(name, argument, value) for name, argument, taken, _ in RANGES for value in taken]
)
def test_the_ends_of_a_range_are_taken(name: str, argument: str, value: object) -> None:
    call(name, **{argument: value})


@pytest.mark.parametrize(
    ("name", "defaults"),
    [
        ("binned_bon_win_rate", {"m": 1.0}),
        ("bonbon_loss", {"alpha": 0.005}),
        ("bradley_terry_loss", {"centre": 0.0}),
        ("clipped_surrogate_loss", {"clip": 0.2, "clip_high": None}),
        ("clipped_value_loss", {"clip": 0.2}),
        ("draw_candidates", {"draws": 0}),
        ("edge_log_cdf", {"estimator": "jeffreys"}),
        ("forecast_head", {"ridge": 1e-3}),
        ("generalized_advantage_estimation", {"gamma": 1.0, "lam": 0.95}),
        ("infalign_target", {"transform": "exp", "slope": 7.0, "ties": "middle"}),
        ("log_ratio_regression", {"scale": 1.0}),
        ("normalise_advantages", {"eps": 1e-8}),
        ("pooled_reward_cdf", {"included": False}),
        ("qrpo_goal", {"ties": "exact"}),
        ("qrpo_loss", {"ties": "exact"}),
        ("reward_cdf", {"estimator": "jeffreys"}),
        ("reward_quantiles", {"included": False}),
        ("token_log_probs", {"temperature": 1.0}),
        ("token_statistics", {"temperature": 1.0}),
        ("value_advantages", {"lam": 1.0, "siblings": True}),
        ("vbon_target", {"bound": "exact"}),
        ("vocabulary_kl", {"temperature": 1.0}),
        ("wind_loss", {"fit": "squared"}),
    ],
)
def test_what_is_not_said_is_the_documented_default(name: str, defaults: dict[str, object]) -> None:
    torch.manual_seed(0)
    given = {
        key: torch.randn_like(value) * 2 if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in arguments(name).items()
        if key not in defaults
    }
    function = getattr(functional, name)
    got, want = function(**given), function(**given, **defaults)
    for left, right in zip(tree_leaves(got), tree_leaves(want), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)
    other = {
        key: not value if isinstance(value, bool) else 0.5 if value != 0.5 else 0.25 for key, value in defaults.items()
    }
    for key, value in other.items():
        if isinstance(defaults[key], str) or key in ("eps", "draws", "m"):
            continue
        changed = tree_leaves(function(**{**given, **defaults, key: value}))
        assert any(not torch.equal(a, b) for a, b in zip(changed, tree_leaves(want), strict=True)), key


@pytest.mark.parametrize("name", ["bon_kl_bound", "bon_win_rate_bound"])
def test_bounds_of_a_number(name: str) -> None:
    for value, error, message in _real("n", ABOVE_0, 0.0, -1.0):
        with pytest.raises(error, match=rf"^{re.escape(message)}"):
            getattr(functional, name)(value)
    assert isinstance(getattr(functional, name)(0.5), float)


def test_the_weight_of_the_kl_needs_more_than_one_sample() -> None:
    for value, error, message in _real("n", "greater than 1", 1.0, 0.5):
        with pytest.raises(error, match=rf"^{re.escape(message)}"):
            functional.kl_weight(value)  # type: ignore[arg-type]
    assert functional.kl_weight(1.5) == 2.0


def test_the_way_from_one_n_to_another_is_of_two_numbers() -> None:
    for name, refused in (("n", _real("n", "greater than 1", 1.0)), ("wanted", _real("wanted", AT_LEAST_1, 0.9))):
        for value, error, message in refused:
            with pytest.raises(error, match=rf"^{re.escape(message)}"):
                functional.realignment_strength(**{"n": 4.0, "wanted": 2.0, name: value})
    assert functional.realignment_strength(1.5, 1.0) == 0.0


def test_counts_of_order_weights_and_pairs() -> None:
    for value, message in ((4.0, "got 4.0 of type float"), (True, "got True of type bool")):
        with pytest.raises(TypeError, match=rf"^m counts samples and must be an integer, {message}$"):
            functional.bon_order_weights(value, 1)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=rf"^n counts samples here and must be an integer, {message}$"):
            functional.bonbon_beta(value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^n must satisfy 1 <= n <= 4 \(the m samples at hand\), got 5; cache more"):
        functional.bon_order_weights(4, 5)
    with pytest.raises(ValueError, match=r"^n must be greater than 1, got 1$"):
        functional.bonbon_beta(1)
    assert functional.bonbon_beta(2) == 0.5


def test_bins_need_two_values_and_two_of_each() -> None:
    rewards = torch.tensor([0.0, 1.0, 2.0])
    for name in ("bins", "atoms"):
        for value, error, message in _real(name, "at least 2", 1):
            with pytest.raises(error, match=rf"^{re.escape(message)}"):
                functional.reward_bins(rewards, **{"bins": 2, name: value})
        functional.reward_bins(rewards, **{"bins": 2, name: 2})
    with pytest.raises(TypeError, match="^rewards must have a floating-point dtype"):
        functional.reward_bins(rewards.long(), bins=2)
    for wrong in (torch.tensor([]), torch.tensor([0.0, torch.inf]), torch.tensor([0.0, torch.nan])):
        with pytest.raises(ValueError, match="^rewards must be finite numbers, at least one$"):
            functional.reward_bins(wrong, bins=2)
    with pytest.raises(ValueError, match="^all 2 rewards are 3: there is nothing to tell apart$"):
        functional.reward_bins(torch.tensor([3.0, 3.0]), bins=2)


def test_a_wrong_number_of_dimensions() -> None:
    assert call("cost_to_go", costs=torch.ones(T)).tolist() == [4.0, 3.0, 2.0, 1.0, 0.0]
    assert call("leave_one_out", values=torch.ones(B, G, T)).shape == (B, G, T)


AS_ITS_INPUT, SINGLE, WIDE, DOUBLE = "as its input", "float32", "float32 or wider", "float64"
DTYPES = {
    SINGLE: {"length_weights"},  # of a mask
    WIDE: {
        "forecast_log_probs",
        "prefix_log_values",
        "realigned_logits",
        "token_log_probs",
        "token_statistics",
        "vocabulary_kl",
    },
    DOUBLE: {
        "binned_bon_kl",
        "binned_bon_reward",
        "binned_bon_win_rate",
        "bon_bin_log_weights",
        "bon_kl",
        "bon_selection_weights",
        "bonbon_gap",
        "edge_log_cdf",
        "effective_samples",
        "exponential_bin_log_weights",
        "forecast_head",
        "particle_weights",
        "pessimistic_acceptance",
        "pessimistic_level",
        "predicted_log_cdf",
        "soft_selection_probs",
    },
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_the_dtype_of_what_comes_back(name: str, dtype: torch.dtype) -> None:
    def cast(value: object) -> object:
        if isinstance(value, RewardBins):
            return value
        return tree_map(
            lambda leaf: leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, value
        )

    found = getattr(functional, name)(**{key: cast(value) for key, value in arguments(name).items()})
    want = dtype
    if name in DTYPES[DOUBLE]:
        want = torch.float64
    elif name in DTYPES[SINGLE]:
        want = torch.float32
    elif name in DTYPES[WIDE]:
        want = torch.promote_types(dtype, torch.float32)
    if name == "clipped_surrogate_loss":
        found = found._replace(clip_fraction=None)  # a share of tokens, whatever they are
    for leaf in tree_leaves(found):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            assert leaf.dtype == want, leaf


@pytest.mark.parametrize(
    "name",
    [
        "bon_bin_log_weights",
        "cost_to_go",
        "draw_candidates",
        "forecast_log_probs",
        "forward_divergence",
        "predicted_log_cdf",
        "prefix_log_values",
        "ranked_probability_score",
        "reverse_divergence",
        "sequence_log_prob",
        "teacher_probs",
        "token_log_probs",
        "token_statistics",
        "vocabulary_kl",
    ],
)
def test_leading_dimensions_are_as_many_rows(name: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def mixed(value: object) -> object:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1:
            return value - torch.rand(value.shape, generator=generator)
        return value

    given = {
        key: value if isinstance(value, RewardBins) else tree_map(mixed, value)
        for key, value in arguments(name).items()
    }
    if name == "draw_candidates":
        given["log_reference"], given["uniforms"] = given["log_reference"].log_softmax(-1), given["uniforms"].abs() % 1
    leading = next(value for value in given.values() if isinstance(value, Tensor)).shape[:2]

    def rows(value: object) -> object:
        if isinstance(value, RewardBins):
            return value
        return tree_map(
            lambda leaf: leaf.flatten(0, 1) if isinstance(leaf, Tensor) and leaf.shape[:2] == leading else leaf, value
        )

    function = getattr(functional, name)
    got = function(**given)
    want = function(**{key: rows(value) for key, value in given.items()})
    for left, right in zip(tree_leaves(got), tree_leaves(want), strict=True):
        if left is not None:
            assert left.shape[: len(leading)] == leading
            torch.testing.assert_close(left.flatten(0, 1) if len(leading) > 1 else left, right)


def test_truth_values_are_no_token_ids() -> None:
    with pytest.raises(TypeError, match="^tokens must hold integers such as token ids, got torch.bool$"):
        call("token_log_probs", tokens=torch.zeros(B, T, dtype=torch.bool))
    with pytest.raises(TypeError, match="^tokens must hold integers such as token ids, got torch.complex64$"):
        call("token_log_probs", tokens=torch.zeros(B, T, dtype=torch.complex64))


def test_one_response_by_itself_is_masked_too() -> None:
    values, mask = torch.arange(3.0), torch.tensor([True, True, False])
    assert functional.reinforce_loss(values, torch.ones(3), mask).item() == -1.0
    assert functional.clipped_value_loss(values, values, values + 1, mask).item() == 1.0


def test_log_probabilities_above_one_are_taken_for_one() -> None:
    zero, below = torch.zeros(2), torch.tensor([-0.5, -2.0])
    for name in ("bon_log_ratio", "bon_log_prob"):
        function = getattr(functional, name)
        for key in ("log_reference", "log_below", "log_at_or_below"):
            given = {"log_reference": below - 1, "log_below": below - 1, "log_at_or_below": below / 2, "n": 3.0}
            assert torch.equal(function(**{**given, key: zero + 0.3}), function(**{**given, key: zero})), (name, key)
    assert (functional.bon_log_prob(zero + 0.3, below, n=3.0) <= 0).all()
    assert torch.equal(functional.bon_log_ratio_bound(zero + 0.3, n=3.0), functional.bon_log_ratio_bound(zero, n=3.0))
    assert torch.equal(functional.bon_kl_estimate(zero + 0.3, n=3.0), functional.bon_kl_estimate(zero, n=3.0))


def test_single_precision_is_computed_in_double() -> None:
    n = 1e6
    log_below = torch.tensor([-math.log(n) / (n - 1)])
    exact = math.log(n) + (n - 1) * log_below.double().item()
    assert functional.bon_log_ratio_bound(log_below, n=n).item() == pytest.approx(exact, abs=1e-9)
    log_e = torch.tensor([-13.0, -9.5, -0.7])
    for found, e in zip(functional.bon_kl_estimate(log_e, n=50.0).tolist(), log_e.double().exp().tolist(), strict=True):
        miss = (1 - e) ** 50
        spread = math.log(50) + 49 * math.log1p(-e) - 49 / 50
        assert found == pytest.approx(miss * spread + (1 - miss) * math.log((1 - miss) / e), rel=1e-6)
    log_cdf = torch.tensor([[-torch.inf, -1e-6, -5e-7, 0.0]])
    wide = functional.bon_bin_log_weights(log_cdf.double(), n=1e5)
    assert torch.equal(functional.bon_bin_log_weights(log_cdf, n=1e5), wide)


def test_a_cdf_that_falls_is_taken_for_one_that_stands() -> None:
    falling, standing = torch.tensor([[-2.0, -2.5, 0.0]]).double(), torch.tensor([[-2.5, -2.5, 0.0]]).double()
    found = functional.bon_bin_log_weights(falling, n=3.0)[:, 0]
    torch.testing.assert_close(found, functional.bon_bin_log_weights(standing, n=3.0)[:, 0])


def test_values_are_in_the_dtype_of_the_kl() -> None:
    given = arguments("value_advantages")
    given["target"] = Target(given["target"].score.double(), 0.5)
    assert call("value_advantages", **{**given, "log_values": given["log_values"].double()}).dtype == torch.float32


def test_nothing_is_copied_at_temperature_one() -> None:
    logits = torch.randn(2, 3)
    assert scaled_logits(logits, 1.0) is logits
    scaled = scaled_logits(logits, 2.0)
    assert torch.equal(scaled.amax(-1), torch.zeros(2))
    torch.testing.assert_close(scaled.diff(dim=-1), (logits / 2).diff(dim=-1))


def test_a_row_without_numbers_leaves_the_others_alone() -> None:
    rewards = torch.tensor([[1.0, math.nan, 3.0], [1.0, 2.0, 3.0]])
    references = torch.tensor([[0.0, 2.0, 4.0], [0.0, math.nan, 4.0], [0.0, 2.0, 4.0]])
    found = functional.reward_cdf(rewards, references[:2])
    assert found.log_below.isnan().tolist() == [[False, True, False], [True, True, True]]
    alone = functional.reward_cdf(rewards[:1], references[:1])
    assert torch.equal(found.log_below[0, 0], alone.log_below[0, 0])
    assert functional.bon_win_rate(rewards, references[:2], n=2).isnan().tolist() == [[False, True, False], [True] * 3]
    assert functional.bon_selection_weights(references, n=2).isnan().any(-1).tolist() == [False, True, False]
    assert functional.bon_self_win_rate(references, n=2).isnan().tolist() == [False, True, False]


def test_what_is_added_up_is_double_where_there_is_double() -> None:
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float64), ("mps", torch.float32)):
        assert working_dtype(SimpleNamespace(device=torch.device(device))) == dtype  # type: ignore[arg-type]
