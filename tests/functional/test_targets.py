"""Expected gradients of the estimators, enumerated in float64, against autograd of the exact objectives."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from vbon_lightning.functional import (
    RewardCDF,
    Target,
    bon_log_prob,
    cost_to_go,
    generalized_advantage_estimation,
    kl_penalty,
    kl_rl_target,
    kl_weight,
    leave_one_out,
    normalise_advantages,
    rao_blackwell_advantages,
    reinforce_loss,
    sampled_kl_advantages,
    token_rewards,
    token_statistics,
    vbon_target,
)

# --- one token: a categorical policy over K responses -----------------------------------------------------

K = 4
REFERENCE = torch.tensor([0.15, 0.4, 0.25, 0.2], dtype=torch.float64)
DISTINCT = torch.tensor([0.5, -1.0, 2.0, 1.0], dtype=torch.float64)
TIED = torch.tensor([1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
REWARDS = pytest.mark.parametrize("rewards", [DISTINCT, TIED], ids=["distinct", "tied"])
ORDERS = pytest.mark.parametrize("n", [1.5, 2, 4, 7])


def exact_cdf(probs: Tensor, rewards: Tensor) -> RewardCDF:
    """The reference's own CDF at each response, by direct sums."""
    below = (rewards[None, :] < rewards[:, None]).to(probs.dtype) @ probs
    at_or_below = (rewards[None, :] <= rewards[:, None]).to(probs.dtype) @ probs
    return RewardCDF(below.log(), at_or_below.clamp(max=1).log())


def best_of_n(probs: Tensor, rewards: Tensor, n: float) -> Tensor:
    """The law of Best-of-N from its CDF over reward levels, each shared in proportion to p."""
    out = torch.zeros_like(probs)
    for level in rewards.unique():
        tied, below = rewards == level, probs[rewards < level].sum()
        mass = probs[tied].sum()
        out[tied] = ((below + mass) ** n - below**n) * probs[tied] / mass
    return out


def exact_gradient(theta: Tensor, score: Tensor, kl_coef: float) -> Tensor:
    """Gradient of ``E[score] - kl_coef KL(policy || reference)``."""
    log_policy = theta.log_softmax(-1)
    policy = log_policy.exp()
    objective = (policy * score).sum() - kl_coef * (policy * (log_policy - REFERENCE.log())).sum()
    return torch.autograd.grad(objective, theta)[0]


def expected_gradient(theta: Tensor, target: Target, normalise: bool = False) -> Tensor:
    """Expectation over all pairs of responses of the gradient that one step would follow (to ascend)."""
    log_policy, mask = theta.log_softmax(-1), torch.ones(1, 2, 1, dtype=torch.bool)
    total = torch.zeros((), dtype=torch.float64)
    for pair in itertools.product(range(K), repeat=2):
        y = torch.tensor([pair])
        log_probs, reference = log_policy[y][..., None], REFERENCE.log()[y][..., None]
        advantages = sampled_kl_advantages(Target(target.score[y], target.kl_coef), log_probs, reference, mask)
        if normalise:
            advantages = normalise_advantages(advantages)
        total = total - log_probs.detach().sum().exp() * reinforce_loss(log_probs, advantages, mask)
    return torch.autograd.grad(total, theta)[0]


@pytest.fixture
def theta() -> Tensor:
    return torch.tensor([0.3, -0.4, 0.1, 0.9], dtype=torch.float64, requires_grad=True)


