"""A*-PO: policy optimisation by regression on the optimal advantage."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vbon_lightning.actors import ActorSpec
from vbon_lightning.functional import RegressionLoss, a_star_po_loss, optimal_value
from vbon_lightning.modules.base import check_positive
from vbon_lightning.modules.log_ratio_regression import LogRatioRegression


class AStarPO(LogRatioRegression):
    r"""Regress on the optimal advantage of the policy's own responses, the optimal value being known from the table.

    With :math:`V^*(x) = \beta_1 \log \frac{1}{M} \sum_j e^{r_j / \beta_1}` of the table's M rewards it minimises
    :math:`(\beta_2 D(y) - (r(y) - V^*(x)))^2` on one response a prompt (Brantley, Chen, Gao, Lee, Sun, Zhan and Zhang,
    "Accelerating RL for LLM Reasoning with Optimal Advantage Regression", 2025). It leads where KL-constrained RL with
    ``beta2`` does, :math:`\pi_{ref}(y) \exp(r(y) / \beta_2) / Z`; V* takes the place of the siblings that a baseline
    would need.

    Args:
        actors: The policy, reference and reward, as the data module names them.
        beta1: Temperature of V*, > 0; ``beta2`` by default, at which the loss is zero at the optimum. A larger one is
            less noisy where M is small.
        beta2: Weight of the KL to the reference, > 0, in units of reward a nat. Below some 1e-5 of what rewards differ
            by, float32 does not hold the goals.
        responses_per_prompt: Responses a prompt and step.
        **kwargs: What :class:`~vbon_lightning.modules.offline.FromTable` takes.
    """

    def __init__(
        self,
        actors: ActorSpec,
        beta1: float | None = None,
        beta2: float = 0.1,
        responses_per_prompt: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(actors, responses="policy", responses_per_prompt=responses_per_prompt, **kwargs)
        check_positive("beta2", beta2)
        self.beta1, self.beta2 = beta2 if beta1 is None else beta1, beta2
        check_positive("beta1", self.beta1)
        self.record_settings(beta1=self.beta1, beta2=beta2)

    def regress(
        self, log_ratio: Tensor, rewards: Tensor, reference_rewards: Tensor, learnt: Tensor | None
    ) -> RegressionLoss:
        """Return the squared distance from the optimal advantage."""
        values = optimal_value(reference_rewards, beta=self.beta1)
        return a_star_po_loss(log_ratio, rewards, values, beta=self.beta2, learnt=learnt)
