"""Variational Best-of-N."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vbon_lightning.actors import ActorSpec
from vbon_lightning.functional import RewardCDF, Target, kl_weight, reward_cdf, sequence_log_prob, vbon_target
from vbon_lightning.modules.base import (
    check_above_one,
    check_choice,
    check_log_ratio_floor,
    check_not_negative,
    check_unused,
)
from vbon_lightning.modules.forward_term import ForwardTerm
from vbon_lightning.modules.n_schedule import NSchedule
from vbon_lightning.modules.reference_rewards import CDFEstimator, check_cdf_estimator, check_reference_rewards
from vbon_lightning.prefix_scorer import PrefixScorer
from vbon_lightning.types import Rollout, ScoredResponses

Bound = Literal["exact", "lower", "untied"]

_NO_REWARDS = (
    "vBoN needs reference rewards: name a table (data.reference_table, made by `vbon predict`), sample them at every "
    "step (model.reference_samples), or name a value model that predicts them (data.value_model)"
)


class VBoN(ForwardTerm):
    r"""Fine-tune the policy towards the distribution that Best-of-N induces, by the backward KL or the forward one.

    Maximises
    :math:`\frac{1}{N-1} E_\pi[\log \pi_{bon}(y) - \log \pi_{ref}(y)] - \frac{1}{N-1} KL(\pi \| \pi_{ref})`,
    which is :math:`-KL(\pi \| \pi_{bon}) / (N-1)` (Amini, Vieira, Ash and Cotterell, "Variational Best-of-N
    Alignment", 2025), with the reward's distribution function under the reference estimated from M reference
    rewards a prompt, ties included.

    Args:
        actors: The policy, reference and reward, as the data module names them.
        n: N of Best-of-N, any real number > 1.
        bound: ``exact`` for the distribution itself, ``lower`` for the paper's lower bound (KL-constrained RL
            with reward log F and beta = 1/(N-1)), ``untied`` for the paper's distribution, which is wrong where rewards
            tie: for comparison.
        cdf_estimator: How the distribution function is estimated from M rewards: ``jeffreys`` (k + 1/2)/(M +
            1), ``add_one`` (the authors'), ``laplace`` or ``digamma``.
        log_ratio_floor: Raise log-ratios of Best-of-N to the reference below this many nats (negative) to it: -L
            spares the gradient the noise of the worst responses and moves the optimum by at most exp(-L) in total
            variation; for ``bound="exact"``. None keeps the target exact.
        prior_samples: How many reference rewards of a prompt the value model's prediction counts for, beside the M
            that are known: few responses a prompt then do as well as many. 0 leaves the prediction to prompts of which
            none is known.
        n_schedule: Let N go to ``n`` over the first updates, :class:`~vbon_lightning.modules.n_schedule.NSchedule`, for
            the backward KL alone. Logged as ``n``. None keeps N at ``n``.
        **kwargs: What :class:`~vbon_lightning.modules.forward_term.ForwardTerm` takes: the divergence, and what every
            policy gradient does.
    """

    normalised_weights = True
    reads_reference_rewards = True

    def __init__(
        self,
        actors: ActorSpec,
        n: float = 4.0,
        bound: Bound = "exact",
        cdf_estimator: CDFEstimator = "jeffreys",
        log_ratio_floor: float | None = None,
        prior_samples: float = 0.0,
        n_schedule: NSchedule | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(actors, **kwargs)
        check_above_one(n)
        check_choice("bound", bound, get_args(Bound))
        self.bound = bound
        check_cdf_estimator(cdf_estimator)
        check_log_ratio_floor(log_ratio_floor)
        if log_ratio_floor is not None and bound != "exact":
            raise ValueError(
                f"model.log_ratio_floor is for model.bound=exact, got {bound}: with the others the optimum may move by "
                "far more than exp(floor)"
            )
        check_not_negative("prior_samples", prior_samples)
        if self.divergence == "forward":
            check_unused(
                type(self),
                "model.divergence=forward",
                bound=bound,
                cdf_estimator=cdf_estimator,
                log_ratio_floor=log_ratio_floor,
                prior_samples=prior_samples,
            )
        if not self.target_is_exact and self.value_lambda < 1:
            raise ValueError(
                f"model.value_lambda={self.value_lambda:g} has the value model foretell the exact log-ratio of "
                "Best-of-N, and another is the target: set model.value_lambda to 1, or the target to the exact one "
                "(model.bound to exact, BOND's model.second_term to true)"
            )
        if prior_samples and not self.uses_value_model:
            raise ValueError("model.prior_samples counts a value model's prediction: set data.value_model")
        self.n, self.cdf_estimator = n, cdf_estimator
        self.log_ratio_floor, self.prior_samples = log_ratio_floor, prior_samples
        self.n_schedule = NSchedule.of(n_schedule)
        self._updates_before = 0
        """Updates made when the rollout was sampled that is learnt from."""
        if self.n_schedule is not None and self.divergence != "backward":
            raise ValueError(
                f"model.n_schedule takes N through numbers that are not whole, and model.divergence={self.divergence} "
                "takes the best of a whole number of responses: leave one of the two out"
            )
        self.record_settings(
            n=n,
            bound=bound,
            cdf_estimator=cdf_estimator,
            log_ratio_floor=log_ratio_floor,
            **({"prior_samples": prior_samples} if prior_samples else {}),
            **({"n_schedule": asdict(self.n_schedule)} if self.n_schedule else {}),
        )

    @property
    def target_is_exact(self) -> bool:
        """Return whether the target is the log-ratio of Best-of-N itself, which is what a value model foretells."""
        return self.bound == "exact"

    @property
    def best_of(self) -> float:
        """Return N."""
        return self.n

    @property
    def forward_coef(self) -> float:
        """Return the weight of the forward cross-entropy in the loss, in which both KLs are divided by N - 1."""
        return kl_weight(self.n) * super().forward_coef

    @property
    def predicts_rewards(self) -> bool:  # type: ignore[override]
        """Return whether the distribution of the reward is predicted also where rewards are known."""
        return self.prior_samples > 0

    def setup(self, stage: str) -> None:
        """Refuse to start without enough reference rewards, before anything expensive."""
        super().setup(stage)
        largest = self.n
        if self.n_schedule is not None:
            largest = max(self.n, self.n_schedule.start)
        check_reference_rewards(self, n=largest, none=_NO_REWARDS, prior_samples=self.prior_samples)

    def on_train_start(self) -> None:
        """Also warn of a training too short for its N."""
        super().on_train_start()
        if self.n_schedule is not None:
            self.n_schedule.check_length(
                self.n,
                self.trainer.estimated_stepping_batches,
                batches_per_update=self.trainer.accumulate_grad_batches,
                batches_per_rollout=self.updates_per_rollout,
            )

    @property
    def current_n(self) -> float:
        """Return N of the rollout that is learnt from, which all updates on it share."""
        return self.n if self.n_schedule is None else self.n_schedule.at(self._updates_before, self.n)

    def _sample(self, batch: Any, number: int, **further: Any) -> ScoredResponses:
        self._updates_before = self.updates
        return super()._sample(batch, number, **further)

    def _sampling_logs(self, rollout: Rollout, *, new: bool) -> dict[str, Tensor]:
        logs = super()._sampling_logs(rollout, new=new)
        return logs if self.n_schedule is None else {**logs, "n": torch.tensor(float(self.current_n))}

    def target(self, rollout: Rollout) -> Target:
        """Return the log-ratio of Best-of-N to the reference over N - 1, and the KL's weight 1/(N - 1)."""
        if rollout.reference_rewards is not None:
            cdf = reward_cdf(rollout.rewards, rollout.reference_rewards, estimator=self.cdf_estimator)
            if self.prior_samples and rollout.reference_log_cdf is not None:
                cdf = self._scorer.mixed_reward_cdf(
                    cdf,
                    rollout.rewards,
                    rollout.reference_log_cdf,
                    samples=rollout.reference_rewards.shape[1],
                    prior_samples=self.prior_samples,
                )
        elif rollout.reference_log_cdf is not None:
            cdf = self._scorer.reward_cdf(rollout.rewards, rollout.reference_log_cdf)
        else:
            raise ValueError(_NO_REWARDS)
        return self.target_of(sequence_log_prob(rollout.reference_log_probs, rollout.completions.mask), cdf)

    def target_of(self, log_reference: Tensor, cdf: RewardCDF) -> Target:
        """Return the target of responses ``[B, G]`` of which reference and reward distribution are known."""
        return vbon_target(log_reference, cdf, n=self.current_n, bound=self.bound, log_ratio_floor=self.log_ratio_floor)

    def bin_log_weights(self, rollout: Rollout) -> Tensor:
        """Return log w_n of each bin under the prompt's own distribution of the reward, ``[B, K]``."""
        log_cdf, rewards = rollout.reference_log_cdf, rollout.reference_rewards
        if rewards is not None and self.prior_samples and log_cdf is not None:
            log_cdf = self._scorer.mixed_log_cdf(rewards, log_cdf, prior_samples=self.prior_samples)
        elif rewards is not None:
            log_cdf = self._scorer.log_cdf(rollout.prompts, rewards)
        if log_cdf is None:
            raise ValueError(_NO_REWARDS)
        log_weights = self._scorer.bon_log_weights(log_cdf, n=self.current_n)
        return log_weights if self.log_ratio_floor is None else log_weights.clamp(min=self.log_ratio_floor)

    @property
    def _scorer(self) -> PrefixScorer:
        scorer = self.loaded.value
        if scorer is None:
            raise ValueError("this needs a value model: set data.value_model")
        return scorer

    # -- checkpoints -------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also keep the N of a rollout that updates are still due on."""
        super().on_save_checkpoint(checkpoint)
        if self.n_schedule is not None:
            checkpoint["vbon_lightning"]["updates_before"] = self._updates_before

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also go on with that N."""
        super().on_load_checkpoint(checkpoint)
        if self.resuming and self.n_schedule is not None:
            self._updates_before = checkpoint["vbon_lightning"].get("updates_before", self.updates)
