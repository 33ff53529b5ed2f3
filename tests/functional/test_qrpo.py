"""QRPO against quadrature, against every table there may be, and at its minimum."""

from __future__ import annotations

import itertools
import math
from typing import Any

import mpmath
import pytest
import scipy.integrate
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
    tables,
)
from vbon_lightning.functional import (
    Quantiles,
    bon_kl_bound,
    qrpo_goal,
    qrpo_log_partition,
    qrpo_loss,
    reward_quantiles,
)

BETA = 0.2
QUANTILES = Quantiles(BELOW[None], AT_OR_BELOW[None])


def optimum(beta: float) -> Tensor:
    """log of ref exp(q / beta) / Z, a tie being broken at random: each u between F_lt and F_le as likely."""
    weights = [
        scipy.integrate.quad(lambda u: math.exp(u / beta), low, high)[0] / (high - low)
        for low, high in zip(BELOW.tolist(), AT_OR_BELOW.tolist(), strict=True)
    ]
    partition = scipy.integrate.quad(lambda u: math.exp(u / beta), 0, 1)[0]
    return LOG_P + (torch.tensor(weights, dtype=torch.float64) / partition).log()


# -- the partition function --


@pytest.mark.parametrize("beta", [1e-4, 0.01, 0.2, 1.0, 30.0, 1e8])
def test_the_partition_function(beta: float) -> None:
    with mpmath.workdps(40):
        exact = float(mpmath.log(mpmath.mpf(beta) * (mpmath.exp(1 / mpmath.mpf(beta)) - 1)))
    assert qrpo_log_partition(beta) == pytest.approx(exact, rel=1e-7, abs=1e-15)
    assert 1 / (2 * beta) * (1 - 1e-7) <= qrpo_log_partition(beta) <= 1 / beta


def test_the_partition_function_by_quadrature() -> None:
    for beta in (0.1, 0.7, 3.0):
        integral = scipy.integrate.quad(lambda u, beta=beta: math.exp(u / beta), 0, 1)[0]
        assert qrpo_log_partition(beta) == pytest.approx(math.log(integral), rel=1e-10)


def test_at_a_fifth_the_optimum_has_about_the_kl_of_best_of_4() -> None:
    partition = qrpo_log_partition(0.2)
    kl = scipy.integrate.quad(lambda u: math.exp(u / 0.2 - partition) * (u / 0.2 - partition), 0, 1)[0]
    assert kl == pytest.approx(bon_kl_bound(4), rel=0.05)


# -- quantiles --


def test_quantiles_by_counting() -> None:
    noise = torch.Generator().manual_seed(0)
    references = torch.randint(4, (3, 5), generator=noise).float()
    picks = torch.tensor([[0, 4], [1, 1], [2, 3]])
    for included in (True, False):
        rewards = references.gather(1, picks) if included else torch.tensor([[1.0, 9.0], [-1.0, 2.0], [0.0, 1.5]])
        found = reward_quantiles(rewards, references, included=included)
        for row, column in itertools.product(range(3), range(2)):
            others = references[row].tolist()
            if included:
                del others[picks[row, column]]
            own = rewards[row, column].item()
            assert found.below[row, column].item() == pytest.approx(sum(r < own for r in others) / len(others))
            want = sum(r <= own for r in others) / len(others)
            assert found.at_or_below[row, column].item() == pytest.approx(want)
    rewards = torch.tensor([[1.0]])
    assert torch.equal(
        reward_quantiles(rewards, references[:1]).below, reward_quantiles(rewards, references[:1], included=False).below
    )
    pair = torch.tensor([[2.0, 1.0], [1.0, torch.nan]])  # one other beside each; a NaN is of its own prompt alone
    assert reward_quantiles(pair, pair, included=True).below[0].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("included", [True, False])
def test_quantiles_are_unbiased_over_all_tables(included: bool) -> None:
    """Of each response, over every table of three: with two others beside it, or three that it is not among."""
    mean = torch.zeros(2, len(LOG_P), dtype=torch.float64)
    for probability, table in tables(3 - included):
        for own in range(len(LOG_P)):
            references = REWARDS[[own, *table] if included else table][None]
            found = reward_quantiles(REWARDS[None, own : own + 1], references, included=included)
            mean[:, own] += probability * torch.stack([found.below[0, 0], found.at_or_below[0, 0]])
    torch.testing.assert_close(mean[0], BELOW, rtol=0, atol=1e-12)
    torch.testing.assert_close(mean[1], AT_OR_BELOW, rtol=0, atol=1e-12)


