"""Measure what it costs to predict a prompt's reward distribution instead of sampling it.

python -m benchmarks.amortised_cdf --config configs/sentiment/data.yaml --data.value_model runs/sentiment/value/export

The optimum of vBoN is the reference times w_N(y), with w_N from the distribution F of the prompt's rewards. Half of
each prompt's responses stand for the reference and are weighted; F is that of the other half (of its first M),
predicted from the prompt, or both, the prediction counting for `prior_samples` of the M. Reported are the optimum's win
rate over the reference and its KL to it, and the KL from Best-of-N's own weights.

Also tried: M where it is needed. Of each prompt half of M are drawn first; the half of the prompts whose rewards fit
their prediction worst (Cramer-von Mises) then get another M each, so that the mean is M. And the same with the prompts
chosen by the error itself, which nobody knows: what such a choice could bring at most.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from jsonargparse import auto_cli
from torch import Tensor

from vbon_lightning import AlignmentDataModule
from vbon_lightning.data import Split
from vbon_lightning.functional import RewardCDF, bon_win_rate, mixed_log_cdf, reward_cdf
from vbon_lightning.functional.best_of_n import bon_log_ratio
from vbon_lightning.prefix_scorer import PrefixScorer


def log_weights(cdf: RewardCDF, n: float) -> Tensor:
    """Return normalised log-weights ``[B, M]`` of the optimum over M equally likely responses."""
    nothing = torch.full_like(cdf.log_below, -torch.inf)  # a response's own probability is negligible
    return bon_log_ratio(nothing, cdf.log_below, n=n, log_at_or_below=cdf.log_at_or_below).log_softmax(-1)


def with_prediction(
    weighed: Tensor, others: Tensor, counts: Tensor, prediction: RewardCDF, prior_samples: float
) -> RewardCDF:
    """Return F at ``weighed`` by the first ``counts`` of each prompt's rewards and the prediction together."""
    below, at_or_below = torch.empty_like(weighed), torch.empty_like(weighed)
    for m in counts.unique().tolist():
        own = counts == m
        known = reward_cdf(weighed[own], others[own, :m])
        for target, log_cdf, ahead in zip((below, at_or_below), known, prediction, strict=True):
            target[own] = mixed_log_cdf(log_cdf, ahead[own], samples=m, prior_samples=prior_samples)
    return RewardCDF(below, at_or_below)


def misfit(cdf: RewardCDF) -> Tensor:
    """Return how badly rewards fit the distributions they are placed in, by Cramer and von Mises: ``[B]``."""
    ranks = ((cdf.log_below.exp() + cdf.log_at_or_below.exp()) / 2).sort(-1).values
    count = ranks.shape[1]
    expected = (2 * torch.arange(count, device=ranks.device) + 1) / (2 * count)
    return (ranks - expected).square().sum(-1)


def more_where(need: Tensor, m: int) -> Tensor:
    """Give the half of the prompts with the greatest need another m, all others m / 2: ``[B]`` counts of mean m."""
    counts = torch.full((len(need),), m // 2)
    counts[need.argsort(descending=True)[: len(need) // 2]] += m
    return counts


def main(
    data: AlignmentDataModule,
    n: list[float] = [2.0, 4.0, 8.0, 16.0],  # noqa: B006 (never mutated)
    samples: list[int] = [8, 16, 32, 64, 256],  # noqa: B006 (never mutated)
    prior_samples: float = 32.0,
    split: Split = "test",
    output: str = "benchmarks/results/amortised_cdf",
) -> None:
    """Compare the optimum under several estimates of F.

    Args:
        data: Prompts, reward, reference table and value model.
        n: Which Best-of-N.
        samples: M of the tables to compare with, each at most half of what there is.
        prior_samples: What the prediction counts for beside them.
        split: Which prompts.
        output: Results go to this path, as .json and .md.
    """
    if data.actors.value_model is None:
        raise ValueError("name the value model: --data.value_model")
    scorer = PrefixScorer.load(data.actors.value_model)
    loader = data.split_dataloader(split)
    predicted = torch.cat([scorer.log_cdf(batch) for batch in loader])
    rewards = data.table_rewards(data.prompts(split)).double()
    half = rewards.shape[1] // 2
    weighed, others = rewards[:, :half], rewards[:, half:]
    win = bon_win_rate(weighed, others, n=1)
    rows = []
    for number in n:
        exact = log_weights(reward_cdf(weighed, others), number)
        estimates = {f"table, M = {m}": reward_cdf(weighed, others[:, :m]) for m in samples if m <= half}
        prediction = scorer.reward_cdf(weighed, predicted)
        estimates["predicted from the prompt"] = prediction

        def both(
            counts: Tensor, number: float = number, prediction: RewardCDF = prediction, exact: Tensor = exact
        ) -> tuple[RewardCDF, Tensor]:
            """Return F by the first of each prompt's rewards and the prediction, and what it errs by."""
            cdf = with_prediction(weighed, others, counts, prediction, prior_samples)
            found = log_weights(cdf, number)
            return cdf, (found.exp() * (found - exact)).sum(-1)

        for m in (m for m in samples if 2 * m <= half):
            even = torch.full((len(rewards),), m)
            name = f"prediction as {prior_samples:g} and M = {m}"
            estimates[name] = both(even)[0]
            if m % 2 == 0:
                first = others[:, : m // 2]
                doubted = misfit(scorer.reward_cdf(first, predicted))
                estimates[f"{name}, more where it fits badly"] = both(more_where(doubted, m))[0]
                estimates[f"{name}, more where it errs most"] = both(more_where(both(even // 2)[1], m))[0]
        for name, cdf in estimates.items():
            found = log_weights(cdf, number)
            weights = found.exp()
            rows.append(
                {
                    "n": number,
                    "F": name,
                    "win_rate": float((weights * win).sum(-1).mean()),
                    "kl": float((weights * (found + torch.log(torch.tensor(float(half))))).sum(-1).mean()),
                    "kl_to_best_of_n": float((weights * (found - exact)).sum(-1).mean()),
                }
            )
    lines = ["| N | F | win rate | KL | KL to Best-of-N |", "| ---: | :--- | ---: | ---: | ---: |"]
    lines += [
        f"| {row['n']:g} | {row['F']} | {row['win_rate']:.3f} | {row['kl']:.3f} | {row['kl_to_best_of_n']:.4f} |"
        for row in rows
    ]
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.with_suffix(".json").write_text(json.dumps(rows, indent=2) + "\n")
    target.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
