"""The best reward among k samples, by policy gradient: max@k, and pass@k where rewards are 0 or 1."""

from __future__ import annotations

from typing import Any, get_args

from torch import Tensor

from vbon_lightning.actors import ActorSpec
from vbon_lightning.functional import MaxAtKForm, Target, kl_rl_target, max_at_k_advantages
from vbon_lightning.functional.max_at_k import MIN_K, samples_for_max_at_k
from vbon_lightning.modules.base import check_choice
from vbon_lightning.modules.policy_gradient import PolicyGradient
from vbon_lightning.modules.policy_gradient_options import check_kl_weight
from vbon_lightning.types import Rollout


class MaxAtK(PolicyGradient):
    r"""Maximise the expected best reward among k samples, under a KL penalty to the reference or without one.

    Maximises :math:`E[\max(r(y_1), \ldots, r(y_k))] - \beta KL(\pi \| \pi_{ref})` from the k-subsets of G >= k samples:
    Walder and Karkhanis, "Pass@K Policy Optimization: Solving Harder Reinforcement Learning Problems", 2025, and at
    G = k Tang, Zheng, Synnaeve and Munos, "Optimizing Language Models for Inference Time Objectives using Reinforcement
    Learning", 2025. With rewards of 0 and 1 it is pass@k. The unit is that of the reward: twice the rewards want twice
    the beta.

    Args:
        actors: The policy, reference and reward, as the data module names them.
        k: Samples among which the best counts, at least 1, where it is the mean reward.
        beta: Weight of the KL, >= 0, in units of reward a nat. At 0 the reference is run once a rollout, for the KL
            that is logged, and not again for its updates.
        form: Which unbiased estimate: ``centred`` (leave-two-out, needs ``samples_per_prompt`` > k), ``marginal`` (what
            a sample adds to the subsets that hold it) or ``plain`` (the subsets' maxima, without a baseline);
            :func:`~vbon_lightning.functional.max_at_k_advantages` has the formulas.
        **kwargs: What :class:`~vbon_lightning.modules.policy_gradient.PolicyGradient` takes, but for a critic.
    """

    reads_value_model = False
    compares_group = True

    def __init__(
        self, actors: ActorSpec, k: int = 4, beta: float = 0.1, form: MaxAtKForm = "centred", **kwargs: Any
    ) -> None:
        super().__init__(actors, **kwargs)
        check_kl_weight(type(self), beta, self.kl_estimator, normalise=self.normalise)
        check_choice("form", form, get_args(MaxAtKForm))
        if isinstance(k, bool) or not isinstance(k, int) or k < MIN_K[form]:
            raise ValueError(f"model.k must be an integer >= {MIN_K[form]} for model.form={form}, got {k!r}")
        if self.samples_per_prompt < (needed := samples_for_max_at_k(form, k)):
            raise ValueError(
                f"model.form={form} needs model.samples_per_prompt >= {needed} for model.k={k}, got "
                f"{self.samples_per_prompt}: sample more, lower k"
                + (", or set form to marginal" if form == "centred" and self.samples_per_prompt == k > 1 else "")
            )
        self.k, self.beta, self.form = k, beta, form
        self.record_settings(k=k, beta=beta, form=form)

    @property
    def fewest_judged(self) -> int:
        """Return how many responses with a reward a prompt must keep: those that the form needs."""
        return max(super().fewest_judged, samples_for_max_at_k(self.form, self.k))

    def target(self, rollout: Rollout) -> Target:
        """Return the rewards and the KL's weight beta."""
        return kl_rl_target(rollout.rewards, beta=self.beta)

    def group_advantages(self, scores: Tensor, kept: Tensor) -> Tensor:
        """Return what each response does for the best of k, ``[B, G]``."""
        return max_at_k_advantages(scores, k=self.k, form=self.form, kept=kept)

    def objective(self, target: Target, rollout: Rollout, kept: Tensor) -> Tensor:
        """Return, of each response, the mean best of the k-subsets that hold it, less the KL, ``[B, G]``."""
        best = max_at_k_advantages(target.score, k=self.k, form="plain", kept=kept) / self.k
        return super().objective(target._replace(score=best), rollout, kept)
