"""How decoders choose, against loops and bisections."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vbon_lightning.functional import (
    branch_places,
    effective_samples,
    implicit_reward,
    particle_weights,
    pessimistic_acceptance,
    pessimistic_level,
    realigned_logits,
    realignment_strength,
    soft_selection_probs,
)

NAN, INF = math.nan, math.inf
REWARDS = torch.randn(6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 7.0])
def test_soft_selection_by_hand(temperature: float) -> None:
    found = soft_selection_probs(REWARDS, temperature=temperature)
    for row, probs in zip(REWARDS.tolist(), found.tolist(), strict=True):
        weights = [math.exp(reward / temperature) for reward in row]
        assert probs == pytest.approx([weight / sum(weights) for weight in weights], abs=1e-12)


def test_soft_selection_at_its_ends() -> None:
    rewards = torch.tensor([[1.0, 3.0, 3.0, NAN], [NAN, NAN, NAN, NAN], [-1e30, 0.0, 1e30, NAN]])
    best = [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]]
    assert soft_selection_probs(rewards, temperature=0).tolist() == best
    even = soft_selection_probs(rewards, temperature=INF)
    assert even.tolist() == [[pytest.approx(1 / 3)] * 3 + [0], [0.25] * 4, [pytest.approx(1 / 3)] * 3 + [0]]
    halves = soft_selection_probs(rewards, temperature=1e-300)
    assert halves.tolist() == [[0, 0.5, 0.5, 0], [0.25] * 4, [0, 0, 1, 0]], "ties are even as the temperature falls"
    for wrong in (-1.0, NAN):
        with pytest.raises(ValueError, match="temperature must be"):
            soft_selection_probs(rewards, temperature=wrong)


@pytest.mark.parametrize("beta", [1e-3, 0.3, 1.0, 20.0])
@pytest.mark.parametrize("shift", [0.0, 1e6])
def test_the_level_solves_its_equation(beta: float, shift: float) -> None:
    level = pessimistic_level(REWARDS + shift, beta=beta) - shift
    mean = ((REWARDS - level[:, None]) / beta).clamp(min=0).mean(-1)
    assert torch.allclose(mean, torch.ones_like(mean), atol=1e-9 if not shift else 1e-6 / beta)


def test_the_level_at_its_ends() -> None:
    """Above all but the best, below all, and of rewards that are not there."""
    assert torch.allclose(pessimistic_level(REWARDS, beta=1e-9), REWARDS.amax(-1), atol=1e-7)
    assert torch.allclose(pessimistic_level(REWARDS, beta=1e6), REWARDS.mean(-1) - 1e6)
    some = torch.cat([REWARDS, torch.full((6, 3), NAN)], dim=-1)[:, torch.randperm(10)]
    assert torch.allclose(pessimistic_level(some, beta=0.5), pessimistic_level(REWARDS, beta=0.5), atol=1e-12)
    assert pessimistic_level(torch.full((2, 3), NAN), beta=1.0).isnan().all()
    assert float(pessimistic_level(torch.tensor([2.0]), beta=0.5)) == 1.5
    assert float(pessimistic_level(torch.tensor([2.0, 2.0]), beta=0.5)) == 1.5
    for wrong in (0.0, -1.0, INF, NAN):
        with pytest.raises(ValueError, match="beta must be"):
            pessimistic_level(REWARDS, beta=wrong)


def test_what_is_accepted() -> None:
    level, best = pessimistic_level(REWARDS, beta=0.7), REWARDS.amax(-1)
    fresh = torch.tensor([[-9.0, 0.2, 1.0, 9.0, NAN]], dtype=torch.float64).expand(6, -1)
    found = pessimistic_acceptance(fresh, level, best, beta=0.7)
    for row, (one, top) in enumerate(zip(level.tolist(), best.tolist(), strict=True)):
        expected = [min(max(reward - one, 0.0) / (top - one), 1.0) for reward in (-9.0, 0.2, 1.0, 9.0)]
        assert found[row].tolist() == pytest.approx([*expected, 0.0], abs=1e-12)
    tiny = torch.tensor([[0.0, 1.0, 1.0, NAN]], dtype=torch.float64)  # the level is the bound, rounded
    beside = pessimistic_acceptance(tiny, pessimistic_level(tiny, beta=1e-20), torch.ones(1).double(), beta=1e-20)
    assert beside.tolist() == [[0.0, 1.0, 1.0, 0.0]]
    none = pessimistic_acceptance(fresh, torch.full((6,), NAN), torch.full((6,), -INF), beta=0.7)
    assert not none.any()


def test_mixed_logits() -> None:
    policy, reference = REWARDS[:3].clone(), REWARDS[3:].clone()
    assert realigned_logits(policy, reference, strength=1.0) is policy
    assert realigned_logits(policy, reference, strength=0.0) is reference
    policy[0, 0] = reference[1, 1] = -INF
    for strength in (0.3, 2.5, -1.0):
        mixed = realigned_logits(policy, reference, strength=strength).softmax(-1)
        ours, theirs = policy.softmax(-1) ** strength, reference.softmax(-1) ** (1 - strength)
        product = (ours * theirs).nan_to_num(nan=0.0, posinf=0.0)
        product[0, 0] = product[1, 1] = 0.0
        assert torch.allclose(mixed, product / product.sum(-1, keepdim=True), atol=1e-12)


def test_a_strength_beyond_all_numbers() -> None:
    """Large ones are as exact as float32, whatever the logits' precision; what is infinite is no mixture."""
    policy, reference = torch.tensor([[30.25, 2.0, -INF]]), torch.tensor([[29.75, 2.0, 0.0]])
    expected = [[40 * 30.25 - 39 * 29.75, 2.0, -INF]]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert realigned_logits(policy.to(dtype), reference.to(dtype), strength=40.0).tolist() == expected
    for strength in (1e39, -1e308):
        assert not realigned_logits(policy, reference, strength=strength).amax().isfinite()


