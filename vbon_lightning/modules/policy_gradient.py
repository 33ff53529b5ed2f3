"""The loop that vBoN and KL-constrained RL share: roll out, score, turn a target into a loss."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vbon_lightning.actors import ActorSpec
from vbon_lightning.functional import (
    Target,
    clipped_surrogate_loss,
    clipped_value_loss,
    generalized_advantage_estimation,
    kl_k3,
    kl_penalty,
    normalise_advantages,
    rao_blackwell_advantages,
    reinforce_loss,
    sampled_kl_advantages,
    token_rewards,
    value_advantages,
)
from vbon_lightning.functional.sequences import masked
from vbon_lightning.modules.anchored import Anchored
from vbon_lightning.modules.base import LRSchedulerCallable, OptimizerCallable, check_unused
from vbon_lightning.modules.experience import Experience, from_plain, to_plain
from vbon_lightning.modules.policy_gradient_options import (
    ONE_UPDATE,
    check_estimator,
    check_group_estimator,
    check_numbers,
    check_shape_of_responses,
    check_value_model_options,
    checked_target,
)
from vbon_lightning.modules.sampled_evaluation import SampledEvaluation
from vbon_lightning.sampling import noise_seed
from vbon_lightning.types import PromptBatch, Rollout, ScoredResponses, select_prompts

KLEstimator = Literal["rao_blackwell", "sampled", "prefix_baseline", "k3"]


class ExtraLoss(NamedTuple):
    """A term of the loss that is no policy gradient."""

    loss: Tensor
    """Scalar, differentiable: what is added to the loss."""
    logs: dict[str, Tensor]
    """What to log of it."""


class PolicyGradient(Anchored, SampledEvaluation):
    """Maximise E[score] - kl_coef * KL(policy || reference) by policy gradients; a subclass names the target.

    Args:
        actors: The policy, reference and reward, as the data module names them.
        samples_per_prompt: G, responses sampled a prompt and rollout.
        eval_samples: Responses a prompt in validation and test; ``samples_per_prompt`` by default.
        estimator: ``reinforce`` (leave-one-out REINFORCE), ``clipped`` (leave-one-out advantages, PPO's clipped
            ratio) or ``ppo`` (clipped ratio, generalised advantages from a critic).
        kl_estimator: How the KL enters: ``rao_blackwell`` (exact over the vocabulary at each step, its own gradient,
            the KL still to come as a cost-to-go), ``sampled`` (the log-ratio of the sampled tokens) or
            ``prefix_baseline`` (``rao_blackwell`` with the log-ratio so far as a further baseline). These are unbiased
            for one update a rollout. ``k3`` is for comparison: ``ref/pi - 1 - log(ref/pi)`` of the sampled tokens in
            the loss, as GRPO has it. Its gradient is that of KL(reference || policy) at the sampled prefixes, another
            divergence, and leaves out what a token does to the KL of those after it.
        epochs_per_rollout: Passes over each rollout. From the second update on the responses are those of an older
            policy: ``clip`` bounds how far advantages may pull, but the exact KL's own gradient is taken where that
            policy went, not where this one would go, and is biased the more, the further the policy has moved.
        minibatches: Updates a pass, each on its share of the prompts; must divide the batch of prompts. The shares
            stay the same in every pass, their order does not.
        clip: Clip range of the probability ratio, for several updates a rollout: at the first the ratio is 1.
        value_clip: Clip range of the value, likewise.
        value_coef: Weight of the value loss.
        gae_lambda: Lambda of generalised advantage estimation (gamma is 1: responses are episodes).
        normalise: Shift and divide advantages by their mean and standard deviation over the minibatch on all ranks,
            for ``kl_estimator="sampled"``, where the KL is part of them: the whole gradient is divided. The exact KL
            has a gradient of its own, which would keep its size. Gradients cannot be accumulated with it.
        value_model: Take advantages from the value model that ``data.value_model`` names, on top of the exact KL: by
            default where one is named and the estimator has no critic of its own.
        value_lambda: Lambda of these advantages: at 1 the value model is a baseline and the gradient unbiased; below,
            what later tokens bring counts as far as the model says, with less noise, and the model's errors move the
            optimum.
        reference_samples: M reference responses a prompt sampled afresh at every step (``online``) instead of read
            from a reference table; 0 reads the table.
        anchor_every: K, updates after which the anchor, which stands for the reference in training, becomes what the
            policy is then, again and again; 0 for never.
        anchor_rate: Average the policy into the anchor after each update, ``(1 - rate) anchor + rate policy``; 0 for an
            anchor that stays. Not together with ``anchor_every``.
        seed: Seeds sampling, minibatches and the initialisation of a policy made from a config.
        optimizer: Builds the optimizer from parameters.
        lr_scheduler: Builds a learning-rate scheduler from the optimizer, stepped once an update.
    """

    predicts_rewards: bool = False
    """Whether rollouts bring the predicted distribution of the reward also where reference rewards are known."""
    baseline_of_batch = False
    """Whether one response a prompt will do, since the baseline is taken from the rest of the batch."""
    normalised_weights = False
    """Whether the weight of a response, ``exp(score / kl_coef)``, has mean 1 under the reference."""
    reads_value_model = True
    """Whether the method can take its advantages from a value model."""
    compares_group = False
    """Whether advantages or weights are made of a prompt's samples together, so that no critic can take their place."""
    follows_target = True
    """Whether advantages and weights are such that the target is what is maximised."""
    clip_high: float | None = None
    """Clip range of the probability ratio at its upper end, where that is not ``clip``."""

    def __init__(
        self,
        actors: ActorSpec,
        samples_per_prompt: int = 8,
        eval_samples: int | None = None,
        estimator: Literal["reinforce", "clipped", "ppo"] = "reinforce",
        kl_estimator: KLEstimator = "rao_blackwell",
        epochs_per_rollout: int = 1,
        minibatches: int = 1,
        clip: float = 0.2,
        value_clip: float = 0.2,
        value_coef: float = 1.0,
        gae_lambda: float = 0.95,
        normalise: bool = False,
        value_model: bool | None = None,
        value_lambda: float = 1.0,
        reference_samples: int = 0,
        anchor_every: int = 0,
        anchor_rate: float = 0.0,
        seed: int = 0,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(actors, anchor_every, anchor_rate, seed=seed, optimizer=optimizer, lr_scheduler=lr_scheduler)
        named = actors.value_model is not None
        reads = self.reads_value_model and type(self).bin_log_weights is not PolicyGradient.bin_log_weights
        fits = reads and estimator != "ppo" and kl_estimator == "rao_blackwell"
        fits = fits and not self.anchor_moves
        self.uses_value_model = named and fits if value_model is None else value_model
        check_group_estimator(
            type(self).__name__,
            estimator,
            samples_per_prompt,
            compares_group=self.compares_group,
            valued=self.uses_value_model,
            reads_value_model=reads,
        )
        check_estimator(
            estimator,
            kl_estimator,
            samples_per_prompt,
            epochs_per_rollout,
            minibatches,
            valued=self.uses_value_model or self.baseline_of_batch,
            normalise=normalise,
        )
        check_value_model_options(self.uses_value_model, named, estimator, kl_estimator, value_lambda)
        check_numbers(
            samples_per_prompt=samples_per_prompt,
            eval_samples=1 if eval_samples is None else eval_samples,
            reference_samples=reference_samples,
            clip=clip,
            value_clip=value_clip,
            value_coef=value_coef,
            gae_lambda=gae_lambda,
        )
        of_a_critic = {"value_clip": value_clip, "value_coef": value_coef, "gae_lambda": gae_lambda}
        if estimator != "ppo":
            check_unused(type(self), f"model.estimator={estimator}", **of_a_critic)
        if estimator == "reinforce":
            check_unused(type(self), f"model.estimator={estimator}", clip=clip)
        elif epochs_per_rollout * minibatches == 1:  # where the policy is the one that sampled
            check_unused(type(self), ONE_UPDATE, clip=clip, value_clip=value_clip)
        self.samples_per_prompt = samples_per_prompt
        self.eval_samples = samples_per_prompt if eval_samples is None else eval_samples
        self.estimator, self.kl_estimator = estimator, kl_estimator
        self.epochs_per_rollout, self.minibatches = epochs_per_rollout, minibatches
        self.clip, self.value_clip, self.value_coef, self.gae_lambda = (
            clip,
            value_clip,
            value_coef,
            gae_lambda,
        )
        self.normalise, self.reference_samples = normalise, reference_samples
        self.value_lambda = value_lambda
        self.critic: nn.Linear | None = None
        self._experience: list[Experience] = []

    def record_settings(self, **settings: Any) -> None:
        """Record the estimator's settings and the target's."""
        super().record_settings(
            samples_per_prompt=self.samples_per_prompt,
            estimator=self.estimator,
            kl_estimator=self.kl_estimator,
            epochs_per_rollout=self.epochs_per_rollout,
            minibatches=self.minibatches,
            clip=self.clip,
            value_clip=self.value_clip,
            value_coef=self.value_coef,
            gae_lambda=self.gae_lambda,
            normalise=self.normalise,
            reference_samples=self.reference_samples,
            value_model=self.uses_value_model,
            value_lambda=self.value_lambda,
            **settings,
        )

    def target(self, rollout: Rollout) -> Target:
        """Return what this method maximises: scores ``[B, G]`` and the KL's weight, a number >= 0.

        It is asked for more than once an update, and must be the same each time.
        """
        raise NotImplementedError(f"{type(self).__name__} must say what it maximises")

    def extra_loss(self, live: Rollout) -> ExtraLoss | None:
        """Return a further term of the loss, beside the target's; None for none.

        Args:
            live: The rollout as the policy that learns evaluates it now, differentiable in it.
        """
        return None

    def bin_log_weights(self, rollout: Rollout) -> Tensor:
        """Return what the method makes of each bin of a value model's reward, ``[B, K]`` or ``[1, K]``.

        A method that does not say it leaves a value model alone that is named.
        """
        raise NotImplementedError(f"{type(self).__name__} must say what it makes of the bins of a value model")

    def group_advantages(self, scores: Tensor, kept: Tensor) -> Tensor | None:
        """Return advantages of the scores within their groups, ``[B, G]``; None for the leave-one-out baseline.

        Args:
            scores: ``[B, G]``, those of the target.
            kept: ``[B, G]`` bool: False for responses that are left out.
        """
        return None

    def response_weights(self, rollout: Rollout, mask: Tensor) -> Tensor | None:
        """Return what each response weighs in the loss, ``[B, G]``; None where all weigh the same.

        Args:
            rollout: A minibatch, its rewards NaN where there are none.
            mask: ``[B, G, T]`` bool: the tokens that count.
        """
        return None

    def objective(self, target: Target, rollout: Rollout, kept: Tensor) -> Tensor:
        """Return the score less the KL of each response, ``[B, G]``, with the exact KL: in the mean, the objective."""
        return target.score - target.kl_coef * rollout.token_kl.sum(-1)

    @property
    def follows_objective(self) -> bool:
        """Return whether the updates follow the gradient of that mean, which else is logged by another name."""
        return self.follows_target and self.kl_estimator != "k3" and not self.normalise

    @property
    def updates_per_rollout(self) -> int:
        """Return how many optimizer updates are made on a rollout."""
        return self.epochs_per_rollout * self.minibatches

    @property
    def rollout_number(self) -> int:
        """Return the number of the rollout that is learnt from, 0 for the first: a function of the batches seen."""
        return max(self.batches_seen - 1, 0) // self.updates_per_rollout

    def setup(self, stage: str) -> None:
        """Refuse to start without what the method needs, before anything expensive."""
        if self.actor_spec.reward is None:
            raise ValueError(f"{type(self).__name__} needs a reward: set `data.reward`")
        super().setup(stage)
        if stage == "fit" and self.normalise and self.trainer.accumulate_grad_batches > 1:
            raise ValueError(
                "model.normalise divides by the spread of one batch, so gradients accumulated over several are not "
                "those of a larger one: set trainer.accumulate_grad_batches to 1, or normalise to false"
            )
        size = getattr(getattr(self.trainer, "datamodule", None), "batch_size", None)
        if stage == "fit" and size is not None:
            self._check_batch(size)

    def _check_batch(self, prompts: int) -> None:
        """Refuse a batch of prompts that the updates of a rollout cannot be made of."""
        if prompts % self.minibatches:
            raise ValueError(
                f"model.minibatches={self.minibatches} does not divide data.batch_size={prompts}: "
                "every minibatch needs the same number of prompts"
            )

    def configure_model(self) -> None:
        """Load the models, and make a value head where the estimator has a critic."""
        super().configure_model()
        if self.estimator == "ppo" and self.critic is None:
            self.critic = nn.Linear(self.loaded.policy.config.get_text_config().hidden_size, 1)
            nn.init.zeros_(self.critic.weight)
            nn.init.zeros_(self.critic.bias)

    def on_train_start(self) -> None:
        """Move a restored rollout to where the policy is."""
        if self._experience:
            self._experience = self.transfer_batch_to_device(self._experience, self.device, 0)

    # -- one update: prompts -> responses -> rewards -> target -> advantages -> loss -----------------

    def training_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Sample and score responses where a new rollout is due, then return the loss of one update.

        With one update a rollout, the pass that learns also gives the log-probabilities and the KL.
        """
        number, update = divmod(self.batches_seen, self.updates_per_rollout)
        self.batches_seen += 1
        if self.updates_per_rollout == 1:
            loss, rollout, logs = self._on_policy_update(self._sample(batch, number))
        else:
            if update == 0:
                self._experience = self._collect(self._sample(batch, number))
            if not self._experience:
                raise RuntimeError("an update is due on a rollout that is not there")
            loss, rollout, logs = self._minibatch_update(self._next_minibatch(number, update))
        self.last_rollout = rollout
        logs |= self._sampling_logs(rollout, new=update == 0)
        self.log_dict({f"train/{name}": value for name, value in logs.items()}, prog_bar=False)
        return {"loss": loss, "rollout": rollout}

    def _sample(self, batch: PromptBatch, number: int, **further: Any) -> ScoredResponses:
        """Prompts -> responses -> rewards."""
        self._check_batch(len(batch.text))
        options: dict[str, Any] = {
            "num_samples": self.samples_per_prompt,
            "seed": self.seed,
            "stream": "train",
            "step": number,
            "reference_samples": self.reference_samples,
            "predict_rewards": self.predicts_rewards,
            "anchored": self.anchor_moves,
        }
        return self.loaded.scored_responses(self.of_the_anchor(batch), **(options | further))

    def _on_policy_update(self, rollout: ScoredResponses) -> tuple[Tensor, Rollout, dict[str, Tensor]]:
        """Responses and their rewards -> loss: what advantages are made of is held fixed, what is learnt is not."""
        live, values = self._evaluate_responses(rollout)
        fixed = live._replace(log_probs=live.log_probs.detach(), token_kl=live.token_kl.detach(), extra_log_probs=None)
        experience = self._experience_of(fixed, None if values is None else values.detach())
        return self._loss(experience, live, values)

    def _evaluate_responses(self, rollout: ScoredResponses | Rollout) -> tuple[Rollout, Tensor | None]:
        """Fill in log-probabilities, exact KL and values ``[B, G, T]``, differentiable in the policy."""
        critic = self.critic
        evaluated, hidden = self.loaded.statistics(rollout, hidden=critic is not None, anchored=self.anchor_moves)
        if critic is None or hidden is None:
            return evaluated, None
        values = critic(hidden.to(critic.weight.dtype)).float().squeeze(-1)
        return evaluated, torch.where(rollout.completions.mask, values, 0.0)

    def _experience_of(self, rollout: Rollout, values: Tensor | None) -> Experience:
        """Rewards -> target -> advantages."""
        advantages, returns = self._advantages(self._target(rollout), rollout, values)
        weights = self.response_weights(rollout, self._learnt(rollout))
        if weights is not None:
            check_shape_of_responses(type(self).__name__, "response_weights", weights, rollout)
            advantages = advantages * weights.unsqueeze(-1)
        return Experience(rollout, advantages, values, returns, weights)

    def _loss(
        self, experience: Experience, live: Rollout, values: Tensor | None
    ) -> tuple[Tensor, Rollout, dict[str, Tensor]]:
        """Advantages -> loss of one update on a minibatch, as evaluated by the policy that learns (``live``)."""
        rollout, target = experience.rollout, self._target(experience.rollout)
        mask = self._learnt(rollout)
        logs: dict[str, Tensor] = {}
        if self.estimator == "reinforce":
            loss = reinforce_loss(live.log_probs, experience.advantages, mask)
        else:
            surrogate = clipped_surrogate_loss(
                live.log_probs, rollout.log_probs, experience.advantages, mask, clip=self.clip, clip_high=self.clip_high
            )
            loss = surrogate.loss
            logs |= {
                "clip_fraction": surrogate.clip_fraction,
                "ratio": surrogate.mean_ratio,
                "update_kl": surrogate.approx_kl,
            }
        if self.kl_estimator != "sampled" and target.kl_coef > 0:
            k3 = self.kl_estimator == "k3"
            token_kl = kl_k3(live.log_probs, rollout.reference_log_probs) if k3 else live.token_kl
            if experience.weights is not None:
                token_kl = token_kl * experience.weights.unsqueeze(-1)
            loss = loss + target.kl_coef * kl_penalty(token_kl, mask)
        if values is not None and experience.values is not None and experience.returns is not None:
            value_loss = clipped_value_loss(values, experience.values, experience.returns, mask, clip=self.value_clip)
            loss, logs["value_loss"] = loss + self.value_coef * value_loss, value_loss.detach()
        kept = mask.any(-1)
        each = self.objective(target, rollout, kept)
        objective = each[kept].mean() if self._skips else each.mean()
        loss = loss * self._share(mask) if self._skips or self.mean_over == "tokens" else loss
        if (extra := self.extra_loss(live)) is not None:
            loss, objective = loss + extra.loss, objective - extra.loss.detach()
            logs |= extra.logs
        logs["objective" if self.follows_objective else "penalised_score"] = objective
        return loss, rollout, logs

    # -- advantages --------------------------------------------------------------------------------

    def _advantages(self, target: Target, rollout: Rollout, values: Tensor | None) -> tuple[Tensor, Tensor | None]:
        mask, returns = self._learnt(rollout), None
        log_ratio = rollout.log_probs - rollout.reference_log_probs
        of_group = self.group_advantages(target.score, mask.any(-1))
        if of_group is not None:
            check_shape_of_responses(type(self).__name__, "group_advantages", of_group, rollout)
            # Advantages are linear in the scores: what is left is those of the KL.
            target = target._replace(score=torch.zeros_like(target.score))
        if self.kl_estimator == "k3":  # a loss of its own
            target = target._replace(kl_coef=0.0)
        if values is not None:
            advantages, returns = generalized_advantage_estimation(
                _token_rewards(target, rollout, mask, sampled=self.kl_estimator in ("sampled", "k3")),
                values,
                mask,
                lam=self.gae_lambda,
            )
        elif self.uses_value_model:
            scorer = self.loaded.value
            assert scorer is not None
            log_values = scorer.log_values(
                rollout.prompts,
                rollout.completions,
                self.bin_log_weights(rollout),
                normalised=self.normalised_weights,
            )
            advantages = value_advantages(
                target,
                log_values,
                rollout.token_kl,
                mask,
                lam=self.value_lambda,
                siblings=self.samples_per_prompt > 1,
            )
        elif self.kl_estimator in ("sampled", "k3"):
            advantages = sampled_kl_advantages(target, rollout.log_probs, rollout.reference_log_probs, mask)
        else:
            baseline = log_ratio if self.kl_estimator == "prefix_baseline" else None
            advantages = rao_blackwell_advantages(target, rollout.token_kl, mask, log_ratio=baseline)
        if of_group is not None:
            advantages = advantages + masked(of_group.unsqueeze(-1).expand(mask.shape), mask)
        if self.normalise:
            advantages = normalise_advantages(advantages, mask, add_up=self._over_ranks)
        return advantages, returns

    # -- responses that are left out -----------------------------------------------------------------

    @property
    def fewest_judged(self) -> int:
        """Return how many responses with a reward a prompt must keep to be learnt from."""
        alone = self.baseline_of_batch and self.samples_per_prompt == 1
        return 1 if self.estimator == "ppo" or self.uses_value_model or alone else 2

    def _learnt(self, rollout: Rollout) -> Tensor:
        """Return the tokens ``[B, G, T]`` that count in the update.

        A response without a reward is left out of its group, and with it a group that keeps fewer than its baseline
        needs.
        """
        mask = rollout.completions.mask
        if not self._skips:
            return mask
        kept = rollout.judged & (rollout.judged.sum(1, keepdim=True) >= self.fewest_judged)
        return mask & kept.unsqueeze(-1)

    def _target(self, rollout: Rollout) -> Target:
        """Return the target; of a response that is left out any score does."""
        rollout = rollout._replace(rewards=rollout.rewards.nan_to_num(0.0)) if self._skips else rollout
        return checked_target(type(self).__name__, self.target(rollout))

    # -- several updates a rollout -----------------------------------------------------------------

    @torch.no_grad()
    def _collect(self, rollout: ScoredResponses) -> list[Experience]:
        """Split a rollout into minibatches and evaluate each as it will be when it is learnt from.

        The same rows in the same shapes give the same bits: the ratio is exactly 1 before the first update.
        """
        prompts = len(rollout.prompts.text)
        # Neighbouring rows go together. Ranks then split every minibatch as they split the batch.
        parts = [list(rows) for rows in torch.arange(prompts).view(self.minibatches, -1).tolist()]
        return [self._experience_of(*self._evaluate_responses(select_prompts(rollout, rows))) for rows in parts]

    def _next_minibatch(self, number: int, update: int) -> Experience:
        epoch, part = divmod(update, self.minibatches)
        generator = torch.Generator().manual_seed(noise_seed(self.seed, "minibatch", number, epoch))
        return self._experience[int(torch.randperm(self.minibatches, generator=generator)[part])]

    def _minibatch_update(self, experience: Experience) -> tuple[Tensor, Rollout, dict[str, Tensor]]:
        rollout = experience.rollout
        kl_has_gradient = self.kl_estimator not in ("sampled", "k3") and self._target(rollout).kl_coef > 0
        if (
            self.critic is None and rollout.extra is None and not kl_has_gradient
        ):  # what the reference says is known since the rollout
            live = rollout._replace(log_probs=self.loaded.policy_log_probs(rollout))
            return self._loss(experience, live, None)
        live, values = self._evaluate_responses(rollout)
        return self._loss(experience, live, values)

    # -- checkpoints -------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also keep a rollout that updates are still due on, for every rank."""
        super().on_save_checkpoint(checkpoint)
        if self.batches_seen % self.updates_per_rollout and self._experience:
            mine = [to_plain(part) for part in self._experience]
            everyone: list[Any] = [mine]
            if self.trainer.world_size > 1:
                everyone = [None] * self.trainer.world_size
                torch.distributed.all_gather_object(everyone, mine)
            checkpoint["vbon_lightning"]["experience"] = everyone

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also restore the rollout that updates are still due on."""
        super().on_load_checkpoint(checkpoint)
        experience = checkpoint["vbon_lightning"].get("experience")
        if self.resuming and experience is not None:
            self._experience = [from_plain(part) for part in experience[self.trainer.global_rank]]


def _token_rewards(target: Target, rollout: Rollout, mask: Tensor, *, sampled: bool) -> Tensor:
    """Return per-token rewards for the critic: the KL as it is paid, and the score on the last real token."""
    if sampled:
        return token_rewards(target, rollout.log_probs, rollout.reference_log_probs, mask)
    # The KL of a position has a gradient of its own; an action answers for that of the position after it.
    later = torch.nn.functional.pad(rollout.token_kl[..., 1:], (0, 1))
    return token_rewards(target, later, torch.zeros_like(later), mask)
