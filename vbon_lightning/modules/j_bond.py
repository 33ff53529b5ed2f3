"""J-BOND: BOND with two samples of an anchor that is an average."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vbon_lightning.actors import ActorSpec
from vbon_lightning.functional import Target, cost_to_go, j_bond_rewards, leave_one_out_of_all
from vbon_lightning.modules.base import check_not_negative, check_unused
from vbon_lightning.modules.forward_term import ForwardTerm
from vbon_lightning.types import Rollout


class JBOND(ForwardTerm):
    r"""Fine-tune the policy towards Best-of-2 of an anchor that is an exponential average of it.

    Minimises :math:`(1-b) KL(\pi_{bo2} \| \pi) + b KL(\pi \| \pi_{bo2}) + \gamma KL(\pi \| anchor)`: the forward KL by
    cross-entropy on the better of two of the anchor's responses, the backward one by a policy gradient on the reward
    ``-log 16`` for responses that lose to both, with the KL to the anchor exact over the vocabulary where the authors
    sample it. The anchor moves by ``anchor <- (1 - rate) anchor + rate policy`` after each update. Of more than two of
    the anchor's responses all pairs count; with one of the policy's the baseline is the mean over the rest of the
    (mini)batch on all ranks, which then needs two prompts and is not accumulated, with more their siblings'. A tie is
    no loss: rewards of 0 and 1 say little to it. Sessa, Dadashi, Hussenot et al., "BOND: Aligning LLMs with Best-of-N
    Distillation", 2024, Algorithm 2; https://arxiv.org/abs/2407.14622.

    Args:
        actors: The policy, reference and reward, as the data module names them.
        jeffreys_weight: b, the weight of the backward KL, in (0, 1].
        regularisation: gamma, the weight of the further KL to the anchor, >= 0.
        samples_per_prompt: G, the policy's responses a prompt in training.
        eval_samples: The policy's responses a prompt in validation and test.
        reference_samples: M, the anchor's responses a prompt, at least 2.
        anchor_rate: The policy's share of the anchor at each update; 0 for an anchor that stays the reference, or that
            ``anchor_every`` replaces.
        forward_responses: Responses a prompt that the forward KL learns, each the better of two of the M.
        **kwargs: What :class:`~vbon_lightning.modules.policy_gradient.PolicyGradient` takes.
    """

    reads_reference_rewards = True
    reads_value_model = False
    best_of = 2
    baseline_of_batch = True

    def __init__(
        self,
        actors: ActorSpec,
        jeffreys_weight: float = 0.5,
        regularisation: float = 0.0,
        samples_per_prompt: int = 1,
        eval_samples: int = 8,
        reference_samples: int = 2,
        anchor_rate: float = 0.02,
        forward_responses: int | None = 1,
        **kwargs: Any,
    ) -> None:
        if not 0 < jeffreys_weight <= 1:
            raise ValueError(f"model.jeffreys_weight must be in (0, 1], got {jeffreys_weight}")
        if jeffreys_weight == 1:
            check_unused(type(self), "model.jeffreys_weight=1", forward_responses=forward_responses)
        super().__init__(
            actors,
            divergence="jeffreys" if jeffreys_weight < 1 else "backward",
            jeffreys_weight=jeffreys_weight if jeffreys_weight < 1 else 0.5,
            forward_responses=forward_responses,
            samples_per_prompt=samples_per_prompt,
            eval_samples=eval_samples,
            reference_samples=reference_samples,
            anchor_rate=anchor_rate,
            **kwargs,
        )
        check_not_negative("regularisation", regularisation)
        if reference_samples < 2:
            raise ValueError(
                f"J-BOND compares with pairs of the anchor's responses: model.reference_samples must be >= 2, got "
                f"{reference_samples}"
            )
        if self._alone and (self.normalise or self.kl_estimator not in ("rao_blackwell", "sampled")):
            raise ValueError(
                "one response a prompt has the rest of the batch for a baseline, without model.normalise and with "
                "model.kl_estimator=rao_blackwell or sampled: set these, or model.samples_per_prompt to 2 or more"
            )
        self.regularisation = regularisation
        self.record_settings(regularisation=regularisation)

    def record_settings(self, **settings: Any) -> None:
        """Record the weight that says which divergence it is."""
        weight = {"jeffreys_weight": self.backward_weight, "forward_responses": self.forward_responses}
        own = weight | {"anchor_every": self.anchor_every, "anchor_rate": self.anchor_rate}
        # Past what names the divergence, which is no option of J-BOND.
        super(ForwardTerm, self).record_settings(**(own | settings))

    @property
    def _alone(self) -> bool:
        """Return whether a response has no siblings for a baseline, and no critic."""
        return self.samples_per_prompt == 1 and self.estimator != "ppo"

    def setup(self, stage: str) -> None:
        """Refuse a baseline that is not that of the update, before anything expensive."""
        super().setup(stage)
        if stage == "fit" and self._alone and self.trainer.accumulate_grad_batches > 1:
            raise ValueError(
                "model.samples_per_prompt=1 takes its baseline from one batch, so gradients accumulated over several "
                "are not those of a larger one: set trainer.accumulate_grad_batches to 1, or samples_per_prompt to 2 "
                "or more"
            )

    def _check_batch(self, prompts: int) -> None:
        super()._check_batch(prompts)
        ranks = 1 if self._trainer is None else self.trainer.world_size
        if self._alone and prompts // self.minibatches * ranks < 2:
            raise ValueError(
                "model.samples_per_prompt=1 takes its baseline from the other prompts of an update, and there are "
                "none: set data.batch_size to at least 2 for each of model.minibatches, or samples_per_prompt to 2 or "
                "more"
            )

    def target(self, rollout: Rollout) -> Target:
        """Return the reward of Best-of-2, and the weights of both KLs to the anchor over that of the backward one."""
        assert rollout.reference_rewards is not None
        rewards = j_bond_rewards(rollout.rewards, rollout.reference_rewards)
        return Target(rewards, 1 + self.regularisation / self.backward_weight)

    def _advantages(self, target: Target, rollout: Rollout, values: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not self._alone:
            return super()._advantages(target, rollout, values)
        mask = self._learnt(rollout)
        if self.kl_estimator == "sampled":
            paid = (rollout.log_probs - rollout.reference_log_probs).sum(-1, keepdim=True).expand(mask.shape)
        else:
            paid = cost_to_go(rollout.token_kl)
        returns = target.score.unsqueeze(-1) - target.kl_coef * paid
        advantages = leave_one_out_of_all(returns, mask.any(-1), add_up=self._add_up)
        return advantages.masked_fill(~mask, 0.0), None

    def _add_up(self, part: Tensor) -> Tensor:
        """Add up over the ranks, whose longest responses differ: behind its end nothing more is paid."""
        if not part.dim():
            return self._over_ranks(part)
        longest = part[-1:].expand(self.loaded.max_new_tokens - len(part))
        return self._over_ranks(torch.cat([part, longest]))[: len(part)]
