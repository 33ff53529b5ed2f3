"""Bins of the raw reward, in which a distributional value model says what reward a response will end with.

Bins are quantiles of the pooled reference rewards. Their edges lie strictly between rewards, so that equal rewards
share a bin, and labels do not change under an increasing transform of the reward. What a bin means for one prompt is
said by that prompt's own distribution function at the edges: a model of the raw reward need not know every prompt's
quantiles.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from vbon_lightning.functional._validate import check_dims, check_float, check_real, working_dtype
from vbon_lightning.functional.best_of_n import log_mean_power
from vbon_lightning.functional.reward_cdf import CDF_ESTIMATORS, RewardCDF


class RewardBins(NamedTuple):
    """K bins of the reward, from the lowest to the highest."""

    edges: Tensor
    """``[K - 1]`` float64, ascending: the inner edges. Bin k holds the rewards from edge k - 1 to edge k."""
    atoms: Tensor
    """``[K, Q]`` float64: Q quantiles of the pooled rewards within each bin, ascending."""

    @property
    def size(self) -> int:
        """Return K."""
        return self.atoms.shape[0]


@torch.no_grad()
def reward_bins(rewards: Tensor, *, bins: int, atoms: int = 16) -> RewardBins:
    """Cut pooled rewards into bins of about equal weight; rewards that are equal share a bin.

    Where rewards tie there are fewer bins than asked for (a reward of 0 and 1 has two), or more: a long run of equal
    rewards that a cut falls into gets a bin of its own.

    Args:
        rewards: any shape, at least two different values, finite.
        bins: about how many, at least 2; never as many as twice that.
        atoms: Q, quantiles kept of each bin, at least 2.

    Returns:
        :class:`RewardBins` on the CPU.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: if ``bins < 2`` or ``atoms < 2``, a reward is not finite, or all rewards are the same.
    """
    check_float("rewards", rewards)
    check_real("bins", bins, at_least=2)
    check_real("atoms", atoms, at_least=2)
    ordered = rewards.detach().double().flatten().cpu().sort().values
    if not len(ordered) or not bool(ordered.isfinite().all()):
        raise ValueError("rewards must be finite numbers, at least one")
    if ordered[0] == ordered[-1]:
        raise ValueError(f"all {len(ordered)} rewards are {ordered[0]:g}: there is nothing to tell apart")
    cuts = (torch.arange(1, bins, dtype=torch.float64) / bins * len(ordered)).round().long().clamp(1, len(ordered) - 1)
    # A cut within a run of equal rewards moves to the run's nearer end, and a long run gets a bin of its own; cuts at
    # either end of all fall away.
    low, high = torch.searchsorted(ordered, ordered[cuts]), torch.searchsorted(ordered, ordered[cuts], right=True)
    long = (high - low) * 2 * bins > len(ordered)
    nearer = torch.where((cuts - low) <= (high - cuts), low, high)
    cuts = torch.cat([torch.where(long, low, nearer), torch.where(long, high, nearer)])
    cuts = cuts[(cuts > 0) & (cuts < len(ordered))].unique()
    low_side, high_side = ordered[cuts - 1], ordered[cuts]
    middle = low_side + (high_side - low_side) / 2
    edges = torch.where(middle < high_side, middle, low_side)  # neighbouring doubles have nothing between them
    bounds = [0, *cuts.tolist(), len(ordered)]
    middles = (torch.arange(atoms, dtype=torch.float64) + 0.5) / atoms
    quantiles = [torch.quantile(ordered[start:stop], middles) for start, stop in pairwise(bounds)]
    return RewardBins(edges, torch.stack(quantiles))


def bin_labels(rewards: Tensor, edges: Tensor) -> Tensor:
    """Return the bin of each reward, from 0 to K - 1.

    Args:
        rewards: any shape.
        edges: ``[K - 1]`` inner edges, ascending.

    Raises:
        TypeError: on a wrong dtype.
    """
    check_float("rewards", rewards)
    check_dims("edges", edges, 1, "[K - 1]")
    dtype = working_dtype(rewards)
    return torch.searchsorted(edges.to(rewards.device, dtype), rewards.to(dtype).contiguous())


@torch.no_grad()
def edge_log_cdf(reference_rewards: Tensor, edges: Tensor, *, estimator: str = "jeffreys") -> Tensor:
    """Estimate the log of a prompt's reward CDF at the bins' edges, the outer ones included.

    Args:
        reference_rewards: ``[B, M]``.
        edges: ``[K - 1]`` inner edges, ascending.
        estimator: as in :func:`~vbon_lightning.functional.reward_cdf`.

    Returns:
        ``[B, K + 1]`` float64, ascending from ``-inf`` to 0.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: on a wrong shape or an unknown estimator.
    """
    check_float("reference_rewards", reference_rewards)
    check_dims("reference_rewards", reference_rewards, 2, "[B, M]")
    check_dims("edges", edges, 1, "[K - 1]")
    if estimator not in CDF_ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(CDF_ESTIMATORS)}, got {estimator!r}")
    dtype = working_dtype(reference_rewards)
    ordered = reference_rewards.to(dtype).sort(-1).values
    at = edges.to(ordered.device, dtype).expand(len(ordered), -1).contiguous()
    inner = CDF_ESTIMATORS[estimator](torch.searchsorted(ordered, at, right=True).to(dtype), ordered.shape[1])
    return _with_ends(inner)


def predicted_log_cdf(bin_log_probs: Tensor) -> Tensor:
    """Turn predicted bins into the log of the CDF at their edges: F for a prompt that no table holds.

    Args:
        bin_log_probs: ``[..., K]``.

    Returns:
        ``[..., K + 1]`` float64, ascending from ``-inf`` to 0.
    """
    check_float("bin_log_probs", bin_log_probs)
    inner = bin_log_probs.to(working_dtype(bin_log_probs)).logcumsumexp(-1)[..., :-1]
    return _with_ends(inner.clamp(max=0.0))


def _with_ends(inner: Tensor) -> Tensor:
    return torch.cat([torch.full_like(inner[..., :1], -torch.inf), inner, torch.zeros_like(inner[..., :1])], dim=-1)


@torch.no_grad()
def bon_bin_log_weights(log_cdf: Tensor, *, n: float) -> Tensor:
    """Compute the log of what Best-of-N makes of each bin, ``w_n(k) = (F_{k+1}^n - F_k^n) / (F_{k+1} - F_k)``.

    The mean over a bin of the ratio of Best-of-N to the reference; of a bin without mass its limit, ``n F^{n-1}``.
    Weighted by the bins' own probabilities the weights sum to 1, whatever F.

    Args:
        log_cdf: ``[..., K + 1]``, log of the CDF at the edges, from ``-inf`` to 0.
        n: number of samples of Best-of-N, any real >= 1.

    Returns:
        ``[..., K]`` float64.

    Raises:
        TypeError: on a wrong dtype or an ``n`` that is not a number.
        ValueError: if ``n < 1``.
    """
    check_float("log_cdf", log_cdf)
    check_real("n", n, at_least=1.0)
    below, above = log_cdf[..., :-1].to(working_dtype(log_cdf)), log_cdf[..., 1:].to(working_dtype(log_cdf))
    empty = above == -torch.inf
    step = torch.where(empty, above, (below - above).clamp(max=0.0))
    scaled = torch.where(empty, above if n > 1 else torch.zeros_like(above), (n - 1) * above)
    return scaled + log_mean_power(step, n)


@torch.no_grad()
def exponential_bin_log_weights(atoms: Tensor, *, beta: float) -> Tensor:
    """Compute ``log E[exp(r / beta)]`` within each bin: what KL-regularised RL makes of it, up to a constant.

    Args:
        atoms: ``[K, Q]`` quantiles of the reward within each bin.
        beta: the KL coefficient, > 0.

    Returns:
        ``[K]`` float64.

    Raises:
        TypeError: on a wrong dtype or a ``beta`` that is not a number.
        ValueError: if ``beta <= 0``.
    """
    check_float("atoms", atoms)
    check_dims("atoms", atoms, 2, "[K, Q]")
    check_real("beta", beta, above=0.0)
    values = atoms.to(working_dtype(atoms)) / beta
    return values.logsumexp(-1) - torch.log(torch.tensor(float(atoms.shape[1]), dtype=values.dtype))


@torch.no_grad()
def binned_reward_cdf(rewards: Tensor, log_cdf: Tensor, bins: RewardBins) -> RewardCDF:
    """Place rewards in a distribution that is known at the bins' edges, for prompts that no table holds.

    Within a bin the pooled rewards say how far up a reward lies; a bin of equal rewards is an atom, where F_lt and F_le
    are its two edges.

    Args:
        rewards: ``[B, G]``.
        log_cdf: ``[B, K + 1]`` from :func:`predicted_log_cdf` or :func:`edge_log_cdf`.
        bins: the bins.

    Returns:
        :class:`~vbon_lightning.functional.RewardCDF` of ``[B, G]`` tensors in the dtype of ``rewards``.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: if the shapes do not fit.
    """
    check_float("rewards", rewards)
    check_dims("rewards", rewards, 2, "[B, G]")
    check_float("log_cdf", log_cdf)
    if log_cdf.shape != (rewards.shape[0], bins.size + 1):
        raise ValueError(
            f"log_cdf must have shape [B, K + 1] = {[rewards.shape[0], bins.size + 1]}, got {list(log_cdf.shape)}"
        )
    dtype = working_dtype(rewards)
    labels = bin_labels(rewards, bins.edges)
    cdf = log_cdf.to(dtype).exp()
    low, high = cdf.gather(-1, labels), cdf.gather(-1, labels + 1)
    atoms = bins.atoms.to(rewards.device, dtype)[labels]  # [B, G, Q]
    value = rewards.to(dtype).unsqueeze(-1)
    below, at_or_below = (atoms < value).double().mean(-1), (atoms <= value).double().mean(-1)
    atomic = atoms[..., 0] == atoms[..., -1]
    # Half a quantile of room at either end, so that no reward of a prompt is ruled out.
    room = 0.5 / atoms.shape[-1]
    middle = ((below + at_or_below) / 2).clamp(room, 1 - room)
    start = torch.where(atomic, torch.zeros_like(middle), middle)
    stop = torch.where(atomic, torch.ones_like(middle), middle)
    unknown = rewards.isnan()
    logs = [
        (low + (high - low) * share).log().masked_fill(unknown, torch.nan).to(rewards.dtype) for share in (start, stop)
    ]
    return RewardCDF(log_below=logs[0], log_at_or_below=logs[1])


HEAD_EXTRA = 2
"""Outputs of a value model's head besides one a bin: the location and the log-scale of the reward."""

