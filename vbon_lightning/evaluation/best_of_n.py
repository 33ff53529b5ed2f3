"""What Best-of-N does, by the M cached reference responses a prompt alone: nothing is sampled."""

from __future__ import annotations

from torch import Tensor

from vbon_lightning.functional import bon_kl
from vbon_lightning.functional import bon_selection_weights as selection_weights
from vbon_lightning.functional.best_of_n import subset_shares
from vbon_lightning.functional.reward_cdf import reward_counts

__all__ = ["KL_ESTIMATOR", "bon_against_bon", "bon_kl", "selection_weights"]

KL_ESTIMATOR = (
    "the cached responses stand for the reference, "
    "sum_j w_j log(M w_j), w_j = (F_le^N - F_lt^N) / (M (F_le - F_lt)); never above log N - (N-1)/N"
)


def bon_against_bon(reference_rewards: Tensor, *, n: int, m: int) -> Tensor:
    """Estimate the win rate of Best-of-n over Best-of-m without bias, ties counted one half.

    The mean over all pairs of disjoint subsets of n and m of the M cached responses. Without ties it is
    exactly ``n / (n + m)``.

    Args:
        reference_rewards: ``[B, M]``.
        n: N of the one Best-of-N.
        m: N of its opponent, ``n + m <= M``.

    Returns:
        ``[B]`` float64.

    Raises:
        ValueError: If ``n + m > M``.
    """
    samples = reference_rewards.shape[1]
    if n + m > samples:
        raise ValueError(f"Best-of-{n} against Best-of-{m} needs {n + m} cached responses a prompt, not {samples}")
    wins = _outright_wins(reference_rewards, n, m) - _outright_wins(reference_rewards, m, n)
    return (1 + wins) / 2


def _outright_wins(reference_rewards: Tensor, n: int, m: int) -> Tensor:
    # P(max of n is at a level of reward, max of m below it), summed over levels; drawing the m first, then
    # the n.
    below, at_or_below = reward_counts(reference_rewards, reference_rewards)
    samples, device = reference_rewards.shape[1], reference_rewards.device
    opponent_below = subset_shares(samples, m).to(device)[below]
    rest = subset_shares(samples - m, n).to(device)
    at_level = rest[(at_or_below - m).clamp(min=0)] - rest[(below - m).clamp(min=0)]
    # Every response on a level brings the level's term: hence the division.
    return (opponent_below * at_level / (at_or_below - below)).sum(-1)