def test_unknown_rewards_have_no_quantile() -> None:
    found = reward_quantiles(torch.tensor([[1.0, math.nan]]), torch.tensor([[0.0, 2.0]]))
    assert found.below.isnan().tolist() == found.at_or_below.isnan().tolist() == [[False, True]]
    assert reward_quantiles(torch.tensor([[1.0]]), torch.tensor([[0.0, math.nan]])).below.isnan().all()


# -- goals --


@pytest.mark.parametrize("beta", [0.05, 0.2, 5.0])
def test_exact_goals_are_those_of_a_distribution_and_the_others_are_not(beta: float) -> None:
    p = LOG_P.exp()
    total = {ties: (p * qrpo_goal(QUANTILES, beta=beta, ties=ties).exp()).sum().item() for ties in ("upper", "mid")}
    exact = qrpo_goal(QUANTILES, beta=beta)
    torch.testing.assert_close(exact[0], optimum(beta) - LOG_P, rtol=0, atol=1e-10)
    assert (p * exact.exp()).sum().item() == pytest.approx(1, abs=1e-12)
    assert total["mid"] < 1 < total["upper"]
    assert 1 - total["mid"] < total["upper"] - 1
    partition = math.log(beta * math.expm1(1 / beta))
    for place, (low, high) in enumerate(zip(BELOW.tolist(), AT_OR_BELOW.tolist(), strict=True)):
        upper = qrpo_goal(QUANTILES, beta=beta, ties="upper")[0, place].item()
        assert upper == pytest.approx(high / beta - partition, abs=1e-9)
        mid = qrpo_goal(QUANTILES, beta=beta, ties="mid")[0, place].item()
        assert mid == pytest.approx((low + high) / 2 / beta - partition, abs=1e-9)


def test_a_prompt_whose_rewards_all_tie_stays_with_the_reference() -> None:
    quantiles = reward_quantiles(torch.ones(1, 2), torch.ones(1, 8), included=True)
    assert qrpo_goal(quantiles, beta=BETA).abs().max().item() < 1e-6
    assert (qrpo_goal(quantiles, beta=BETA, ties="upper") > 1).all()
    assert (qrpo_goal(quantiles, beta=BETA, ties="mid") < -0.5).all()


def test_without_ties_the_three_are_one_and_small_betas_are_exact() -> None:
    share = torch.linspace(0, 1, 5, dtype=torch.float64)[None]
    single = Quantiles(share, share)
    for beta in (1e-5, 0.3):
        goals = [qrpo_goal(single, beta=beta, ties=ties) for ties in ("exact", "upper", "mid")]
        torch.testing.assert_close(goals[0], goals[1], rtol=0, atol=1e-9)
        torch.testing.assert_close(goals[0], goals[2], rtol=0, atol=1e-9)
    close = qrpo_goal(Quantiles(share, share + 1e-9), beta=0.3)
    torch.testing.assert_close(close, goals[0], rtol=0, atol=1e-7)
    wide = qrpo_goal(Quantiles(torch.zeros(1, 1).double(), torch.ones(1, 1).double()), beta=1e-5)
    assert wide.item() == pytest.approx(0.0, abs=1e-9)


def test_single_precision_is_computed_in_double() -> None:
    """At the highest quantile two numbers of ten thousand nats leave nine."""
    for ties in ("exact", "upper", "mid"):
        goal = qrpo_goal(Quantiles(torch.ones(1, 1), torch.ones(1, 1)), beta=1e-4, ties=ties)
        assert goal.dtype == torch.float32
        assert goal.item() == pytest.approx(-math.log(1e-4), abs=1e-5)


# -- the loss --


def by_hand(log_ratio: Tensor, quantile: Tensor, beta: float) -> Tensor:
    return (quantile - beta * math.log(beta * math.expm1(1 / beta)) - beta * log_ratio) ** 2