@REWARDS
@ORDERS
def test_expected_gradient_is_that_of_the_kl_to_best_of_n(theta: Tensor, rewards: Tensor, n: float) -> None:
    target = vbon_target(REFERENCE.log(), exact_cdf(REFERENCE, rewards), n=n)
    got = expected_gradient(theta, target)
    policy = theta.softmax(-1)
    kl_to_bon = (policy * (policy.log() - best_of_n(REFERENCE, rewards, n).log())).sum()
    want = -kl_weight(n) * torch.autograd.grad(kl_to_bon, theta)[0]
    assert want.abs().max().item() > 1e-3
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@REWARDS
@ORDERS
def test_best_of_n_is_the_optimum_of_the_exact_target_only(rewards: Tensor, n: float) -> None:
    log_bon = bon_log_prob(REFERENCE.log(), exact_cdf(REFERENCE, rewards).log_below, n=n,
                           log_at_or_below=exact_cdf(REFERENCE, rewards).log_at_or_below)  # fmt: skip
    at_optimum = log_bon.clone().requires_grad_()
    target = vbon_target(REFERENCE.log(), exact_cdf(REFERENCE, rewards), n=n)
    assert expected_gradient(at_optimum, target).abs().max().item() < 1e-14
    # Scaling the score by 1/n with a KL coefficient of 1/(n-1), as is sometimes done, moves the optimum.
    wrong = Target(target.score * (n - 1) / n, target.kl_coef)
    assert expected_gradient(at_optimum, wrong).abs().max().item() > 1e-3


@REWARDS
@pytest.mark.parametrize("floor", [-0.2, -1.0, -4.0])
def test_a_floor_moves_the_optimum_by_no_more_than_it_says(rewards: Tensor, floor: float) -> None:
    n, cdf = 8, exact_cdf(REFERENCE, rewards)
    target = vbon_target(REFERENCE.log(), cdf, n=n, log_ratio_floor=floor)
    bon = best_of_n(REFERENCE, rewards, n)
    raised = torch.maximum(bon, math.exp(floor) * REFERENCE)
    assert (raised > bon).any(), "the floor is met"
    optimum = raised / raised.sum()
    at_optimum = optimum.log().requires_grad_()
    assert expected_gradient(at_optimum, target).abs().max().item() < 1e-14
    assert (optimum - bon).abs().sum() / 2 <= math.exp(floor)
    exact = vbon_target(REFERENCE.log(), cdf, n=n)
    torch.testing.assert_close(target.score, exact.score.clamp(min=floor / (n - 1)))
    for bound in ("lower", "untied"):  # whose optimum it may move by far more
        with pytest.raises(ValueError, match=f"for bound='exact' only, got '{bound}'"):
            vbon_target(REFERENCE.log(), cdf, n=n, bound=bound, log_ratio_floor=floor)


@ORDERS
def test_the_untied_formula_is_the_exact_one_without_ties_only(n: float) -> None:
    def ratios(rewards: Tensor, bound: str) -> Tensor:
        return vbon_target(REFERENCE.log(), exact_cdf(REFERENCE, rewards), n=n, bound=bound).score / kl_weight(n)

    torch.testing.assert_close(ratios(DISTINCT, "untied"), ratios(DISTINCT, "exact"), atol=1e-12, rtol=0)
    exact, untied = ratios(TIED, "exact"), ratios(TIED, "untied")
    assert (REFERENCE * exact.exp()).sum().item() == pytest.approx(1)
    tied = TIED == 1.0
    torch.testing.assert_close(untied[~tied], exact[~tied], atol=1e-12, rtol=0)
    assert (untied[tied] < exact[tied]).all()  # too little is left for responses that tie


@ORDERS
def test_bound_is_kl_rl_with_the_log_cdf_as_reward(theta: Tensor, n: float) -> None:
    """Scaled back by n - 1, the bound of the vBoN objective has n - 1 times the KL-RL gradient."""
    probs = torch.tensor([0.7, 0.2, 0.9, 1.0], dtype=torch.float64)
    cdf = RewardCDF(probs.log(), probs.log())
    lower = vbon_target(REFERENCE.log(), cdf, n=n, bound="lower")
    kl_rl = kl_rl_target(probs.log(), beta=kl_weight(n))
    assert lower.kl_coef == kl_rl.kl_coef
    torch.testing.assert_close(lower.score - kl_rl.score, torch.full_like(probs, math.log(n) * kl_weight(n)))
    bound_of_j = exact_gradient(theta, math.log(n) + (n - 1) * probs.log(), 1.0)
    torch.testing.assert_close(bound_of_j, (n - 1) * expected_gradient(theta, kl_rl), rtol=0, atol=1e-11)
    torch.testing.assert_close(expected_gradient(theta, lower), expected_gradient(theta, kl_rl), rtol=0, atol=1e-12)


