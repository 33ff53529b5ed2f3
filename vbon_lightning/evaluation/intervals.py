"""A number with its 95% confidence interval over prompts."""

from __future__ import annotations

import math
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
