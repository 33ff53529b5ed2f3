"""Group-relative policy optimisation, as people know it: for comparison."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import Tensor

from vbon_lightning.actors import ActorSpec
from vbon_lightning.functional import (
    LengthNorm,
    Target,
    group_normalised_advantages,
    kl_rl_target,
    length_weights,
)
from vbon_lightning.modules.base import check_choice, check_positive, check_unused
from vbon_lightning.modules.policy_gradient import KLEstimator, PolicyGradient
from vbon_lightning.modules.policy_gradient_options import ONE_UPDATE, check_kl_weight
from vbon_lightning.types import Rollout


class GRPO(PolicyGradient):
    r"""Maximise the reward by advantages in units of their group's spread, with the KL as a k3 term in the loss.

    :math:`A_i = (r_i - \bar r) / (s + 10^{-4})` over a prompt's samples, the clipped ratio, and
    :math:`\beta (\pi_{ref}/\pi - 1 - \log \pi_{ref}/\pi)` a token: Shao and others, "DeepSeekMath: Pushing the Limits
    of Mathematical Reasoning in Open Language Models", 2024, equation 3 and 4. The numbers are those of TRL's
    ``GRPOTrainer`` with ``loss_type`` and ``scale_rewards`` set alike, token by token importance ratios, and gradients
    of the same loss.

    The defaults are the paper's: its beta, one update a rollout, ``length_norm: grpo`` (it samples 64 responses a
    prompt). Its successors are options. "Dr. GRPO" (Liu and others, "Understanding R1-Zero-Like Training: A Critical
    Perspective", 2025, arXiv 2503.20783) is ``scale_rewards: false`` and ``length_norm: dr_grpo``. Of DAPO (Yu and
    others, "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", 2025, arXiv 2503.14476) there are the
    mean over tokens, ``length_norm: dapo``, the upper clip range, ``clip_high: 0.28``, for which a rollout needs
    several updates, as with ``minibatches: 4``, and ``beta: 0``; not its sampling until a prompt's rewards differ, nor
    its reward for overlong responses. Of TRL's trainer there are no ratios of whole responses (GSPO), no
    ``scale_rewards: batch``, no two-sided clip (``delta``) and no mask of truncated responses.

    What is biased about it, in TRL as here: the division by the spread weighs prompts by its inverse and counts the
    KL's weight in units of it, so that its optimum is not ``ref exp(r / beta)``; ``grpo`` punishes long wrong responses
    less a token than short ones; and the gradient of k3 as a loss is that of KL(reference || policy) at the sampled
    prefixes. ``scale_rewards: false``, ``length_norm: dr_grpo`` and ``kl_estimator: rao_blackwell`` take these away one
    by one. What stays is the papers' own mean, which holds the sample itself: it shrinks the reward's advantages by
    (G - 1)/G, and not the KL, whose weight is then that of ``beta G/(G - 1)``: 2 beta at G = 2, 1.14 beta at G = 8.
    :class:`~vbon_lightning.modules.kl_rl.KLRL` has none of it.

    Args:
        actors: The policy, reference and reward, as the data module names them.
        beta: Weight of the KL, >= 0, in units of advantage a nat. TRL's default is 0; the paper's 0.04.
        scale_rewards: Divide by the standard deviation of the group (TRL's ``scale_rewards: group``, or ``none``).
        length_norm: What a response counts: ``grpo`` (the mean over its tokens), ``dr_grpo`` (their sum over
            ``data.max_new_tokens``) or ``dapo`` (the mean over all tokens of the update, on all ranks).
        clip_high: Clip range of the probability ratio at its upper end, for several updates a rollout; ``clip`` by
            default.
        estimator: ``clipped``, or ``reinforce``, the same for one update a rollout.
        kl_estimator: ``k3``, or one of :class:`~vbon_lightning.modules.policy_gradient.PolicyGradient`'s others.
        **kwargs: What :class:`~vbon_lightning.modules.policy_gradient.PolicyGradient` takes, but for a critic.
    """

    reads_value_model = False
    compares_group = True
    follows_target = False

    def __init__(
        self,
        actors: ActorSpec,
        beta: float = 0.04,
        scale_rewards: bool = True,
        length_norm: LengthNorm = "grpo",
        clip_high: float | None = None,
        estimator: Literal["reinforce", "clipped"] = "clipped",
        kl_estimator: KLEstimator = "k3",
        **kwargs: Any,
    ) -> None:
        super().__init__(actors, estimator=estimator, kl_estimator=kl_estimator, **kwargs)
        check_kl_weight(type(self), beta, self.kl_estimator, normalise=self.normalise)
        check_choice("length_norm", length_norm, get_args(LengthNorm))
        if clip_high is not None:
            check_positive("clip_high", clip_high)
        if self.updates_per_rollout == 1:
            check_unused(type(self), ONE_UPDATE, clip_high=clip_high)
        self.beta, self.scale_rewards, self.length_norm, self.clip_high = beta, scale_rewards, length_norm, clip_high
        self.mean_over = "tokens" if length_norm == "dapo" else "responses"
        self.record_settings(beta=beta, scale_rewards=scale_rewards, length_norm=length_norm, clip_high=clip_high)

    def target(self, rollout: Rollout) -> Target:
        """Return the rewards and the KL's weight beta."""
        return kl_rl_target(rollout.rewards, beta=self.beta)

    def group_advantages(self, scores: Tensor, kept: Tensor) -> Tensor:
        """Return the rewards less their group's mean, in units of its spread, ``[B, G]``."""
        return group_normalised_advantages(scores, kept=kept, scale=self.scale_rewards)

    def response_weights(self, rollout: Rollout, mask: Tensor) -> Tensor:
        """Return what makes the sum over a response's tokens the mean that is asked for, ``[B, G]``."""
        return length_weights(mask, norm=self.length_norm, max_length=self.loaded.max_new_tokens)
