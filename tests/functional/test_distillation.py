"""Candidates and teachers: expectations over the draws as sums over a grid of uniforms, divergences by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vbon_lightning.functional import (
    Candidates,
    candidate_teacher,
    draw_candidates,
    forward_divergence,
    reverse_divergence,
    teacher_probs,
)

# Two states. Outside the two most likely tokens, 12 parts are left in either row: a grid of uniforms whose cells do
# not straddle a token makes the mean over it exact.
PARTS = torch.tensor([[3, 40, 1, 2, 20, 0, 5, 1], [30, 6, 0, 1, 4, 30, 1, 0]], dtype=torch.float64)
REFERENCE = PARTS / PARTS.sum(-1, keepdim=True)
V = REFERENCE.shape[-1]
GRID = 12


def random_rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def on_the_grid(top: int, draws: int) -> list[Candidates]:
    """Candidates at the middle of each cell of a grid, the same uniform in every stratum."""
    grid = [(i + 0.5) / GRID for i in range(GRID)]
    uniforms = [torch.full((2, draws), u, dtype=torch.float64) for u in grid]
    return [draw_candidates(REFERENCE.log(), top=top, draws=draws, uniforms=u) for u in uniforms]


def spread(candidates: Candidates, values: Tensor) -> Tensor:
    """Add each candidate's value up at its token, by a loop."""
    out = torch.zeros(*values.shape[:-1], V, dtype=torch.float64)
    for row, place in itertools.product(range(values.shape[0]), range(values.shape[1])):
        out[row, candidates.tokens[row, place]] += values[row, place]
    return out


# --- candidates -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("top", "draws"), [(2, 1), (2, 2), (2, 5), (2, 12)])
def test_drawn_masses_are_unbiased_for_every_function(top: int, draws: int) -> None:
    # Linear in f, so that the mass of each token says it for all.
    mean = sum(spread(c, c.log_mass.exp()) for c in on_the_grid(top, draws)) / GRID
    torch.testing.assert_close(mean, REFERENCE, rtol=0, atol=1e-12 if draws == 1 else 1e-7)


@pytest.mark.parametrize("draws", [1, 3])
def test_without_a_top_all_is_drawn(draws: int) -> None:
    quarters = torch.tensor([[0.25, 0.0, 0.5, 0.25]], dtype=torch.float64)
    mean = torch.zeros(4, dtype=torch.float64)
    for i in range(4):
        uniforms = torch.full((1, draws), (i + 0.5) / 4, dtype=torch.float64)
        found = draw_candidates(quarters.log(), top=0, draws=draws, uniforms=uniforms)
        assert found.tokens.shape == (1, draws)
        mean.index_add_(0, found.tokens[0], found.log_mass[0].exp() / 4)
    torch.testing.assert_close(mean, quarters[0], rtol=0, atol=1e-7)


