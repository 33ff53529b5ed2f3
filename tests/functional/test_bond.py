"""BOND's target: the sum written out, its optimum, and Best-of-N of Best-of-N."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.functional.test_targets import (
    DISTINCT,
    REFERENCE,
    REWARDS,
    TIED,
    best_of_n,
    exact_cdf,
    exact_gradient,
    expected_gradient,
)
from vbon_lightning.functional import RewardCDF, bond_target, vbon_target


def reward_by_hand(rewards: Tensor, n: int, second_term: bool) -> list[float]:
    """``log F_le + 1/(n-1) log sum_i (F_lt/F_le)^(i-1)``, term by term."""
    found = []
    for reward in rewards.tolist():
        below = float(REFERENCE[rewards < reward].sum())
        up_to = float(REFERENCE[rewards <= reward].sum())
        second = math.log(sum((below / up_to) ** (i - 1) for i in range(1, n + 1))) / (n - 1)
        found.append(math.log(up_to) + (second if second_term else 0.0))
    return found


@REWARDS
@pytest.mark.parametrize("n", [2, 3, 8])
@pytest.mark.parametrize("second_term", [True, False])
def test_the_reward_by_hand(rewards: Tensor, n: int, second_term: bool) -> None:
    target = bond_target(REFERENCE.log(), exact_cdf(REFERENCE, rewards), n=n, second_term=second_term)
    assert target.kl_coef == 1 / (n - 1)
    assert target.score.tolist() == pytest.approx(reward_by_hand(rewards, n, second_term), abs=1e-12)


@REWARDS
def test_with_both_terms_it_is_vbon(rewards: Tensor) -> None:
    cdf = exact_cdf(REFERENCE, rewards)
    ours, theirs = bond_target(REFERENCE.log(), cdf, n=4), vbon_target(REFERENCE.log(), cdf, n=4)
    torch.testing.assert_close(ours.score, theirs.score, rtol=0, atol=1e-12)
    without = bond_target(REFERENCE.log(), cdf, n=4, second_term=False)
    gap = theirs.score - without.score
    assert gap.min() >= 0
    assert gap.max() <= math.log(4) / 3
    assert gap.max() > 0.05


@REWARDS
@pytest.mark.parametrize("second_term", [True, False])
def test_the_expected_gradient(rewards: Tensor, second_term: bool) -> None:
    theta = torch.tensor([0.3, -0.4, 0.1, 0.9], dtype=torch.float64, requires_grad=True)
    target = bond_target(REFERENCE.log(), exact_cdf(REFERENCE, rewards), n=4, second_term=second_term)
    by_hand = torch.tensor(reward_by_hand(rewards, 4, second_term), dtype=torch.float64)
    want = exact_gradient(theta, by_hand, 1 / 3)
    assert want.abs().max() > 1e-2
    torch.testing.assert_close(expected_gradient(theta, target), want, rtol=0, atol=1e-12)


@REWARDS
def test_without_its_second_term_the_optimum_is_another(rewards: Tensor) -> None:
    n = 4
    up_to = torch.stack([REFERENCE[rewards <= reward].sum() for reward in rewards])
    optimum = REFERENCE * up_to ** (n - 1)
    target = bond_target(REFERENCE.log(), exact_cdf(REFERENCE, rewards), n=n, second_term=False)
    log_optimum = (optimum / optimum.sum()).log().requires_grad_()
    assert expected_gradient(log_optimum, target).abs().max() < 1e-13
    log_bon = best_of_n(REFERENCE, rewards, n).log().requires_grad_()
    assert expected_gradient(log_bon, target).abs().max() > 1e-3


@REWARDS
@pytest.mark.parametrize(("n", "stages"), [(2, 3), (3, 2), (1.5, 4)])
def test_iterated_it_ends_at_best_of_n_to_the_stages(rewards: Tensor, n: float, stages: int) -> None:
    """Each stage's optimum ``anchor exp(score / coefficient)`` is the next one's anchor."""
    anchor = REFERENCE
    for _ in range(stages):
        target = bond_target(anchor.log(), exact_cdf(anchor, rewards), n=n)
        anchor = (anchor.log() + target.score / target.kl_coef).exp()
        assert anchor.sum().item() == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(anchor, best_of_n(REFERENCE, rewards, n**stages), rtol=0, atol=1e-12)
    assert (anchor - best_of_n(REFERENCE, rewards, n)).abs().max() > 1e-2


def test_rounding_beyond_a_probability_of_one_is_no_reward() -> None:
    log_up_to = torch.tensor([[1e-3, -0.5]])
    target = bond_target(torch.zeros(1, 2), RewardCDF(log_up_to - 1, log_up_to), n=2, second_term=False)
    assert target.score.tolist() == [[0.0, -0.5]]


def test_refusals() -> None:
    pair = torch.zeros(1, 2)
    for second_term in (True, False):
        with pytest.raises(ValueError, match="n must be greater than 1, got 1"):
            bond_target(pair, RewardCDF(pair, pair), n=1, second_term=second_term)
    with pytest.raises(ValueError, match="log_at_or_below must have the shape of log_anchor"):
        bond_target(pair, RewardCDF(pair, pair[0]), n=2, second_term=False)
    assert not torch.equal(DISTINCT, TIED)
