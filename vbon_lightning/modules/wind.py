"""WIND: the regularised game of win rates."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vbon_lightning.actors import ActorSpec
from vbon_lightning.functional import WIND_FITS, sequence_log_prob, wind_log_ratio, wind_loss
from vbon_lightning.functional.wind import Fit
from vbon_lightning.modules.base import LRSchedulerCallable, OptimizerCallable, check_choice, check_positive
from vbon_lightning.modules.policy_gradient import PolicyGradient
from vbon_lightning.types import PromptBatch, Rollout


class WIND(PolicyGradient):
    r"""Play the game of win rates against the policy's own last iterate, each pair regularised by the reference.

    An iteration takes the iterate :math:`\pi_t` to

    .. math:: \pi_{t+1} \propto \pi_t^{1/(1+h\beta)} \pi_{ref}^{h\beta/(1+h\beta)} \exp(h/(1+h\beta) P(y \succ \pi_t)),

    and ends at :math:`\pi \propto \pi_{ref} \exp(P(y \succ \pi)/\beta)` (Yang, Mei, Dai, Wen, Cen, Schuurmans, Chi and
    Dai, "Faster WIND: Accelerating Iterative Best-of-N Distillation for LLM Alignment", 2024,
    https://arxiv.org/abs/2410.20727). Here the iterate is the anchor: its responses are sampled at every step and
    judged by each other, the policy is fitted to them by a regression
    (:func:`~vbon_lightning.functional.wind_loss`, derived from this update), and after every ``anchor_every`` updates
    it becomes the iterate. What is exported is the last one. Nothing is sampled from the policy in training.

    Args:
        actors: The policy, reference and reward, as the data module names them.
        beta: Weight of the KL to the reference in the game, > 0, in units of win rate a nat.
        step_size: h, the step size of an iteration, > 0; where the game ends does not depend on it.
        fit: The loss of the regression: ``squared``, ``kl`` or ``nce``; all have the same minimum.
        samples_per_prompt: G, the iterate's responses a prompt, at least 3.
        eval_samples: The policy's responses a prompt in validation and test; ``samples_per_prompt`` by default.
        reference_samples: The reference's responses a prompt in validation and test, for the win rate; 0 for none.
        anchor_every: K, updates of an iteration.
        seed: Seeds sampling and the initialisation of a policy made from a config.
        optimizer: Builds the optimizer from parameters.
        lr_scheduler: Builds a learning-rate scheduler from the optimizer, stepped once an update.
    """

    def __init__(
        self,
        actors: ActorSpec,
        beta: float = 0.1,
        step_size: float = 1.0,
        fit: Fit = "squared",
        samples_per_prompt: int = 8,
        eval_samples: int | None = None,
        reference_samples: int = 0,
        anchor_every: int = 20,
        seed: int = 0,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        check_positive("beta", beta)
        check_positive("step_size", step_size)
        check_choice("fit", fit, WIND_FITS)
        if samples_per_prompt < 3:
            raise ValueError(
                f"a pair of responses is judged by a third: model.samples_per_prompt must be >= 3, got "
                f"{samples_per_prompt}"
            )
        if anchor_every < 1:
            raise ValueError(f"model.anchor_every is how long an iteration is, and must be >= 1, got {anchor_every}")
        super().__init__(
            actors,
            samples_per_prompt=samples_per_prompt,
            eval_samples=eval_samples,
            reference_samples=reference_samples,
            anchor_every=anchor_every,
            value_model=False,
            seed=seed,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
        )
        self.beta, self.step_size, self.fit = beta, step_size, fit
        super(PolicyGradient, self).record_settings(
            beta=beta,
            step_size=step_size,
            fit=fit,
            samples_per_prompt=samples_per_prompt,
            reference_samples=reference_samples,
        )

    def training_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Sample from the iterate and return the loss of the regression on its win rates."""
        number, self.batches_seen = self.batches_seen, self.batches_seen + 1
        live, _ = self.loaded.statistics(self._sample(batch, number, by_anchor=True, reference_samples=0))
        self.last_rollout = live._replace(log_probs=live.log_probs.detach(), token_kl=live.token_kl.detach())
        loss = wind_loss(self.log_ratio(live), live.rewards, fit=self.fit)
        if self._skips:  # a prompt counts where a third is left to judge a pair
            loss = loss * self._share((live.judged.sum(1) > 2)[:, None, None])
        logs = {"loss": loss.detach(), "anchor_reward": live.rewards.nanmean()}
        logs |= self._sampling_logs(self.last_rollout, new=True)
        self.log_dict({f"train/{name}": value for name, value in logs.items()})
        return {"loss": loss}

    def log_ratio(self, live: Rollout) -> Tensor:
        """Return what is fitted to the win rate of each of the iterate's responses ``[B, G]``, up to a constant."""
        mask = live.completions.mask
        return wind_log_ratio(
            sequence_log_prob(live.log_probs, mask),
            sequence_log_prob(live.completions.log_probs, mask),  # as they were sampled
            sequence_log_prob(live.reference_log_probs, mask),
            beta=self.beta,
            step_size=self.step_size,
        )
