"""Rollouts made by hand, with random numbers in every field."""

from __future__ import annotations

import torch

from vbon_lightning.types import Completions, PromptBatch, Rollout, select_prompts


def make_rollout(
    prompts: int = 3,
    samples: int = 4,
    length: int = 5,
    *,
    references: int | None = 16,
    seed: int = 0,
    first: int = 0,
    levels: int | None = 7,
    fillers: int = 0,
) -> Rollout:
    """Make a rollout.

    Args:
        prompts: B.
        samples: G.
        length: T.
        references: M, None for no reference rewards.
        seed: Seeds all numbers.
        first: Index of the first prompt.
        levels: Rewards take so many values, so that they tie; None for rewards that do not.
        fillers: How many rows at the end are not valid; they hold NaN where a number can.
    """
    noise = torch.Generator().manual_seed(seed)

    def rewards(*shape: int) -> torch.Tensor:
        values = torch.rand(shape, generator=noise)
        return values if levels is None else (values * levels).floor() / levels

    lengths = torch.randint(1, length + 1, (prompts, samples), generator=noise)
    mask = torch.arange(length) < lengths[..., None]
    valid = torch.arange(prompts) < prompts - fillers
    shape = (prompts, samples, length)
    log_probs = torch.where(mask, torch.randn(shape, generator=noise) - 2, 0.0)
    reference_log_probs = torch.where(mask, torch.randn(shape, generator=noise) - 3, 0.0)
    token_kl = torch.where(mask, torch.rand(shape, generator=noise), 0.0)
    policy_rewards = rewards(prompts, samples)
    for values in (log_probs, token_kl, policy_rewards):
        values[~valid] = torch.nan
    tokens = torch.randint(3, 90, shape, generator=noise)
    reference = None if references is None else rewards(prompts, references)
    batch = PromptBatch(
        index=torch.arange(first, first + prompts),
        valid=valid,
        tokens=torch.ones(prompts, 2, dtype=torch.long),
        mask=torch.ones(prompts, 2, dtype=torch.bool),
        text=[f"prompt | {first + row}" for row in range(prompts)],
        reference_rewards=reference,
    )
    return Rollout(
        prompts=batch,
        completions=Completions(tokens, mask, lengths % 2 == 0, log_probs),
        responses=[[f"response {first + row}.{sample}" for sample in range(samples)] for row in range(prompts)],
        rewards=policy_rewards,
        log_probs=log_probs,
        reference_log_probs=reference_log_probs,
        token_kl=token_kl,
        reference_rewards=reference,
    )


def silence(rollout: Rollout, *places: tuple[int, int]) -> Rollout:
    """Take the rewards of some responses, each a row and a place in it."""
    rewards = rollout.rewards.clone()
    for row, place in places:
        rewards[row, place] = torch.nan
    return rollout._replace(rewards=rewards)


def one_prompt(rollout: Rollout, row: int, kept: list[int]) -> Rollout:
    """Return a prompt with some of its responses only."""
    one: Rollout = select_prompts(rollout, [row])
    named = ("rewards", "log_probs", "reference_log_probs", "token_kl")
    return one._replace(
        completions=Completions(*(part[:, kept] for part in one.completions)),
        responses=[[one.responses[0][place] for place in kept]],
        **{name: getattr(one, name)[:, kept] for name in named},
    )


MISSING = ((0, 1), (1, 0), (1, 2), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3))
"""Of three prompts with four responses: the first keeps three, the second one, the third none."""
LEFT = ((0, [0, 2, 3]), (1, [1]))
"""What is left, by row."""
