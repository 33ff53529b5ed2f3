"""Pick from cached responses, a pure function of (seed, stream, step, prompt) as sampling is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vbon_lightning.functional import (
    GroupExtremes,
    bon_selection_weights,
    group_extremes,
    systematic_resampling,
)
from vbon_lightning.sampling.noise import prompt_noise


def pick_groups(
    rewards: Tensor, identities: Sequence[int | str], *, n: int, groups: int, seed: int, stream: str, step: int
) -> GroupExtremes:
    """Permute each prompt's M responses, put them into groups of n, and take the best and the worst of each group.

    Ties are broken at random. The groups of a step are disjoint, and each is a random n-subset.

    Args:
        rewards: ``[B, M]``.
        identities: B prompt identities, as in :func:`~vbon_lightning.sampling.prompt_noise`.
        n: Responses a group.
        groups: K, groups a prompt, at most M // n.
        seed: The run's seed.
        stream: What the noise is for.
        step: The pick's number within the stream.

    Returns:
        Places of the best and the worst among the M, each ``[B, K]``.
    """
    noise = prompt_noise(
        identities, num_samples=1, length=rewards.shape[1], seed=seed, stream=stream, step=step
    ).squeeze(1)
    return group_extremes(rewards, noise.argsort(dim=-1, stable=True).to(rewards.device), n=n, groups=groups)


def pick_best(
    rewards: Tensor, identities: Sequence[int | str], *, n: int, count: int, seed: int, stream: str, step: int
) -> Tensor:
    """Draw responses with the probabilities that Best-of-n of a random n-subset of the M gives them.

    Systematic resampling over the responses in the order of their rewards: of each range of rewards it draws as many as
    Best-of-n returns, to within one. The mean over the picks of anything is that under
    :func:`~vbon_lightning.functional.bon_selection_weights`, on average over the noise.

    Args:
        rewards: ``[B, M]``.
        identities: B prompt identities, as in :func:`~vbon_lightning.sampling.prompt_noise`.
        n: N of Best-of-N.
        count: K, responses to draw a prompt; one of high weight may be drawn more than once.
        seed: The run's seed.
        stream: What the noise is for.
        step: The pick's number within the stream.

    Returns:
        Places among the M, ``[B, K]``.
    """
    weights = bon_selection_weights(rewards, n=n)
    return pick_weighted(rewards, weights, identities, count=count, seed=seed, stream=stream, step=step)


def pick_weighted(
    rewards: Tensor, weights: Tensor, identities: Sequence[int | str], *, count: int, seed: int, stream: str, step: int
) -> Tensor:
    """Draw responses with given probabilities, by systematic resampling in the order of their rewards.

    Args:
        rewards: ``[B, M]``.
        weights: ``[B, M]``, each row summing to 1.
        identities: B prompt identities, as in :func:`~vbon_lightning.sampling.prompt_noise`.
        count: K, responses to draw a prompt; one of high weight may be drawn more than once.
        seed: The run's seed.
        stream: What the noise is for.
        step: The pick's number within the stream.

    Returns:
        Places among the M, ``[B, K]``.
    """
    offsets = prompt_noise(identities, num_samples=1, length=1, seed=seed, stream=stream, step=step).flatten()
    order = rewards.argsort(dim=-1, stable=True)
    ordered = weights.gather(-1, order)
    return order.gather(-1, systematic_resampling(ordered, offsets.to(ordered.dtype).to(ordered.device), count=count))


def pick_some(identities: Sequence[int | str], *, among: int, count: int, seed: int, stream: str, step: int) -> Tensor:
    """Pick some of each prompt's responses at random, none twice.

    Args:
        identities: B prompt identities, as in :func:`~vbon_lightning.sampling.prompt_noise`.
        among: M, how many there are.
        count: K, how many to pick, at most M.
        seed: The run's seed.
        stream: What the noise is for.
        step: The pick's number within the stream.

    Returns:
        ``[B, K]`` long, places among the M.
    """
    noise = prompt_noise(identities, num_samples=1, length=among, seed=seed, stream=stream, step=step).squeeze(1)
    return torch.topk(noise, count, dim=-1).indices
