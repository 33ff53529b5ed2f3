"""REINFORCE leave-one-out with the KL as people know it: for comparison."""

from __future__ import annotations

from typing import Any, Literal

from vbon_lightning.actors import ActorSpec
from vbon_lightning.modules.kl_rl import KLRL
from vbon_lightning.modules.policy_gradient import KLEstimator


class RLOO(KLRL):
    r"""Maximise the reward under a KL penalty by leave-one-out REINFORCE, with the KL as a k3 term in the loss.

    :math:`A_i = r_i - \frac{1}{G-1} \sum_{j \neq i} r_j`: Ahmadian and others, "Back to Basics: Revisiting
    REINFORCE-Style Optimization for Learning from Human Feedback in LLMs", 2024. A preset of
    :class:`~vbon_lightning.modules.kl_rl.KLRL`, with whose default, the exact KL, only ``kl_estimator`` differs. With
    ``k3`` the KL is what GRPO has, so that the two differ in their advantages alone; its gradient is that of
    KL(reference || policy) at the sampled prefixes, so its optimum is another. ``kl_estimator: sampled`` takes the
    log-ratio off the reward before the baseline, as the paper and TRL's ``RLOOTrainer`` do, and is unbiased. (TRL's
    ratio for several updates a rollout, ``estimator: clipped``, is that of the whole response; here each token's.)

    Args:
        actors: The policy, reference and reward, as the data module names them.
        beta: Weight of the KL, > 0, in units of reward a nat.
        estimator: ``reinforce``, or ``clipped`` for several updates a rollout.
        kl_estimator: ``k3``, or one of :class:`~vbon_lightning.modules.policy_gradient.PolicyGradient`'s others.
        **kwargs: What :class:`~vbon_lightning.modules.policy_gradient.PolicyGradient` takes, but for a critic.
    """

    reads_value_model = False
    compares_group = True

    def __init__(
        self,
        actors: ActorSpec,
        beta: float = 0.1,
        estimator: Literal["reinforce", "clipped"] = "reinforce",
        kl_estimator: KLEstimator = "k3",
        **kwargs: Any,
    ) -> None:
        super().__init__(actors, beta=beta, estimator=estimator, kl_estimator=kl_estimator, **kwargs)
