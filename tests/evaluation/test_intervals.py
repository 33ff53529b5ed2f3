"""Confidence intervals over prompts and over seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from vbon_lightning.evaluation import Estimate, estimate_mean
from vbon_lightning.evaluation.intervals import estimate_over_seeds


def test_interval_is_students() -> None:
    values = torch.tensor([0.1, 0.5, 0.4, 0.9, -0.3])
    found = estimate_mean(values)
    low, high = stats.ttest_1samp(values.double().numpy(), 0.0).confidence_interval(0.95)
    assert found.mean == pytest.approx((low + high) / 2)
    assert found.half_width == pytest.approx((high - low) / 2)
    assert str(found) == "0.320 ± 0.558"


def test_interval_covers_as_often_as_it_says() -> None:
    draws = torch.randn(2000, 5, generator=torch.Generator().manual_seed(0))
    estimates = [estimate_mean(row) for row in draws]
    covered = np.mean([abs(e.mean) <= e.half_width for e in estimates])
    # A normal quantile in place of Student's would cover 88% of the time.
    assert covered == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 2000))


def test_one_prompt_has_no_interval() -> None:
    assert estimate_mean(torch.tensor([2.0])) == Estimate(2.0, None)
    assert str(Estimate(2.0, None)) == "2.000"


@pytest.mark.parametrize("values", [torch.zeros(0), torch.zeros(2, 2), torch.tensor([1.0, math.nan])])
def test_intervals_need_numbers(values: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="interval over prompts"):
        estimate_mean(values)


def test_estimates_over_seeds_by_hand() -> None:
    one, other = Estimate(0.6, 0.03), Estimate(0.8, 0.05)
    # Student's t for one degree of freedom is 12.706; s = 0.2 / sqrt(2), over sqrt(2) seeds: 0.1.
    found = estimate_over_seeds([one, other])
    assert found.mean == pytest.approx(0.7)
    assert found.half_width == pytest.approx(math.sqrt((0.03**2 + 0.05**2) / 2 + (12.7062 * 0.1) ** 2), rel=1e-4)
    assert estimate_over_seeds([one]) == one
    assert estimate_over_seeds([Estimate(0.6, None)]) == Estimate(0.6, None)
    with pytest.raises(ValueError, match="at least one run"):
        estimate_over_seeds([])