@pytest.mark.parametrize(("top", "draws"), [(0, 1), (0, 4), (1, 3), (2, 5), (5, 2)])
def test_the_masses_stand_for_all_of_the_reference(top: int, draws: int) -> None:
    uniforms = torch.rand(2, draws, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = draw_candidates(REFERENCE.log(), top=top, draws=draws, uniforms=uniforms)
    assert found.log_rest is None
    assert found.tokens.shape == found.log_mass.shape == (2, top + draws)
    mass = found.log_mass.exp()
    torch.testing.assert_close(mass.sum(-1), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-7)
    for row in range(2):
        best = sorted(REFERENCE[row].tolist(), reverse=True)[:top]
        assert mass[row, :top].tolist() == pytest.approx(best, abs=1e-15)
        chosen = found.tokens[row, :top].tolist()
        assert REFERENCE[row, chosen].tolist() == pytest.approx(best, abs=1e-15)
        assert len(set(chosen)) == top
        drawn = found.tokens[row, top:].tolist()
        assert not set(drawn) & set(chosen)
        assert (REFERENCE[row, drawn] > 0).all()
        assert mass[row, top:].tolist() == pytest.approx([(1 - sum(best)) / draws] * draws, abs=1e-7)


@pytest.mark.parametrize("draws", [2, 3, 5])
def test_in_double_precision_the_masses_sum_to_one_to_its_digits(draws: int) -> None:
    found = draw_candidates(REFERENCE.log(), top=2, draws=draws, uniforms=torch.full((2, draws), 0.5))
    assert (found.log_mass.exp().sum(-1) - 1).abs().max().item() < 1e-12


def test_each_draw_has_a_stratum_of_the_rest() -> None:
    # The rest is tokens 0, 1, 3 and 4, with quantiles to 0.1, 0.3, 0.7 and 1.
    reference = torch.tensor([[0.05, 0.1, 0.5, 0.2, 0.15]], dtype=torch.float64).log()

    def drawn(*uniforms: float) -> list[int]:
        found = draw_candidates(reference, top=1, draws=len(uniforms), uniforms=torch.tensor([uniforms]).double())
        assert found.tokens[0, 0] == 2
        return found.tokens[0, 1:].tolist()

    assert [drawn(u) for u in (0.0, 0.09, 0.11, 0.29, 0.31, 0.69, 0.71, 0.999)] == [
        [0], [0], [1], [1], [3], [3], [4], [4]
    ]  # fmt: skip
    assert drawn(0.0, 0.0) == [0, 3]
    assert drawn(0.19, 0.39) == [0, 3]
    assert drawn(0.21, 0.41) == [1, 4]
    assert drawn(0.999, 0.999) == [3, 4]
    assert drawn(0.6, 0.6, 0.6, 0.6, 0.6) == [1, 3, 3, 4, 4]


def test_a_quantile_at_a_boundary_is_of_the_next_token_with_any_mass() -> None:
    # After the two most likely, tokens 2 and 4 are left with a half each.
    reference = torch.tensor([[0.5, 0.25, 0.125, 0.0, 0.125]], dtype=torch.float64).log()
    for uniform, token in ((0.0, 2), (0.5, 4), (1 - 1e-9, 4)):
        found = draw_candidates(reference, top=2, draws=1, uniforms=torch.tensor([[uniform]], dtype=torch.float64))
        assert found.tokens.tolist() == [[0, 1, token]]


@pytest.mark.parametrize("top", [1, 2, 4, 7])
def test_without_draws_the_rest_is_left_over(top: int) -> None:
    reference = random_rows(2, 3, V).softmax(-1)
    found = draw_candidates(reference.log(), top=top)
    assert found.tokens.shape == (3, top)
    assert found.log_rest is not None
    for row in range(3):
        rest = 1 - sum(sorted(reference[row].tolist(), reverse=True)[:top])
        assert found.log_rest[row].exp().item() == pytest.approx(rest, rel=1e-9, abs=1e-14)
    torch.testing.assert_close(found.log_mass.exp(), reference.gather(-1, found.tokens), rtol=0, atol=1e-15)


def test_a_small_rest_keeps_its_digits() -> None:
    reference = torch.tensor([[1 - 3e-9, 1e-9, 2e-9]], dtype=torch.float64)
    found = draw_candidates(reference.log(), top=1)
    assert found.log_rest is not None
    assert found.log_rest.item() == pytest.approx(math.log(3e-9), abs=1e-12)


@pytest.mark.parametrize("top", [V, V + 1, 1000])
@pytest.mark.parametrize("draws", [0, 3])
def test_a_top_of_the_whole_vocabulary_leaves_nothing(top: int, draws: int) -> None:
    found = draw_candidates(REFERENCE.log(), top=top, draws=draws, uniforms=torch.rand(2, draws))
    assert found.log_rest is None
    assert found.tokens.sort(-1).values.tolist() == [list(range(V))] * 2
    torch.testing.assert_close(found.log_mass.exp(), REFERENCE.gather(-1, found.tokens), rtol=0, atol=1e-15)


def test_candidates_keep_the_dtype_and_carry_no_gradient() -> None:
    log_reference = torch.randn(2, 3, 6).log_softmax(-1).requires_grad_()
    found = draw_candidates(log_reference, top=2, draws=2, uniforms=torch.rand(2, 3, 2))
    assert found.log_mass.dtype == torch.float32
    assert found.tokens.shape == (2, 3, 4)
    assert not found.log_mass.requires_grad
    torch.testing.assert_close(found.log_mass.exp().sum(-1), torch.ones(2, 3), rtol=0, atol=1e-6)


# --- teachers ---------------------------------------------------------------------------------------------

LOG_VALUES = random_rows(3, 2, V)
STATE = (REFERENCE * LOG_VALUES.exp()).sum(-1).log()
EXACT = REFERENCE * (LOG_VALUES - STATE[:, None]).exp()


def laid_out(candidates: Candidates, log_values: Tensor, state: Tensor, reference: Tensor = REFERENCE) -> Tensor:
    teacher = candidate_teacher(candidates, log_values.gather(-1, candidates.tokens), state)
    return teacher_probs(reference, candidates.tokens, teacher.correction, teacher.scale)


def test_with_all_tokens_the_teacher_is_exact() -> None:
    candidates = draw_candidates(REFERENCE.log(), top=V)
    unread = torch.full((2,), math.nan, dtype=torch.float64)
    teacher = candidate_teacher(candidates, LOG_VALUES.gather(-1, candidates.tokens), unread)
    torch.testing.assert_close(teacher.log_normaliser, STATE, rtol=0, atol=1e-12)
    torch.testing.assert_close(teacher.scale, torch.ones(2, dtype=torch.float64), rtol=0, atol=0)
    torch.testing.assert_close(laid_out(candidates, LOG_VALUES, unread), EXACT, rtol=0, atol=1e-12)
    # Moving all values by a constant moves the normaliser only.
    torch.testing.assert_close(laid_out(candidates, LOG_VALUES + 50, unread), EXACT, rtol=0, atol=1e-12)


@given(st.integers(0, 10_000), st.integers(1, V - 1), st.floats(-5, 5))
@settings(max_examples=50, deadline=None)
def test_with_a_top_only_the_teacher_is_a_distribution(seed: int, top: int, state_value: float) -> None:
    reference, values = random_rows(seed, 2, V).softmax(-1), 2 * random_rows(seed + 1, 2, V)
    state = torch.full((2,), state_value, dtype=torch.float64)
    found = laid_out(draw_candidates(reference.log(), top=top), values, state, reference)
    assert (found > 0).all()
    for row in range(2):
        best = set(reference[row].argsort(descending=True)[:top].tolist())
        weighted = [
            reference[row, a].item() * math.exp(values[row, a].item() if a in best else state_value) for a in range(V)
        ]
        assert found[row].tolist() == pytest.approx([w / sum(weighted) for w in weighted], abs=1e-12)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_normaliser_of_a_top_counts_the_rest_at_the_value_of_the_state() -> None:
    candidates = draw_candidates(REFERENCE.log(), top=2)
    teacher = candidate_teacher(candidates, LOG_VALUES.gather(-1, candidates.tokens), STATE)
    for row in range(2):
        inside = candidates.tokens[row].tolist()
        total = (REFERENCE[row, inside] * LOG_VALUES[row, inside].exp()).sum().item()
        total += (1 - REFERENCE[row, inside].sum().item()) * STATE[row].exp().item()
        assert teacher.log_normaliser[row].item() == pytest.approx(math.log(total), abs=1e-12)
        assert teacher.scale[row].item() == pytest.approx(STATE[row].exp().item() / total, abs=1e-12)


def test_values_that_are_all_the_same_leave_the_reference() -> None:
    flat = torch.full((2, V), 0.7, dtype=torch.float64)
    for candidates in (draw_candidates(REFERENCE.log(), top=3), draw_candidates(REFERENCE.log(), top=V)):
        torch.testing.assert_close(laid_out(candidates, flat, flat[:, 0]), REFERENCE, rtol=0, atol=1e-12)
    for candidates in on_the_grid(2, 3):
        torch.testing.assert_close(laid_out(candidates, flat, flat[:, 0]), REFERENCE, rtol=0, atol=1e-7)


def test_a_single_draw_says_nothing() -> None:
    for u in (0.1, 0.5, 0.9):
        uniforms = torch.full((2, 1), u, dtype=torch.float64)
        candidates = draw_candidates(REFERENCE.log(), top=0, draws=1, uniforms=uniforms)
        torch.testing.assert_close(laid_out(candidates, LOG_VALUES, STATE), REFERENCE, rtol=0, atol=1e-12)


def test_drawn_teachers_are_ratios_of_sums_over_the_candidates() -> None:
    for candidates in on_the_grid(2, 5):
        mass = candidates.log_mass.exp()
        weighted = mass * LOG_VALUES.gather(-1, candidates.tokens).exp()
        want = REFERENCE + spread(candidates, weighted / weighted.sum(-1, keepdim=True) - mass)
        found = laid_out(candidates, LOG_VALUES, STATE)
        torch.testing.assert_close(found, want, rtol=0, atol=1e-12)
        torch.testing.assert_close(found.sum(-1), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-7)


def test_the_expected_teacher_nears_the_exact_one_as_draws_grow() -> None:
    generator = torch.Generator().manual_seed(5)
    error, rows = {}, 4000
    reference, values = REFERENCE[:1].expand(rows, V), LOG_VALUES[:1].expand(rows, V)
    for draws in (1, 4, 16, 64):
        uniforms = torch.rand(rows, draws, dtype=torch.float64, generator=generator)
        candidates = draw_candidates(reference.log(), top=1, draws=draws, uniforms=uniforms)
        mean = laid_out(candidates, values, STATE[:1].expand(rows), reference).mean(0)
        error[draws] = (mean - EXACT[0]).abs().max().item()
    assert error[1] > 0.02
    assert error[1] > 2 * error[4] > 6 * error[16]
    assert error[64] < 1e-3


def test_a_candidate_that_stands_twice_gets_both() -> None:
    tokens = torch.tensor([[2, 5, 2, 2]])
    mass = torch.tensor([[0.4, 0.2, 0.3, 0.1]], dtype=torch.float64)
    values = torch.tensor([[0.5, -0.3, 0.5, 0.5]], dtype=torch.float64)
    teacher = candidate_teacher(Candidates(tokens, mass.log(), None), values, STATE[:1])
    reference = torch.full((1, 6), 1 / 6, dtype=torch.float64)
    before = reference.clone()
    found = teacher_probs(reference, tokens, teacher.correction, teacher.scale)
    twos, fives = 0.8 * math.exp(0.5), 0.2 * math.exp(-0.3)
    want = [1 / 6] * 6
    want[2] += twos / (twos + fives) - 0.8
    want[5] += fives / (twos + fives) - 0.2
    assert found[0].tolist() == pytest.approx(want, abs=1e-12)
    assert torch.equal(reference, before), "the reference's own probabilities are left as they are"


def test_teacher_probs_by_hand() -> None:
    reference = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    tokens = torch.tensor([[1, 1], [0, 2]])
    correction = torch.tensor([[0.25, 0.25], [0.1, -0.15]], dtype=torch.float64)
    found = teacher_probs(reference, tokens, correction, torch.tensor([0.5, 1.0], dtype=torch.float64))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([[0.25, 0.65, 0.1], [0.2, 0.1, 0.65]]))


