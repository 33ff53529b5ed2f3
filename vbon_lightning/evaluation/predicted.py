"""Best-of-N as a value model predicts it, for prompts that no table holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vbon_lightning.evaluation.intervals import estimate_mean
from vbon_lightning.evaluation.reports import BEST_OF_N, PREDICTED_KL, PREDICTED_WIN_RATE, PolicyReport
from vbon_lightning.functional import (
    binned_bon_kl,
    binned_bon_reward,
    binned_bon_win_rate,
    bon_kl_bound,
    bon_win_rate_bound,
)
from vbon_lightning.functional.reward_bins import RewardBins


@torch.no_grad()
def predicted_bon_reports(log_cdf: Tensor, bins: RewardBins, *, n_values: Sequence[int]) -> list[PolicyReport]:
    """Report on Best-of-N for each N by what a value model predicts of prompts that no table holds.

    Args:
        log_cdf: ``[B, K + 1]`` log of the predicted CDF at the bins' edges.
        bins: The value model's bins.
        n_values: The N to report on; 1 is left out, as the reference itself can be sampled.

    Raises:
        ValueError: If an N is below 1.
    """
    if any(n < 1 for n in n_values):
        raise ValueError(f"Best-of-n needs n >= 1, got {list(n_values)}")
    wanted = sorted({n for n in n_values if n > 1})

    def against(n: int, m: int) -> Tensor:
        return binned_bon_win_rate(log_cdf, bins, n=n, m=m).cpu()

    return [
        PolicyReport(
            name=f"Best-of-{n}",
            method=BEST_OF_N,
            prompts=len(log_cdf),
            samples=0,
            reward=estimate_mean(binned_bon_reward(log_cdf, bins, n=n).cpu()),
            kl=estimate_mean(binned_bon_kl(log_cdf, bins, n=n).cpu()),
            kl_estimator=PREDICTED_KL,
            kl_bound=bon_kl_bound(n),
            win_rate=estimate_mean(against(n, 1)),
            win_rate_bound=bon_win_rate_bound(n),
            win_rate_estimator=PREDICTED_WIN_RATE,
            win_rate_vs_bon={m: estimate_mean(against(n, m)) for m in wanted},
            n=n,
        )
        for n in wanted
    ]
