"""The forward KL to Best-of-N, on responses of the reference."""

from __future__ import annotations

from torch import Tensor

from vbon_lightning.functional._validate import check_float, check_same_shape
from vbon_lightning.functional.best_of_n import bon_selection_weights


def bon_cross_entropy(log_probs: Tensor, reference_rewards: Tensor, *, n: int) -> Tensor:
    """Estimate the cross-entropy of the policy under Best-of-N, ``-E_{y ~ pi_bon}[log pi(y)]``, from M responses.

    It is ``KL(pi_bon || policy)`` up to the entropy of Best-of-N, which the policy has no part in. Each of the M
    responses counts with the probability that the best of a random n of them is it
    (:func:`~vbon_lightning.functional.bon_selection_weights`): the mean over all n-subsets, a U-statistic. Value and
    gradient are unbiased for every M >= n, and no other unbiased estimate from the M responses and their rewards has
    less variance. (Weights ``w_N(y)`` by an estimate of the distribution function are biased at every M, and
    self-normalised ones as well.)

    Args:
        log_probs: ``[B, M]``, log-probabilities under the policy of responses that the reference sampled,
            differentiable.
        reference_rewards: ``[B, M]``, their rewards.
        n: N of Best-of-N, an integer with ``1 <= n <= M``.

    Returns:
        A scalar in nats, the mean over prompts.

    Raises:
        TypeError: on a wrong dtype or an ``n`` that is not an integer.
        ValueError: if the shapes differ or ``n`` is out of range.
    """
    check_float("log_probs", log_probs)
    check_float("reference_rewards", reference_rewards)
    check_same_shape("log_probs", log_probs, "reference_rewards", reference_rewards)
    weights = bon_selection_weights(reference_rewards, n=n)
    return -(weights.to(log_probs.dtype) * log_probs).sum(-1).mean()
