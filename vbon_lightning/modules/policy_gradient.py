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
    kl_penalty,
    normalise_advantages,
    rao_blackwell_advantages,
    reinforce_loss,
    sampled_kl_advantages,
    token_rewards,
)
from vbon_lightning.modules.base import AlignmentModule, LRSchedulerCallable, OptimizerCallable
from vbon_lightning.sampling import noise_seed, response_logits
from vbon_lightning.types import Completions, PromptBatch, Rollout


class Experience(NamedTuple):
    """A rollout and what several updates on it must hold fixed."""

    rollout: Rollout
    advantages: Tensor
    """``[B, G, T]``."""
    values: Tensor | None
    """``[B, G, T]``: the critic's values when the rollout was made."""
    returns: Tensor | None
    """``[B, G, T]``: what the critic should learn."""


class PolicyGradient(AlignmentModule):
    """Maximise E[score] - kl_coef * KL(policy || reference) by policy gradients; a subclass names the target.

    Args:
        actors: The policy, reference and reward, as the data module names them.
        samples_per_prompt: G, responses sampled a prompt and rollout.
        eval_samples: Responses a prompt in validation and test; ``samples_per_prompt`` by default.
        estimator: ``reinforce`` (leave-one-out REINFORCE), ``clipped`` (leave-one-out advantages, PPO's clipped
            ratio) or ``ppo`` (clipped ratio, generalised advantages from a critic).
        kl_estimator: How the KL enters: ``rao_blackwell`` (exact over the vocabulary at each step, its own gradient,
            the KL still to come as a cost-to-go), ``sampled`` (the log-ratio of the sampled tokens) or
            ``prefix_baseline`` (``rao_blackwell`` with the log-ratio so far as a further baseline). All unbiased.
        epochs_per_rollout: Passes over each rollout.
        minibatches: Updates a pass; must divide the batch of prompts.
        clip: Clip range of the probability ratio.
        value_clip: Clip range of the value.
        value_coef: Weight of the value loss.
        gae_lambda: Lambda of generalised advantage estimation (gamma is 1: responses are episodes).
        normalise: Divide advantages by their standard deviation. This biases the objective: the KL weight is then
            no longer the one asked for.
        reference_samples: M reference responses a prompt sampled afresh at every step (``online``) instead of read
            from a reference table; 0 reads the table.
        seed: Seeds sampling, minibatches and the initialisation of a policy made from a config.
        optimizer: Builds the optimizer from parameters.
        lr_scheduler: Builds a learning-rate scheduler from the optimizer, stepped once an update.
    """

    def __init__(
        self,
        actors: ActorSpec,
        samples_per_prompt: int = 8,
        eval_samples: int | None = None,
        estimator: Literal["reinforce", "clipped", "ppo"] = "reinforce",
        kl_estimator: Literal["rao_blackwell", "sampled", "prefix_baseline"] = "rao_blackwell",
        epochs_per_rollout: int = 1,
        minibatches: int = 1,
        clip: float = 0.2,
        value_clip: float = 0.2,
        value_coef: float = 1.0,
        gae_lambda: float = 0.95,
        normalise: bool = False,
        reference_samples: int = 0,
        seed: int = 0,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(actors, seed=seed, optimizer=optimizer, lr_scheduler=lr_scheduler)
        _check_options(estimator, kl_estimator, samples_per_prompt, epochs_per_rollout, minibatches)
        if reference_samples < 0:
            raise ValueError(f"model.reference_samples must be >= 0, got {reference_samples}")
        self.samples_per_prompt, self.eval_samples = samples_per_prompt, eval_samples or samples_per_prompt
        self.estimator, self.kl_estimator = estimator, kl_estimator
        self.epochs_per_rollout, self.minibatches = epochs_per_rollout, minibatches
        self.clip, self.value_clip, self.value_coef, self.gae_lambda = clip, value_clip, value_coef, gae_lambda
        self.normalise, self.reference_samples = normalise, reference_samples
        self.critic: nn.Linear | None = None
        self._experience: Experience | None = None

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
            **settings,
        )

    def target(self, rollout: Rollout) -> Target:
        """Return what this method maximises: scores ``[B, G]`` and the KL's weight."""
        raise NotImplementedError(f"{type(self).__name__} must say what it maximises")

    @property
    def updates_per_rollout(self) -> int:
        """Return how many optimizer updates are made on a rollout."""
        return self.epochs_per_rollout * self.minibatches

    def configure_model(self) -> None:
        """Load the models, and make a value head where the estimator has a critic."""
        super().configure_model()
        if self.estimator == "ppo" and self.critic is None:
            self.critic = nn.Linear(self.loaded.policy.config.get_text_config().hidden_size, 1)
            nn.init.zeros_(self.critic.weight)
            nn.init.zeros_(self.critic.bias)

    # -- steps --------------------------------------------------------------------------------------------------

    def training_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Sample and score responses where a new rollout is due, then return the loss of one update."""
        number, update = divmod(self.batches_seen, self.updates_per_rollout)
        self.batches_seen += 1
        if self.updates_per_rollout == 1:
            loss, rollout, logs = self._on_policy_update(self._sample(batch, number, statistics=False))
        else:
            if update == 0:
                self._experience = self._collect(self._sample(batch, number, statistics=False))
            if self._experience is None:
                raise RuntimeError("an update is due on a rollout that is not there")
            loss, rollout, logs = self._minibatch_update(self._experience, number, update)
        self.log_dict({f"train/{name}": value for name, value in logs.items()}, prog_bar=False)
        return {"loss": loss, "rollout": rollout}

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Sample and score responses; the callbacks do the rest."""
        return {"rollout": self._evaluate(batch, "val")}

    def test_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Sample and score responses; the callbacks do the rest."""
        return {"rollout": self._evaluate(batch, "test")}

    def _evaluate(self, batch: PromptBatch, stage: str) -> Rollout:
        return self.loaded.rollout(
            batch,
            num_samples=self.eval_samples,
            seed=self.seed,
            stream=stage,
            step=0,
            reference_samples=self.reference_samples,
        )

    def _sample(self, batch: PromptBatch, number: int, *, statistics: bool) -> Rollout:
        return self.loaded.rollout(
            batch,
            num_samples=self.samples_per_prompt,
            seed=self.seed,
            stream="train",
            step=number,
            reference_samples=self.reference_samples,
            statistics=statistics,
        )

    # -- one update a rollout: the pass that learns also gives the log-probabilities and the KL --------------------

    def _on_policy_update(self, rollout: Rollout) -> tuple[Tensor, Rollout, dict[str, Tensor]]:
        actors, mask = self.loaded, rollout.completions.mask
        scored = response_logits(
            actors.policy, rollout.prompts, rollout.completions, hidden=self.critic is not None
        )
        live = actors.with_statistics(rollout, scored.logits, actors.reference_logits(rollout))
        fixed = live._replace(log_probs=live.log_probs.detach(), token_kl=live.token_kl.detach())
        target = self.target(fixed)
        values = self._values(scored.hidden, mask)
        advantages, returns = self._advantages(target, fixed, None if values is None else values.detach())
        if self.estimator == "reinforce":
            loss = reinforce_loss(live.log_probs, advantages, mask)
            logs: dict[str, Tensor] = {}
        else:
            surrogate = clipped_surrogate_loss(live.log_probs, fixed.log_probs, advantages, mask, clip=self.clip)
            loss, logs = surrogate.loss, {"clip_fraction": surrogate.clip_fraction}
        if self.kl_estimator != "sampled":
            loss = loss + target.kl_coef * kl_penalty(live.token_kl, mask)
        if values is not None and returns is not None:
            value_loss = clipped_value_loss(values, values.detach(), returns, mask, clip=self.value_clip)
            loss, logs["value_loss"] = loss + self.value_coef * value_loss, value_loss.detach()
        logs["objective"] = _objective(target, fixed)
        return loss, fixed, logs

    # -- several updates a rollout ------------------------------------------------------------------------------

    @torch.no_grad()
    def _collect(self, rollout: Rollout) -> Experience:
        actors, mask = self.loaded, rollout.completions.mask
        scored = response_logits(actors.policy, rollout.prompts, rollout.completions, hidden=self.critic is not None)
        rollout = actors.with_statistics(rollout, scored.logits, actors.reference_logits(rollout))
        values = self._values(scored.hidden, mask)
        advantages, returns = self._advantages(self.target(rollout), rollout, values)
        return Experience(rollout, advantages, values, returns)

    def _minibatch_update(
        self, experience: Experience, number: int, update: int
    ) -> tuple[Tensor, Rollout, dict[str, Tensor]]:
        epoch, part = divmod(update, self.minibatches)
        prompts = len(experience.rollout.prompts.text)
        if prompts % self.minibatches:
            raise ValueError(f"model.minibatches={self.minibatches} does not divide data.batch_size={prompts}")
        generator = torch.Generator().manual_seed(noise_seed(self.seed, "minibatch", number, epoch))
        rows = torch.randperm(prompts, generator=generator).view(self.minibatches, -1)[part]
        chosen = select_prompts(experience, rows.tolist())
        rollout, mask, actors = chosen.rollout, chosen.rollout.completions.mask, self.loaded

        scored = response_logits(actors.policy, rollout.prompts, rollout.completions, hidden=self.critic is not None)
        live = actors.with_statistics(rollout, scored.logits, actors.reference_logits(rollout))
        surrogate = clipped_surrogate_loss(
            live.log_probs, rollout.log_probs, chosen.advantages, mask, clip=self.clip
        )
        target = self.target(rollout)
        loss, logs = surrogate.loss, {"clip_fraction": surrogate.clip_fraction}
        if self.kl_estimator != "sampled":
            loss = loss + target.kl_coef * kl_penalty(live.token_kl, mask)
        values = self._values(scored.hidden, mask)
        if values is not None and chosen.values is not None and chosen.returns is not None:
            value_loss = clipped_value_loss(values, chosen.values, chosen.returns, mask, clip=self.value_clip)
            loss, logs["value_loss"] = loss + self.value_coef * value_loss, value_loss.detach()
        logs["objective"] = _objective(target, rollout)
        return loss, rollout, logs

    # -- advantages ---------------------------------------------------------------------------------------------

    def _values(self, hidden: Tensor | None, mask: Tensor) -> Tensor | None:
        if self.critic is None or hidden is None:
            return None
        return torch.where(mask, self.critic(hidden).float().view(mask.shape), 0.0)

    def _advantages(
        self, target: Target, rollout: Rollout, values: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        mask, returns = rollout.completions.mask, None
        log_ratio = rollout.log_probs - rollout.reference_log_probs
        if values is not None:
            advantages, returns = generalized_advantage_estimation(
                _token_rewards(target, rollout, sampled=self.kl_estimator == "sampled"),
                values,
                mask,
                lam=self.gae_lambda,
            )
        elif self.kl_estimator == "sampled":
            advantages = sampled_kl_advantages(target, rollout.log_probs, rollout.reference_log_probs, mask)
        else:
            baseline = log_ratio if self.kl_estimator == "prefix_baseline" else None
            advantages = rao_blackwell_advantages(target, rollout.token_kl, mask, log_ratio=baseline)
        if self.normalise:
            advantages = normalise_advantages(advantages, mask)
        return advantages, returns

    # -- checkpoints --------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also keep a rollout that updates are still due on, for every rank."""
        super().on_save_checkpoint(checkpoint)
        if self.batches_seen % self.updates_per_rollout and self._experience is not None:
            mine = _to_plain(self._experience)
            everyone: list[Any] = [mine]
            if self.trainer.world_size > 1:
                everyone = [None] * self.trainer.world_size
                torch.distributed.all_gather_object(everyone, mine)
            checkpoint["vbon_lightning"]["experience"] = everyone

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also restore the rollout that updates are still due on."""
        super().on_load_checkpoint(checkpoint)
        experiences = checkpoint["vbon_lightning"].get("experience")
        if experiences is None:
            return
        if self._trainer is not None and len(experiences) != self.trainer.world_size:
            raise ValueError(
                f"the checkpoint stopped amid a rollout of {len(experiences)} rank(s); resume it on as many, "
                f"not on {self.trainer.world_size}"
            )
        rank = 0 if self._trainer is None else self.trainer.global_rank
        self._experience = _from_plain(experiences[rank])

    def on_fit_start(self) -> None:
        """Move a restored rollout to where the policy is."""
        if self._experience is not None:
            self._experience = self.transfer_batch_to_device(self._experience, self.device, 0)


def select_prompts(value: Any, rows: list[int]) -> Any:
    """Return the same record for some of its prompts: dimension 0 of every tensor and list."""
    if isinstance(value, Tensor):
        return value[torch.as_tensor(rows, device=value.device)]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(select_prompts(part, rows) for part in value))
    if isinstance(value, list):
        return [value[row] for row in rows]
    return value


def _token_rewards(target: Target, rollout: Rollout, *, sampled: bool) -> Tensor:
    """Return per-token rewards for the critic: the KL as it is paid, and the score on the last real token."""
    mask = rollout.completions.mask
    if sampled:
        return token_rewards(target, rollout.log_probs, rollout.reference_log_probs, mask)
    # The KL of a position has a gradient of its own; an action answers for that of the position after it.
    later = torch.nn.functional.pad(rollout.token_kl[..., 1:], (0, 1))
    return token_rewards(target, later, torch.zeros_like(later), mask)


def _objective(target: Target, rollout: Rollout) -> Tensor:
    """Return the estimate of what is maximised: mean score minus the weighted exact KL."""
    return (target.score - target.kl_coef * rollout.token_kl.sum(-1)).mean()


def _check_options(estimator: str, kl_estimator: str, samples: int, epochs: int, minibatches: int) -> None:
    if estimator not in (known := ("reinforce", "clipped", "ppo")):
        raise ValueError(f"model.estimator must be one of {', '.join(known)}; got {estimator!r}")
    if kl_estimator not in (known := ("rao_blackwell", "sampled", "prefix_baseline")):
        raise ValueError(f"model.kl_estimator must be one of {', '.join(known)}; got {kl_estimator!r}")
    if epochs < 1 or minibatches < 1:
        raise ValueError(f"model.epochs_per_rollout and model.minibatches must be >= 1, got {epochs}, {minibatches}")
    if estimator != "ppo" and samples < 2:
        raise ValueError(f"a leave-one-out baseline needs model.samples_per_prompt >= 2, got {samples}")
    if estimator == "reinforce" and epochs * minibatches > 1:
        raise ValueError(
            "REINFORCE is unbiased for one update a rollout only: for several, set model.estimator to clipped or ppo"
        )


def _to_plain(value: Any) -> Any:
    """Turn nested NamedTuples into dicts, which checkpoints load under ``weights_only``."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {name: _to_plain(part) for name, part in value._asdict().items()}
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _from_plain(value: dict[str, Any]) -> Experience:
    rollout = dict(value["rollout"])
    rollout["prompts"] = PromptBatch(**rollout["prompts"])
    rollout["completions"] = Completions(**rollout["completions"])
    return Experience(Rollout(**rollout), value["advantages"], value["values"], value["returns"])