def test_a_candidate_that_best_of_n_never_takes_has_no_weight() -> None:
    values = LOG_VALUES.clone()
    values[:, 1] = -math.inf
    state = (REFERENCE * values.exp()).sum(-1).log()
    found = laid_out(draw_candidates(REFERENCE.log(), top=V), values, state)
    torch.testing.assert_close(found, REFERENCE * (values - state[:, None]).exp(), rtol=0, atol=1e-12)
    assert found[:, 1].abs().max().item() < 1e-15


# --- divergences ------------------------------------------------------------------------------------------


def test_forward_divergence_has_the_gradient_of_the_kl_from_the_teacher() -> None:
    logits, teacher = random_rows(6, 2, 3, V).requires_grad_(), random_rows(7, 2, 3, V).softmax(-1)
    found = forward_divergence(logits, teacher)
    assert found.shape == (2, 3)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    policy = logits.exp() / logits.exp().sum(-1, keepdim=True)
    torch.testing.assert_close(gradient, (policy - teacher).detach(), rtol=0, atol=1e-13)
    divergence = (teacher * (teacher / policy).log()).sum(-1)
    (want,) = torch.autograd.grad(divergence.sum(), logits)
    torch.testing.assert_close(gradient, want, rtol=0, atol=1e-13)
    entropy = -(teacher * teacher.log()).sum(-1)
    torch.testing.assert_close(found, divergence + entropy, rtol=0, atol=1e-12)


