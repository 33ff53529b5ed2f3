"""KL monitors against torch.distributions, and which of them may serve as a loss."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from vbon_lightning.functional import (
    kl_k1,
    kl_k2,
    kl_k3,
    reinforce_loss,
    token_log_probs,
    token_statistics,
    vocabulary_kl,
)


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(2, 4, 6, dtype=torch.float64), torch.randn(2, 4, 6, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_vocabulary_kl_and_its_gradient(logits: tuple[Tensor, Tensor], temperature: float) -> None:
    policy, reference = logits[0].requires_grad_(), logits[1]
    got = vocabulary_kl(policy, reference, temperature=temperature)
    want = kl_divergence(Categorical(logits=policy / temperature), Categorical(logits=reference / temperature))
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)
    got_gradient, want_gradient = (torch.autograd.grad(x.sum(), policy)[0] for x in (got, want))
    torch.testing.assert_close(got_gradient, want_gradient, rtol=1e-11, atol=1e-14)
    assert torch.autograd.gradcheck(lambda x: vocabulary_kl(x, reference, temperature=temperature), policy)


def test_tokens_masked_in_both_have_no_part(logits: tuple[Tensor, Tensor]) -> None:
    policy, reference = logits
    masked = [torch.cat([x, torch.full((2, 4, 2), -math.inf, dtype=x.dtype)], -1) for x in (policy, reference)]
    masked[0].requires_grad_()
    got = vocabulary_kl(masked[0], masked[1])
    torch.testing.assert_close(got, vocabulary_kl(policy, reference))
    got.sum().backward()
    assert masked[0].grad.isfinite().all()
    assert not masked[0].grad[..., -2:].any()


def test_tokens_masked_in_one() -> None:
    full, partial = torch.zeros(1, 2), torch.tensor([[0.0, -math.inf]])
    assert vocabulary_kl(partial, full).item() == pytest.approx(math.log(2))
    assert vocabulary_kl(full, partial).item() == math.inf


def test_equal_models_have_zero_kl_and_zero_gradient() -> None:
    torch.manual_seed(0)
    policy = (torch.randn(50, 1000) * 5).requires_grad_()
    got = vocabulary_kl(policy, policy.detach().clone())
    assert torch.equal(got, torch.zeros(50))
    got.sum().backward()
    assert policy.grad.abs().max().item() < 1e-6


def test_rounding_never_makes_the_kl_negative_and_keeps_the_gradient() -> None:
    torch.manual_seed(0)
    reference = torch.randn(2000, 500) * 5
    policy = (reference + 1e-5 * torch.randn_like(reference)).requires_grad_()
    log_policy, log_reference = policy.log_softmax(-1), reference.log_softmax(-1)
    plain = (log_policy.exp() * (log_policy - log_reference)).sum(-1)
    assert (plain < 0).any()  # the case is met
    got = vocabulary_kl(policy, reference)
    assert (got >= 0).all()
    got.sum().backward()
    assert policy.grad[plain < 0].abs().sum(-1).gt(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_statistics_equal_the_single_functions(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    policy, reference = torch.randn(3, 5, 11).to(dtype), torch.randn(3, 5, 11).to(dtype)
    tokens = torch.randint(11, (3, 5))
    got = token_statistics(policy, reference, tokens, temperature=0.7)
    assert {x.dtype for x in got} == {torch.float32}
    torch.testing.assert_close(got.log_probs, token_log_probs(policy, tokens, temperature=0.7))
    torch.testing.assert_close(got.reference_log_probs, token_log_probs(reference, tokens, temperature=0.7))
    torch.testing.assert_close(got.kl, vocabulary_kl(policy, reference, temperature=0.7))
    alone = token_statistics(policy, None, tokens, temperature=0.7)
    torch.testing.assert_close(alone.log_probs, got.log_probs)
    assert alone.reference_log_probs is None
    assert alone.kl is None


@pytest.mark.parametrize("excluded", [False, True], ids=["full support", "a token neither model allows"])
def test_the_written_out_gradient_of_token_statistics(excluded: bool) -> None:
    torch.manual_seed(2)
    policy, reference = (torch.randn(3, 5, 11, dtype=torch.float64) for _ in range(2))
    if excluded:
        policy[..., 4] = reference[..., 4] = -torch.inf
    tokens = torch.randint(4, (3, 5))
    policy.requires_grad_(True)
    weights = torch.randn(2, 3, 5, dtype=torch.float64)

    def grad(log_probs: Tensor, kl: Tensor) -> Tensor:
        return torch.autograd.grad((weights[0] * log_probs + weights[1] * kl).sum(), policy)[0]

    got = token_statistics(policy, reference, tokens, temperature=0.7)
    expected = grad(token_log_probs(policy, tokens, temperature=0.7), vocabulary_kl(policy, reference, temperature=0.7))
    torch.testing.assert_close(grad(got.log_probs, got.kl), expected, rtol=1e-10, atol=1e-12)
    # With a reference that wants its own gradient the general path is taken, and agrees.
    reference.requires_grad_(True)
    general = token_statistics(policy, reference, tokens, temperature=0.7)
    torch.testing.assert_close(grad(general.log_probs, general.kl), expected, rtol=1e-10, atol=1e-12)


# --- k1, k2, k3 -------------------------------------------------------------------------------------------


def pointwise(logits: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Both log-laws over 6 tokens and the exact gradient of the KL in the policy's logits."""
    theta = logits[0][0, 0].clone().requires_grad_()
    log_policy, log_reference = theta.log_softmax(-1), logits[1][0, 0].log_softmax(-1)
    exact = (log_policy.exp() * (log_policy - log_reference)).sum()
    (gradient,) = torch.autograd.grad(exact, theta)
    return theta, log_reference, gradient


