"""Baselines and surrogate losses against independent loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vbon_lightning.functional import (
    clipped_surrogate_loss,
    clipped_value_loss,
    cost_to_go,
    generalized_advantage_estimation,
    leave_one_out,
    normalise_advantages,
    reinforce_loss,
)

B, G, T = 2, 3, 5


@pytest.fixture
def mask() -> Tensor:
    lengths = torch.tensor([[5, 1, 3], [2, 4, 5]])
    return torch.arange(T) < lengths[..., None]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (1, 2)])
def test_leave_one_out_against_a_loop(shape: tuple[int, ...]) -> None:
    values = draw(*shape)
    got = leave_one_out(values)
    for i in range(shape[1]):
        others = [values[:, j] for j in range(shape[1]) if j != i]
        torch.testing.assert_close(got[:, i], values[:, i] - sum(others) / len(others), rtol=0, atol=1e-14)


def test_normalise_counts_only_the_mask(mask: Tensor) -> None:
    advantages = (draw(B, G, T) * 3 + 5).masked_fill(~mask, math.nan)
    got = normalise_advantages(advantages, mask)
    assert not got[~mask].any()
    assert got[mask].mean().item() == pytest.approx(0, abs=1e-12)
    assert got[mask].std(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert torch.equal(normalise_advantages(torch.full((2, 3), 4.0)), torch.zeros(2, 3))


def test_cost_to_go_is_strictly_later() -> None:
    costs = draw(2, 3, 6)
    got = cost_to_go(costs)
    for t in range(6):
        torch.testing.assert_close(got[..., t], costs[..., t + 1 :].sum(-1), rtol=0, atol=1e-14)
    assert not got[..., -1].any()


def test_reinforce_loss_against_a_loop(mask: Tensor) -> None:
    log_probs = draw(B, G, T).masked_fill(~mask, math.nan)
    by_token, by_response = draw(B, G, T).masked_fill(~mask, math.inf), draw(B, G)
    want_token = want_response = 0.0
    for b in range(B):
        for g in range(G):
            for t in range(T):
                if mask[b, g, t]:
                    want_token -= (by_token[b, g, t] * log_probs[b, g, t]).item() / (B * G)
                    want_response -= (by_response[b, g] * log_probs[b, g, t]).item() / (B * G)
    assert reinforce_loss(log_probs, by_token, mask).item() == pytest.approx(want_token, abs=1e-13)
    assert reinforce_loss(log_probs, by_response, mask).item() == pytest.approx(want_response, abs=1e-13)


def test_losses_send_no_gradient_outside_the_mask_or_into_advantages(mask: Tensor) -> None:
    log_probs = draw(B, G, T).masked_fill(~mask, -math.inf).requires_grad_()
    advantages = draw(B, G).requires_grad_()
    reinforce_loss(log_probs, advantages, mask).backward()
    assert advantages.grad is None
    assert not log_probs.grad[~mask].any()
    torch.testing.assert_close(log_probs.grad, -advantages.detach()[..., None] * mask / (B * G))


def test_losses_over_shards_average_to_the_loss_of_the_whole(mask: Tensor) -> None:
    """What data-parallel training does, with shards of unequal token counts; a token mean fails here."""
    assert mask[0].sum() != mask[1].sum()
    log_probs, old, advantages, values = draw(B, G, T), draw(B, G, T), draw(B, G), draw(B, G, T)
    losses = {
        "reinforce": lambda s: reinforce_loss(log_probs[s], advantages[s], mask[s]),
        "clipped": lambda s: clipped_surrogate_loss(log_probs[s], old[s], advantages[s], mask[s]).loss,
        "value": lambda s: clipped_value_loss(values[s], old[s], log_probs[s], mask[s]),
    }
    for name, loss in losses.items():
        whole = loss(slice(None)).item()
        assert (loss(slice(0, 1)) + loss(slice(1, 2))).item() / 2 == pytest.approx(whole, abs=1e-13), name


def test_clipped_surrogate_at_ratio_one_is_reinforce(mask: Tensor) -> None:
    log_probs = draw(B, G, T).masked_fill(~mask, math.nan).requires_grad_()
    advantages = draw(B, G, T)
    got = clipped_surrogate_loss(log_probs, log_probs.detach().clone(), advantages, mask)
    (gradient,) = torch.autograd.grad(got.loss, log_probs)
    (want,) = torch.autograd.grad(reinforce_loss(log_probs, advantages, mask), log_probs)
    torch.testing.assert_close(gradient, want, rtol=0, atol=1e-15)
    assert (got.clip_fraction.item(), got.approx_kl.item(), got.mean_ratio.item()) == (0.0, 0.0, 1.0)


def test_the_upper_end_of_the_clip_may_be_another() -> None:
    ratios, advantages = torch.tensor([1.25, 1.35, 0.75]), torch.tensor([2.0, 2.0, -2.0])
    zero, mask = torch.zeros(1, 1, 3), torch.ones(1, 1, 3).bool()
    given = (ratios.log().view(1, 1, 3), zero, advantages.view(1, 1, 3), mask)
    got = clipped_surrogate_loss(*given, clip=0.2, clip_high=0.3)
    assert got.loss.item() == pytest.approx(-2 * 1.25 - 2 * 1.3 + 2 * 0.8)
    assert got.clip_fraction.item() == pytest.approx(2 / 3)
    assert clipped_surrogate_loss(*given, clip=0.2).loss.item() == pytest.approx(-2 * 1.2 - 2 * 1.2 + 2 * 0.8)


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "flows"),
    [
        (1.5, 1.0, 1.2, False),  # up enough already
        (1.5, -1.0, -1.5, True),  # moved the wrong way: pulled back
        (0.5, 1.0, 0.5, True),
        (0.5, -1.0, -0.8, False),
        (1.1, 2.0, 2.2, True),
        (0.9, -2.0, -1.8, True),
    ],
)
def test_clip_cuts_only_the_side_that_gains(ratio: float, advantage: float, objective: float, flows: bool) -> None:
    log_probs = torch.full((1, 1, 1), math.log(ratio), dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, 1, 1, dtype=torch.float64)
    got = clipped_surrogate_loss(log_probs, zero, zero + advantage, torch.ones(1, 1, 1).bool(), clip=0.2)
    assert got.loss.item() == pytest.approx(-objective, abs=1e-12)
    got.loss.backward()
    assert log_probs.grad.item() == pytest.approx(-ratio * advantage if flows else 0.0, abs=1e-12)
    assert got.clip_fraction.item() == float(not flows)
    assert got.mean_ratio.item() == pytest.approx(ratio)
    assert got.approx_kl.item() == pytest.approx(ratio - 1 - math.log(ratio))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_gae_against_its_definition(mask: Tensor, gamma: float, lam: float) -> None:
    rewards, values = draw(B, G, T), draw(B, G, T)
    noise = torch.full_like(rewards, math.nan)
    got = generalized_advantage_estimation(
        torch.where(mask, rewards, noise), torch.where(mask, values, noise), mask, gamma=gamma, lam=lam
    )
    for b in range(B):
        for g in range(G):
            length = int(mask[b, g].sum())
            r, v = rewards[b, g, :length].tolist(), [*values[b, g, :length].tolist(), 0.0]
            for t in range(T):
                want = 0.0
                if t < length:
                    want = sum((gamma * lam) ** (s - t) * (r[s] + gamma * v[s + 1] - v[s]) for s in range(t, length))
                assert got.advantages[b, g, t].item() == pytest.approx(want, abs=1e-12)
                want_return = want + v[t] if t < length else 0.0
                assert got.returns[b, g, t].item() == pytest.approx(want_return, abs=1e-12)


def test_gae_with_lambda_one_is_return_minus_value(mask: Tensor) -> None:
    rewards, values = draw(B, G, T), draw(B, G, T).requires_grad_()
    got = generalized_advantage_estimation(rewards, values, mask, lam=1.0)
    want = torch.where(mask, rewards, 0.0).flip(-1).cumsum(-1).flip(-1)
    torch.testing.assert_close(got.returns, torch.where(mask, want, 0.0), rtol=0, atol=1e-13)
    assert not got.advantages.requires_grad
    assert not got.returns.requires_grad


def test_value_loss_against_a_loop(mask: Tensor) -> None:
    values, old, returns = draw(B, G, T).requires_grad_(), draw(B, G, T), draw(B, G, T)
    noise = torch.full_like(old, math.nan)
    got = clipped_value_loss(values, torch.where(mask, old, noise), torch.where(mask, returns, noise), mask, clip=0.3)
    want = 0.0
    for v, o, r, m in zip(*(x.flatten().tolist() for x in (values, old, returns, mask)), strict=True):
        if m:
            near = min(max(v, o - 0.3), o + 0.3)
            want += max((v - r) ** 2, (near - r) ** 2) / 2 / (B * G)
    assert got.item() == pytest.approx(want, abs=1e-13)
    got.backward()
    assert values.grad.isfinite().all()
    assert not values.grad[~mask].any()


ROW, MASK = torch.zeros(1, 2, 3), torch.ones(1, 2, 3).bool()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: leave_one_out(torch.zeros(4, 1)),
            ValueError,
            r"G >= 2 samples a prompt, got G = 1 in \[4, 1\]",
        ),
        (lambda: leave_one_out(torch.zeros(4)), ValueError, r"values must have shape \[B, G, ...\]"),
        (lambda: normalise_advantages(ROW, MASK[0]), ValueError, "mask must have the shape of advantages"),
        (lambda: normalise_advantages(ROW, eps=-1), ValueError, "eps must be at least 0"),
        (lambda: cost_to_go(torch.tensor(1.0)), ValueError, r"costs must have shape \[..., T\]"),
        (
            lambda: reinforce_loss(ROW, torch.zeros(2, 2), MASK),
            ValueError,
            r"advantages must have.*\[1, 2, 3\], or of its responses, \[1, 2\], got \[2, 2\]",
        ),
        (lambda: reinforce_loss(ROW[0], ROW, MASK), ValueError, r"log_probs must have the shape of mask"),
        (
            lambda: reinforce_loss(ROW, ROW, MASK.float()),
            TypeError,
            "mask must be a bool tensor, got torch.float32",
        ),
        (
            lambda: clipped_surrogate_loss(ROW, ROW, ROW, MASK, clip=0),
            ValueError,
            "clip must be greater than 0",
        ),
        (
            lambda: clipped_surrogate_loss(ROW, ROW[0], ROW, MASK),
            ValueError,
            "old_log_probs must have the shape",
        ),
        (
            lambda: generalized_advantage_estimation(ROW, ROW, MASK, gamma=1.1),
            ValueError,
            "gamma must be at most 1",
        ),
        (
            lambda: generalized_advantage_estimation(ROW, ROW, MASK, lam=-0.1),
            ValueError,
            "lam must be at least 0",
        ),
        (
            lambda: clipped_value_loss(ROW, ROW, ROW[0], MASK),
            ValueError,
            "returns must have the shape of mask",
        ),
        (lambda: clipped_value_loss(ROW, ROW, ROW, MASK, clip=-1), ValueError, "clip must be greater than 0"),
    ],
)
def test_refusals_say_what_came_and_what_was_expected(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def test_one_advantage_is_its_own_mean() -> None:
    advantages = torch.tensor([[3.0, 5.0]], dtype=torch.float64)
    mask = torch.tensor([[True, False]])
    assert normalise_advantages(advantages, mask).tolist() == [[0.0, 0.0]]
    assert normalise_advantages(advantages, torch.zeros_like(mask)).tolist() == [[0.0, 0.0]]


def test_eps_widens_the_spread() -> None:
    advantages = torch.tensor([[1.0, 3.0]], dtype=torch.float64)
    assert normalise_advantages(advantages, eps=0.25).tolist() == [[-0.8, 0.8]]
    assert normalise_advantages(torch.ones(1, 2), eps=0.25).tolist() == [[0.0, 0.0]]


def test_diagnostics_of_the_surrogate_are_means_over_tokens() -> None:
    ratios = torch.tensor([[[1.5, 1.0, 0.5], [2.0, 1.0, 9.0]]], dtype=torch.float64)
    advantages = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    mask = torch.tensor([[[True, True, True], [True, True, False]]])
    got = clipped_surrogate_loss(ratios.log(), torch.zeros_like(ratios), advantages, mask, clip=0.2)
    # Of the five tokens only the first is cut: at 1.2, where its advantage asks for more.
    assert got.clip_fraction.item() == pytest.approx(1 / 5)
    assert got.mean_ratio.item() == pytest.approx(6 / 5)
    assert got.approx_kl.item() == pytest.approx(sum(r - 1 - math.log(r) for r in (1.5, 1, 0.5, 2, 1)) / 5)
    assert got.loss.item() == pytest.approx(-((1.2 + 1 + 0.5) + (-2.0 - 1.0)) / 2)
    nothing = clipped_surrogate_loss(ratios.log(), torch.zeros_like(ratios), advantages, torch.zeros_like(mask))
    assert [value.item() for value in nothing] == [0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5)])
def test_leave_one_out_of_what_is_kept(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept = torch.tensor([[True, False, True, True], [True, True, True, True], [False, False, True, False]])
    values[~kept] = torch.nan
    found = leave_one_out(values, kept)
    torch.testing.assert_close(found[0, [0, 2, 3]], leave_one_out(values[:1, [0, 2, 3]])[0])
    torch.testing.assert_close(found[1], leave_one_out(values[1:2])[0])
    assert not found[~kept].any()
    assert not found[2].any(), "one alone has no baseline"


def test_leave_one_out_refuses_another_shape() -> None:
    with pytest.raises(ValueError, match=r"kept must have shape \[B, G\]"):
        leave_one_out(torch.zeros(2, 3), torch.ones(2, 4, dtype=torch.bool))


def test_a_response_without_tokens_counts_in_no_mean() -> None:
    noise = torch.Generator().manual_seed(0)
    log_probs, old, advantages, values = torch.randn(4, 2, 3, 4, generator=noise)
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[:, 1] = False
    left = [0, 2]
    for loss in (
        lambda keep: reinforce_loss(log_probs[:, keep], advantages[:, keep], mask[:, keep]),
        lambda keep: clipped_surrogate_loss(log_probs[:, keep], old[:, keep], advantages[:, keep], mask[:, keep]).loss,
        lambda keep: clipped_value_loss(values[:, keep], old[:, keep], advantages[:, keep], mask[:, keep]),
    ):
        torch.testing.assert_close(loss([0, 1, 2]), loss(left))
        assert loss([1]) == 0
