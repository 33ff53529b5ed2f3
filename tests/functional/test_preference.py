"""Preference losses against other routes to the same numbers, and at their optima."""

from __future__ import annotations

import itertools
import math

import pytest
import scipy.integrate
import torch
from torch import Tensor

from vbon_lightning.functional import bonbon_beta, bonbon_gap, bonbon_loss, dpo_loss

REFERENCE = torch.tensor([0.15, 0.4, 0.25, 0.2], dtype=torch.float64)
REWARDS = torch.tensor([0.5, -1.0, 2.0, 1.0], dtype=torch.float64)
BETA = 0.7


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# -- DPO --


@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_dpo_against_a_loop(shape: tuple[int, ...]) -> None:
    best, worst = draw(*shape), draw(*shape)
    pairs = list(zip(best.flatten().tolist(), worst.flatten().tolist(), strict=True))
    found = dpo_loss(best, worst, beta=BETA)
    # The softmax of two implicit rewards, as the Bradley-Terry model has it.
    chosen = [math.exp(BETA * w) / (math.exp(BETA * w) + math.exp(BETA * v)) for w, v in pairs]
    assert found.loss.item() == pytest.approx(-sum(map(math.log, chosen)) / len(pairs), abs=1e-12)
    assert found.accuracy.item() == pytest.approx(sum(w > v for w, v in pairs) / len(pairs))
    assert found.margin.item() == pytest.approx(sum(BETA * (w - v) for w, v in pairs) / len(pairs))


def test_dpo_gradient_by_hand() -> None:
    best, worst = draw(2, 3).requires_grad_(), draw(2, 3).requires_grad_()
    dpo_loss(best, worst, beta=BETA).loss.backward()
    wrong = 1 / (1 + torch.exp(BETA * (best - worst).detach()))  # the probability of the wrong preference
    torch.testing.assert_close(best.grad, -BETA * wrong / 6, rtol=0, atol=1e-15)
    torch.testing.assert_close(worst.grad, BETA * wrong / 6, rtol=0, atol=1e-15)


@pytest.mark.parametrize("gap", [-1e6, -50.0, 0.0, 50.0, 1e6])
def test_dpo_is_finite_however_far_apart(gap: float) -> None:
    best = torch.tensor([gap], requires_grad=True)
    found = dpo_loss(best, torch.zeros(1), beta=1.0)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(math.log(2) if gap == 0 else max(-gap, 0), abs=1e-6)
    assert torch.isfinite(best.grad).all()


def bradley_terry_gradient(policy: Tensor) -> Tensor:
    """Gradient in a policy's logits of the expected loss, preferences by a Bradley-Terry model of the rewards."""
    theta = policy.log().requires_grad_()
    log_ratio = theta.log_softmax(-1) - REFERENCE.log()
    total = torch.zeros((), dtype=torch.float64)
    for i, j in itertools.permutations(range(4), 2):
        preferred = torch.sigmoid(REWARDS[i] - REWARDS[j])
        total = total + REFERENCE[i] * REFERENCE[j] * preferred * dpo_loss(log_ratio[i], log_ratio[j], beta=BETA).loss
    return torch.autograd.grad(total, theta)[0]


def test_dpo_optimum_is_the_tilted_reference() -> None:
    tilted = REFERENCE * torch.exp(REWARDS / BETA)
    assert bradley_terry_gradient(tilted / tilted.sum()).abs().max().item() < 1e-15
    for other in (REFERENCE, REFERENCE * torch.exp(REWARDS), REFERENCE * torch.exp(REWARDS / BETA**2)):
        assert bradley_terry_gradient(other / other.sum()).abs().max().item() > 1e-3


def test_diagnostics_carry_no_gradient_and_count_ties_half() -> None:
    best = torch.tensor([1.0, 2.0, 0.0, 3.0], requires_grad=True)
    found = dpo_loss(best, torch.tensor([1.0, 1.0, 1.0, 1.0]), beta=2.0)
    assert found.accuracy.item() == (0.5 + 1 + 0 + 1) / 4
    assert found.margin.item() == 2.0 * (0 + 1 - 1 + 2) / 4
    assert found.loss.requires_grad and not found.accuracy.requires_grad and not found.margin.requires_grad


# -- BoNBoN --


def test_bonbon_beta_of_eight() -> None:
    assert bonbon_beta(8) == pytest.approx(0.0275482094, abs=5e-11)
    assert bonbon_beta(2) == 0.5


