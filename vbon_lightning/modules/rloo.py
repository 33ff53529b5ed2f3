"""REINFORCE leave-one-out, as people know it: for comparison."""

from __future__ import annotations

from typing import Any, Literal

from vbon_lightning.actors import ActorSpec
from vbon_lightning.modules.kl_rl import KLRL
from vbon_lightning.modules.policy_gradient import KLEstimator


class RLOO(KLRL):
    r"""Maximise the reward under a KL penalty by leave-one-out REINFORCE, the KL being paid for in the reward.

    With :math:`R_i = r_i - \beta \log \pi(y_i)/\pi_{ref}(y_i)` the advantage of each of G responses to a prompt is
    :math:`A_i = R_i - \frac{1}{G-1} \sum_{j \neq i} R_j`: Ahmadian and others, "Back to Basics: Revisiting
    REINFORCE-Style Optimization for Learning from Human Feedback in LLMs", 2024, and TRL's ``RLOOTrainer`` by
    default. A preset of :class:`~vbon_lightning.modules.kl_rl.KLRL`, from which only ``kl_estimator`` differs by
    default: both are unbiased, and KLRL's exact KL is the less noisy one away from the optimum.

    ``kl_estimator: k3`` makes it RLOO with k3: the reward alone in the advantages, and the KL in the loss as GRPO has
    it, so that the two differ in their advantages alone. Its gradient is that of KL(reference || policy) at the sampled
    prefixes, so its optimum is another. (TRL's ratio for several updates a rollout, ``estimator: clipped``, is that of
    the whole response; here each token's.)

    Args:
        actors: The policy, reference and reward, as the data module names them.
        beta: Weight of the KL, > 0, in units of reward a nat.
        estimator: ``reinforce``, or ``clipped`` for several updates a rollout.
        kl_estimator: ``sampled``, ``k3``, or one of
            :class:`~vbon_lightning.modules.policy_gradient.PolicyGradient`'s others.
        **kwargs: What :class:`~vbon_lightning.modules.policy_gradient.PolicyGradient` takes, but for a critic.
    """

    reads_value_model = False
    compares_group = True

    def __init__(
        self,
        actors: ActorSpec,
        beta: float = 0.1,
        estimator: Literal["reinforce", "clipped"] = "reinforce",
        kl_estimator: KLEstimator = "sampled",
        **kwargs: Any,
    ) -> None:
        super().__init__(actors, beta=beta, estimator=estimator, kl_estimator=kl_estimator, **kwargs)
