"""Least squares on log-ratios, by a loop; what is left out has no part in it."""

from __future__ import annotations

import math

import pytest
import torch

from tests.functional.six_responses import LOG_P, expected_gradient, minimum, objective_gradient
from vbon_lightning.functional import log_ratio_regression

TARGET = torch.tensor([0.4, 0.1, 0.05, 0.15, 0.2, 0.1], dtype=torch.float64).log()


def test_against_a_loop() -> None:
    noise = torch.Generator().manual_seed(0)
    log_ratio, goal = torch.randn(2, 3, 4, dtype=torch.float64, generator=noise)
    learnt = torch.rand(3, 4, generator=noise) < 0.6
    found = log_ratio_regression(log_ratio, goal, scale=0.3, learnt=learnt)
    pairs = [(log_ratio[i, j].item(), goal[i, j].item()) for i, j in learnt.nonzero().tolist()]
    assert 1 < len(pairs) < 12
    assert found.loss.item() == pytest.approx(sum((0.3 * (d - g)) ** 2 for d, g in pairs) / len(pairs), rel=1e-12)
    assert found.log_ratio.item() == pytest.approx(sum(d for d, _ in pairs) / len(pairs), rel=1e-12)
    assert found.goal.item() == pytest.approx(sum(g for _, g in pairs) / len(pairs), rel=1e-12)
    whole = log_ratio_regression(log_ratio, goal)
    assert whole.loss.item() == pytest.approx((log_ratio - goal).square().mean().item(), rel=1e-12)


def test_only_the_loss_has_a_gradient_and_only_in_the_log_ratio() -> None:
    log_ratio, goal = torch.tensor([0.5, -1.0], requires_grad=True), torch.tensor([0.0, 1.0], requires_grad=True)
    found = log_ratio_regression(log_ratio, goal, scale=2.0)
    assert not found.log_ratio.requires_grad and not found.goal.requires_grad
    found.loss.backward()
    assert log_ratio.grad.tolist() == [2.0, -8.0] and goal.grad is None


def test_what_is_left_out_may_be_anything() -> None:
    log_ratio = torch.tensor([0.5, math.inf, math.nan, 1.0], requires_grad=True)
    goal = torch.tensor([0.0, 1.0, 1.0, math.nan])
    learnt = torch.tensor([True, False, False, False])
    found = log_ratio_regression(log_ratio, goal, learnt=learnt)
    assert [value.item() for value in found] == [0.25, 0.5, 0.0]
    found.loss.backward()
    assert log_ratio.grad.tolist() == [1.0, 0.0, 0.0, 0.0]
    none = log_ratio_regression(log_ratio, goal, learnt=torch.zeros(4, dtype=torch.bool))
    assert [value.item() for value in none] == [0.0, 0.0, 0.0]
    (gradient,) = torch.autograd.grad(none.loss, log_ratio)
    assert not gradient.any()


def test_a_goal_that_is_not_known_is_not_learnt_in_silence() -> None:
    assert log_ratio_regression(torch.zeros(2), torch.tensor([0.0, math.nan])).loss.isnan()


def test_the_minimum_is_the_target_and_the_expected_gradient_that_of_the_kl() -> None:
    goal = (TARGET - LOG_P)[None]

    def loss(log_ratio: torch.Tensor, some: slice) -> torch.Tensor:
        return log_ratio_regression(log_ratio, goal[:, some]).loss

    torch.testing.assert_close(minimum(loss), TARGET, rtol=0, atol=1e-6)
    want = objective_gradient(lambda log_pi: 2 * (log_pi.exp() * (log_pi - TARGET)).sum())
    torch.testing.assert_close(expected_gradient(loss), want, rtol=0, atol=1e-10)


def test_the_loss_is_in_the_dtype_of_the_log_ratio() -> None:
    found = log_ratio_regression(torch.zeros(2), torch.ones(2, dtype=torch.float64))
    assert [value.dtype for value in found] == [torch.float32] * 3


def test_losses_over_shards_average_to_the_loss_of_the_whole() -> None:
    log_ratio, goal = torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(1))
    parts = [log_ratio_regression(log_ratio[s], goal[s]).loss for s in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(sum(parts) / 2, log_ratio_regression(log_ratio, goal).loss)
