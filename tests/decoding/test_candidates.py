"""Which of a group of whole responses is kept."""

from __future__ import annotations

import math

import torch

from vbon_lightning.decoding.candidates import ScoredCandidates, best_of, keep
from vbon_lightning.types import Completions


def test_the_first_of_the_best_and_never_one_without_a_reward() -> None:
    nan = math.nan
    rewards = torch.tensor([[1.0, nan, 3.0, 3.0], [nan, -5.0, nan, -7.0], [nan, nan, nan, nan]])
    assert best_of(rewards).tolist() == [2, 1, 0]


def test_what_is_kept_is_of_its_own_prompt_and_group() -> None:
    """Two prompts, two groups of three each, every response told apart by its one token."""
    tokens = torch.arange(12).view(2, 6, 1)
    drawn = Completions(tokens, tokens >= 2, tokens[..., 0] % 2 == 1, torch.zeros(2, 6, 1))
    rewards = tokens.view(2, 2, 3) / 10
    found = keep(ScoredCandidates(drawn, rewards), torch.tensor([[2, 0], [1, 2]]), kl_bound=0.5)
    assert found.tokens.tolist() == [[[2], [3]], [[7], [11]]]
    assert found.mask.all() and found.finished.tolist() == [[False, True], [True, True]]
    assert found.rewards is not None and torch.equal(found.rewards, found.tokens[..., 0] / 10)
    assert found.cost[:3] == (10, 0, 12) and found.kl_bound == 0.5 and found.token_kl is None
    plain = keep(ScoredCandidates(drawn, rewards), torch.zeros(2, 2, dtype=torch.long), kl_bound=None)
    assert plain.kl_bound is None