def test_forward_divergence_is_linear_in_the_teacher() -> None:
    logits = random_rows(8, 2, V)
    drawn = [laid_out(candidates, LOG_VALUES, STATE) for candidates in on_the_grid(0, 2)]
    assert min(teacher.min().item() for teacher in drawn) < 0, "some are negative in places"
    of_mean = forward_divergence(logits, torch.stack(drawn).mean(0))
    mean_of = torch.stack([forward_divergence(logits, teacher) for teacher in drawn]).mean(0)
    torch.testing.assert_close(of_mean, mean_of, rtol=0, atol=1e-12)


def all_tokens(log_policy: Tensor) -> Candidates:
    tokens = torch.arange(V).expand(log_policy.shape)
    return Candidates(tokens, log_policy.detach(), None)


def test_reverse_divergence_is_the_kl_by_hand() -> None:
    logits, values, state = random_rows(9, 2, 3, V).requires_grad_(), random_rows(10, 2, 3, V), random_rows(13, 2, 3)
    log_reference = random_rows(14, 2, 3, V).log_softmax(-1)
    found = reverse_divergence(logits, log_reference, all_tokens(logits.log_softmax(-1)), values, state)
    log_policy = logits.log_softmax(-1)
    want = (log_policy.exp() * (log_policy - log_reference - values + state[..., None])).sum(-1)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-13)
    weights = random_rows(15, 2, 3)
    ours, theirs = (
        torch.autograd.grad((weights * value).sum(), logits, retain_graph=True)[0] for value in (found, want)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_reverse_divergence_vanishes_at_the_teacher_only() -> None:
    log_reference, values = random_rows(11, 4, V).log_softmax(-1), random_rows(12, 4, V)
    state = (log_reference + values).logsumexp(-1)
    teacher = (log_reference + values - state[..., None]).requires_grad_()
    found = reverse_divergence(teacher, log_reference, all_tokens(teacher), values, state)
    assert found.abs().max().item() < 1e-14
    assert torch.autograd.grad(found.sum(), teacher)[0].abs().max().item() < 1e-14
    other = (teacher + 0.1 * random_rows(16, 4, V)).log_softmax(-1)
    assert (reverse_divergence(other, log_reference, all_tokens(other), values, state) > 1e-4).all()


@pytest.mark.parametrize("top", [0, 2])
@pytest.mark.parametrize("draws", [1, 3])
def test_the_reverse_gradient_is_unbiased_over_draws(top: int, draws: int) -> None:
    # The policy is the distribution whose grid of uniforms is exact: see PARTS.
    parts = PARTS if top == 2 else torch.tensor([[3.0, 4, 1, 2, 2, 0, 0, 0], [1, 6, 0, 1, 4, 0, 0, 0]]).double()
    policy = (parts + 0.0) / parts.sum(-1, keepdim=True)
    logits = policy.log().clamp(min=-745.0).requires_grad_()
    log_reference, values, state = random_rows(17, 2, V).log_softmax(-1), random_rows(18, 2, V), random_rows(19, 2)
    exact = reverse_divergence(logits, log_reference, all_tokens(policy.log().clamp(min=-745.0)), values, state)
    (want,) = torch.autograd.grad(exact.sum(), logits)
    mean, mean_value, apart = torch.zeros_like(want), torch.zeros_like(exact), 0.0
    for cell in range(GRID):
        uniforms = torch.full((2, draws), (cell + 0.5) / GRID, dtype=torch.float64)
        drawn = draw_candidates(policy.log(), top=top, draws=draws, uniforms=uniforms)
        found = reverse_divergence(logits, log_reference, drawn, values.gather(-1, drawn.tokens), state)
        (gradient,) = torch.autograd.grad(found.sum(), logits)
        mean, mean_value = mean + gradient / GRID, mean_value + found.detach() / GRID
        apart = max(apart, float((gradient - want).abs().max()))
    assert apart > 0.01, "which no single draw has"
    torch.testing.assert_close(mean, want, rtol=0, atol=1e-9)
    torch.testing.assert_close(mean_value, exact.detach(), rtol=0, atol=1e-9)


def test_a_rest_that_is_left_over_is_worth_the_state() -> None:
    logits, values, state = random_rows(20, 2, V), random_rows(21, 2, V), random_rows(22, 2)
    log_reference, log_policy = random_rows(23, 2, V).log_softmax(-1), logits.log_softmax(-1)
    top = draw_candidates(log_policy, top=3)
    found = reverse_divergence(logits, log_reference, top, values.gather(-1, top.tokens), state)
    worth = state[:, None].expand(2, V).scatter(-1, top.tokens, values.gather(-1, top.tokens))
    want = (log_policy.exp() * (log_policy - log_reference - worth + state[:, None])).sum(-1)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-13)