@pytest.mark.parametrize("branches", [1, 2, 3, 6])
def test_places_are_dealt_to_the_better_nodes_first(branches: int) -> None:
    """So many to one that goes on, one to one that has finished, until all are dealt; each row by itself."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.randint(0, 4, (2, 20, 6), generator=generator).float().masked_fill(torch.arange(6) == 2, NAN)
    finished = torch.rand(2, 20, 6, generator=generator) < torch.linspace(0, 1, 20)[:, None]
    found = branch_places(scores, finished, branches=branches)
    for rows in zip(scores.flatten(0, 1).tolist(), finished.flatten(0, 1), found.flatten(0, 1).tolist(), strict=True):
        values, ended, places = rows
        order = sorted(range(6), key=lambda node: (-values[node] if values[node] == values[node] else INF, node))
        dealt = [node for node in order for _ in range(1 if ended[node] else branches)]
        assert places == sorted(dealt[:6])
    assert found[:, -1].tolist() == [list(range(6))] * 2, "of leaves alone each is kept"
    message = r"^finished must have the shape of scores, \[2, 20, 6\], got \[20, 6\]$"
    with pytest.raises(ValueError, match=message):
        branch_places(scores, finished[0], branches=branches)


def test_from_one_n_to_another() -> None:
    """The optimum of the bound is ``ref F^(N-1)``: whole responses are mixed exactly."""
    ref, cdf = REWARDS[0].softmax(-1), torch.linspace(0.1, 1.0, 7, dtype=torch.float64)
    ours, wanted = (ref * cdf ** (n - 1) for n in (4.0, 2.5))
    mixed = realigned_logits(ours.log(), ref.log(), strength=realignment_strength(4.0, 2.5)).softmax(-1)
    assert torch.allclose(mixed, wanted / wanted.sum(), atol=1e-12)
    assert (realignment_strength(4, 4), realignment_strength(4, 1), realignment_strength(3, 9)) == (1, 0, 4)


def test_earlier_prefixes_count_for_more() -> None:
    ratio, mask = REWARDS, torch.arange(7) < torch.tensor([[1], [2], [3], [5], [7], [0]])
    found = implicit_reward(ratio.masked_fill(~mask, NAN), mask)
    for row in range(6):
        expected = sum(float(ratio[row, k]) / (k + 1) for k in range(int(mask[row].sum())))
        assert float(found[row]) == pytest.approx(expected, abs=1e-12)


def test_weights_of_particles() -> None:
    logs = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1e3, 0.0, 0.0, 0.0], [-INF, 2.0, 2.0, -INF], [-INF] * 4])
    assert particle_weights(logs).tolist() == [[0.25] * 4, [1, 0, 0, 0], [0, 0.5, 0.5, 0], [0.25] * 4]
    assert effective_samples(logs).tolist() == pytest.approx([4, 1, 2, 4])
    weights = REWARDS.exp()
    expected = weights.sum(-1) ** 2 / weights.square().sum(-1)
    assert torch.allclose(effective_samples(REWARDS), expected)


@pytest.mark.parametrize(
    "function",
    [
        lambda values: soft_selection_probs(values, temperature=0),
        lambda values: soft_selection_probs(values, temperature=0.5),
        lambda values: pessimistic_level(values, beta=0.5),
        lambda values: implicit_reward(values, values > -1),
        lambda values: particle_weights(values.nan_to_num(nan=-INF)),
        lambda values: effective_samples(values.nan_to_num(nan=-INF)),
    ],
)
def test_groups_of_prompts_are_as_rows(function: Callable[[Tensor], Tensor]) -> None:
    values = REWARDS.clone()
    values[0], values[1, 2], values[4, 3:] = NAN, NAN, NAN
    found = function(values.view(2, 3, 7)).flatten(0, 1)
    torch.testing.assert_close(found, function(values), rtol=0, atol=0, equal_nan=True)
