"""Policy gradients of max@k against sums over all subsets and all groups."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from tests.functional.groups import BINARY, DISTINCT, TIED, expected_gradient, expected_maximum, gradient_of
from vbon_lightning.functional import leave_one_out, max_at_k_advantages

FORMS = ("plain", "marginal", "centred")
CASES = [
    (form, size, k)
    for form in FORMS
    for size in range(2, 6)
    for k in range(2 if form == "marginal" else 1, size if form == "centred" else size + 1)
]


def by_subsets(rewards: list[float], k: int, form: str) -> list[float]:
    """The definitions, one subset at a time."""
    places, found = range(len(rewards)), []

    def best(subset: tuple[int, ...]) -> float:
        return max(rewards[place] for place in subset)

    for i in places:
        holding = [subset for subset in itertools.combinations(places, k) if i in subset]
        mean = sum(map(best, holding)) / len(holding)
        if form == "marginal":
            mean -= sum(best(tuple(j for j in subset if j != i)) for subset in holding) / len(holding)
        elif form == "centred":
            # Of each other sample j, what it brings where i is left out, in i's place.
            others = [[s for s in itertools.combinations(places, k) if j in s and i not in s] for j in places if j != i]
            mean -= sum(sum(map(best, subsets)) / len(subsets) for subsets in others) / len(others)
        found.append(k * mean)
    return found


@pytest.mark.parametrize(("form", "size", "k"), CASES)
def test_sums_over_gaps_are_sums_over_subsets(form: str, size: int, k: int) -> None:
    noise = torch.Generator().manual_seed(size)
    for rewards in (
        torch.randn(3, size, dtype=torch.float64, generator=noise),
        torch.randint(3, (3, size), generator=noise).double(),  # ties
    ):
        expected = torch.tensor([by_subsets(row, k, form) for row in rewards.tolist()], dtype=torch.float64)
        torch.testing.assert_close(max_at_k_advantages(rewards, k=k, form=form), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rewards", [DISTINCT, TIED, BINARY], ids=["distinct", "tied", "binary"])
@pytest.mark.parametrize(("form", "size", "k"), [case for case in CASES if case[1] < 5 or case[2] == 3])
def test_the_expected_gradient_is_that_of_the_best_of_k(form: str, size: int, k: int, rewards: Tensor) -> None:
    """With rewards of 0 and 1 it is pass@k."""
    found = expected_gradient(lambda group: max_at_k_advantages(rewards[group], k=k, form=form), size)
    expected = gradient_of(expected_maximum(rewards, k))
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_pass_at_k_is_one_minus_all_failing() -> None:
    """The oracle of the binary case by its closed form."""
    closed = gradient_of(lambda probs: 1 - (1 - (probs * BINARY).sum()) ** 3)
    torch.testing.assert_close(closed, gradient_of(expected_maximum(BINARY, 3)), rtol=0, atol=1e-14)


def test_the_plain_form_estimates_what_is_maximised() -> None:
    rewards = torch.tensor([[0.0, 3.0, 1.0, 7.0]], dtype=torch.float64)
    pairs = [max(pair) for pair in itertools.combinations(rewards[0].tolist(), 2)]
    got = max_at_k_advantages(rewards, k=2, form="plain").mean() / 2
    assert got.item() == pytest.approx(sum(pairs) / len(pairs), abs=1e-13)


def test_with_as_many_as_samples_only_the_best_moves() -> None:
    rewards = torch.tensor([[0.2, 5.0, -1.0, 3.5]], dtype=torch.float64)
    got = max_at_k_advantages(rewards, k=4, form="marginal")
    torch.testing.assert_close(got, torch.tensor([[0.0, 4 * 1.5, 0.0, 0.0]], dtype=torch.float64))
    tied = max_at_k_advantages(torch.tensor([[5.0, 5.0, 0.0]]), k=3, form="marginal")
    assert not tied.any(), "neither of two best is missed"


def test_what_each_form_is_like() -> None:
    rewards = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain, marginal, centred = (max_at_k_advantages(rewards, k=3, form=form) for form in FORMS)
    assert marginal.min() >= 0
    assert centred.sum(1).abs().max() < 1e-12
    assert (plain.sum(1).abs() > 0.1).all()
    for form, shifted_by in (("plain", 3 * 10.0), ("marginal", 0.0), ("centred", 0.0)):
        before, after = (max_at_k_advantages(r, k=3, form=form) for r in (rewards, 2 * rewards + 10))
        torch.testing.assert_close(after, 2 * before + shifted_by, rtol=0, atol=1e-11)
    torch.testing.assert_close(max_at_k_advantages(rewards, k=1), leave_one_out(rewards))


def test_the_variance_falls_from_form_to_form() -> None:
    """Of ``mean_i A_i grad log pi(y_i)`` over the enumerated groups of four, the rewards far from 0."""
    from tests.functional.groups import THETA, groups

    probs, all_groups = THETA.softmax(-1), groups(4)
    chance = probs[all_groups].prod(1)
    scores = torch.eye(4, dtype=torch.float64)[all_groups] - probs  # grad log pi of a softmax
    variance = {}
    for form in FORMS:
        advantages = max_at_k_advantages((DISTINCT + 3)[all_groups], k=2, form=form)
        gradient = (advantages.unsqueeze(-1) * scores).mean(1)
        mean = (chance[:, None] * gradient).sum(0)
        variance[form] = (chance * (gradient - mean).square().sum(1)).sum().item()
    assert variance["centred"] < variance["marginal"] < 0.2 * variance["plain"]


@pytest.mark.parametrize("form", FORMS)
def test_a_thousand_samples_and_half_as_many_to_the_best(form: str) -> None:
    """Binomials of 1024 overflow; their quotients are compared with exact ones, for rewards of one success."""
    size, k = 1024, 512
    rewards = torch.zeros(1, size, dtype=torch.float64)
    rewards[0, 17] = 1.0
    got = max_at_k_advantages(rewards, k=k, form=form)[0]
    share = Fraction(math.comb(size - 2, k - 2), math.comb(size - 1, k - 1))  # of i's subsets, those with the success
    win = {"plain": Fraction(1), "marginal": Fraction(1), "centred": Fraction(1)}[form]
    lose = {"plain": share, "marginal": Fraction(0), "centred": Fraction(-1, size - 1)}[form]
    assert got[17].item() == pytest.approx(k * float(win), rel=1e-10)
    assert got[16].item() == pytest.approx(k * float(lose), rel=1e-10, abs=1e-12)
    assert got.isfinite().all()


@pytest.mark.parametrize(("form", "needed"), [("plain", 2), ("marginal", 2), ("centred", 3)])
def test_samples_that_are_left_out(form: str, needed: int) -> None:
    noise = torch.Generator().manual_seed(1)
    rewards = torch.randn(4, 5, dtype=torch.float64, generator=noise)
    left = [[0, 2, 3], [0, 1, 2, 3, 4], [1, 4], [3]]
    kept = torch.zeros(4, 5, dtype=torch.bool)
    for row, places in enumerate(left):
        kept[row, places] = True
    found = max_at_k_advantages(rewards.masked_fill(~kept, math.nan), k=2, form=form, kept=kept)
    assert not found[~kept].any()
    for row, places in enumerate(left):
        if len(places) < needed:
            assert not found[row].any()
        else:
            expected = max_at_k_advantages(rewards[row : row + 1, places], k=2, form=form)[0]
            torch.testing.assert_close(found[row, places], expected, rtol=0, atol=1e-12)
    nothing = torch.zeros(1, 5, dtype=torch.bool)
    assert not max_at_k_advantages(torch.full((1, 5), math.nan), k=2, form=form, kept=nothing).any()


def test_the_best_of_one_is_that_one() -> None:
    rewards, kept = torch.tensor([[0.5, -2.0, 3.0]]), torch.tensor([[False, True, False]])
    assert max_at_k_advantages(rewards, k=1, form="plain", kept=kept).tolist() == [[0.0, -2.0, 0.0]]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"form": "x"}, ValueError, "form must be one of plain, marginal, centred, got 'x'"),
        ({"k": 2.0}, TypeError, "k counts samples and must be an integer, got 2.0 of type float"),
        ({"k": True}, TypeError, "k counts samples and must be an integer, got True of type bool"),
        ({"k": 0}, ValueError, "k must be at least 1 for form 'centred', got 0"),
        ({"k": 1, "form": "marginal"}, ValueError, "k must be at least 2 for form 'marginal', got 1"),
        ({"k": 4}, ValueError, "form 'centred' needs at least 5 samples a prompt for k = 4, got G = 4"),
        ({"k": 5, "form": "plain"}, ValueError, "form 'plain' needs at least 5 samples a prompt for k = 5, got G = 4"),
        ({"rewards": torch.zeros(4)}, ValueError, r"rewards must have shape \[B, G\], got \[4\]"),
        ({"kept": torch.ones(2, 3).bool()}, ValueError, r"kept must have the shape of rewards, \[2, 4\]"),
    ],
)
def test_what_is_refused(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        max_at_k_advantages(**({"rewards": torch.zeros(2, 4), "k": 2} | changes))
