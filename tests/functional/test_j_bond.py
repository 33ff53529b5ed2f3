"""J-BOND's reward, its baseline, and the expected gradient of its three terms by enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.functional.test_targets import REFERENCE, REWARDS, K, best_of_n
from vbon_lightning.functional import (
    bon_cross_entropy,
    j_bond_rewards,
    leave_one_out,
    leave_one_out_of_all,
    reinforce_loss,
)


def test_as_it_is_quoted_with_two_samples() -> None:
    anchors = torch.tensor([[1.0, 2.0]])
    found = j_bond_rewards(torch.tensor([[0.5, 1.0, 1.5, 2.0, 3.0]]), anchors)
    assert found[0].tolist() == pytest.approx([-math.log(16), 0, 0, 0, 0])


def test_of_more_all_pairs_count() -> None:
    rewards, anchors = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[1.0, 2.0, 2.0, 3.0]])
    pairs = list(itertools.combinations(anchors[0].tolist(), 2))
    want = [-math.log(16) * sum(min(pair) > reward for pair in pairs) / len(pairs) for reward in rewards[0].tolist()]
    assert j_bond_rewards(rewards, anchors)[0].tolist() == pytest.approx(want)
    assert j_bond_rewards(torch.tensor([[math.nan, 0.0]]), anchors).isnan().tolist() == [[True, False]]


@REWARDS
@pytest.mark.parametrize("samples", [2, 3])
def test_its_mean_is_the_chance_to_lose_twice(rewards: Tensor, samples: int) -> None:
    found = torch.zeros(K, dtype=torch.float64)
    for places in itertools.product(range(K), repeat=samples):
        drawn = rewards[torch.tensor(places)]
        found += REFERENCE[torch.tensor(places)].prod() * j_bond_rewards(rewards[None], drawn[None])[0]
    above = torch.stack([REFERENCE[rewards > reward].sum() for reward in rewards])
    torch.testing.assert_close(found, -math.log(16) * above**2, rtol=0, atol=1e-12)


@REWARDS
def test_the_expected_gradient_of_all_terms(rewards: Tensor) -> None:
    """Two prompts with one response each and two of the anchor's: every outcome, with the rest of the batch's mean."""
    b, gamma = 0.3, 0.5
    rewards, anchor = rewards[:3], REFERENCE[:3] / REFERENCE[:3].sum()
    theta = torch.tensor([[0.3, -0.4, 0.1], [-0.2, 0.5, 0.0]], dtype=torch.float64, requires_grad=True)
    log_policy, mask = theta.log_softmax(-1), torch.ones(2, 1, 1, dtype=torch.bool)
    rows = torch.arange(2)
    total = torch.zeros((), dtype=torch.float64)
    for places in itertools.product(range(3), repeat=6):
        y, drawn = torch.tensor(places[:2]), torch.tensor(places[2:]).view(2, 2)
        log_probs = log_policy[rows, y].view(2, 1, 1)
        chance = log_probs.detach().sum().exp() * anchor[drawn].prod()
        score = b * j_bond_rewards(rewards[y][:, None], rewards[drawn])
        returns = score[..., None] - (b + gamma) * (log_probs.detach() - anchor.log()[y].view(2, 1, 1))
        advantages = leave_one_out_of_all(returns, mask[..., 0])
        loss = reinforce_loss(log_probs, advantages, mask)
        cross = bon_cross_entropy(log_policy.gather(1, drawn), rewards[drawn], n=2)
        total = total + chance * (loss + (1 - b) * cross)
    got = torch.autograd.grad(total, theta, retain_graph=True)[0]
    policy = log_policy.exp()
    above = torch.stack([anchor[rewards > reward].sum() for reward in rewards])
    backward = (policy * (-math.log(16) * above**2 - (log_policy - anchor.log()))).sum(-1)
    regularisation = (policy * (log_policy - anchor.log())).sum(-1)
    forward = (best_of_n(anchor, rewards, 2) * log_policy).sum(-1)
    objective = (b * backward - gamma * regularisation + (1 - b) * forward).mean()
    want = torch.autograd.grad(-objective, theta)[0]
    assert want.abs().max() > 1e-2
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_the_rest_of_the_batch_by_hand() -> None:
    noise = torch.Generator().manual_seed(0)
    values = torch.randn(3, 2, 4, generator=noise, dtype=torch.float64)
    kept = torch.tensor([[True, True], [False, True], [True, False]])
    found = leave_one_out_of_all(values, kept)
    places = kept.nonzero().tolist()
    for row, column in itertools.product(range(3), range(2)):
        others = [values[i, j] for i, j in places if [i, j] != [row, column]]
        want = values[row, column] - torch.stack(others).mean(0) if kept[row, column] else torch.zeros(4).double()
        torch.testing.assert_close(found[row, column], want, rtol=0, atol=1e-12)
    one = values[:1]
    torch.testing.assert_close(leave_one_out_of_all(one, torch.ones(1, 2).bool()), leave_one_out(one))
    alone = leave_one_out_of_all(values[:1, :1], torch.ones(1, 1).bool())
    assert not alone.any(), "with nothing to compare it with, nothing is learnt"


def test_the_rest_of_the_batch_is_that_of_all_ranks() -> None:
    values, kept = torch.randn(4, 1, 3, generator=torch.Generator().manual_seed(0)), torch.ones(4, 1).bool()
    whole = leave_one_out_of_all(values, kept)
    sums = iter([kept.sum().float(), values.sum((0, 1))])
    mine = leave_one_out_of_all(values[:2], kept[:2], add_up=lambda part: next(sums))
    torch.testing.assert_close(mine, whole[:2])


def test_refusals() -> None:
    with pytest.raises(ValueError, match="anchor_rewards needs M >= 2, got 1"):
        j_bond_rewards(torch.zeros(1, 2), torch.zeros(1, 1))
    with pytest.raises(ValueError, match="must agree on B"):
        j_bond_rewards(torch.zeros(1, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"values must have shape \[B, G, T\]"):
        leave_one_out_of_all(torch.zeros(1, 2), torch.ones(1, 2).bool())
    with pytest.raises(ValueError, match=r"kept must have shape \[B, G\]"):
        leave_one_out_of_all(torch.zeros(1, 2, 3), torch.ones(1, 3).bool())