def test_kl_rl_expected_gradient(theta: Tensor) -> None:
    got = expected_gradient(theta, kl_rl_target(DISTINCT, beta=0.3))
    torch.testing.assert_close(got, exact_gradient(theta, DISTINCT, 0.3), rtol=0, atol=1e-13)


def test_normalised_advantages_are_biased(theta: Tensor) -> None:
    """Not even the direction survives, which is why it is opt-in."""
    target = kl_rl_target(DISTINCT, beta=0.3)
    got, want = expected_gradient(theta, target, normalise=True), exact_gradient(theta, DISTINCT, 0.3)
    assert torch.cosine_similarity(got, want, dim=0).item() < 0.999


@pytest.mark.parametrize("transform", [lambda r: 5 * r + 3, lambda r: r**3, torch.exp], ids=["affine", "cube", "exp"])
@pytest.mark.parametrize("bound", ["exact", "lower"])
def test_increasing_transforms_leave_the_target_unchanged(transform, bound: str) -> None:
    for rewards in (DISTINCT, TIED):
        before, after = (
            vbon_target(REFERENCE.log(), exact_cdf(REFERENCE, r), n=4, bound=bound)
            for r in (rewards, transform(rewards))
        )
        assert torch.equal(before.score, after.score)


# --- several tokens: vocabulary {a, b, EOS}, at most 3 tokens ---------------------------------------------

EOS, LIMIT, TEMPERATURE = 2, 3, 0.7


def all_responses() -> list[tuple[int, ...]]:
    out: list[tuple[int, ...]] = []
    for length in range(1, LIMIT + 1):
        for body in itertools.product((0, 1), repeat=length - 1):
            out.append((*body, EOS))
            if length == LIMIT:
                out += [(*body, 0), (*body, 1)]
    return out


RESPONSES = all_responses()
PREFIXES = [p for n in range(LIMIT) for p in itertools.product((0, 1), repeat=n)]


class Language(NamedTuple):
    """Every response of the toy language, padded, with the row of logits behind each token."""

    tokens: Tensor
    mask: Tensor
    rows: Tensor


def toy_language() -> Language:
    pad = [r + (EOS,) * (LIMIT - len(r)) for r in RESPONSES]  # pad equal to EOS, as it often is
    mask = [[t < len(r) for t in range(LIMIT)] for r in RESPONSES]
    rows = [[PREFIXES.index(r[:t]) if t < len(r) else 0 for t in range(LIMIT)] for r in RESPONSES]
    return Language(torch.tensor(pad), torch.tensor(mask), torch.tensor(rows))


def response_log_probs(table: Tensor) -> Tensor:
    """Sequence log-probabilities by a plain loop over tokens."""
    step = (table / TEMPERATURE).log_softmax(-1)
    return torch.stack([sum(step[PREFIXES.index(r[:t]), r[t]] for t in range(len(r))) for r in RESPONSES])


