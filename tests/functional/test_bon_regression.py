"""The Best-of-N regression: its minimum is what N draws and a pick bring, and its weights are those of its table."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.functional.six_responses import (
    AT_OR_BELOW,
    BELOW,
    LOG_P,
    REWARDS,
    expected_gradient,
    minimum,
    objective_gradient,
)
from vbon_lightning.functional import RewardCDF, bon_regression_loss, log_ratio_regression, pooled_reward_cdf

CDF = RewardCDF(BELOW[None].log(), AT_OR_BELOW[None].log())


def best_of(n: int, probabilities: list[float], rewards: list[float]) -> Tensor:
    """Probabilities of what is returned, over every draw of n, ties broken at random."""
    found = torch.zeros(len(rewards), dtype=torch.float64)
    for draw in itertools.product(range(len(rewards)), repeat=n):
        top = max(rewards[place] for place in draw)
        best = [place for place in draw if rewards[place] == top]
        for place in best:
            found[place] += math.prod(probabilities[drawn] for drawn in draw) / len(best)
    return found


def weights(cdf: RewardCDF, n: float) -> Tensor:
    """The Best-of-n weights, from the loss at a log-ratio of 0 and 1: its goals."""
    zero = torch.zeros_like(cdf.log_at_or_below)
    goals = [
        bon_regression_loss(zero[:, k : k + 1], RewardCDF(*(part[:, k : k + 1] for part in cdf)), n=n).goal
        for k in range(zero.shape[1])
    ]
    return torch.stack(goals).exp()


# -- the loss --


@pytest.mark.parametrize("n", [2, 4])
def test_the_minimum_is_what_n_draws_and_a_pick_bring(n: int) -> None:
    found = minimum(lambda log_ratio, _: bon_regression_loss(log_ratio, CDF, n=n).loss)
    torch.testing.assert_close(found, best_of(n, LOG_P.exp().tolist(), REWARDS.tolist()).log(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("n", [1.3, 2.5, 16.0, 1e4])
def test_any_real_n_is_met_by_a_distribution(n: float) -> None:
    assert (LOG_P.exp() * weights(CDF, n)).sum().item() == pytest.approx(1, abs=1e-12)


def test_on_the_policys_responses_the_expected_gradient_is_that_of_the_kl_to_best_of_n() -> None:
    best = best_of(3, LOG_P.exp().tolist(), REWARDS.tolist()).log()

    def loss(log_ratio: Tensor, some: slice) -> Tensor:
        return bon_regression_loss(log_ratio, RewardCDF(*(part[:, some] for part in CDF)), n=3).loss

    want = objective_gradient(lambda log_pi: 2 * (log_pi.exp() * (log_pi - best)).sum())
    torch.testing.assert_close(expected_gradient(loss), want, rtol=0, atol=1e-10)


def test_a_floor_ends_the_lower_tail() -> None:
    goal = (best_of(4, LOG_P.exp().tolist(), REWARDS.tolist()).log() - LOG_P)[None]
    assert goal.min() < -1.5 < goal.max()
    log_ratio = torch.linspace(-1, 2, 6, dtype=torch.float64)[None]
    learnt = torch.tensor([[True, True, False, True, True, False]])
    found = bon_regression_loss(log_ratio, CDF, n=4, log_ratio_floor=-1.5, learnt=learnt)
    want = log_ratio_regression(log_ratio, goal.clamp(min=-1.5), learnt=learnt)
    assert found.loss.item() == pytest.approx(want.loss.item(), rel=1e-10)
    assert found.goal.item() == pytest.approx(want.goal.item(), rel=1e-10)
    assert found.loss.item() != pytest.approx(bon_regression_loss(log_ratio, CDF, n=4, learnt=learnt).loss.item())
    floored = (LOG_P.exp() * goal.clamp(min=-1.5).exp()).sum().item()
    assert 1 < floored <= 1 + math.exp(-1.5)


# -- the weights of a table --


@pytest.mark.parametrize("n", [1.5, 2.0, 4.0, 37.0])
def test_the_weights_of_a_table_have_mean_one(n: float) -> None:
    references = torch.randint(6, (5, 12), generator=torch.Generator().manual_seed(0)).double()
    cdf = pooled_reward_cdf(references, references, included=True)
    for row in range(5):
        one = RewardCDF(*(part[row : row + 1] for part in cdf))
        assert weights(one, n).mean().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("rewards", [[3.0, 1.0, 2.0, 0.0], [1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 0.0, 1.0], [2.0] * 4])
def test_the_weights_of_a_table_are_those_of_draws_from_it(rewards: list[float]) -> None:
    table = torch.tensor([rewards], dtype=torch.float64)
    found = weights(pooled_reward_cdf(table, table, included=True), 3)
    torch.testing.assert_close(found, 4 * best_of(3, [0.25] * 4, rewards), rtol=0, atol=1e-12)
    # A response that is not one of the table joins it.
    own, others = table[:, :1], table[:, 1:]
    torch.testing.assert_close(weights(pooled_reward_cdf(own, others), 3), found[:1], rtol=0, atol=1e-12)


def test_the_cdf_by_counting() -> None:
    references = torch.tensor([[0.0, 2.0, 2.0, 5.0]])
    of_table = pooled_reward_cdf(references, references, included=True)
    assert of_table.log_below.exp().tolist()[0] == pytest.approx([0.0, 0.25, 0.25, 0.75])
    assert of_table.log_at_or_below.exp().tolist()[0] == pytest.approx([0.25, 0.75, 0.75, 1.0])
    joined = pooled_reward_cdf(torch.tensor([[2.0, -1.0, 6.0, math.nan]]), references)
    assert joined.log_below.exp().tolist()[0][:3] == pytest.approx([0.2, 0.0, 0.8])
    assert joined.log_at_or_below.exp().tolist()[0][:3] == pytest.approx([0.8, 0.2, 1.0])
    assert joined.log_below.isnan().tolist() == joined.log_at_or_below.isnan().tolist() == [[False] * 3 + [True]]
    unknown = torch.tensor([[0.0, math.nan]])
    assert pooled_reward_cdf(references[:, :1], unknown).log_at_or_below.isnan().all()


def test_the_lowest_goal_is_where_m_responses_tell_no_more() -> None:
    references = torch.arange(64.0, dtype=torch.float64)[None]
    lowest = RewardCDF(*(part[:, :1] for part in pooled_reward_cdf(references, references, included=True)))
    goal = bon_regression_loss(torch.zeros(1, 1, dtype=torch.float64), lowest, n=4).goal
    assert goal.item() == pytest.approx(-3 * math.log(64), rel=1e-12)


def test_goals_are_too_high_for_the_worst_and_a_prompt_whose_rewards_all_tie_stays_with_the_reference() -> None:
    """A simulation: the mean goal of a response of quantile u in tables of 16, against 4 u^3."""
    noise = torch.Generator().manual_seed(0)
    others = torch.rand(20_000, 15, dtype=torch.float64, generator=noise)
    bias = []
    for u in (0.02, 0.5, 0.98):
        own = torch.full((20_000, 1), u, dtype=torch.float64)
        cdf = pooled_reward_cdf(own, torch.cat([own, others], 1), included=True)
        goal = bon_regression_loss(torch.zeros_like(own), cdf, n=4).goal.item()
        bias.append(goal - math.log(4 * u**3))
    assert bias[0] > 2.0
    assert abs(bias[1]) < 0.1 and abs(bias[2]) < 0.1
    same = torch.ones(1, 8)
    assert bon_regression_loss(torch.zeros(1, 8), pooled_reward_cdf(same, same, included=True), n=4).loss.item() == 0