@pytest.mark.parametrize("n", [2, 3, 8, 30])
def test_bonbon_regresses_on_the_mean_gap_of_best_of_n(n: int) -> None:
    """The log-ratio is log n + (n-1) log F for a continuous reward, F uniform under the reference."""
    noise = torch.Generator().manual_seed(0)
    uniforms = torch.rand(40_000, n, dtype=torch.float64, generator=noise)
    gaps = (n - 1) * (uniforms.amax(-1).log() - uniforms.amin(-1).log())
    error = gaps.std().item() / math.sqrt(len(gaps))
    assert gaps.mean().item() == pytest.approx(1 / (2 * bonbon_beta(n)), abs=4 * error)


@pytest.mark.parametrize("alpha", [0.0, 0.005, 1.0])
def test_bonbon_against_a_loop(alpha: float) -> None:
    log_prob, best, worst = -draw(4).abs(), draw(4), draw(4)
    goal = 3 * (1 + 1 / 2 + 1 / 3)  # n = 4
    want = sum(
        -alpha * p + (1 - alpha) * (b - w - goal) ** 2
        for p, b, w in zip(log_prob.tolist(), best.tolist(), worst.tolist(), strict=True)
    )
    found = bonbon_loss(log_prob, best, worst, n=4, alpha=alpha)
    assert found.loss.item() == pytest.approx(want / 4, rel=1e-12)
    assert found.margin.item() == pytest.approx((best - worst).mean().item() / (2 * goal))


def test_bonbon_gradient_reaches_both_terms() -> None:
    log_prob, best, worst = (draw(3).requires_grad_() for _ in range(3))
    bonbon_loss(log_prob, best, worst, n=3, alpha=0.25).loss.backward()
    off = (best - worst).detach() - 2 * (1 + 1 / 2)
    torch.testing.assert_close(log_prob.grad, torch.full((3,), -0.25 / 3, dtype=torch.float64))
    torch.testing.assert_close(best.grad, 0.75 * 2 * off / 3)
    torch.testing.assert_close(worst.grad, -0.75 * 2 * off / 3)


def gap_by_enumeration(rewards: list[float], n: int) -> tuple[float, float]:
    """Mean gap and share of ties over all n-tuples of the rewards, each as likely."""
    count = len(rewards)

    def log_ratio(reward: float) -> float:
        low, high = (
            sum(other < reward for other in rewards) / count,
            sum(other <= reward for other in rewards) / count,
        )
        return math.log((high**n - low**n) / (high - low))

    groups = list(itertools.product(rewards, repeat=n))
    gaps = [log_ratio(max(group)) - log_ratio(min(group)) for group in groups]
    return sum(gaps) / len(groups), sum(max(group) == min(group) for group in groups) / len(groups)


@pytest.mark.parametrize("rewards", [[0, 0, 1, 1, 1], [2, 2, 5, 5, 3, 3], [1, 1, 1], [0] * 7 + [1] * 3])
@pytest.mark.parametrize("n", [2, 4])
def test_the_gap_of_rewards_that_tie(rewards: list[float], n: int) -> None:
    found = bonbon_gap(torch.tensor([rewards], dtype=torch.float64), n=n)
    gap, tied = gap_by_enumeration(rewards, n)
    assert found.mean.item() == pytest.approx(gap, abs=1e-12)
    assert found.tied.item() == pytest.approx(tied, abs=1e-12)
    assert found.told_apart.item() == pytest.approx(gap / (1 - tied) if tied < 1 else 0.0, abs=1e-12)


@pytest.mark.parametrize("n", [2, 3, 8, 30])
def test_without_ties_the_gap_is_bonbons(n: int) -> None:
    found = bonbon_gap(torch.rand(3, 17), n=n)
    assert found.mean.tolist() == pytest.approx([1 / (2 * bonbon_beta(n))] * 3, rel=1e-12)
    assert not found.tied.any() and torch.equal(found.told_apart, found.mean)


def gap_by_quadrature(rewards: list[float], n: int) -> tuple[float, float]:
    """Mean gap and share of ties: a reward that ties with none is a continuous one between its neighbours."""
    count, gap, tied = len(rewards), 0.0, 0.0
    for reward in set(rewards):
        low, high = sum(other < reward for other in rewards) / count, sum(other <= reward for other in rewards) / count
        ties = rewards.count(reward) > 1
        level = math.log((high**n - low**n) / (high - low))

        def density(u: float, ties: bool = ties, level: float = level) -> float:
            log_ratio = level if ties else math.log(n) + (n - 1) * math.log(u)
            return n * (u ** (n - 1) - (1 - u) ** (n - 1)) * log_ratio

        gap += scipy.integrate.quad(density, low, high)[0]
        tied += (high - low) ** n if ties else 0.0
    return gap, tied