_SHARPEST = 7.0
"""How far log s may go from 0."""


def forecast_log_probs(outputs: Tensor, bins: RewardBins) -> Tensor:
    """Turn a value model's outputs into log-probabilities of the bins.

    The reward follows a logistic distribution, cut into the bins, times a free factor a bin:
    ``p(k) ~ exp(o_k) (sigmoid((e_{k+1} - m) / s) - sigmoid((e_k - m) / s))``. The free factors alone would do, but
    hardly be learnt: what is certain at a response's end and open at its beginning needs outputs a hundred times as
    large at the one as at the other, and here only the scale s has to change.

    Args:
        outputs: ``[..., K + 2]``: o of each bin, then location m and log s in units of the atoms' mean and standard
            deviation.
        bins: the bins.

    Returns:
        ``[..., K]``, normalised, float32 or wider.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: if there are not K + 2 outputs.
    """
    check_float("outputs", outputs)
    if outputs.shape[-1] != bins.size + HEAD_EXTRA:
        raise ValueError(f"outputs must have K + 2 = {bins.size + HEAD_EXTRA} entries, got {outputs.shape[-1]}")
    wide = outputs if outputs.dtype == torch.float64 else outputs.float()
    centre, spread = _units(bins)
    edges = ((bins.edges - centre) / spread).to(wide)
    free, location, log_scale = wide[..., : bins.size], wide[..., bins.size, None], wide[..., bins.size + 1, None]
    log_scale = log_scale.clamp(-_SHARPEST, _SHARPEST)
    passed = (edges - location) * (-log_scale).exp()  # [..., K - 1]
    gaps = edges.diff().clamp(min=1e-6) * (-log_scale).exp()
    # sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b)); at the ends a = -inf, b = inf.
    below = torch.nn.functional.pad(torch.nn.functional.logsigmoid(passed), (0, 1))
    above = torch.nn.functional.pad(torch.nn.functional.logsigmoid(-passed), (1, 0))
    between = torch.nn.functional.pad(torch.log(-torch.expm1(-gaps)), (1, 1))
    return (free + below + above + between).log_softmax(-1)


