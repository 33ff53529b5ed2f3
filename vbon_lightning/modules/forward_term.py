"""The forward KL to Best-of-N beside a policy gradient's backward one."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import Tensor

from vbon_lightning.actors import ActorSpec
from vbon_lightning.functional import Target, bon_cross_entropy, sequence_log_prob
from vbon_lightning.modules.base import check_choice, check_unused
from vbon_lightning.modules.offline import check_at_least_one, select_responses
from vbon_lightning.modules.policy_gradient import ExtraLoss, PolicyGradient
from vbon_lightning.sampling import pick_best, response_log_probs
from vbon_lightning.types import PromptBatch, Responses, Rollout, ScoredResponses, TableBatch

Divergence = Literal["backward", "forward", "jeffreys"]


class ForwardTerm(PolicyGradient):
    r"""Minimise the backward KL to Best-of-N, the forward one, or Jeffreys' mixture of both.

    The mixture is :math:`(1-b) KL(\pi_{bon} \| \pi) + b KL(\pi \| \pi_{bon})`. A subclass names the target of the
    backward KL, and the N of Best-of-N. The forward KL is, up to a constant, the cross-entropy
    :func:`~vbon_lightning.functional.bon_cross_entropy` on the reference's (or the anchor's) responses, of the table or
    fresh ones: unbiased, with exact weights. In a mixture they run in the same pass as the policy's own responses. The
    forward KL alone samples nothing from the policy and asks for no reward but theirs: what says how to estimate the
    backward KL's gradient, or its target, is refused.

    Args:
        actors: The policy, reference and reward, as the data module names them.
        divergence: ``backward``, ``forward`` or ``jeffreys``.
        jeffreys_weight: b, the weight of the backward KL in the mixture, in (0, 1).
        forward_responses: K, how many of the reference's M responses a prompt and step the forward KL learns, drawn by
            systematic resampling with the exact weights; None for all M, each with its weight, which has the least
            noise and costs a pass over M responses.
        **kwargs: What :class:`~vbon_lightning.modules.policy_gradient.PolicyGradient` takes.
    """

    def __init__(
        self,
        actors: ActorSpec,
        divergence: Divergence = "backward",
        jeffreys_weight: float = 0.5,
        forward_responses: int | None = 4,
        **kwargs: Any,
    ) -> None:
        check_choice("divergence", divergence, get_args(Divergence))
        if divergence == "forward":  # which no critic has a part in
            kwargs["value_model"] = bool(kwargs.get("value_model"))
        super().__init__(actors, **kwargs)
        if not 0 < jeffreys_weight < 1:
            raise ValueError(f"model.jeffreys_weight must be in (0, 1), got {jeffreys_weight}")
        if forward_responses is not None:
            check_at_least_one("forward_responses", forward_responses)
        if divergence != "backward" and self.normalise:
            raise ValueError(
                "model.normalise divides the advantages, and not the forward KL, whose weight would be another than "
                "the one asked for: set it to false"
            )
        if divergence == "forward" and (self.updates_per_rollout > 1 or self.uses_value_model):
            raise ValueError(
                "model.divergence=forward learns from the reference's responses alone: leave out "
                "model.epochs_per_rollout, model.minibatches and model.value_model"
            )
        why = f"model.divergence={divergence}"
        if divergence != "jeffreys":
            check_unused(type(self), why, jeffreys_weight=jeffreys_weight)
        if divergence == "backward":
            check_unused(type(self), why, forward_responses=forward_responses)
        if divergence == "forward":
            check_unused(type(self), why, estimator=self.estimator, kl_estimator=self.kl_estimator)
        self.divergence, self.forward_responses = divergence, forward_responses
        self.backward_weight = {"backward": 1.0, "forward": 0.0, "jeffreys": jeffreys_weight}[divergence]

    @property
    def best_of(self) -> float:
        """Return the N of Best-of-N."""
        raise NotImplementedError(f"{type(self).__name__} must say what N is")

    @property
    def forward_coef(self) -> float:
        """Return the weight of the forward cross-entropy in the loss; here as if the KLs were not scaled."""
        return 1 - self.backward_weight

    @property
    def batch_kind(self) -> str:  # type: ignore[override]
        """Return which batches the data module should bring: the forward KL learns from the table's responses."""
        return "responses" if self.backward_weight < 1 and not self.reference_samples else "prompts"

    def record_settings(self, **settings: Any) -> None:
        """Record the divergence, where it is not the backward KL alone."""
        mixed = {"jeffreys_weight": self.backward_weight} if self.divergence == "jeffreys" else {}
        forward = {"divergence": self.divergence, **mixed, "forward_responses": self.forward_responses}
        super().record_settings(**(({} if self.divergence == "backward" else forward) | settings))

    def setup(self, stage: str) -> None:
        """Refuse a forward KL without the responses that it learns from, before anything expensive."""
        super().setup(stage)
        if stage != "fit" or self.divergence == "backward":
            return
        if self.best_of != int(self.best_of):
            raise ValueError(
                f"model.divergence={self.divergence} takes the best of a whole number of responses, got n = "
                f"{self.best_of:g}: round model.n, or set model.divergence to backward"
            )
        data: Any = getattr(self.trainer, "datamodule", None)
        if not self.reference_samples and getattr(data, "reference_table", None) is None:
            raise ValueError(
                f"model.divergence={self.divergence} learns from the reference's responses: name a table "
                "(data.reference_table), or sample them at every step (model.reference_samples)"
            )
        samples = self.reference_samples or data.reference_rewards
        if samples < self.best_of:
            raise ValueError(
                f"there are M = {samples} reference responses a prompt, fewer than n = {self.best_of:g}: sample more "
                "or lower model.n"
            )
        if self._skips and self.trainer.accumulate_grad_batches > 1:
            raise ValueError(
                "data.reward_calls.on_missing=skip weighs accumulated batches by their responses, of which the forward "
                "KL has as many in each: set trainer.accumulate_grad_batches to 1, or model.divergence to backward"
            )

    # -- a step ------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Make an update as a policy gradient, or of the forward KL alone."""
        if self.backward_weight:
            return super().training_step(batch, batch_idx)
        number, self.batches_seen = self.batches_seen, self.batches_seen + 1
        actors = self.loaded
        actors.place()
        prompts, cached = _parts(batch)
        rewards = self.of_the_anchor(prompts).reference_rewards
        if cached is None or rewards is None:
            cached, rewards = actors.reference_responses(
                prompts,
                num_samples=self.reference_samples,
                seed=self.seed,
                stream="train/reference",
                step=number,
                anchored=self.anchor_moves,
            )
        picked = self._pick(prompts, cached, rewards, number)
        log_probs = response_log_probs(actors.policy, prompts, picked, temperature=actors.temperature)
        loss, logs = self._forward(log_probs, picked, rewards)
        self.log_dict({f"train/{name}": value for name, value in {"objective": -loss.detach(), **logs}.items()})
        return {"loss": loss}

    def _sample(self, batch: Any, number: int, **further: Any) -> ScoredResponses:
        if not self.forward_coef:
            return super()._sample(batch, number, **further)
        prompts, cached = _parts(batch)
        scored = super()._sample(prompts, number, keep_references=cached is None, **further)
        responses, rewards = scored.extra if cached is None else cached, scored.reference_rewards
        assert responses is not None
        assert rewards is not None
        return scored._replace(extra=self._pick(prompts, responses, rewards, number))

    def _pick(self, prompts: PromptBatch, responses: Responses, rewards: Tensor, number: int) -> Responses:
        """Return what the forward KL learns of the reference's M responses."""
        if self.forward_responses is None:
            return responses
        index = pick_best(
            rewards,
            prompts.index.tolist(),
            n=int(self.best_of),
            count=self.forward_responses,
            seed=self.seed,
            stream="train/forward",
            step=number,
        )
        return select_responses(responses, index)

    def _target(self, rollout: Rollout) -> Target:
        target = super()._target(rollout)
        return Target(self.backward_weight * target.score, self.backward_weight * target.kl_coef)

    def extra_loss(self, live: Rollout) -> ExtraLoss | None:
        """Return the forward KL's part of the loss."""
        if live.extra is None or live.extra_log_probs is None or live.reference_rewards is None:
            return None
        return self._forward(live.extra_log_probs, live.extra, live.reference_rewards)

    def _forward(self, log_probs: Tensor, responses: Responses, rewards: Tensor) -> ExtraLoss:
        whole = sequence_log_prob(log_probs, responses.mask)
        if self.forward_responses is None:
            cross_entropy = bon_cross_entropy(whole, rewards, n=int(self.best_of))
        else:
            cross_entropy = -whole.mean()
        return ExtraLoss(self.forward_coef * cross_entropy, {"forward_nll": cross_entropy.detach()})


def _parts(batch: Any) -> tuple[PromptBatch, Responses | None]:
    """Return a batch's prompts, and the table's responses where it brings them."""
    return (batch.prompts, batch.responses) if isinstance(batch, TableBatch) else (batch, None)
