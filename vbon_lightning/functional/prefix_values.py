"""What a prefix of a response is worth: soft values from the predicted distribution of the reward to come.

For a weight ``w`` of the final reward, ``W(s) = E_ref[w | s]`` turns the reference into the tilted policy, token by
token and exactly:

    pi(a | s) = ref(a | s) W(s a) / W(s).

With ``w = w_n`` that is Best-of-N; with ``w = exp(r / beta)`` the optimum of KL-regularised RL. ``log W`` is the soft
value of that control problem, in units of the KL's weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vbon_lightning.functional._validate import check_float, check_mask, check_real, check_same_shape, check_shape
from vbon_lightning.functional.policy_gradient import generalized_advantage_estimation, leave_one_out
from vbon_lightning.functional.targets import Target


def prefix_log_values(bin_log_probs: Tensor, log_weights: Tensor) -> Tensor:
    """Compute ``log W = log sum_k p(k | prefix) w(k)``.

    Args:
        bin_log_probs: ``[..., K]`` predicted log-probabilities of the bins; normalised here.
        log_weights: ``[..., K]``, broadcast against them.

    Returns:
        ``[...]`` float32, or float64 where ``bin_log_probs`` is.

    Raises:
        TypeError: on a wrong dtype.
    """
    check_float("bin_log_probs", bin_log_probs)
    check_float("log_weights", log_weights)
    wide = bin_log_probs if bin_log_probs.dtype == torch.float64 else bin_log_probs.float()
    return torch.logsumexp(wide.log_softmax(-1) + log_weights.to(wide.dtype), dim=-1)


@torch.no_grad()
def with_exact_end(log_values: Tensor, log_weight: Tensor, mask: Tensor) -> Tensor:
    """Replace the value of the whole response by what it is, the log-weight of its reward, and keep it from there on.

    Args:
        log_values: ``[B, G, T + 1]``, after 0, 1, ... T tokens.
        log_weight: ``[B, G]``, ``log w(y)``.
        mask: ``[B, G, T]`` bool, True on response tokens.

    Returns:
        ``[B, G, T + 1]``.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: if the shapes do not fit.
    """
    check_float("log_values", log_values)
    check_float("log_weight", log_weight)
    check_mask("mask", mask)
    check_shape("log_values", log_values, (*mask.shape[:-1], mask.shape[-1] + 1), "[B, G, T + 1]")
    check_shape("log_weight", log_weight, mask.shape[:-1], "[B, G]")
    ended = torch.arange(mask.shape[-1] + 1, device=mask.device) >= mask.sum(-1, keepdim=True)
    return torch.where(ended, log_weight.to(log_values.dtype).unsqueeze(-1), log_values)


@torch.no_grad()
def value_advantages(
    target: Target, log_values: Tensor, token_kl: Tensor, mask: Tensor, *, lam: float = 1.0, siblings: bool = True
) -> Tensor:
    """Compute advantages from a model of the reward to come, on top of the exact KL.

    With ``rho_t = log W(s_{t+1}) - log W(s_t)``, the optimal policy's log-ratio at the sampled token, and ``KL_t`` the
    exact KL to the reference at position t,

        A_t = kl_coef sum_{l >= 0} lam^l (rho_{t+l} - KL_{t+l}),

    where the last ``log W`` is the response's own log-weight ``score / kl_coef``. The KL of position t is a baseline
    here, since it does not depend on token t; it has its own gradient
    (:func:`~vbon_lightning.functional.kl_penalty`).

    At ``lam = 1`` the sum telescopes to ``score - kl_coef log W(s_t) - kl_coef sum_{s >= t} KL_s``: the values are a
    baseline and no more, and the gradient is that of the target whatever the model says. Below 1 it is biased by what
    is left out, ``-kl_coef sum_{l > 0} (1 - lam^l) E[sum_t grad log pi_t (rho_{t+l} - KL_{t+l})]``. If the model is
    exact, a term left out is, in expectation, minus the policy's divergence from the optimum at a later state, so that
    the bias vanishes at the optimum; an inexact model moves the fixed point. A discount that falls on ``KL_{t+l+1}``
    instead, as generalised advantages of a KL in the reward have it, would leave a bias there too, and cost reward.

    Args:
        target: score ``[B, G]`` and KL coefficient, > 0.
        log_values: ``[B, G, T + 1]``, log W after 0, 1, ... T tokens, with the constant that ``score / kl_coef`` has;
            from the end of a response on it is not read.
        token_kl: ``[B, G, T]``, exact KL(policy || reference) over the vocabulary at each position.
        mask: ``[B, G, T]`` bool, True on response tokens.
        lam: lambda, in [0, 1].
        siblings: also subtract the mean of the siblings' advantages at the same position, a further baseline;
            needs ``G >= 2``. A response without a token in the mask is nobody's sibling.

    Returns:
        ``[B, G, T]`` without gradient, 0 outside the mask.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: if the shapes do not fit, ``lam`` is out of range or the KL coefficient is 0.
    """
    check_float("token_kl", token_kl)
    check_mask("mask", mask)
    check_same_shape("token_kl", token_kl, "mask", mask)
    check_real("target.kl_coef", float(target.kl_coef), above=0.0)
    values = with_exact_end(log_values, target.score / target.kl_coef, mask)
    kl = torch.where(mask, token_kl, torch.zeros_like(token_kl))
    # The potential is in the rewards already: no value is left to bootstrap from.
    rewards = (values[..., 1:] - values[..., :-1]).to(kl.dtype) - kl
    found = generalized_advantage_estimation(rewards, torch.zeros_like(kl), mask, lam=lam).advantages
    if siblings:
        kept = mask.any(-1)
        several = kept.sum(1, keepdim=True) > 1  # one that is left alone has the values for a baseline
        found = torch.where(several.unsqueeze(-1), leave_one_out(found, kept), found)
    return torch.where(mask, target.kl_coef * found, torch.zeros_like(found))


def ranked_probability_score(bin_log_probs: Tensor, labels: Tensor) -> Tensor:
    """Compute the CRPS in units of rank, ``sum_k (P(bin <= k) - 1[label <= k])^2 / K``.

    The integral of the squared difference of the two distribution functions, the reward measured by the bins it passes.

    Args:
        bin_log_probs: ``[..., K]``.
        labels: ``[...]`` long.

    Returns:
        ``[...]``, at least 0.

    Raises:
        TypeError: on a wrong dtype.
        ValueError: if the shapes do not fit.
    """
    check_float("bin_log_probs", bin_log_probs)
    check_shape("labels", labels, bin_log_probs.shape[:-1], "bin_log_probs.shape[:-1]")
    cdf = bin_log_probs.log_softmax(-1).exp().cumsum(-1)
    reached = labels.unsqueeze(-1) <= torch.arange(bin_log_probs.shape[-1], device=labels.device)
    return (cdf - reached.to(cdf.dtype)).square().mean(-1)
