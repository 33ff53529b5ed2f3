"""A*-PO: the optimal value by a loop and over every table, the minimum, and the gradient on the policy's responses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.functional.six_responses import LOG_P, REWARDS, expected_gradient, minimum, objective_gradient, tables
from vbon_lightning.functional import a_star_po_loss, optimal_value

BETA = 0.7
PARTITION = sum(p * math.exp(r / BETA) for p, r in zip(LOG_P.exp().tolist(), REWARDS.tolist(), strict=True))
VALUE = torch.tensor([BETA * math.log(PARTITION)], dtype=torch.float64)
"""V* of the reference over all its responses."""


@pytest.mark.parametrize("beta", [0.05, 0.7, 20.0])
def test_the_value_by_a_loop(beta: float) -> None:
    rewards = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for row, value in zip(rewards.tolist(), optimal_value(rewards, beta=beta).tolist(), strict=True):
        top = max(row)
        mean = sum(math.exp((r - top) / beta) for r in row) / 5
        assert value == pytest.approx(top + beta * math.log(mean), rel=1e-12)
        assert sum(row) / 5 < value < top


def test_the_value_goes_from_the_highest_reward_to_the_mean() -> None:
    rewards = torch.tensor([[0.0, 1.0, 5.0]], dtype=torch.float64)
    assert optimal_value(rewards, beta=1e-4).item() == pytest.approx(5.0, abs=1e-3)
    assert optimal_value(rewards, beta=1e6).item() == pytest.approx(2.0, abs=1e-4)
    assert optimal_value(rewards * 1e4, beta=1e-3).isfinite().all()
    assert optimal_value(torch.full((1, 7), 3.0), beta=0.5).item() == 3.0
    assert optimal_value(torch.tensor([[1.0, math.nan], [1.0, 2.0]]), beta=0.5).isnan().tolist() == [True, False]


def test_over_all_tables_the_mean_of_the_exponentials_is_exact_and_the_value_too_low() -> None:
    every = tables(3)
    references = torch.stack([REWARDS[table] for _, table in every])
    probabilities = torch.tensor([probability for probability, _ in every], dtype=torch.float64)
    values = optimal_value(references, beta=BETA)
    assert (probabilities * (values / BETA).exp()).sum().item() == pytest.approx(PARTITION, rel=1e-12)
    assert (probabilities * values).sum().item() < VALUE.item() - 0.05


def test_the_loss_by_a_loop() -> None:
    log_ratio = torch.linspace(-1, 2, 6, dtype=torch.float64).view(2, 3)
    rewards, values = REWARDS.view(2, 3), torch.tensor([0.3, -0.4], dtype=torch.float64)
    learnt = torch.tensor([[True, True, False], [True, False, True]])
    found = a_star_po_loss(log_ratio, rewards, values, beta=BETA, learnt=learnt)
    terms = [
        (BETA * log_ratio[i, j].item() - (rewards[i, j].item() - values[i].item())) ** 2
        for i, j in learnt.nonzero().tolist()
    ]
    assert found.loss.item() == pytest.approx(sum(terms) / 4, rel=1e-12)
    whole = a_star_po_loss(log_ratio, rewards, values, beta=BETA).loss.item()
    assert whole == pytest.approx(((BETA * log_ratio - rewards + values[:, None]) ** 2).mean().item(), rel=1e-12)


@pytest.mark.parametrize("beta", [0.3, 0.7, 5.0])
def test_with_one_temperature_the_minimum_is_the_optimum_of_kl_constrained_rl(beta: float) -> None:
    weights = LOG_P.exp() * (REWARDS / beta).exp()
    values = beta * weights.sum().log()[None]
    found = minimum(lambda log_ratio, _: a_star_po_loss(log_ratio, REWARDS[None], values, beta=beta).loss)
    torch.testing.assert_close(found, (weights / weights.sum()).log(), rtol=0, atol=1e-6)


def test_a_value_of_another_temperature_is_met_by_no_distribution() -> None:
    other = optimal_value(REWARDS[None], beta=10 * BETA)

    def loss(log_ratio: Tensor, _: slice) -> Tensor:
        return a_star_po_loss(log_ratio, REWARDS[None], other, beta=BETA).loss

    best = loss((minimum(loss) - LOG_P)[None], slice(None))
    assert best.item() > 0.01
    exact = minimum(lambda log_ratio, _: a_star_po_loss(log_ratio, REWARDS[None], VALUE, beta=BETA).loss)
    assert (minimum(loss) - exact).abs().max().item() > 0.01


@pytest.mark.parametrize("value", [VALUE, torch.zeros(1, dtype=torch.float64)], ids=["V*", "0"])
def test_on_the_policys_responses_any_value_is_a_baseline(value: Tensor) -> None:
    def loss(log_ratio: Tensor, some: slice) -> Tensor:
        return a_star_po_loss(log_ratio, REWARDS[None, some], value, beta=BETA).loss

    def objective(log_pi: Tensor) -> Tensor:
        return (log_pi.exp() * (REWARDS - BETA * (log_pi - LOG_P))).sum()

    want = -2 * BETA * objective_gradient(objective)
    torch.testing.assert_close(expected_gradient(loss), want, rtol=0, atol=1e-10)