def test_estimators_under_the_policy(logits: tuple[Tensor, Tensor]) -> None:
    theta, log_reference, _ = pointwise(logits)
    log_policy = theta.detach().log_softmax(-1)
    exact = (log_policy.exp() * (log_policy - log_reference)).sum()
    k1, k2, k3 = (k(log_policy, log_reference) for k in (kl_k1, kl_k2, kl_k3))
    expected = [(log_policy.exp() * k).sum().item() for k in (k1, k2, k3)]
    assert expected[0] == pytest.approx(exact.item(), abs=1e-14)
    assert expected[2] == pytest.approx(exact.item(), abs=1e-14)
    assert abs(expected[1] - exact.item()) > 1e-3
    assert (k2 >= 0).all()
    assert (k3 >= 0).all()
    assert (k1 < 0).any()


def expected_loss_gradient(estimator, theta: Tensor, log_reference: Tensor) -> Tensor:
    """E_{y ~ pi}[grad k(y)]: what a step on the estimator as a loss follows, sampling held fixed."""
    log_policy = theta.log_softmax(-1)
    loss = (log_policy.detach().exp() * estimator(log_policy, log_reference)).sum()
    return torch.autograd.grad(loss, theta)[0]


def test_k1_as_a_loss_has_no_gradient_and_in_the_reward_the_right_one(logits: tuple[Tensor, Tensor]) -> None:
    theta, log_reference, exact = pointwise(logits)
    assert exact.abs().max().item() > 0.05
    assert expected_loss_gradient(kl_k1, theta, log_reference).abs().max().item() < 1e-15

    log_policy = theta.log_softmax(-1)
    probs, advantages = log_policy.detach().exp(), -kl_k1(log_policy, log_reference)
    mask = torch.ones(6, 1, 1, dtype=torch.bool)  # six prompts, one for each token, weighted by its probability
    loss = reinforce_loss(log_policy[:, None, None], (6 * probs * advantages)[:, None], mask)
    torch.testing.assert_close(torch.autograd.grad(loss, theta)[0], exact, rtol=0, atol=1e-14)


def test_k3_as_a_loss_follows_another_divergence(logits: tuple[Tensor, Tensor]) -> None:
    theta, log_reference, exact = pointwise(logits)
    got = expected_loss_gradient(kl_k3, theta, log_reference)
    assert (got - exact).abs().max().item() > 0.01
    reverse = kl_divergence(Categorical(logits=log_reference), Categorical(logits=theta))
    torch.testing.assert_close(got, torch.autograd.grad(reverse, theta)[0], rtol=0, atol=1e-14)


def test_k2_as_a_loss_has_the_right_gradient(logits: tuple[Tensor, Tensor]) -> None:
    """Biased in value, right in gradient: E[l grad log pi]."""
    theta, log_reference, exact = pointwise(logits)
    torch.testing.assert_close(expected_loss_gradient(kl_k2, theta, log_reference), exact, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: kl_k1(torch.zeros(2), torch.zeros(3)),
            ValueError,
            "reference_log_probs must have the shape",
        ),
        (
            lambda: kl_k3(torch.zeros(2).int(), torch.zeros(2)),
            TypeError,
            "log_probs must have a floating-point",
        ),
        (
            lambda: vocabulary_kl(torch.zeros(2, 3), torch.zeros(2, 4)),
            ValueError,
            r"reference_logits must have the shape of logits, \[2, 3\], got \[2, 4\]",
        ),
        (
            lambda: vocabulary_kl(torch.zeros(3), torch.zeros(3), temperature=-1),
            ValueError,
            "temperature must be",
        ),
        (
            lambda: token_statistics(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2).long()),
            ValueError,
            "reference_logits must have the shape",
        ),
        (
            lambda: token_statistics(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3).long()),
            ValueError,
            "tokens must have shape",
        ),
    ],
)
def test_refusals_say_what_came_and_what_was_expected(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def test_statistics_are_the_same_where_the_reference_is_trained_too() -> None:
    torch.manual_seed(0)
    logits, reference_logits = (torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    tokens = torch.randint(5, (2, 3))
    got = token_statistics(logits, reference_logits, tokens, temperature=0.7)
    want = token_statistics(logits, reference_logits.detach(), tokens, temperature=0.7)
    for left, right in zip(got, want, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-12)
    (got.reference_log_probs.sum() + got.kl.sum()).backward()
    log_policy = (logits.detach() / 0.7).log_softmax(-1)
    log_reference = (reference_logits.detach() / 0.7).log_softmax(-1)
    chosen = torch.nn.functional.one_hot(tokens, 5) - log_reference.exp()
    expected = (chosen + log_reference.exp() - log_policy.exp()) / 0.7
    torch.testing.assert_close(reference_logits.grad, expected, rtol=0, atol=1e-12)
