"""What prefixes are worth, against a value model that is run on each prefix by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers import tiny_gpt2, tiny_llama
from tests.models.setting import BINS, bins_after, new_model, scramble
from tests.sampling.test_decode import DEEPER, PROMPTS, VOCABULARY, batch_of
from tests.sampling.test_lookahead import AHEAD, RESPONSES
from vbon_lightning.prefix_scorer import PrefixScorer
from vbon_lightning.types import Responses

BATCH = batch_of(PROMPTS)
WEIGHTS = torch.randn(len(PROMPTS), BINS.size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def scorer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PrefixScorer:
    directory = tmp_path_factory.mktemp(request.param)
    make = {"llama": tiny_llama, "gpt2": tiny_gpt2}[request.param]
    make(VOCABULARY, **DEEPER[request.param]).save_pretrained(directory)
    return PrefixScorer(scramble(new_model(str(directory))).eval())


def by_hand(scorer: PrefixScorer, tail: Tensor | None = None) -> Tensor:
    """Return the bins' log-probabilities of each prefix ``[B, G, T + 1, K]``, or of it with one more token."""
    return torch.stack(
        [
            torch.stack(
                [
                    torch.stack(
                        [
                            bins_after(
                                scorer.model,
                                prompt,
                                tokens[:length] + ([] if tail is None else [int(tail[place, sample, length])]),
                            )
                            for length in range(len(tokens) + 1)
                        ]
                    )
                    for sample, tokens in enumerate(RESPONSES.tokens[place].tolist())
                ]
            )
            for place, prompt in enumerate(PROMPTS)
        ]
    )


def worth(log_probs: Tensor) -> Tensor:
    """Return log W of prefixes ``[B, ..., K]``."""
    weights = WEIGHTS.view(len(WEIGHTS), *[1] * (log_probs.dim() - 2), -1)
    return (log_probs.double() + weights).exp().sum(-1).log().float()


def test_bins_after_each_prefix(scorer: PrefixScorer) -> None:
    found = scorer.bin_log_probs(BATCH, RESPONSES)
    assert found.shape == (4, 2, 5, BINS.size)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, by_hand(scorer), atol=1e-5, rtol=1e-4)
    assert found.requires_grad
    gradients = torch.autograd.grad(found[..., 0].sum(), list(scorer.model.parameters()), allow_unused=True)
    assert all(gradient is not None for gradient in gradients)


def test_bins_after_the_prompt_alone(scorer: PrefixScorer) -> None:
    found = scorer.prompt_log_probs(BATCH)
    torch.testing.assert_close(found, scorer.bin_log_probs(BATCH, RESPONSES)[:, 0, 0], atol=1e-6, rtol=1e-5)
    assert not found.requires_grad


def test_what_is_behind_a_response_does_not_matter(scorer: PrefixScorer) -> None:
    mask = torch.arange(4) < torch.tensor([[1, 4], [2, 3], [4, 1], [3, 2]])[..., None]
    cut = Responses(torch.where(mask, RESPONSES.tokens, 0), mask)
    found, whole = scorer.bin_log_probs(BATCH, cut), scorer.bin_log_probs(BATCH, RESPONSES)
    seen = torch.nn.functional.pad(mask, (1, 0), value=True)
    torch.testing.assert_close(found[seen], whole[seen], atol=1e-6, rtol=1e-5)


def test_values_are_relative_to_the_prompts(scorer: PrefixScorer) -> None:
    found = scorer.log_values(BATCH, RESPONSES, WEIGHTS)
    assert not found[..., 0].any()
    expected = worth(by_hand(scorer))
    torch.testing.assert_close(found, expected - expected[..., :1], atol=1e-5, rtol=1e-4)
    assert not found.requires_grad


def test_values_of_candidates(scorer: PrefixScorer) -> None:
    found = scorer.candidate_log_values(BATCH, RESPONSES, AHEAD, WEIGHTS)
    assert found.shape == AHEAD.shape
    for place in range(AHEAD.shape[-1]):
        expected = worth(by_hand(scorer, AHEAD[..., place]))
        torch.testing.assert_close(found[..., place], expected, atol=1e-5, rtol=1e-4)
    parts = scorer.candidate_log_values(BATCH, RESPONSES, AHEAD, WEIGHTS, max_tokens=1)
    torch.testing.assert_close(parts, found, atol=1e-5, rtol=1e-4)


def test_the_responses_own_token_leads_to_the_next_prefix(scorer: PrefixScorer) -> None:
    found = scorer.candidate_log_values(BATCH, RESPONSES, RESPONSES.tokens[..., None], WEIGHTS)[..., 0]
    prompt = worth(scorer.prompt_log_probs(BATCH))
    expected = scorer.log_values(BATCH, RESPONSES, WEIGHTS)[..., 1:] + prompt[:, None, None]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


# -- weights --


def test_the_distribution_of_the_reward(scorer: PrefixScorer) -> None:
    rewards = torch.tensor([[-0.1, 0.2, 3.0, 3.5], [0.0, 0.0, 0.0, 9.0], [1.0, 2.0, 3.0, 4.0], [-9.0, -9.0, 2.0, 2.0]])
    known = scorer.log_cdf(BATCH, rewards).exp()
    below = (rewards[:, None] <= BINS.edges[None, :, None]).double().sum(-1)
    torch.testing.assert_close(known[:, 1:-1], (below + 0.5) / 5)
    predicted = scorer.log_cdf(BATCH).exp()
    torch.testing.assert_close(predicted[:, 1:-1].float(), scorer.prompt_log_probs(BATCH).exp().cumsum(-1)[:, :-1])
    for found in (known, predicted):
        assert found[:, 0].tolist() == [0.0] * 4
        assert found[:, -1].tolist() == [1.0] * 4
    placed = scorer.reward_cdf(rewards, predicted.log())
    bins = torch.searchsorted(BINS.edges, rewards.double())
    assert (placed.log_below.exp() >= predicted.gather(1, bins).float() - 1e-6).all()
    assert (placed.log_at_or_below.exp() <= predicted.gather(1, bins + 1).float() + 1e-6).all()


@pytest.mark.parametrize("n", [1.0, 3.5, 8.0])
def test_best_of_n_makes_one_of_the_prompts_own_bins(n: float, scorer: PrefixScorer) -> None:
    log_cdf = scorer.log_cdf(BATCH)
    cdf = log_cdf.exp()
    found = scorer.bon_log_weights(log_cdf, n=n)
    torch.testing.assert_close(found.exp(), (cdf**n).diff(dim=-1) / cdf.diff(dim=-1))
    whole = scorer.prompt_log_probs(BATCH).double() + found
    torch.testing.assert_close(whole.exp().sum(-1), torch.ones(4, dtype=torch.float64), atol=1e-5, rtol=1e-5)


def test_the_weights_of_kl_regularised_rl(scorer: PrefixScorer) -> None:
    expected = (BINS.atoms / 0.3).exp().mean(-1).log()[None]
    torch.testing.assert_close(scorer.kl_rl_log_weights(0.3), expected)