def test_the_tilt_is_the_teachers_kl_to_the_reference() -> None:
    values, state = random_rows(24, 2, V), random_rows(25, 2)
    for top in (3, V):
        found = draw_candidates(REFERENCE.log().clamp(min=-745.0), top=top)
        teacher = candidate_teacher(found, values.gather(-1, found.tokens), state)
        dense = teacher_probs(REFERENCE, found.tokens, teacher.correction, teacher.scale)
        seen = dense > 0
        want = torch.where(seen, dense * (dense / REFERENCE).log(), 0.0).sum(-1)
        torch.testing.assert_close(teacher.tilt, want, rtol=0, atol=1e-12)


def test_the_tilt_of_drawn_candidates_is_the_kl_of_the_choice_among_them() -> None:
    for candidates in on_the_grid(2, 5):
        values = LOG_VALUES.gather(-1, candidates.tokens)
        mass = candidates.log_mass.exp()
        share = mass * values.exp()
        share = share / share.sum(-1, keepdim=True)
        want = (share * (share / mass).log()).sum(-1)
        torch.testing.assert_close(candidate_teacher(candidates, values, STATE).tilt, want, rtol=0, atol=1e-12)
        # Choosing a candidate says more than choosing a token, which may stand there twice.
        chosen = spread(candidates, share)
        stands = spread(candidates, mass)
        seen = stands > 0
        of_tokens = torch.where(seen, chosen * (chosen / stands).log(), 0.0).sum(-1)
        assert (of_tokens <= want + 1e-12).all()