def _units(bins: RewardBins) -> tuple[Tensor, Tensor]:
    return bins.atoms.mean(), bins.atoms.std().clamp(min=torch.finfo(torch.float64).tiny)


@torch.no_grad()
def forecast_head(
    features: Tensor, rewards: Tensor, bins: RewardBins, *, fit: Tensor, ridge: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """Fit a linear head by regression: location and log-scale linear in the features, no free factors.

    A body that has learnt the reward, such as a reward model's, then starts where its own head is, and not from
    nothing.

    Args:
        features: ``[S, H]``, S samples.
        rewards: ``[S]``.
        bins: the bins.
        fit: ``[S]`` bool: the samples that the location is fitted to (whole responses, which have their reward); the
            scale is fitted to all of them.
        ridge: the penalty, relative to the features' mean square.

    Returns:
        Weight ``[K + 2, H]`` and bias ``[K + 2]`` of the head, float64.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: if the shapes do not fit.
    """
    check_float("features", features)
    check_float("rewards", rewards)
    check_dims("features", features, 2, "[S, H]")
    for name, value in (("rewards", rewards), ("fit", fit)):
        if value.shape != features.shape[:1]:
            raise ValueError(f"{name} must have shape [S] = {list(features.shape[:1])}, got {list(value.shape)}")
    centre, spread = _units(bins)
    every, values = features.double(), (rewards.double() - centre) / spread
    slope, offset = _ridge(every[fit], values[fit], ridge)
    missed = (values - every @ slope - offset).abs()
    # How far off the location is, is itself a function of the prefix: the regression of its logarithm.
    finest = ((bins.edges[-1] - bins.edges[0]) / spread / bins.size / 4).clamp(min=1e-3)
    log_missed = torch.maximum(missed, finest).log()
    scale_slope, scale_offset = _ridge(every, log_missed, ridge)
    log_scale = every @ scale_slope + scale_offset
    # The mean absolute deviation of a logistic distribution of scale 1 is 2 log 2.
    scale_offset = scale_offset + ((missed * (-log_scale).exp()).mean() / (2 * math.log(2))).log()
    weight = every.new_zeros(bins.size + HEAD_EXTRA, every.shape[1])
    bias = every.new_zeros(bins.size + HEAD_EXTRA)
    weight[bins.size], bias[bins.size] = slope, offset
    weight[bins.size + 1], bias[bins.size + 1] = scale_slope, scale_offset
    return weight, bias


def _ridge(features: Tensor, values: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Return slope ``[H]`` and offset of a regression whose penalty is relative to the features' mean square."""
    middle, mean = features.mean(0), values.mean()
    centred = features - middle
    gram = centred.T @ centred
    gram.diagonal().add_(penalty * gram.diagonal().mean().clamp(min=1e-12))
    slope = torch.linalg.solve(gram, centred.T @ (values - mean))
    return slope, mean - middle @ slope