@pytest.mark.parametrize("ties", ["upper", "mid"])
def test_the_loss_is_the_papers(ties: Any) -> None:
    log_ratio = torch.linspace(-1, 2, 6, dtype=torch.float64)[None]
    found = qrpo_loss(log_ratio, QUANTILES, beta=BETA, ties=ties)
    quantile = AT_OR_BELOW if ties == "upper" else (BELOW + AT_OR_BELOW) / 2
    assert found.loss.item() == pytest.approx(by_hand(log_ratio[0], quantile, BETA).mean().item(), rel=1e-10)
    learnt = torch.tensor([[True, False, True, True, False, False]])
    some = qrpo_loss(log_ratio, QUANTILES, beta=BETA, ties=ties, learnt=learnt).loss.item()
    assert some == pytest.approx(by_hand(log_ratio[0], quantile, BETA)[learnt[0]].mean().item(), rel=1e-10)


@pytest.mark.parametrize("beta", [0.1, 0.2, 1.0])
def test_the_minimum_is_the_tilted_reference(beta: float) -> None:
    found = minimum(lambda log_ratio, _: qrpo_loss(log_ratio, QUANTILES, beta=beta).loss)
    torch.testing.assert_close(found, optimum(beta), rtol=0, atol=1e-6)


def test_in_the_limit_of_a_continuous_reward_the_papers_quantile_has_the_same_minimum() -> None:
    count = 2000
    high = torch.arange(1, count + 1, dtype=torch.float64)[None] / count
    quantiles = Quantiles(high - 1 / count, high)
    density = (high / BETA).exp() / (BETA * math.expm1(1 / BETA))
    for ties in ("exact", "upper", "mid"):
        goal = qrpo_goal(quantiles, beta=BETA, ties=ties)
        assert (goal.exp().mean().item() - 1) == pytest.approx(0, abs=2 / (count * BETA))
        assert (goal.exp() - density).abs().max().item() < 2 * density.max().item() / (count * BETA)


def test_on_the_policys_responses_the_expected_gradient_is_that_of_the_quantile_under_a_kl() -> None:
    for ties, quantile in (("upper", AT_OR_BELOW), ("mid", (BELOW + AT_OR_BELOW) / 2)):

        def loss(log_ratio: Tensor, some: slice, ties: Any = ties) -> Tensor:
            return qrpo_loss(log_ratio, Quantiles(*(q[:, some] for q in QUANTILES)), beta=BETA, ties=ties).loss

        def objective(log_pi: Tensor, quantile: Tensor = quantile) -> Tensor:
            return (log_pi.exp() * (quantile - BETA * (log_pi - LOG_P))).sum()

        want = -2 * BETA * objective_gradient(objective)
        torch.testing.assert_close(expected_gradient(loss), want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("ties", ["upper", "mid"])
def test_the_expected_gradient_over_all_tables_is_that_with_the_true_quantiles(ties: Any) -> None:
    """Noise in a goal moves no minimum: two responses of a table of three, against the reference's distribution."""
    log_p, rewards = LOG_P[:4].log_softmax(-1), REWARDS[:4]
    logits = torch.tensor([0.3, -0.2, 1.0, -0.7], dtype=torch.float64, requires_grad=True)
    p = log_p.exp()
    below = torch.stack([p[rewards < r].sum() for r in rewards])
    at_or_below = torch.stack([p[rewards <= r].sum() for r in rewards])

    def log_ratio() -> Tensor:
        return logits.log_softmax(-1) - log_p

    total = torch.zeros(4, dtype=torch.float64)
    for probability, table in tables(3, log_p):
        references = rewards[table][None]
        quantiles = reward_quantiles(references[:, :2], references, included=True)
        loss = qrpo_loss(log_ratio()[table[:2]][None], quantiles, beta=BETA, ties=ties).loss
        total += probability * torch.autograd.grad(loss, logits)[0]
    quantile = at_or_below if ties == "upper" else (below + at_or_below) / 2
    want = torch.autograd.grad((p * by_hand(log_ratio(), quantile, BETA)).sum(), logits)[0]
    torch.testing.assert_close(total, want, rtol=0, atol=1e-10)
