"""Peaked distributions and large vocabularies: the last digits, and the memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers import tiny_llama
from tests.models.setting import BINS
from tests.sampling.test_decode import PAD, PROMPTS, VOCABULARY, batch_of, noise_of, pad_left
from vbon_lightning.functional import token_log_probs, token_statistics, vocabulary_kl
from vbon_lightning.sampling import (
    SamplingRequest,
    response_log_probs,
    response_statistics,
    sample_completions,
    text_log_probs,
)
from vbon_lightning.sampling.decode import MAX_CHOSEN, choose_tokens
from vbon_lightning.sampling.distilling import CandidateRequest, distil
from vbon_lightning.sampling.static import GraphSampler
from vbon_lightning.types import Responses

TEMPERATURES = [0.02, 0.3, 1.0, 7.0, 100.0]
QWEN = 151_936


def peaked(seed: int = 1) -> Any:
    """Return a model whose logits are 50 times as large as they were."""
    model = tiny_llama(VOCABULARY, seed=seed, spread=2.0)
    with torch.no_grad():
        model.lm_head.weight *= 50
    return model.eval()


def summed_by_hand(model: Any, completions: Any, temperature: float) -> Tensor:
    """Return log-probabilities ``[B, G]`` of whole responses in float64, a pass a response."""
    wide = model.double()
    found = torch.zeros(completions.mask.shape[:2], dtype=torch.float64)
    for row, prompt in enumerate(PROMPTS):
        for sample in range(found.shape[1]):
            tokens = completions.tokens[row, sample][completions.mask[row, sample]]
            logits = wide(input_ids=torch.tensor([[*prompt, *tokens.tolist()]]), use_cache=False).logits[0]
            predicted = (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)
            found[row, sample] = predicted.gather(-1, tokens[:, None]).sum()
    model.float()
    return found


@pytest.mark.parametrize("temperature", TEMPERATURES)
@torch.no_grad()
def test_responses_of_a_peaked_model(temperature: float) -> None:
    model, other = peaked(), peaked(seed=2)
    noise = noise_of(list(range(len(PROMPTS))), 6, 32)
    request = SamplingRequest(*pad_left(PROMPTS), noise, end_ids=[2], pad_id=PAD, temperature=temperature)
    drawn = sample_completions(model, request)
    exact = summed_by_hand(model, drawn, temperature)
    replayed = GraphSampler()(model, request)
    scored = response_log_probs(model, batch_of(PROMPTS), drawn, temperature=temperature)
    statistics = response_statistics(model, other, batch_of(PROMPTS), drawn, temperature=temperature)
    for found in (drawn.log_probs, replayed.log_probs, scored, statistics.log_probs):
        assert (found.double().sum(-1) - exact).abs().max() < 1e-3
    # What another model says of them is far from 0: as many of its digits are right.
    theirs = summed_by_hand(other, drawn, temperature)
    error = (statistics.reference_log_probs.double().sum(-1) - theirs).abs()
    assert (error / theirs.abs().clamp(min=1)).max() < (1e-5 if temperature < 1 else 1e-3)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("peak", [1, 50])
def test_last_digits_of_logits(temperature: float, peak: int) -> None:
    noise = torch.Generator().manual_seed(0)
    logits = peak * 4 * torch.randn(400, 300, generator=noise)
    reference = logits + 0.1 * torch.randn(400, 300, generator=noise)
    uniforms = torch.rand(400, 1, generator=noise, dtype=torch.float64)
    tokens, log_probs = choose_tokens(logits, uniforms, temperature)
    log_policy, log_reference = ((values.double() / temperature).log_softmax(-1) for values in (logits, reference))
    exact = log_policy.gather(-1, tokens).squeeze(-1)
    kl = (log_policy.exp() * (log_policy - log_reference)).sum(-1)
    flat = tokens.squeeze(-1)
    statistics = token_statistics(logits, reference, flat, temperature=temperature)
    # A response of 100 tokens is within 1e-3.
    for found, right in (
        (log_probs.squeeze(-1), exact),
        (token_log_probs(logits, flat, temperature=temperature), exact),
        (statistics.log_probs, exact),
        (statistics.reference_log_probs, log_reference.gather(-1, tokens).squeeze(-1)),
        (statistics.kl, kl),
        (vocabulary_kl(logits, reference, temperature=temperature), kl),
    ):
        assert found is not None
        assert (found.double() - right).abs().max() < 1e-5


class Largest(TorchDispatchMode):
    """Note the most numbers that a tensor made meanwhile has; views of others are none."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {
            value.untyped_storage().data_ptr() for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)
        }
        for value in tree_leaves(found):
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in given:
                self.most = max(self.most, value.untyped_storage().nbytes() // value.element_size())
        return found


def made_by(work: Callable[[], object]) -> int:
    with Largest() as largest:
        work()
    return largest.most


@pytest.fixture(scope="module")
def wide() -> list[Any]:
    """Return two models with the vocabulary of Qwen and little else."""
    return [
        tiny_llama(QWEN, seed=seed, hidden_size=16, num_attention_heads=2, num_key_value_heads=2).eval()
        for seed in (0, 1)
    ]


LIMIT = 2**22
"""27 positions of that vocabulary; the weights are 2.4 million numbers."""


def test_a_large_vocabulary_is_sampled_in_pieces(wide: list[Any]) -> None:
    logits = torch.randn(90, QWEN)
    uniforms = torch.rand(90, 1, dtype=torch.float64)
    found: list[tuple[Tensor, Tensor]] = []
    assert logits.numel() > MAX_CHOSEN
    assert QWEN < made_by(lambda: found.append(choose_tokens(logits, uniforms, 0.7))) <= MAX_CHOSEN
    assert QWEN < made_by(lambda: choose_tokens(logits, uniforms, 0.7, max_logits=LIMIT)) <= LIMIT
    for row in (0, 54, 55, 89):
        tokens, log_probs = choose_tokens(logits[row : row + 1], uniforms[row : row + 1], 0.7)
        assert tokens.item() == found[0][0][row].item()
        assert log_probs.item() == pytest.approx(found[0][1][row].item(), abs=1e-6)


def responses(rows: int, length: int) -> Responses:
    tokens = torch.randint(3, QWEN, (len(PROMPTS), rows, length), generator=torch.Generator().manual_seed(0))
    return Responses(tokens, torch.ones_like(tokens, dtype=torch.bool))


def test_a_large_vocabulary_is_scored_in_pieces(wide: list[Any]) -> None:
    policy, reference = wide
    given = responses(2, 10)  # 80 positions
    batch = batch_of(PROMPTS)

    def both() -> None:
        found = response_statistics(policy, reference, batch, given, max_logits=LIMIT)
        (found.log_probs + found.kl).sum().backward()

    def one() -> None:
        response_log_probs(policy, batch, given, max_logits=LIMIT).sum().backward()

    def texts() -> None:
        tokens = given.tokens.flatten(0, 1)
        mask = torch.ones_like(tokens, dtype=torch.bool)
        text_log_probs(policy, tokens, mask, mask, max_logits=LIMIT).sum().backward()

    for work in (both, one, texts):
        assert QWEN < made_by(work) <= LIMIT


class Indifferent:
    """A scorer that finds all candidates alike."""

    def candidate_log_values(self, prompts: Any, responses: Any, candidates: Tensor, log_weights: Tensor) -> Tensor:
        return torch.zeros(candidates.shape, dtype=torch.float64)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_large_vocabulary_is_distilled_in_pieces(reverse: bool, wide: list[Any]) -> None:
    from contextlib import nullcontext

    policy, reference = wide
    given = responses(1, 10)
    weights = torch.zeros(len(PROMPTS), BINS.size, dtype=torch.float64)
    values = torch.zeros(len(PROMPTS), 1, 11, dtype=torch.float64)

    def work() -> None:
        found = distil(
            policy, lambda: nullcontext(reference), Indifferent(), batch_of(PROMPTS), given, weights, values,
            CandidateRequest(top=4, draws=0), reverse=reverse, max_logits=LIMIT,
        )  # fmt: skip
        found.divergence.sum().backward()

    assert QWEN < made_by(work) <= LIMIT
