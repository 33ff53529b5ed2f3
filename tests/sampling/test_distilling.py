"""The divergence from Best-of-N at each token, by hand from passes over each prefix alone."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.helpers import tiny_gpt2, tiny_llama
from tests.models.setting import BINS, new_model, scramble
from tests.sampling.test_decode import PROMPTS, VOCABULARY, batch_of
from tests.sampling.test_lookahead import RESPONSES
from tests.sampling.test_scoring import tiny_gemma2
from vbon_lightning.prefix_scorer import PrefixScorer
from vbon_lightning.sampling.distilling import CandidateRequest, Distilled, distil
from vbon_lightning.types import Responses

BATCH = batch_of(PROMPTS)
LENGTHS = torch.tensor([[1, 4], [2, 3], [4, 1], [3, 2]])
MASK = torch.arange(4) < LENGTHS[..., None]
GIVEN = Responses(torch.where(MASK, RESPONSES.tokens, 0), MASK)
WEIGHTS = torch.randn(len(PROMPTS), BINS.size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
UNIFORMS = torch.rand(*MASK.shape, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
KINDS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "gemma2": tiny_gemma2}
REQUESTS = {
    "all": CandidateRequest(top=VOCABULARY + 3, draws=0),
    "rest": CandidateRequest(top=4, draws=0),
    "drawn": CandidateRequest(top=3, draws=5),
    "only drawn": CandidateRequest(top=0, draws=5),
}


class Hand(NamedTuple):
    """A state's teacher, by hand."""

    teacher: Tensor
    """``[V]``."""
    tilt: Tensor
    """E_t[log t/ref], with the shares and masses of the candidates."""


@torch.no_grad()
def worth(scorer: PrefixScorer, rows: Tensor, length: int, weights: Tensor) -> Tensor:
    """Return W ``[N]`` of prefixes ``[N, L]`` of which ``length`` tokens are the response's, from one plain pass."""
    states = scorer.model.base_model(input_ids=rows, use_cache=False).last_hidden_state[:, -1]
    return (scorer.model.forecast(states, torch.tensor(length)).double() + weights).exp().sum(-1)


@torch.no_grad()
def teacher_by_hand(
    reference: Any,
    scorer: PrefixScorer,
    prompt: list[int],
    response: list[int],
    weights: Tensor,
    request: CandidateRequest,
    *,
    uniforms: Tensor | None = None,
    temperature: float = 1.0,
    end: tuple[int, float] | None = None,
) -> Hand:
    """Return ``ref(a) W(s a) / W(s)`` after a prefix, as far as the candidates know it."""
    prefix = torch.tensor([prompt + response])
    ref = (reference(input_ids=prefix, use_cache=False).logits[0, -1].double() / temperature).softmax(-1)
    size = len(ref)
    every = torch.cat([prefix.expand(size, -1), torch.arange(size)[:, None]], dim=1)
    after = worth(scorer, every, len(response) + 1, weights)
    if end is not None:  # the last token of a response whose reward is known
        after[end[0]] = end[1]
    likely = ref.argsort(descending=True)[: request.top]
    others = ref.clone().index_fill_(0, likely, 0.0)
    if not request.draws:
        # What is no candidate is worth what the prefix is.
        mass = torch.where(others > 0, ref * worth(scorer, prefix, len(response), weights), ref * after)
        teacher = mass / mass.sum()
        return Hand(teacher, torch.where(teacher > 0, teacher * (teacher / ref).log(), 0.0).sum())
    assert uniforms is not None
    strata = (torch.arange(request.draws) + uniforms) / request.draws * others.sum()
    drawn = [int((others.cumsum(0) <= place).sum()) for place in strata]
    tokens = torch.cat([likely, torch.tensor(drawn)])
    mass = torch.cat([ref[likely], (others.sum() / request.draws).expand(request.draws)])
    tilted = mass * after[tokens]
    correction = tilted / tilted.sum() - mass
    share = tilted / tilted.sum()
    return Hand(ref.index_add(0, tokens, correction), (share * (share / mass).log()).sum())


