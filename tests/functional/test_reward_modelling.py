"""The Bradley-Terry loss against a reference of its own."""

from __future__ import annotations

import math

import pytest
import torch

from vbon_lightning.functional import bradley_terry_loss


def test_the_likelihood_of_preferences() -> None:
    chosen, rejected = torch.tensor([1.0, -2.0, 40.0, -40.0]), torch.tensor([0.5, 1.0, -40.0, 40.0])
    expected = [-math.log(1 / (1 + math.exp(b - a))) for a, b in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    assert bradley_terry_loss(chosen, rejected).tolist() == pytest.approx(expected, rel=1e-6)


def test_no_overflow_far_apart() -> None:
    loss = bradley_terry_loss(torch.tensor([-1e4]), torch.tensor([1e4]))
    assert loss.item() == pytest.approx(2e4)


def test_only_differences_count_unless_centred() -> None:
    chosen, rejected = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    assert torch.equal(bradley_terry_loss(chosen + 8, rejected + 8), bradley_terry_loss(chosen, rejected))
    centred = bradley_terry_loss(chosen, rejected, centre=0.1) - bradley_terry_loss(chosen, rejected)
    torch.testing.assert_close(centred, torch.tensor([0.1, 0.4]))


def test_its_minimum_is_the_log_odds() -> None:
    # The first wins three times of four: the reward's difference at the optimum is log 3.
    gap = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([gap], line_search_fn="strong_wolfe")
    zeros = torch.zeros(3, dtype=torch.float64)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (bradley_terry_loss(gap.expand(3), zeros).sum() + bradley_terry_loss(zeros[:1], gap).sum()) / 4
        loss.backward()
        return loss

    optimizer.step(closure)
    assert gap.item() == pytest.approx(math.log(3), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2), torch.zeros(3)), "rejected must have the shape of chosen"),
        ((torch.zeros(2).long(), torch.zeros(2)), "chosen must have a floating-point dtype"),
    ],
)
def test_bad_input(arguments: tuple[torch.Tensor, torch.Tensor], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        bradley_terry_loss(*arguments)


def test_a_negative_centre_is_refused() -> None:
    with pytest.raises(ValueError, match="centre must be at least 0"):
        bradley_terry_loss(torch.zeros(1), torch.zeros(1), centre=-1.0)


def test_the_centre_holds_the_sum_and_costs_nothing_where_it_is_off() -> None:
    chosen, rejected = torch.tensor([2.0, 1e30]), torch.tensor([0.5, 1e30])
    plain = torch.nn.functional.softplus(rejected - chosen)
    assert torch.equal(bradley_terry_loss(chosen, rejected), plain)  # and no 0 times inf
    got = bradley_terry_loss(chosen[:1], rejected[:1], centre=0.1)
    torch.testing.assert_close(got, plain[:1] + 0.1 * 2.5**2)