@pytest.fixture
def tables() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of policy and reference, and rewards with ties."""
    generator = torch.Generator().manual_seed(5)
    policy = torch.randn(len(PREFIXES), 3, dtype=torch.float64, generator=generator).requires_grad_()
    reference = torch.randn(len(PREFIXES), 3, dtype=torch.float64, generator=generator)
    rewards = torch.randint(0, 6, (len(RESPONSES),), generator=generator).double()
    return policy, reference, rewards


ESTIMATORS = ["sampled", "rao_blackwell", "prefix_baseline"]


def sequence_gradients(estimator: str, policy: Tensor, reference: Tensor, target: Target) -> tuple[Tensor, float]:
    """Mean and total variance, over all pairs of responses, of the gradient that one step would follow."""
    language = toy_language()
    pairs = torch.tensor(list(itertools.product(range(len(RESPONSES)), repeat=2)))  # [B, 2]: one prompt a pair
    rows, mask = language.rows[pairs], language.mask[pairs]
    stats = token_statistics(policy[rows], reference[rows], language.tokens[pairs], temperature=TEMPERATURE)
    group = Target(target.score[pairs], target.kl_coef)
    if estimator == "sampled":
        advantages = sampled_kl_advantages(group, stats.log_probs, stats.reference_log_probs, mask)
    else:
        log_ratio = stats.log_probs - stats.reference_log_probs if estimator == "prefix_baseline" else None
        advantages = rao_blackwell_advantages(group, stats.kl, mask, log_ratio=log_ratio)
    losses = torch.vmap(reinforce_loss)(*(x[:, None] for x in (stats.log_probs, advantages, mask)))  # [B]
    if estimator != "sampled":
        losses = losses + group.kl_coef * torch.vmap(kl_penalty)(stats.kl, mask)
    each = torch.eye(len(pairs), dtype=torch.float64)
    (gradients,) = torch.autograd.grad(-losses, policy, each, is_grads_batched=True)
    weights = torch.where(mask, stats.log_probs.detach(), 0.0).sum((-1, -2)).exp()
    assert weights.sum().item() == pytest.approx(1.0, abs=1e-13)
    mean = (weights[:, None, None] * gradients).sum(0)
    return mean, (weights[:, None, None] * (gradients - mean).square()).sum().item()


def test_toy_language_is_complete(tables: tuple[Tensor, Tensor, Tensor]) -> None:
    assert len(RESPONSES) == 15
    assert response_log_probs(tables[0]).exp().sum().item() == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("bound", ["exact", "kl_rl"])
def test_every_kl_estimator_has_the_exact_expected_gradient(
    tables: tuple[Tensor, Tensor, Tensor], estimator: str, bound: str
) -> None:
    policy, reference, rewards = tables
    log_reference = response_log_probs(reference)
    log_policy = response_log_probs(policy)
    if bound == "exact":
        target = vbon_target(log_reference, exact_cdf(log_reference.exp(), rewards), n=4)
        log_bon = best_of_n(log_reference.exp(), rewards, 4).log()
        objective = -(log_policy.exp() * (log_policy - log_bon)).sum() / 3
    else:
        target = kl_rl_target(rewards, beta=0.4)
        objective = (log_policy.exp() * (rewards - 0.4 * (log_policy - log_reference))).sum()
    (want,) = torch.autograd.grad(objective, policy)
    got, _ = sequence_gradients(estimator, policy, reference, target)
    assert want.abs().max().item() > 1e-2
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_at_the_optimum_the_sampled_kl_is_noiseless_and_the_prefix_baseline_helps(
    tables: tuple[Tensor, Tensor, Tensor],
) -> None:
    """The optimum of KL-RL, written as logits: every mean gradient vanishes, and the variances order."""
    _, reference, rewards = tables
    beta = 0.4
    optimum = response_log_probs(reference) + rewards / beta
    optimum = (optimum - optimum.logsumexp(0)).exp()
    table = torch.zeros_like(reference)
    for row, prefix in enumerate(PREFIXES):
        for token in range(3):
            reached = [i for i, r in enumerate(RESPONSES) if r[: len(prefix) + 1] == (*prefix, token)]
            table[row, token] = TEMPERATURE * optimum[reached].sum().log()
    policy, target = table.requires_grad_(), kl_rl_target(rewards, beta=beta)
    torch.testing.assert_close(response_log_probs(policy).exp(), optimum)
    variance = {}
    for estimator in ESTIMATORS:
        mean, variance[estimator] = sequence_gradients(estimator, policy, reference, target)
        assert mean.abs().max().item() < 1e-13
    assert variance["sampled"] < 1e-25
    assert 0 < variance["prefix_baseline"] < 0.8 * variance["rao_blackwell"]


def test_advantages_against_loops() -> None:
    torch.manual_seed(0)
    b, g, t = 2, 3, 4
    mask = torch.arange(t) < torch.tensor([[4, 1, 2], [3, 3, 4]])[..., None]
    score, kl, lp, ref = (torch.randn(*s, dtype=torch.float64) for s in [(b, g), (b, g, t), (b, g, t), (b, g, t)])
    noise = torch.full_like(kl, math.nan)
    dirty = [torch.where(mask, x, noise) for x in (kl, lp, ref)]
    target = Target(score, 0.3)
    sampled = sampled_kl_advantages(target, dirty[1], dirty[2], mask)
    plain = rao_blackwell_advantages(target, dirty[0], mask)
    prefix = rao_blackwell_advantages(target, dirty[0], mask, log_ratio=dirty[1] - dirty[2])
    ratio, kl = torch.where(mask, lp - ref, 0.0), torch.where(mask, kl, 0.0)
    before = ratio.cumsum(-1) - ratio
    total = score - 0.3 * ratio.sum(-1)
    siblings = (total.sum(1, keepdim=True) - total) / (g - 1)
    want_prefix = (score[..., None] - 0.3 * (cost_to_go(kl) + before) - siblings[..., None]) * mask
    want_sampled = leave_one_out(score - 0.3 * ratio.sum(-1))[..., None] * mask
    want_plain = (leave_one_out(score)[..., None] - 0.3 * leave_one_out(cost_to_go(kl))) * mask
    torch.testing.assert_close(sampled, want_sampled, rtol=0, atol=1e-14)
    torch.testing.assert_close(plain, want_plain, rtol=0, atol=1e-14)
    torch.testing.assert_close(prefix, want_prefix, rtol=0, atol=1e-14)
    assert kl_penalty(dirty[0], mask).item() == pytest.approx(kl.sum().item() / (b * g))


@pytest.mark.parametrize("form", ["sampled", "rao_blackwell", "prefix_baseline"])
def test_a_response_without_a_token_is_nobodys_sibling(form: str) -> None:
    noise = torch.Generator().manual_seed(0)
    score, (kl, lp, ref) = torch.randn(2, 3, generator=noise), torch.randn(3, 2, 3, 4, generator=noise)
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[:, 1] = False
    score[:, 1] = math.nan

    def advantages(places: list[int]) -> Tensor:
        target = Target(score[:, places], 0.3)
        divergence, ours, theirs, kept = (part[:, places] for part in (kl, lp, ref, mask))
        if form == "sampled":
            return sampled_kl_advantages(target, ours, theirs, kept)
        ratio = ours - theirs if form == "prefix_baseline" else None
        return rao_blackwell_advantages(target, divergence, kept, log_ratio=ratio)

    found = advantages([0, 1, 2])
    assert not found[:, 1].any()
    torch.testing.assert_close(found[:, [0, 2]], advantages([0, 2]))


def test_advantages_carry_no_gradient() -> None:
    mask = torch.ones(1, 2, 3, dtype=torch.bool)
    values = torch.randn(1, 2, 3, requires_grad=True)
    target = Target(torch.randn(1, 2), 0.1)
    assert not sampled_kl_advantages(target, values, values * 2, mask).requires_grad
    assert not rao_blackwell_advantages(target, values, mask, log_ratio=values).requires_grad
    assert not token_rewards(target, values, values * 2, mask).requires_grad
    assert kl_penalty(values, mask).requires_grad
    assert not vbon_target(values, RewardCDF(values, values), n=3).score.requires_grad


def test_token_rewards_put_the_score_on_the_last_real_token() -> None:
    mask = torch.tensor([[[True, True, False], [True, True, True], [True, False, False]]])
    log_probs = torch.tensor([[[-1.0, -2.0, math.nan], [-1.0, -1.0, -1.0], [-3.0, math.inf, math.nan]]])
    reference = torch.where(mask, log_probs - 0.5, log_probs)
    got = token_rewards(Target(torch.tensor([[10.0, 20.0, 30.0]]), 0.2), log_probs, reference, mask)
    want = torch.tensor([[[-0.1, 9.9, 0.0], [-0.1, -0.1, 19.9], [29.9, 0.0, 0.0]]])
    torch.testing.assert_close(got, want)
    # With lambda = 1 and no critic, the first token's advantage is the whole reward of the response.
    advantages = generalized_advantage_estimation(got, torch.zeros_like(got), mask, lam=1.0).advantages
    torch.testing.assert_close(advantages[..., 0], got.sum(-1))


PAIR = torch.zeros(1, 2)
MASK, TOKENS, TARGET = torch.ones(1, 2, 3).bool(), torch.zeros(1, 2, 3), Target(PAIR, 0.1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: vbon_target(PAIR, RewardCDF(PAIR, PAIR), n=1),
            ValueError,
            "n must be greater than 1, got 1",
        ),
        (
            lambda: vbon_target(PAIR, RewardCDF(PAIR, PAIR), n=2, log_ratio_floor=0.0),
            ValueError,
            "log_ratio_floor must be less than 0, got 0.0",
        ),
        (
            lambda: vbon_target(PAIR, RewardCDF(PAIR, PAIR), n=2, bound="upper"),
            ValueError,
            "bound must be 'exact', 'untied' or 'lower', got 'upper'",
        ),
        (
            lambda: vbon_target(PAIR, RewardCDF(PAIR[0], PAIR[0]), n=2),
            ValueError,
            "log_below must have the shape",
        ),
        (
            lambda: vbon_target(PAIR, RewardCDF(PAIR[0], PAIR[0]), n=2, bound="lower"),
            ValueError,
            r"cdf.log_below must have the shape of log_reference, \[1, 2\], got \[2\]",
        ),
        (lambda: kl_rl_target(PAIR, beta=-0.1), ValueError, "beta must be at least 0, got -0.1"),
        (lambda: kl_rl_target(PAIR.long(), beta=0.1), TypeError, "rewards must have a floating-point dtype"),
        (
            lambda: sampled_kl_advantages(TARGET, TOKENS[0], TOKENS, MASK),
            ValueError,
            "log_probs must have the shape",
        ),
        (
            lambda: sampled_kl_advantages(Target(PAIR[0], 0.1), TOKENS, TOKENS, MASK),
            ValueError,
            r"target.score must have shape \[B, G\] = \[1, 2\], got \[2\]",
        ),
        (
            lambda: sampled_kl_advantages(Target(PAIR[:, :1], 0.1), TOKENS[:, :1], TOKENS[:, :1], MASK[:, :1]),
            ValueError,
            "G >= 2",
        ),
        (
            lambda: rao_blackwell_advantages(TARGET, TOKENS, MASK[0]),
            ValueError,
            r"mask must have shape \[B, G, T\]",
        ),
        (
            lambda: rao_blackwell_advantages(TARGET, TOKENS, MASK, log_ratio=PAIR),
            ValueError,
            "log_ratio must have",
        ),
        (
            lambda: token_rewards(TARGET, TOKENS, PAIR, MASK),
            ValueError,
            "reference_log_probs must have the shape",
        ),
        (lambda: kl_penalty(TOKENS, MASK[0]), ValueError, "mask must have the shape of token_kl"),
    ],
)
def test_refusals_say_what_came_and_what_was_expected(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def test_token_rewards_are_in_the_dtype_of_the_log_probabilities() -> None:
    log_probs, mask = torch.zeros(1, 2, 3), torch.ones(1, 2, 3, dtype=torch.bool)
    got = token_rewards(Target(torch.ones(1, 2, dtype=torch.float64), 0.5), log_probs, log_probs, mask)
    assert got.dtype == torch.float32
    assert got.tolist() == [[[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]]