@torch.no_grad()
def candidates_by_hand(probs: Tensor, request: CandidateRequest, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Return candidate tokens ``[k]`` of a distribution ``[V]`` and their masses."""
    likely = probs.argsort(descending=True)[: request.top]
    others = probs.clone().index_fill_(0, likely, 0.0)
    strata = (torch.arange(request.draws) + uniforms) / max(request.draws, 1) * others.sum()
    drawn = torch.tensor([int((others.cumsum(0) <= place).sum()) for place in strata], dtype=torch.long)
    share = (others.sum() / max(request.draws, 1)).expand(request.draws)
    return torch.cat([likely, drawn]), torch.cat([probs[likely], share])


def reverse_by_hand(
    ours: Tensor,
    reference: Any,
    scorer: PrefixScorer,
    prompt: list[int],
    response: list[int],
    weights: Tensor,
    request: CandidateRequest,
    *,
    uniforms: Tensor,
    temperature: float = 1.0,
    end: tuple[int, float] | None = None,
) -> Tensor:
    """Return KL(policy || teacher) after a prefix over candidates of the policy ``ours [V]``, differentiable in it."""
    prefix = torch.tensor([prompt + response])
    with torch.no_grad():
        ref = (reference(input_ids=prefix, use_cache=False).logits[0, -1].double() / temperature).log_softmax(-1)
    every = torch.cat([prefix.expand(len(ref), -1), torch.arange(len(ref))[:, None]], dim=1)
    after = worth(scorer, every, len(response) + 1, weights)
    if end is not None:
        after[end[0]] = end[1]
    gain = (after / worth(scorer, prefix, len(response), weights)).log()
    tokens, mass = candidates_by_hand(ours.detach().exp(), request, uniforms)
    moving = mass * (ours[tokens] - ours[tokens].detach()).exp()
    return (ours.exp() * (ours - ref)).sum() - (moving * gain[tokens]).sum()


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> PrefixScorer:
    directory = tmp_path_factory.mktemp("value")
    tiny_llama(VOCABULARY, seed=8).save_pretrained(directory)
    return PrefixScorer(scramble(new_model(str(directory))).eval())


def run(policy: Any, reference: Any, scorer: PrefixScorer, request: CandidateRequest, **options: Any) -> Distilled:
    @contextmanager
    def as_reference():
        yield reference

    prompt = scorer.prompt_log_probs(BATCH).double()
    offset = (prompt + WEIGHTS).logsumexp(-1).float()[:, None, None]
    values = scorer.log_values(BATCH, GIVEN, WEIGHTS) + offset
    uniforms = UNIFORMS[..., : request.draws] if request.draws else None
    return distil(
        policy, as_reference, scorer, BATCH, GIVEN, WEIGHTS, values, request, **({"uniforms": uniforms} | options)
    )


def real_tokens() -> list[tuple[int, int, int]]:
    return [tuple(place) for place in MASK.nonzero().tolist()]


def policy_log_probs(policy: Any, place: int, sample: int, length: int, temperature: float) -> Tensor:
    prefix = torch.tensor([PROMPTS[place] + GIVEN.tokens[place, sample, :length].tolist()])
    return (policy(input_ids=prefix, use_cache=False).logits[0, -1].double() / temperature).log_softmax(-1)


def compare(
    kind: str, name: str, scorer: PrefixScorer, temperature: float, reverse: bool, ends: Tensor | None = None
) -> None:
    policy, reference = (KINDS[kind](VOCABULARY, seed=seed) for seed in (4, 5))
    request = REQUESTS[name]
    found = run(policy, reference, scorer, request, temperature=temperature, reverse=reverse, ends=ends)
    expected = [torch.zeros(MASK.shape, dtype=torch.float64) for _ in range(2)]
    for place, sample, length in real_tokens():
        ours = policy_log_probs(policy, place, sample, length, temperature)
        state = (
            reference,
            scorer,
            PROMPTS[place],
            GIVEN.tokens[place, sample, :length].tolist(),
            WEIGHTS[place],
            request,
        )
        last = length + 1 == int(LENGTHS[place, sample])
        given: dict[str, Any] = {
            "uniforms": UNIFORMS[place, sample, length][: request.draws],
            "temperature": temperature,
            "end": (int(GIVEN.tokens[place, sample, length]), float(ends[place, sample].exp()))
            if ends is not None and last
            else None,
        }
        here = (place, sample, length)
        if reverse:
            expected[0][here] = expected[1][here] = reverse_by_hand(ours, *state, **given)
        else:
            hand = teacher_by_hand(*state, **given)
            reached = policy_log_probs(reference, place, sample, length, temperature).detach()
            expected[0][here] = -(hand.teacher * ours).sum()
            expected[1][here] = hand.tilt + (hand.teacher * (reached - ours)).sum()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs.detach().float(), atol=5e-5, rtol=1e-4)
    assert not found.teacher_kl.requires_grad
    weights = torch.linspace(-1, 2, MASK.numel()).view(MASK.shape)
    gradients = [
        torch.autograd.grad((weights * total).sum(), list(policy.parameters()), allow_unused=True)
        for total in (found.divergence, expected[0])
    ]
    assert max(float(part.abs().max()) for part in gradients[1]) > 0.1
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs.float(), atol=1e-4, rtol=1e-3)
    assert all(parameter.grad is None for parameter in (*reference.parameters(), *scorer.model.parameters()))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", REQUESTS)
def test_the_teachers_cross_entropy(name: str, temperature: float, scorer: PrefixScorer) -> None:
    compare("llama", name, scorer, temperature, reverse=False)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_of_other_models(kind: str, scorer: PrefixScorer) -> None:
    compare(kind, "all", scorer, 0.7, reverse=False)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("name", ["all", "drawn"])
def test_the_last_token_of_a_response_has_its_own_worth(name: str, reverse: bool, scorer: PrefixScorer) -> None:
    ends = torch.randn(MASK.shape[:2], generator=torch.Generator().manual_seed(9))
    compare("llama", name, scorer, 0.7, reverse=reverse, ends=ends)


@pytest.mark.parametrize("name", REQUESTS)
def test_the_policys_divergence(name: str, scorer: PrefixScorer) -> None:
    compare("llama", name, scorer, 0.7, reverse=True)


def test_nothing_outside_the_mask(scorer: PrefixScorer) -> None:
    found = run(tiny_llama(VOCABULARY, seed=4), tiny_llama(VOCABULARY, seed=5), scorer, REQUESTS["drawn"])
    for part in found:
        assert part.shape == MASK.shape
        assert not part[~MASK].any()
        assert part[MASK].all()


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("max_logits", [1, 7 * VOCABULARY], ids=["one", "seven"])
@pytest.mark.parametrize("name", ["rest", "drawn"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_chunks_change_nothing(kind: str, max_logits: int, name: str, reverse: bool, scorer: PrefixScorer) -> None:
    policy, reference = (KINDS[kind](VOCABULARY, seed=seed) for seed in (4, 5))
    sizes: list[int] = []
    options: dict[str, Any] = {"temperature": 0.7, "reverse": reverse}
    whole = run(policy, reference, scorer, REQUESTS[name], **options)
    if kind == "llama":
        for model in (policy, reference):
            model.get_output_embeddings().register_forward_hook(lambda _, arguments, out: sizes.append(out.numel()))
    parts = run(policy, reference, scorer, REQUESTS[name], **options, max_logits=max_logits)
    for ours, theirs in zip(parts, whole, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    gradients = [
        torch.autograd.grad(found.divergence.square().sum(), list(policy.parameters())) for found in (parts, whole)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert kind != "llama" or len(sizes) > 4
    assert all(size <= max(max_logits, VOCABULARY) for size in sizes)


def test_a_policy_that_is_the_teacher_diverges_nowhere(scorer: PrefixScorer) -> None:
    # Weights that are all alike ask for the reference itself.
    reference = tiny_llama(VOCABULARY, seed=5)

    @contextmanager
    def as_reference():
        yield reference

    alike, zeros = torch.zeros_like(WEIGHTS), torch.zeros(*MASK.shape[:-1], MASK.shape[-1] + 1)
    for request in REQUESTS.values():
        uniforms = UNIFORMS[..., : request.draws] if request.draws else None
        found = distil(
            reference, as_reference, scorer, BATCH, GIVEN, alike, zeros, request, uniforms=uniforms, temperature=0.7
        )
        torch.testing.assert_close(found.teacher_kl, torch.zeros(MASK.shape), atol=1e-5, rtol=0)


def test_without_a_gradient(scorer: PrefixScorer) -> None:
    policy, reference = (tiny_llama(VOCABULARY, seed=seed) for seed in (4, 5))
    with torch.no_grad():
        found = run(policy, reference, scorer, REQUESTS["rest"], max_logits=1)
    assert not found.divergence.requires_grad
    expected = run(policy, reference, scorer, REQUESTS["rest"])
    torch.testing.assert_close(found.divergence, expected.divergence.detach(), atol=1e-6, rtol=1e-5)