# --- refusals ---------------------------------------------------------------------------------------------

ROW, TWO = torch.full((1, 4), 0.25).log(), torch.zeros(1, 2)
ALL_OF_IT = Candidates(TWO.long(), TWO, None)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: draw_candidates(ROW, top=0), ValueError, "at least one candidate is needed"),
        (lambda: draw_candidates(ROW, top=-1, draws=3), ValueError, "top must be at least 0, got -1"),
        (lambda: draw_candidates(ROW, top=1, draws=-1), ValueError, "draws must be at least 0, got -1"),
        (lambda: draw_candidates(ROW.long(), top=1), TypeError, "log_reference must have a floating-point dtype"),
        (
            lambda: draw_candidates(ROW, top=1, draws=2),
            ValueError,
            r"uniforms must have shape \[1, 2\], got None",
        ),
        (
            lambda: draw_candidates(ROW, top=1, draws=2, uniforms=torch.rand(2)),
            ValueError,
            r"uniforms must have shape \[1, 2\], got \[2\]",
        ),
        (
            lambda: candidate_teacher(ALL_OF_IT, TWO[:, :1], TWO[:, 0]),
            ValueError,
            r"log_values must have the shape of candidates.log_mass, \[1, 2\], got \[1, 1\]",
        ),
        (
            lambda: candidate_teacher(ALL_OF_IT._replace(log_rest=TWO[:, 0]), TWO, TWO),
            ValueError,
            r"state_log_values must have the shape of candidates.log_rest, \[1\], got \[1, 2\]",
        ),
        (lambda: candidate_teacher(ALL_OF_IT, TWO.long(), TWO[:, 0]), TypeError, "log_values must have a floating"),
        (
            lambda: candidate_teacher(ALL_OF_IT._replace(log_rest=TWO[:, 0]), TWO, TWO[:, 0].long()),
            TypeError,
            "state_log_values must have a floating-point dtype",
        ),
        (
            lambda: forward_divergence(ROW, TWO),
            ValueError,
            r"teacher must have the shape of logits, \[1, 4\], got \[1, 2\]",
        ),
        (lambda: forward_divergence(ROW.long(), ROW), TypeError, "logits must have a floating-point dtype"),
        (
            lambda: reverse_divergence(ROW, TWO, ALL_OF_IT, TWO, TWO[:, 0]),
            ValueError,
            r"log_reference must have the shape of logits, \[1, 4\], got \[1, 2\]",
        ),
        (
            lambda: reverse_divergence(ROW, ROW, ALL_OF_IT, ROW, TWO[:, 0]),
            ValueError,
            r"log_values must have the shape of candidates.tokens, \[1, 2\], got \[1, 4\]",
        ),
        (
            lambda: reverse_divergence(ROW.long(), ROW, ALL_OF_IT, TWO, TWO[:, 0]),
            TypeError,
            "logits must have a floating-point dtype",
        ),
    ],
)
def test_refusals_say_what_came_and_what_was_expected(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def test_more_candidates_than_positions() -> None:
    log_reference = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    some = draw_candidates(log_reference, top=5)
    assert some.tokens.shape == (2, 3, 5)
    left = log_reference.exp().sum(-1) - some.log_mass.exp().sum(-1)
    torch.testing.assert_close(some.log_rest.exp(), left, rtol=1e-4, atol=1e-6)
    for top in (6, 9):
        every = draw_candidates(log_reference, top=top)
        assert every.log_rest is None
        assert torch.equal(every.log_mass.sort(-1).values, log_reference.sort(-1).values)


def test_draws_are_exact_over_a_large_vocabulary() -> None:
    size = 100_003  # whose share single precision cannot add up
    log_reference = torch.full((1, size), -math.log(size))
    drawn = draw_candidates(log_reference, top=0, draws=16, uniforms=torch.full((1, 16), 0.5))
    assert drawn.tokens.tolist() == [[int((j + 0.5) / 16 * size) for j in range(16)]]


def test_the_rest_of_half_precision_is_added_up_in_double() -> None:
    log_reference = torch.full((1, 1000), -math.log(1000)).bfloat16()
    share = log_reference[0, 0].double().exp().bfloat16().double().item()
    rest = draw_candidates(log_reference, top=100).log_rest
    assert rest.dtype == torch.bfloat16
    assert rest.item() == torch.tensor(math.log(900 * share)).bfloat16().item()


def test_a_teacher_without_a_rest_is_normalised_over_its_candidates() -> None:
    generator = torch.Generator().manual_seed(0)
    mass, values = (torch.randn(2, 3, 4, generator=generator) for _ in range(2))
    candidates = Candidates(torch.zeros(2, 3, 4, dtype=torch.long), mass.log_softmax(-1), None)
    teacher = candidate_teacher(candidates, values, torch.zeros(2, 3))
    weights = candidates.log_mass.exp() * values.exp()
    torch.testing.assert_close(teacher.log_normaliser, weights.sum(-1).log())
    share = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(teacher.correction, share - candidates.log_mass.exp())
    torch.testing.assert_close(teacher.scale, torch.ones(2, 3))


def test_the_last_stratum_ends_before_the_vocabulary_does() -> None:
    log_reference = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    last = torch.full((50, 8), 1 - 2.0**-53, dtype=torch.float64)  # 7 + this rounds to 8
    assert int(draw_candidates(log_reference, top=0, draws=8, uniforms=last).tokens.max()) == 6
