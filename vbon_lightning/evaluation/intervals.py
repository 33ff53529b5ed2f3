"""A number with its 95% confidence interval over prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and half the width of its 95% interval."""

    mean: float
    half_width: float | None
    """None where there is no interval: with a single prompt."""

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.half_width is None else f"{self.mean:.3f} ± {self.half_width:.3f}"


def estimate_mean(per_prompt: Tensor, *, confidence: float = 0.95) -> Estimate:
    """Estimate a mean over prompts with Student's t interval.

    ``mean ± t_{(1 + confidence) / 2, B - 1} s / sqrt(B)``, with s the standard deviation of the prompts'
    values. Responses to one prompt are not independent of each other, so the interval is over prompts.

    Args:
        per_prompt: ``[B]`` one value a prompt.
        confidence: Coverage of the interval.

    Raises:
        ValueError: If there is no prompt, or a value is NaN.
    """
    values = per_prompt.detach().double().cpu()
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"an interval over prompts needs one value a prompt, got shape {tuple(values.shape)}")
    if bool(values.isnan().any()):
        raise ValueError("an interval over prompts needs numbers, but some of the prompts' values are NaN")
    count = len(values)
    if count == 1:
        return Estimate(float(values[0]), None)
    quantile = float(stats.t.ppf((1 + confidence) / 2, count - 1))
    return Estimate(float(values.mean()), quantile * float(torch.std(values)) / math.sqrt(count))


def estimate_over_seeds(runs: Sequence[Estimate], *, confidence: float = 0.95) -> Estimate:
    """Join the estimates of one quantity by runs that differ by their seed and share their prompts.

    The prompts are the same for all seeds, so their part of the error does not shrink with more seeds: the half-width
    is ``sqrt(mean(half_width^2) + t^2 s^2 / S)`` with s the standard deviation over the S seeds, t Student's for
    S - 1. A little too wide, since a run's own noise is in both parts.

    Args:
        runs: One estimate a seed.
        confidence: Coverage of the seeds' part; that of the runs' intervals is theirs.

    Returns:
        Mean and half-width; with one seed, that run's.

    Raises:
        ValueError: If there is no run.
    """
    if not runs:
        raise ValueError("an interval over seeds needs at least one run")
    mean = sum(run.mean for run in runs) / len(runs)
    halves = [run.half_width for run in runs if run.half_width is not None]
    prompts = sum(half**2 for half in halves) / len(halves) if halves else 0.0
    if len(runs) == 1:
        return Estimate(mean, halves[0] if halves else None)
    seeds = estimate_mean(torch.tensor([run.mean for run in runs]), confidence=confidence).half_width or 0.0
    return Estimate(mean, math.sqrt(prompts + seeds**2))
