"""A distributional value model at work: what prefixes of responses are worth, for any N and any beta."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vbon_lightning.functional import (
    RewardBins,
    RewardCDF,
    binned_reward_cdf,
    bon_bin_log_weights,
    edge_log_cdf,
    exponential_bin_log_weights,
    mixed_log_cdf,
    predicted_log_cdf,
    prefix_log_values,
)
from vbon_lightning.models import ValueModel, load_value_model
from vbon_lightning.models.spec import ModelSpec
from vbon_lightning.sampling.decode import forget_casts
from vbon_lightning.sampling.lookahead import MAX_TOKENS, lookahead_states
from vbon_lightning.sampling.scoring import body_outputs
from vbon_lightning.types import Completions, PromptBatch, Responses


class PrefixScorer:
    """Say what a prefix of a response is worth under the reference, from one model of the reward to come.

    The model predicts, for a prompt and each prefix of a response, in which bin the final reward will lie. For a prompt
    with distribution function F, ``W_N(prefix) = sum_k p(k | prefix) w_N(k)``: one model serves every N, and
    KL-regularised RL at every beta.

    Args:
        model: A value model (:func:`~vbon_lightning.models.load_value_model`).
    """

    def __init__(self, model: ValueModel) -> None:
        self.model = model

    @property
    def bins(self) -> RewardBins:
        """Return the bins, on the model's device."""
        return self.model.bins

    @classmethod
    def load(cls, spec: str | Mapping[str, Any] | ModelSpec) -> PrefixScorer:
        """Load a trained value model, frozen."""
        return cls(load_value_model(spec))

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Return what the rewards are of: the fingerprint of the table the model was trained on."""
        return dict(self.model.config.table)

    def to(self, device: torch.device) -> None:
        """Move the model; its precision stays."""
        nn.Module.to(self.model, device)

    # -- predictions -------------------------------------------------------------------------------

    def bin_log_probs(self, prompts: PromptBatch, responses: Completions | Responses) -> Tensor:
        """Predict the final reward after each prefix.

        Args:
            prompts: ``[B, P]`` prompts.
            responses: ``[B, G, T]`` responses.

        Returns:
            ``[B, G, T + 1, K]`` float32 log-probabilities after 0, 1, ... T tokens, differentiable in the model.
        """
        states = self.states(prompts, responses)
        return self.model.forecast(states, torch.arange(states.shape[2], device=states.device))

    def states(self, prompts: PromptBatch, responses: Completions | Responses) -> Tensor:
        """Return the body's last hidden states after 0, 1, ... T tokens, ``[B, G, T + 1, H]``."""
        # One more token: states are those that predict the next one.
        padded = Responses(
            torch.nn.functional.pad(responses.tokens, (0, 1)), torch.nn.functional.pad(responses.mask, (0, 1))
        )
        return body_outputs(self.model, prompts, padded).view(*padded.tokens.shape, -1)

    @torch.no_grad()
    def prompt_log_probs(self, prompts: PromptBatch) -> Tensor:
        """Predict the final reward from the prompt alone, ``[B, K]``: the amortised distribution of the reward."""
        count = len(prompts.tokens)
        nothing = Responses(prompts.tokens.new_zeros(count, 1, 0), prompts.mask.new_zeros(count, 1, 0))
        found = self.bin_log_probs(prompts, nothing)[:, 0, 0]
        forget_casts(found.device)
        return found

    @torch.no_grad()
    def log_values(
        self,
        prompts: PromptBatch,
        responses: Completions | Responses,
        log_weights: Tensor,
        *,
        normalised: bool = True,
    ) -> Tensor:
        """Return log W after 0, 1, ... T tokens, ``[B, G, T + 1]``.

        Args:
            prompts: ``[B, P]`` prompts.
            responses: ``[B, G, T]`` responses.
            log_weights: ``[B, K]`` or ``[1, K]``.
            normalised: Take off the value of the prompt, for weights whose mean under the reference is 1: those of
                Best-of-N. Values of other weights keep their constant, which the whole response's has too.
        """
        values = prefix_log_values(self.bin_log_probs(prompts, responses), log_weights[:, None, None])
        forget_casts(values.device)
        return values - values[..., :1] if normalised else values

    @torch.no_grad()
    def candidate_log_values(
        self,
        prompts: PromptBatch,
        responses: Completions | Responses,
        candidates: Tensor,
        log_weights: Tensor,
        *,
        max_tokens: int = MAX_TOKENS,
    ) -> Tensor:
        """Return log W after each candidate token, up to the constant that :meth:`log_values` takes off.

        Args:
            prompts: ``[B, P]`` prompts.
            responses: ``[B, G, T]`` responses.
            candidates: ``[B, G, R, k]`` long, what may follow the prefixes of 0 to R - 1 tokens.
            log_weights: ``[B, K]``.
            max_tokens: Candidates that live at once.

        Returns:
            ``[B, G, R, k]`` float32.
        """
        states = lookahead_states(self.model, prompts, responses, candidates, max_tokens=max_tokens)
        lengths = torch.arange(1, states.shape[2] + 1, device=states.device)[:, None]
        values = prefix_log_values(self.model.forecast(states, lengths), log_weights[:, None, None, None])
        forget_casts(values.device)
        return values

    # -- weights -----------------------------------------------------------------------------------

    @torch.no_grad()
    def log_cdf(self, prompts: PromptBatch, reference_rewards: Tensor | None = None) -> Tensor:
        """Return the log of the reward's distribution function at the bins' edges, ``[B, K + 1]``.

        Args:
            prompts: ``[B, P]`` prompts.
            reference_rewards: ``[B, M]`` of the table; None to predict the distribution from the prompt.
        """
        if reference_rewards is not None:
            return edge_log_cdf(reference_rewards, self.bins.edges)
        return predicted_log_cdf(self.prompt_log_probs(prompts))

    def mixed_log_cdf(self, reference_rewards: Tensor, predicted: Tensor, *, prior_samples: float) -> Tensor:
        """Return log F at the bins' edges by known rewards and the prediction together, ``[B, K + 1]``.

        Args:
            reference_rewards: ``[B, M]`` known.
            predicted: ``[B, K + 1]`` of :meth:`log_cdf` from the prompts alone.
            prior_samples: How many known rewards the prediction counts for.
        """
        known = edge_log_cdf(reference_rewards, self.bins.edges)
        return mixed_log_cdf(known, predicted, samples=reference_rewards.shape[1], prior_samples=prior_samples)

    def mixed_reward_cdf(
        self, cdf: RewardCDF, rewards: Tensor, predicted: Tensor, *, samples: int, prior_samples: float
    ) -> RewardCDF:
        """Return where rewards lie by known rewards and the prediction together.

        Args:
            cdf: Where they lie among M known rewards, ``[B, G]``.
            rewards: ``[B, G]``.
            predicted: ``[B, K + 1]`` of :meth:`log_cdf` from the prompts alone.
            samples: M.
            prior_samples: How many known rewards the prediction counts for.
        """
        pairs = zip(cdf, self.reward_cdf(rewards, predicted), strict=True)
        below, at_or_below = (
            mixed_log_cdf(known, ahead, samples=samples, prior_samples=prior_samples) for known, ahead in pairs
        )
        return RewardCDF(below, at_or_below)

    def reward_cdf(self, rewards: Tensor, log_cdf: Tensor) -> RewardCDF:
        """Place rewards ``[B, G]`` in the distributions of their prompts."""
        return binned_reward_cdf(rewards, log_cdf, self.bins)

    def bon_log_weights(self, log_cdf: Tensor, *, n: float) -> Tensor:
        """Return log w_n of each bin, ``[B, K]``, for the prompts whose distributions these are."""
        return bon_bin_log_weights(log_cdf, n=n)

    def kl_rl_log_weights(self, beta: float) -> Tensor:
        """Return ``log E[exp(r / beta)]`` of each bin, ``[1, K]``, the same for every prompt."""
        return exponential_bin_log_weights(self.bins.atoms, beta=beta)[None]
