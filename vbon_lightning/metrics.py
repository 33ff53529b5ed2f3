"""Metrics over rollouts and forecasts, kept as float64 sums that add up over batches and processes.

Rows that only even out the processes (``valid`` False) count nowhere. A process without any rows may still
call ``compute``: counts are part of every result, and a count of 0 comes with NaN means.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from vbon_lightning.functional import bon_win_rate, ranked_probability_score

__all__ = [
    "PREFIX_PLACES",
    "ForecastSummary",
    "KLSummary",
    "MeanSummary",
    "PrefixForecast",
    "PromptMean",
    "RewardStatistics",
    "RewardSummary",
    "SequenceKL",
    "WinRate",
    "calibration_error",
    "prefix_nll",
    "prefix_places",
]

PREFIX_PLACES = ("prompt", "early", "middle", "late", "end")
"""Where in a response a prediction is made: before it, in its first, second or last third, or at its end."""

_CALIBRATION_BINS = 10


class MeanSummary(NamedTuple):
    """A mean over prompts."""

    mean: Tensor
    """Mean of the prompts' values."""
    standard_error: Tensor
    """Its standard error over prompts; NaN below two prompts."""
    prompts: Tensor
    """Number of prompts."""


class KLSummary(NamedTuple):
    """The KL divergence of the policy from the reference, in nats, two ways."""

    kl: Tensor
    """Mean over responses of the exact KL over the vocabulary, summed over each response's tokens."""
    kl_per_token: Tensor
    """The same sum divided by the number of tokens."""
    sampled: Tensor
    """Mean over responses of ``log policy - log reference``: the same in expectation, but noisier."""
    sampled_standard_error: Tensor
    """Standard error of ``sampled`` over responses; NaN below two responses."""
    responses: Tensor
    """Number of responses."""


class RewardSummary(NamedTuple):
    """Rewards and lengths of responses."""

    mean: Tensor
    """Mean reward."""
    std: Tensor
    """Standard deviation of the rewards (``n - 1`` in the denominator); NaN below two responses."""
    length: Tensor
    """Mean number of tokens, the EOS included."""
    finished: Tensor
    """Share of responses that ended with an EOS."""
    responses: Tensor
    """Number of responses."""


class ForecastSummary(NamedTuple):
    """How good predictions of the final reward are, at each of :data:`PREFIX_PLACES`."""

    nll: Tensor
    """``[5]`` mean cross-entropy of the reward's bin, in nats."""
    crps: Tensor
    """``[5]`` mean CRPS, in ranks (:func:`vbon_lightning.functional.ranked_probability_score`)."""
    calibration_error: Tensor
    """``[5]`` :func:`calibration_error` of the event that the reward is in the upper half of the bins."""
    prefixes: Tensor
    """``[5]`` number of prefixes; where there is none, the others are NaN."""


def calibration_error(probs: Tensor, happened: Tensor, *, bins: int = 10) -> Tensor:
    """Compute the expected calibration error of predictions of an event, with bins of equal width.

    Predictions that are alike form a bin; what they say on average is compared with how often the event happens, and
    the absolute differences are averaged over all predictions.

    Args:
        probs: Any shape: predicted probabilities of the event.
        happened: The same shape, bool: whether it did happen.
        bins: Number of bins.

    Returns:
        A scalar; NaN without predictions.
    """
    gaps = _calibration_gaps(probs.flatten(), happened.flatten(), bins=bins).sum(0)
    return gaps.abs().sum() / probs.numel()


def _calibration_gaps(probs: Tensor, happened: Tensor, *, bins: int) -> Tensor:
    """Return prediction minus event, in the column of the prediction's bin: ``[..., bins]``, which add up."""
    bounds = torch.linspace(0, 1, bins + 1, dtype=probs.dtype, device=probs.device)[1:-1]
    place = torch.bucketize(probs.contiguous(), bounds, right=True)
    gaps = probs.double() - happened.double()
    return torch.nn.functional.one_hot(place, bins) * gaps.unsqueeze(-1)


