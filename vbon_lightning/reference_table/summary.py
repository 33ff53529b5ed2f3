"""A few numbers about a reference table."""

from __future__ import annotations

from typing import Any

import torch

from vbon_lightning.reference_table.reader import ReferenceTable
from vbon_lightning.reference_table.shards import ReferenceTableError


def table_summary(table: ReferenceTable) -> dict[str, Any]:
    """Summarise a reference table; each share and mean is taken within a prompt, then over prompts.

    Args:
        table: the table.

    Returns:
        ``prompts``: their number; ``samples``: M, the minimum over prompts; ``most_samples``: the maximum, where it is
        another, as in a table that is being topped up; ``responses``: their number;
        ``mean_reward``; ``tie_fraction``: the probability that two different samples for the same prompt have
        equal rewards, nan if every prompt has one; ``finished_share``: of responses that ended with an EOS,
        None if unknown.
    """
    keys = table.keys()
    samples = table.samples
    rewards = [table.rewards(key).double() for key in keys]
    ties = []
    for values in rewards:
        m = len(values)
        if m > 1:
            counts = torch.unique(values, return_counts=True)[1].double()
            ties.append((counts * (counts - 1)).sum() / (m * (m - 1)))
    try:
        finished = float(torch.stack([table.finished(key).double().mean() for key in keys]).mean())
    except ReferenceTableError:
        finished = None
    return {
        "prompts": len(keys),
        "samples": samples,
        **({} if table.most_samples == samples else {"most_samples": table.most_samples}),
        "responses": sum(len(values) for values in rewards),
        "mean_reward": float(torch.stack([values.mean() for values in rewards]).mean()),
        "tie_fraction": float(torch.stack(ties).mean()) if ties else float("nan"),
        "finished_share": finished,
    }