def test_a_reward_that_ties_with_none_is_a_continuous_one() -> None:
    rewards = [0.0, 1.0, 1.0, 4.0, 9.0, 9.0, 9.0, 2.0]
    found = bonbon_gap(torch.tensor([rewards]), n=3)
    assert (found.mean.item(), found.tied.item()) == pytest.approx(gap_by_quadrature(rewards, 3), abs=1e-6)


def test_pairs_that_tie_teach_nothing() -> None:
    log_prob, best, worst = (draw(4).requires_grad_() for _ in range(3))
    apart = torch.tensor([True, False, True, False])
    for found in (
        dpo_loss(best, worst, beta=BETA, told_apart=apart),
        bonbon_loss(log_prob, best, worst, n=3, alpha=0.0, goal=torch.tensor(1.5), told_apart=apart),
    ):
        best.grad = worst.grad = None
        found.loss.backward()
        assert (best.grad[~apart] == 0).all() and (worst.grad[~apart] == 0).all() and best.grad[apart].all()
        assert found.accuracy.item() == (best > worst)[apart].double().mean().item()
    whole = bonbon_loss(log_prob, best, worst, n=3, alpha=0.0, goal=torch.tensor(1.5), told_apart=apart)
    by_hand = (best - worst - 1.5)[apart].square().sum() / 4
    torch.testing.assert_close(whole.loss, by_hand)


# -- both --


def test_losses_over_shards_average_to_the_loss_of_the_whole() -> None:
    log_prob, best, worst = draw(4, 2), draw(4, 2), draw(4, 2)
    for loss in (
        lambda s: dpo_loss(best[s], worst[s], beta=0.1).loss,
        lambda s: bonbon_loss(log_prob[s], best[s], worst[s], n=4).loss,
    ):
        torch.testing.assert_close((loss(slice(0, 2)) + loss(slice(2, 4))) / 2, loss(slice(None)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: dpo_loss(x, x, beta=0.0), ValueError, "beta must be greater than 0"),
        (lambda x: dpo_loss(x, x, beta="1"), TypeError, "beta must be a real number"),
        (lambda x: dpo_loss(x, x[:1], beta=1.0), ValueError, "worst_log_ratio must have the shape of best_log_ratio"),
        (lambda x: dpo_loss(x.long(), x, beta=1.0), TypeError, "best_log_ratio must have a floating-point dtype"),
        (lambda x: bonbon_beta(1), ValueError, "n must be greater than 1"),
        (lambda x: bonbon_beta(2.5), TypeError, "n counts samples here and must be an integer"),
        (lambda x: bonbon_beta(True), TypeError, "n counts samples here and must be an integer"),
        (lambda x: bonbon_loss(x, x, x, n=2, alpha=1.5), ValueError, "alpha must be at most 1"),
        (lambda x: bonbon_loss(x[:1], x, x, n=2), ValueError, "best_log_prob must have the shape"),
    ],
)
def test_bad_arguments(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.zeros(3))


def test_diagnostics_of_one_pair_are_its_own() -> None:
    best, worst = torch.tensor([1.0, 5.0]), torch.tensor([0.0, 7.0])
    got = dpo_loss(best, worst, beta=0.5, told_apart=torch.tensor([True, False]))
    assert (got.accuracy.item(), got.margin.item()) == (1.0, 0.5)
    none = dpo_loss(best, worst, beta=0.5, told_apart=torch.tensor([False, False]))
    assert (none.loss.item(), none.accuracy.item(), none.margin.item()) == (0.0, 0.0, 0.0)


def test_gaps_are_those_of_each_prompt() -> None:
    rewards = torch.tensor([[0.0, 0.0, 1.0, 2.0], [3.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    together = bonbon_gap(rewards, n=3)
    assert together.tied.shape == together.mean.shape == (3,)
    for row in range(3):
        alone = bonbon_gap(rewards[row : row + 1], n=3)
        torch.testing.assert_close(together.mean[row], alone.mean[0])
        torch.testing.assert_close(together.tied[row], alone.tied[0])
