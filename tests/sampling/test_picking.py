"""Picks are a function of the prompt, the step and the seed, and follow the weights of Best-of-n."""

from __future__ import annotations

import pytest
import torch

from vbon_lightning.functional import bon_selection_weights
from vbon_lightning.sampling import pick_best, pick_groups

ARGUMENTS = {"n": 3, "seed": 5, "stream": "pick", "step": 2}
REWARDS = torch.tensor([[0.1, 2.0, -1.0, 0.5, 1.0, 2.0, 2.0, 0.5], [1.0, 0.0] * 4, [0.0] * 8])


def both(rewards: torch.Tensor, identities: list, **changes) -> torch.Tensor:
    arguments = ARGUMENTS | changes
    groups = pick_groups(rewards, identities, groups=2, **arguments)
    return torch.cat([groups.best, groups.worst, pick_best(rewards, identities, count=4, **arguments)], dim=1)


def test_a_pick_belongs_to_its_prompt() -> None:
    whole = both(REWARDS, [7, 8, 9])
    assert torch.equal(both(REWARDS[[2, 0]], [9, 7]), whole[[2, 0]])
    torch.manual_seed(1)
    assert torch.equal(both(REWARDS, [7, 8, 9]), whole)


@pytest.mark.parametrize("changes", [{"seed": 6}, {"stream": "other"}, {"step": 3}])
def test_other_noise_picks_others(changes: dict) -> None:
    rewards, prompts = REWARDS[:1].expand(16, 8), list(range(16))
    first, second = both(rewards, prompts), both(rewards, prompts, **changes)
    assert (first[:, :4] != second[:, :4]).any()
    assert (first[:, 4:] != second[:, 4:]).any()
    assert len({tuple(row) for row in first.tolist()}) > 8  # prompts differ, too


@pytest.mark.parametrize("row", range(3), ids=["some tie", "two levels", "all tie"])
def test_frequencies(row: int) -> None:
    count, weights = 4000, bon_selection_weights(REWARDS[row : row + 1], n=3)[0]
    rewards, prompts = REWARDS[row].expand(count, 8), list(range(count))
    groups = pick_groups(rewards, prompts, groups=2, **ARGUMENTS)
    worst = bon_selection_weights(-REWARDS[row : row + 1], n=3)[0]
    for found, expected in (
        (groups.best, weights),
        (groups.worst, worst),
        (pick_best(rewards, prompts, count=4, **ARGUMENTS), weights),
    ):
        shares = torch.bincount(found.flatten(), minlength=8).double() / found.numel()
        assert ((shares - expected).abs() <= 4.5 * (expected * (1 - expected) / count).sqrt()).all()
    assert (groups.best != groups.worst).all()
    best, low = REWARDS[row][groups.best], REWARDS[row][groups.worst]
    assert (best >= low).all()


def test_the_weights_vary_less_than_groups() -> None:
    """Systematic resampling stratifies by reward: the mean reward of the picks hardly moves."""
    rewards = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).expand(500, 64)
    prompts = list(range(500))
    by_weights = rewards.gather(1, pick_best(rewards, prompts, count=8, **ARGUMENTS)).mean(-1)
    by_groups = rewards.gather(1, pick_groups(rewards, prompts, groups=8, **ARGUMENTS).best).mean(-1)
    assert by_weights.mean().item() == pytest.approx(by_groups.mean().item(), abs=0.05)
    assert by_weights.std() < 0.75 * by_groups.std()
