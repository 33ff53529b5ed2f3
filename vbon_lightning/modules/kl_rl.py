"""KL-constrained reinforcement learning."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vbon_lightning.actors import ActorSpec
from vbon_lightning.functional import Target, kl_rl_target
from vbon_lightning.modules.base import check_positive
from vbon_lightning.modules.policy_gradient import PolicyGradient
from vbon_lightning.types import Rollout


class KLRL(PolicyGradient):
    r"""Maximise the reward under a KL penalty to the reference.

    Maximises :math:`E_\pi[r(y)] - \beta KL(\pi \| \pi_{ref})`, whose optimum is
    :math:`\pi_{ref}(y) \exp(r(y)/\beta) / Z`.

    Args:
        actors: The policy, reference and reward, as the data module names them.
        beta: Weight of the KL, > 0, in units of reward a nat.
        **kwargs: What :class:`~vbon_lightning.modules.policy_gradient.PolicyGradient` takes.
    """

    def __init__(self, actors: ActorSpec, beta: float = 0.1, **kwargs: Any) -> None:
        super().__init__(actors, **kwargs)
        check_positive("beta", beta)
        self.beta = beta
        self.record_settings(beta=beta)

    def target(self, rollout: Rollout) -> Target:
        """Return the rewards and the KL's weight beta."""
        return kl_rl_target(rollout.rewards, beta=self.beta)

    def bin_log_weights(self, rollout: Rollout) -> Tensor:
        """Return ``log E[exp(r / beta)]`` of each bin, ``[1, K]``."""
        scorer = self.loaded.value
        assert scorer is not None
        return scorer.kl_rl_log_weights(self.beta)
