"""Values of prefixes on a language small enough to enumerate: every expectation here is a sum over all responses."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from vbon_lightning.functional import (
    Target,
    bin_labels,
    bon_bin_log_weights,
    candidate_teacher,
    draw_candidates,
    exponential_bin_log_weights,
    kl_penalty,
    predicted_log_cdf,
    prefix_log_values,
    ranked_probability_score,
    reinforce_loss,
    reward_bins,
    teacher_probs,
    value_advantages,
    with_exact_end,
)

# --- the language: three tokens and EOS, at most 3 of them -------------------------------------------------

EOS, VOCABULARY, LIMIT = 3, 4, 3
Prefix = tuple[int, ...]
PREFIXES: list[Prefix] = [p for t in range(LIMIT) for p in itertools.product(range(EOS), repeat=t)]
RESPONSES: list[Prefix] = [
    (*p, token) for p in PREFIXES for token in range(VOCABULARY) if token == EOS or len(p) == LIMIT - 1
]
ROW = {prefix: row for row, prefix in enumerate(PREFIXES)}
ORDERS = pytest.mark.parametrize("n", [2, 3.5, 8])
SEEDS = pytest.mark.parametrize("seed", [0, 1])


def completions(prefix: Prefix) -> list[int]:
    return [i for i, response in enumerate(RESPONSES) if response[: len(prefix)] == prefix]


class Language(NamedTuple):
    """Reference, a policy and rewards, some of which tie."""

    reference: Tensor
    """``[13, 4]``: next-token probabilities after each prefix."""
    policy_logits: Tensor
    """``[13, 4]``."""
    rewards: Tensor
    """``[40]``."""

    @property
    def response_probs(self) -> Tensor:
        return response_probs(self.reference)


def response_probs(table: Tensor) -> Tensor:
    """Probability of each response, by a plain loop over tokens."""
    return torch.stack(
        [math.prod((table[ROW[r[:t]], r[t]] for t in range(1, len(r))), start=table[0, r[0]]) for r in RESPONSES]
    )


def random_language(seed: int) -> Language:
    generator = torch.Generator().manual_seed(seed)
    reference = (1.5 * torch.randn(len(PREFIXES), VOCABULARY, dtype=torch.float64, generator=generator)).softmax(-1)
    policy_logits = torch.randn(len(PREFIXES), VOCABULARY, dtype=torch.float64, generator=generator)
    levels = torch.randn(11, dtype=torch.float64, generator=generator)
    rewards = levels[torch.randint(0, 11, (len(RESPONSES),), generator=generator)]
    return Language(reference, policy_logits, rewards)


def best_of_n(probs: Tensor, rewards: Tensor, n: float) -> Tensor:
    """``p (F_le^n - F_lt^n) / (F_le - F_lt)``, by direct sums."""
    below = (rewards[None, :] < rewards[:, None]).double() @ probs
    at_or_below = (rewards[None, :] <= rewards[:, None]).double() @ probs
    return probs * (at_or_below**n - below**n) / (at_or_below - below)


def kl_rl_optimum(probs: Tensor, rewards: Tensor, beta: float) -> Tensor:
    weighted = probs * (rewards / beta).exp()
    return weighted / weighted.sum()


def next_token_table(probs: Tensor) -> Tensor:
    """``[13, 4]`` next-token probabilities of a law over responses."""
    table = torch.zeros(len(PREFIXES), VOCABULARY, dtype=torch.float64)
    for row, prefix in enumerate(PREFIXES):
        for token in range(VOCABULARY):
            table[row, token] = probs[completions((*prefix, token))].sum() / probs[completions(prefix)].sum()
    return table


def label_log_probs(probs: Tensor, labels: Tensor, size: int) -> dict[Prefix, Tensor]:
    """Log of the exact ``p(bin | prefix)``, whole responses included."""
    out = {}
    for prefix in (*PREFIXES, *RESPONSES):
        reached = torch.tensor(completions(prefix))
        mass = torch.zeros(size, dtype=torch.float64).index_add(0, labels[reached], probs[reached])
        out[prefix] = (mass / mass.sum()).log()
    return out


def tilted(language: Language, values: dict[Prefix, Tensor]) -> Tensor:
    """``ref(a | s) W(s a) / W(s)``."""
    table = torch.zeros_like(language.reference)
    for row, prefix in enumerate(PREFIXES):
        for token in range(VOCABULARY):
            ratio = (values[(*prefix, token)] - values[prefix]).exp()
            table[row, token] = language.reference[row, token] * ratio
    return table


def exact_values(language: Language, log_weight: Tensor) -> dict[Prefix, float]:
    """``log E_ref[w | prefix]`` for any weight of the whole responses, by sums."""
    probs, weighted = language.response_probs, language.response_probs * log_weight.exp()
    return {
        prefix: (weighted[completions(prefix)].sum() / probs[completions(prefix)].sum()).log().item()
        for prefix in (*PREFIXES, *RESPONSES)
    }


@SEEDS
def test_the_language_is_complete_and_its_rewards_tie(seed: int) -> None:
    language = random_language(seed)
    assert (len(PREFIXES), len(RESPONSES)) == (13, 40)
    assert language.response_probs.sum().item() == pytest.approx(1, abs=1e-14)
    assert 5 < len(language.rewards.unique()) < 12
    for law in (language.response_probs, best_of_n(language.response_probs, language.rewards, 3.5)):
        assert law.sum().item() == pytest.approx(1, abs=1e-13)
        torch.testing.assert_close(response_probs(next_token_table(law)), law, rtol=0, atol=1e-14)


# --- the identity -----------------------------------------------------------------------------------------


@SEEDS
@ORDERS
def test_weighted_by_prefix_values_the_reference_is_best_of_n(seed: int, n: float) -> None:
    language = random_language(seed)
    probs, rewards = language.response_probs, language.rewards
    bins = reward_bins(rewards, bins=1000)
    assert bins.size == len(rewards.unique()), "one bin a reward"
    cdf = [0.0, *(probs[rewards < edge].sum().item() for edge in bins.edges.tolist()), 1.0]
    log_weights = bon_bin_log_weights(torch.tensor(cdf, dtype=torch.float64).log(), n=n)
    bin_log_probs = label_log_probs(probs, bin_labels(rewards, bins.edges), bins.size)
    # The prompt's own prediction says what its bins mean.
    torch.testing.assert_close(
        bon_bin_log_weights(predicted_log_cdf(bin_log_probs[()]), n=n), log_weights, rtol=0, atol=1e-10
    )
    values = {prefix: prefix_log_values(found, log_weights) for prefix, found in bin_log_probs.items()}
    optimum = best_of_n(probs, rewards, n)
    want = next_token_table(optimum)
    assert (want - language.reference).abs().max() > 0.1
    torch.testing.assert_close(tilted(language, values), want, rtol=0, atol=1e-10)
    assert values[()].item() == pytest.approx(0, abs=1e-10)
    for i, response in enumerate(RESPONSES):
        assert values[response].item() == pytest.approx((optimum[i] / probs[i]).log().item(), abs=1e-9)


@SEEDS
@ORDERS
def test_with_coarse_bins_it_is_best_of_n_of_the_bins(seed: int, n: float) -> None:
    language = random_language(seed)
    probs = language.response_probs
    labels = bin_labels(language.rewards, torch.tensor([-0.6, 0.4], dtype=torch.float64))
    assert labels.unique().tolist() == [0, 1, 2]
    bin_log_probs = label_log_probs(probs, labels, 3)
    log_weights = bon_bin_log_weights(predicted_log_cdf(bin_log_probs[()]), n=n)
    values = {prefix: prefix_log_values(found, log_weights) for prefix, found in bin_log_probs.items()}
    want = next_token_table(best_of_n(probs, labels.double(), n))
    torch.testing.assert_close(tilted(language, values), want, rtol=0, atol=1e-10)


@SEEDS
@pytest.mark.parametrize("beta", [0.3, 1, 4.0])
def test_weighted_by_exponential_values_the_reference_is_the_optimum_of_kl_rl(seed: int, beta: float) -> None:
    language = random_language(seed)
    probs, rewards = language.response_probs, language.rewards
    bins = reward_bins(rewards, bins=1000)
    log_weights = exponential_bin_log_weights(bins.atoms, beta=beta)
    bin_log_probs = label_log_probs(probs, bin_labels(rewards, bins.edges), bins.size)
    values = {prefix: prefix_log_values(found, log_weights) for prefix, found in bin_log_probs.items()}
    want = next_token_table(kl_rl_optimum(probs, rewards, beta))
    torch.testing.assert_close(tilted(language, values), want, rtol=0, atol=1e-10)
    assert values[()].item() == pytest.approx((probs * (rewards / beta).exp()).sum().log().item(), abs=1e-10)
    for i, response in enumerate(RESPONSES):
        assert values[response].item() == pytest.approx(rewards[i].item() / beta, abs=1e-10)


def test_a_teacher_of_all_tokens_is_best_of_n() -> None:
    language = random_language(0)
    optimum = best_of_n(language.response_probs, language.rewards, 3.5)
    values = exact_values(language, (optimum / language.response_probs).log())
    candidates = draw_candidates(language.reference.log(), top=VOCABULARY)
    after = [[values[(*p, int(a))] for a in candidates.tokens[row]] for row, p in enumerate(PREFIXES)]
    state = torch.tensor([values[p] for p in PREFIXES], dtype=torch.float64)
    teacher = candidate_teacher(candidates, torch.tensor(after, dtype=torch.float64), state)
    torch.testing.assert_close(teacher.log_normaliser, state, rtol=0, atol=1e-12)
    found = teacher_probs(language.reference, candidates.tokens, teacher.correction, teacher.scale)
    torch.testing.assert_close(found, next_token_table(optimum), rtol=0, atol=1e-12)


def test_prefix_values_normalise_the_prediction_and_broadcast_the_weights() -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(2, 3, 5, dtype=torch.float64, generator=generator)
    log_weights = torch.randn(2, 1, 5, dtype=torch.float64, generator=generator)
    found = prefix_log_values(logits, log_weights)
    assert found.dtype == torch.float64
    for i, j in itertools.product(range(2), range(3)):
        odds = [math.exp(x) for x in logits[i, j].tolist()]
        mean = sum(o * math.exp(w) for o, w in zip(odds, log_weights[i, 0].tolist(), strict=True)) / sum(odds)
        assert found[i, j].item() == pytest.approx(math.log(mean), abs=1e-12)
    for dtype in (torch.float32, torch.bfloat16):
        narrow = prefix_log_values(logits.to(dtype), log_weights)
        assert narrow.dtype == torch.float32
        torch.testing.assert_close(narrow, found.float(), rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)


def test_a_bin_that_best_of_n_never_returns_is_worth_nothing() -> None:
    log_weights = torch.tensor([-math.inf, 0.0, 1000.0], dtype=torch.float64)
    log_probs = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64).log()
    assert prefix_log_values(log_probs, log_weights).tolist() == pytest.approx([math.log(0.5), -math.inf, 1000])


# --- advantages -------------------------------------------------------------------------------------------

BETA = 0.4


class Sampled(NamedTuple):
    """Every group of responses, padded to LIMIT, with its weight under the policy."""

    members: Tensor
    """``[B, G]``: places in RESPONSES."""
    log_probs: Tensor
    """``[B, G, T]`` under the policy, differentiable, junk outside the mask."""
    token_kl: Tensor
    """``[B, G, T]``, differentiable, junk outside the mask."""
    mask: Tensor
    """``[B, G, T]``."""
    weights: Tensor
    """``[B]``."""


def all_groups(theta: Tensor, reference: Tensor, size: int) -> Sampled:
    log_policy = theta.log_softmax(-1)
    row_kl = (log_policy.exp() * (log_policy - reference.log())).sum(-1)
    rows = torch.tensor([[ROW[r[: min(t, len(r) - 1)]] for t in range(LIMIT)] for r in RESPONSES])
    tokens = torch.tensor([[r[min(t, len(r) - 1)] for t in range(LIMIT)] for r in RESPONSES])
    mask = torch.tensor([[t < len(r) for t in range(LIMIT)] for r in RESPONSES])
    members = torch.tensor(list(itertools.product(range(len(RESPONSES)), repeat=size)))
    weights = response_probs(theta.detach().softmax(-1))[members].prod(-1)
    return Sampled(members, log_policy[rows, tokens][members], row_kl[rows][members], mask[members], weights)


def prefix_values(values: dict[Prefix, float]) -> Tensor:
    """``[40, T + 1]``, NaN from the end of each response on: there nothing is to be read."""
    table = [[values[r[:t]] if t < len(r) else math.nan for t in range(LIMIT + 1)] for r in RESPONSES]
    return torch.tensor(table, dtype=torch.float64)


def random_values(seed: int) -> dict[Prefix, float]:
    generator = torch.Generator().manual_seed(seed)
    return dict(zip(PREFIXES, torch.randn(len(PREFIXES), generator=generator).tolist(), strict=True))


def expected_gradient(
    theta: Tensor, language: Language, target: Target, values: dict[Prefix, float], *, lam: float, size: int
) -> Tensor:
    """Mean over all groups of the gradient that one step would follow, to ascend."""
    groups = all_groups(theta, language.reference, size)
    own = Target(target.score[groups.members], target.kl_coef)
    log_values = prefix_values(values)[groups.members]
    advantages = value_advantages(own, log_values, groups.token_kl, groups.mask, lam=lam, siblings=size > 1)
    assert not advantages.requires_grad
    assert (advantages[~groups.mask] == 0).all()
    losses = torch.vmap(reinforce_loss)(*(x[:, None] for x in (groups.log_probs, advantages, groups.mask)))
    losses = losses + target.kl_coef * torch.vmap(kl_penalty)(groups.token_kl, groups.mask)
    return -torch.autograd.grad((groups.weights * losses).sum(), theta)[0]


def exact_gradient(theta: Tensor, language: Language, target: Target) -> Tensor:
    """Gradient of ``E[score] - kl_coef KL(policy || reference)``."""
    policy = response_probs(theta.softmax(-1))
    divergence = (policy * (policy / language.response_probs).log()).sum()
    return torch.autograd.grad((policy * target.score).sum() - target.kl_coef * divergence, theta)[0]


def both_targets(language: Language) -> dict[str, tuple[Target, Tensor]]:
    """The score of each response and the optimum: Best-of-4 in its beta form, KL-RL."""
    probs = language.response_probs
    bon = best_of_n(probs, language.rewards, 4)
    return {
        "vbon": (Target((bon / probs).log() / 3, 1 / 3), bon),
        "kl_rl": (Target(language.rewards, BETA), kl_rl_optimum(probs, language.rewards, BETA)),
    }


TARGETS = pytest.mark.parametrize("name", ["vbon", "kl_rl"])
SIZES = pytest.mark.parametrize("size", [1, 2], ids=["alone", "siblings"])


@TARGETS
@SIZES
@pytest.mark.parametrize("model", ["exact", "random", "far off"])
def test_at_lambda_one_the_gradient_is_that_of_the_target_whatever_the_values(name: str, size: int, model: str) -> None:
    language = random_language(2)
    target, _ = both_targets(language)[name]
    values = exact_values(language, target.score / target.kl_coef) if model == "exact" else random_values(3)
    if model == "far off":
        values = {prefix: 20 * value - 7 for prefix, value in values.items()}
    theta = language.policy_logits.clone().requires_grad_()
    want = exact_gradient(theta, language, target)
    assert want.abs().max().item() > 1e-2
    got = expected_gradient(theta, language, target, values, lam=1.0, size=size)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@TARGETS
@SIZES
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.9])
def test_with_exact_values_the_gradient_vanishes_at_the_optimum(name: str, size: int, lam: float) -> None:
    language = random_language(2)
    target, optimum = both_targets(language)[name]
    theta = next_token_table(optimum).log().requires_grad_()
    values = exact_values(language, target.score / target.kl_coef)
    got = expected_gradient(theta, language, target, values, lam=lam, size=size)
    assert got.abs().max().item() < 1e-10
    # A constant that all values share shows where the end is exact; and others have other fixed points.
    for inexact in ({prefix: value + 0.3 for prefix, value in values.items()}, random_values(3)):
        biased = expected_gradient(theta, language, target, inexact, lam=lam, size=size)
        assert biased.abs().max().item() > 1e-3


def left_out(
    theta: Tensor, language: Language, kl_coef: float, values: dict[Prefix, float], ends: Tensor, lam: float
) -> Tensor:
    """``-kl_coef sum_{l > 0} (1 - lam^l) E[sum_t grad log pi_t (rho_{t+l} - KL_{t+l})]``, by loops."""
    log_policy = theta.log_softmax(-1)
    policy = log_policy.detach().exp()
    kl = (policy * (policy / language.reference).log()).sum(-1)
    probs = response_probs(policy)
    total = torch.zeros((), dtype=torch.float64)
    for i, r in enumerate(RESPONSES):
        along = [*(values[r[:t]] for t in range(len(r))), ends[i].item()]
        terms = [along[t + 1] - along[t] - kl[ROW[r[:t]]].item() for t in range(len(r))]
        for t in range(len(r)):
            later = sum((1 - lam ** (s - t)) * terms[s] for s in range(t + 1, len(r)))
            total = total - kl_coef * probs[i] * later * log_policy[ROW[r[:t]], r[t]]
    return torch.autograd.grad(total, theta)[0]


@TARGETS
@SIZES
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("model", ["exact", "random"])
def test_below_lambda_one_the_bias_is_what_is_left_out(name: str, size: int, lam: float, model: str) -> None:
    language = random_language(2)
    target, _ = both_targets(language)[name]
    values = exact_values(language, target.score / target.kl_coef) if model == "exact" else random_values(3)
    theta = language.policy_logits.clone().requires_grad_()
    bias = expected_gradient(theta, language, target, values, lam=lam, size=size) - exact_gradient(
        theta, language, target
    )
    want = left_out(theta, language, target.kl_coef, values, target.score / target.kl_coef, lam)
    assert want.abs().max().item() > 1e-3
    torch.testing.assert_close(bias, want, rtol=0, atol=1e-10)


def test_with_exact_values_what_is_left_out_is_the_divergence_from_the_optimum_at_later_states() -> None:
    language, lam = random_language(2), 0.5
    target, optimum = both_targets(language)["vbon"]
    theta = language.policy_logits.clone().requires_grad_()
    want = left_out(theta, language, 1 / 3, exact_values(language, target.score * 3), target.score * 3, lam)
    log_policy = theta.log_softmax(-1)
    policy = log_policy.detach().exp()
    divergence = (policy * (policy / next_token_table(optimum)).log()).sum(-1)
    probs, total = response_probs(policy), torch.zeros((), dtype=torch.float64)
    for i, r in enumerate(RESPONSES):
        for t in range(len(r)):
            later = sum((1 - lam ** (s - t)) * divergence[ROW[r[:s]]] for s in range(t + 1, len(r)))
            total = total + probs[i] * later / 3 * log_policy[ROW[r[:t]], r[t]]
    torch.testing.assert_close(torch.autograd.grad(total, theta)[0], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("siblings", [False, True])
def test_value_advantages_against_loops(lam: float, siblings: bool) -> None:
    generator = torch.Generator().manual_seed(6)
    b, g, t, kl_coef = 2, 3, 4, 0.3
    mask = torch.arange(t) < torch.tensor([[4, 1, 2], [3, 3, 4]])[..., None]
    score, values, kl = (
        torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in [(b, g), (b, g, t + 1), (b, g, t)]
    )
    want = torch.zeros(b, g, t, dtype=torch.float64)
    for i, j in itertools.product(range(b), range(g)):
        length = int(mask[i, j].sum())
        along = [*values[i, j, :length].tolist(), score[i, j].item() / kl_coef]
        for start in range(length):
            want[i, j, start] = kl_coef * sum(
                lam ** (s - start) * (along[s + 1] - along[s] - kl[i, j, s].item()) for s in range(start, length)
            )
            if lam == 1.0:
                later = kl[i, j, start:length].sum().item()
                direct = score[i, j].item() - kl_coef * (along[start] + later)
                assert want[i, j, start].item() == pytest.approx(direct, abs=1e-12)
    if siblings:
        others = (want.sum(1, keepdim=True) - want) / (g - 1)
        want = (want - others) * mask
    dirty_kl = torch.where(mask, kl, math.nan)
    unread = torch.arange(t + 1) >= mask.sum(-1, keepdim=True)
    dirty = torch.where(unread, math.nan, values)
    got = value_advantages(Target(score, kl_coef), dirty, dirty_kl, mask, lam=lam, siblings=siblings)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_a_response_without_a_token_is_nobodys_sibling() -> None:
    noise = torch.Generator().manual_seed(0)
    target, kl = Target(torch.randn(2, 3, generator=noise), 0.5), torch.rand(2, 3, 4, generator=noise)
    values, mask = torch.randn(2, 3, 5, generator=noise), torch.ones(2, 3, 4, dtype=torch.bool)
    mask[0, 1] = mask[1, :2] = False
    found = value_advantages(target, values, kl, mask)
    two, row = [0, 2], slice(0, 1)
    own = Target(target.score[row, two], target.kl_coef)
    pair = value_advantages(own, values[row, two], kl[row, two], mask[row, two])
    torch.testing.assert_close(found[row, two], pair)
    alone = value_advantages(target, values, kl, mask, siblings=False)
    torch.testing.assert_close(found[1], alone[1], msg="one that is left alone has the values for a baseline")
    assert found[1, 2].any()


def test_by_default_lambda_is_one_and_siblings_count() -> None:
    generator = torch.Generator().manual_seed(7)
    mask = torch.ones(2, 2, 3, dtype=torch.bool)
    target = Target(torch.randn(2, 2, generator=generator), 0.5)
    values, kl = torch.randn(2, 2, 4, generator=generator), torch.rand(2, 2, 3, generator=generator)
    default = value_advantages(target, values, kl, mask)
    assert torch.equal(default, value_advantages(target, values, kl, mask, lam=1.0, siblings=True))
    torch.testing.assert_close(default.sum(1), torch.zeros(2, 3), rtol=0, atol=1e-5)


def test_the_exact_end_replaces_the_value_there_and_after() -> None:
    mask = torch.tensor([[[True, True, False], [True, True, True], [False, False, False]]])
    values = torch.tensor([[[0.1, 0.2, 0.3, math.nan], [0.5, 0.6, 0.7, 0.8], [math.nan, 0.0, 1.0, 2.0]]])
    found = with_exact_end(values, torch.tensor([[-7.0, -8.0, -9.0]]), mask)
    want = torch.tensor([[[0.1, 0.2, -7, -7], [0.5, 0.6, 0.7, -8], [-9, -9, -9, -9]]])
    assert torch.equal(found, want)
    assert not with_exact_end(values.requires_grad_(), torch.zeros(1, 3).double(), mask).requires_grad
    assert with_exact_end(values, torch.zeros(1, 3).double(), mask).dtype == torch.float32


# --- the score of a prediction ----------------------------------------------------------------------------


def test_ranked_probability_score_against_a_double_loop() -> None:
    generator = torch.Generator().manual_seed(8)
    logits = 2 * torch.randn(3, 4, 5, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 5, (3, 4), generator=generator)
    found = ranked_probability_score(logits, labels)
    for i, j in itertools.product(range(3), range(4)):
        odds = [math.exp(x) for x in logits[i, j].tolist()]
        want = 0.0
        for k in range(5):
            up_to = sum(odds[: k + 1]) / sum(odds)
            want += (up_to - (1.0 if labels[i, j] <= k else 0.0)) ** 2 / 5
        assert found[i, j].item() == pytest.approx(want, abs=1e-13)


def test_ranked_probability_score_of_a_sure_prediction_counts_bins() -> None:
    sure = torch.eye(4, dtype=torch.float64).log()
    for label in range(4):
        found = ranked_probability_score(sure, torch.full((4,), label))
        assert found.tolist() == pytest.approx([abs(k - label) / 4 for k in range(4)], abs=1e-14)


def test_ranked_probability_score_is_least_at_the_truth() -> None:
    truth = torch.tensor([0.1, 0.4, 0.0, 0.3, 0.2], dtype=torch.float64)
    truth = (truth + 0.01) / (truth + 0.01).sum()

    def mean_score(logits: Tensor) -> Tensor:
        return (truth * ranked_probability_score(logits.expand(5, 5), torch.arange(5))).sum()

    at_truth = truth.log().requires_grad_()
    least = mean_score(at_truth)
    assert torch.autograd.grad(least, at_truth)[0].abs().max().item() < 1e-15
    generator = torch.Generator().manual_seed(9)
    for _ in range(10):
        off = truth.log() + 0.3 * torch.randn(5, dtype=torch.float64, generator=generator)
        assert mean_score(off) > least


# --- refusals ---------------------------------------------------------------------------------------------

PAIR, MASK, KL, VALUES = torch.zeros(1, 2), torch.ones(1, 2, 3).bool(), torch.zeros(1, 2, 3), torch.zeros(1, 2, 4)
TARGET = Target(PAIR, 0.1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: prefix_log_values(PAIR.long(), PAIR), TypeError, "bin_log_probs must have a floating-point dtype"),
        (lambda: prefix_log_values(PAIR, PAIR.long()), TypeError, "log_weights must have a floating-point dtype"),
        (
            lambda: with_exact_end(KL, PAIR, MASK),
            ValueError,
            r"log_values must have shape \[B, G, T \+ 1\] = \[1, 2, 4\], got \[1, 2, 3\]",
        ),
        (lambda: with_exact_end(VALUES, PAIR[0], MASK), ValueError, r"log_weight must have shape \[B, G\] = \[1, 2\]"),
        (lambda: with_exact_end(VALUES, PAIR, KL), TypeError, "mask must be a bool tensor"),
        (lambda: with_exact_end(VALUES, PAIR.long(), MASK), TypeError, "log_weight must have a floating-point dtype"),
        (lambda: value_advantages(TARGET, KL, KL, MASK), ValueError, r"log_values must have shape \[B, G, T \+ 1\]"),
        (lambda: value_advantages(TARGET, VALUES, VALUES, MASK), ValueError, "token_kl must have the shape of mask"),
        (lambda: value_advantages(TARGET, VALUES, KL.long(), MASK), TypeError, "token_kl must have a floating-point"),
        (lambda: value_advantages(TARGET, VALUES, KL, KL), TypeError, "mask must be a bool tensor"),
        (lambda: value_advantages(TARGET, VALUES, KL, MASK, lam=1.5), ValueError, "lam must be at most 1, got 1.5"),
        (lambda: value_advantages(TARGET, VALUES, KL, MASK, lam=-0.1), ValueError, "lam must be at least 0, got -0.1"),
        (
            lambda: value_advantages(Target(PAIR, 0.0), VALUES, KL, MASK),
            ValueError,
            "target.kl_coef must be greater than 0, got 0.0",
        ),
        (
            lambda: value_advantages(Target(PAIR[:, :1], 0.1), VALUES[:, :1], KL[:, :1], MASK[:, :1]),
            ValueError,
            "G >= 2",
        ),
        (
            lambda: ranked_probability_score(KL, torch.zeros(1, 3).long()),
            ValueError,
            r"labels must have shape bin_log_probs.shape\[:-1\] = \[1, 2\], got \[1, 3\]",
        ),
        (
            lambda: ranked_probability_score(KL.long(), PAIR.long()),
            TypeError,
            "bin_log_probs must have a floating-point dtype",
        ),
    ],
)
def test_refusals_say_what_came_and_what_was_expected(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