def prefix_nll(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each prefix in nats; every prefix has its response's label.

    Args:
        log_probs: ``[B, G, T + 1, K]`` log-probabilities of the bins after 0, 1, ... T tokens.
        labels: ``[B, G]`` long: the bin of each response's reward.

    Returns:
        ``[B, G, T + 1]``, differentiable.
    """
    index = labels[..., None, None].expand(*log_probs.shape[:-1], 1)
    return -log_probs.gather(-1, index).squeeze(-1)


def prefix_places(mask: Tensor) -> Tensor:
    """Return which of :data:`PREFIX_PLACES` each prefix is at.

    Args:
        mask: ``[B, G, T]`` bool: True on response tokens.

    Returns:
        ``[B, G, T + 1]`` long, of the prefixes of 0, 1, ... T tokens; what is after the end means nothing.
    """
    tokens = torch.arange(mask.shape[-1] + 1, device=mask.device)
    length = mask.sum(-1, keepdim=True)
    third = (3 * (tokens - 1) // length.clamp(min=1)).clamp(0, 2)
    return torch.where(tokens == 0, 0, torch.where(tokens == length, 4, 1 + third))


def _variance_of(total: Tensor, squares: Tensor, count: Tensor) -> Tensor:
    # 0/0 below two values: NaN says that there is no variance to speak of.
    return (squares - total * total / count).clamp(min=0) / (count - 1).clamp(min=0)


def _rows(values: Tensor, valid: Tensor | None) -> Tensor:
    return values.new_ones(len(values), dtype=torch.bool) if valid is None else valid.to(values.device)


def _kept(values: Tensor, rows: Tensor) -> Tensor:
    # Zeros rather than a selection, which would make the host wait for the device.
    return torch.where(rows.view(-1, *[1] * (values.ndim - 1)), values.double(), 0.0)


class _Sums(Metric):
    """A metric whose whole state is one vector of sums, so that a synchronisation is one gather."""

    full_state_update = False

    def __init__(self, size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sums: Tensor
        self.add_state("sums", default=torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")

    @property
    def update_called(self) -> bool:
        """Return True: to compute without an update is no mistake here, the count says how much there was."""
        return True

    def _add(self, *terms: Tensor) -> None:
        self.sums += torch.stack([term.to(self.sums) for term in terms])


class _PromptSums(_Sums):
    """Sums for a mean over prompts and its standard error."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(3, **kwargs)

    def _add_prompts(self, values: Tensor, valid: Tensor | None, counted: Tensor | None = None) -> None:
        values, rows = values.double(), _rows(values, valid)
        if counted is not None:
            values = torch.where(counted, values, 0.0).sum(-1) / counted.sum(-1)
            rows = rows & counted.any(-1)
        values = _kept(values.mean(-1) if values.ndim == 2 else values, rows)
        self._add(values.sum(), values.square().sum(), rows.sum())

    def compute(self) -> MeanSummary:
        """Return the mean over all prompts of all processes."""
        total, squares, count = self.sums.unbind()
        return MeanSummary(total / count, (_variance_of(total, squares, count) / count).sqrt(), count)


class PromptMean(_PromptSums):
    """Average a value a prompt, with its standard error over prompts."""

    def update(self, values: Tensor, valid: Tensor | None = None) -> None:
        """Add prompts.

        Args:
            values: ``[B]`` one value a prompt, or ``[B, G]`` to be averaged over its G samples first.
            valid: ``[B]`` bool: rows to count; all by default.
        """
        self._add_prompts(values, valid)


class WinRate(_PromptSums):
    """Estimate, without bias, how often a response beats the best of n reference samples; a tie counts half.

    With k of M cached rewards below r, ``C(k, n) / C(M, n)`` is the share of n-subsets that r beats (ties
    left aside), an unbiased estimate of ``F(r)^n``; the plug-in ``(k / M)^n`` is not. See
    :func:`vbon_lightning.functional.bon_win_rate`.

    Args:
        n: Number of reference samples the opponent picks the best of; 1 for a plain reference sample.
        **kwargs: Passed on to ``torchmetrics.Metric``.
    """

    def __init__(self, n: int = 1, **kwargs: Any) -> None:
        if n < 1:
            raise ValueError(f"a win rate against Best-of-N needs n >= 1, got {n}")
        super().__init__(**kwargs)
        self.n = n

    def update(self, rewards: Tensor, reference_rewards: Tensor, valid: Tensor | None = None) -> None:
        """Add prompts.

        Args:
            rewards: ``[B, G]`` rewards of the policy's responses; NaN where a response has none: it is left out of the
                mean over its prompt's, and with it a prompt that keeps none.
            reference_rewards: ``[B, M]`` rewards of reference responses to the same prompts, ``M >= n``.
            valid: ``[B]`` bool: rows to count; all by default.
        """
        rates = bon_win_rate(rewards.double(), reference_rewards.double(), n=self.n)
        self._add_prompts(rates, valid, ~rewards.isnan())


class SequenceKL(_Sums):
    """Average the KL divergence of the policy from the reference over responses, in nats.

    The exact KL of a response is ``sum_t KL(policy || reference)`` over the whole vocabulary at each of its
    positions; its mean over responses drawn from the policy is the KL between the two distributions over
    responses.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(5, **kwargs)

    def update(
        self,
        token_kl: Tensor,
        log_probs: Tensor,
        reference_log_probs: Tensor,
        mask: Tensor,
        valid: Tensor | None = None,
    ) -> None:
        """Add responses.

        Args:
            token_kl: ``[B, G, T]`` KL over the vocabulary at each position.
            log_probs: ``[B, G, T]`` log-probabilities of the sampled tokens under the policy.
            reference_log_probs: ``[B, G, T]`` the same under the reference.
            mask: ``[B, G, T]`` bool: True on response tokens; a response without any is left out.
            valid: ``[B]`` bool: rows to count; all by default.
        """
        rows = _rows(mask, valid)
        mask = mask & rows[:, None, None]
        log_ratio = torch.where(mask, log_probs.double() - reference_log_probs.double(), 0.0).sum(-1)
        self._add(
            torch.where(mask, token_kl.double(), 0.0).sum(),
            log_ratio.sum(),
            log_ratio.square().sum(),
            mask.sum(),
            mask.any(-1).sum(),
        )

    def compute(self) -> KLSummary:
        """Return the means over all responses of all processes."""
        kl, ratio, squares, tokens, count = self.sums.unbind()
        return KLSummary(
            kl=kl / count,
            kl_per_token=kl / tokens,
            sampled=ratio / count,
            sampled_standard_error=(_variance_of(ratio, squares, count) / count).sqrt(),
            responses=count,
        )


class RewardStatistics(_Sums):
    """Average rewards, lengths and the share of finished responses."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(5, **kwargs)

    def update(self, rewards: Tensor, mask: Tensor, finished: Tensor, valid: Tensor | None = None) -> None:
        """Add responses.

        Args:
            rewards: ``[B, G]``; NaN where a response has none: it is left out.
            mask: ``[B, G, T]`` bool: True on response tokens.
            finished: ``[B, G]`` bool: True where an EOS was sampled.
            valid: ``[B]`` bool: rows to count; all by default.
        """
        counted = _rows(rewards, valid)[:, None] & ~rewards.isnan()
        kept, tokens, ended = (
            torch.where(counted, values.double(), 0.0) for values in (rewards, mask.sum(-1), finished)
        )
        self._add(kept.sum(), kept.square().sum(), tokens.sum(), ended.sum(), counted.sum())

    def compute(self) -> RewardSummary:
        """Return the means over all responses of all processes."""
        total, squares, tokens, finished, count = self.sums.unbind()
        return RewardSummary(
            mean=total / count,
            std=_variance_of(total, squares, count).sqrt(),
            length=tokens / count,
            finished=finished / count,
            responses=count,
        )


class PrefixForecast(_Sums):
    """Say how well the final reward is predicted from the prompt, within the response and at its end."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(len(PREFIX_PLACES) * (3 + _CALIBRATION_BINS), **kwargs)

    def update(self, log_probs: Tensor, labels: Tensor, mask: Tensor, valid: Tensor | None = None) -> None:
        """Add responses.

        Args:
            log_probs: ``[B, G, T + 1, K]`` log-probabilities of the reward's bins after 0, 1, ... T tokens.
            labels: ``[B, G]`` long: the bins that the rewards are in.
            mask: ``[B, G, T]`` bool: True on response tokens.
            valid: ``[B]`` bool: rows to count; all by default.
        """
        log_probs = log_probs.detach().double()
        every = labels[..., None].expand(log_probs.shape[:-1])
        half = log_probs.shape[-1] // 2
        upper = log_probs[..., half:].logsumexp(-1).exp().clamp(0, 1)
        scores = [prefix_nll(log_probs, labels), ranked_probability_score(log_probs, every), torch.ones_like(upper)]
        gaps = _calibration_gaps(upper, every >= half, bins=_CALIBRATION_BINS)
        values = torch.cat([torch.stack(scores, dim=-1), gaps], dim=-1)
        kept = torch.nn.functional.pad(mask, (1, 0), value=True) & _rows(mask, valid)[:, None, None]
        values = torch.where(kept[..., None], values, 0.0).flatten(0, -2)
        # A product with zeros and ones: no selection, and the same sum in every run.
        places = torch.nn.functional.one_hot(prefix_places(mask).flatten(), len(PREFIX_PLACES))
        self.sums += (places.to(values).T @ values).flatten().to(self.sums)

    def compute(self) -> ForecastSummary:
        """Return the means over all prefixes of all processes."""
        sums = self.sums.view(len(PREFIX_PLACES), -1)
        nll, crps, count = sums[:, 0], sums[:, 1], sums[:, 2]
        return ForecastSummary(nll / count, crps / count, sums[:, 3:].abs().sum(-1) / count, count)
