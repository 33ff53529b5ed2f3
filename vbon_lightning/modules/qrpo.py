"""Quantile Reward Policy Optimization."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from vbon_lightning.actors import ActorSpec
from vbon_lightning.functional import RegressionLoss, qrpo_loss, reward_quantiles
from vbon_lightning.functional.qrpo import Ties
from vbon_lightning.modules.base import check_choice, check_positive
from vbon_lightning.modules.log_ratio_regression import LogRatioRegression, Source

_LEAST_BETA = 100 * torch.finfo(torch.float32).eps
"""Goals reach 1 / beta nats, and next to that the policy's log-ratio is to be told to a hundredth of a nat."""


class QRPO(LogRatioRegression):
    r"""Regress on the quantile of the reward under the reference, whose normaliser is known.

    With q the quantile and :math:`Z = \beta (e^{1/\beta} - 1)`, the same for every prompt and reward, it minimises
    :math:`(q(y) - \beta \log Z - \beta D(y))^2` (Matrenok, Moalla and Gulcehre, "Quantile Reward Policy Optimization:
    Alignment with Pointwise Regression and Exact Partition Functions", 2025), whose minimum is
    :math:`\pi_{ref}(y) \exp(q(y) / \beta) / Z`: the optimum of :math:`E[q] - \beta KL(\pi \| \pi_{ref})`. As with
    Best-of-N, only ranks count. The quantile of a response of the table is that among the other M - 1.

    Args:
        actors: The policy, reference and reward, as the data module names them.
        beta: Weight of the KL to the reference, > 0, in quantiles a nat: 0.2 goes about as far as Best-of-4. Below
            1.2e-5 float32 does not hold the goals, and it is refused.
        ties: The quantile of rewards that tie: ``exact`` breaks ties at random, so that Z stays exact and a prompt
            whose rewards all tie stays with the reference; ``upper`` is the share of rewards no higher, as in the
            paper; ``mid`` counts ties half. Without ties the three are one.
        responses: Whose responses are learnt, the ``table``'s or the ``policy``'s own.
        responses_per_prompt: Responses a prompt and step.
        **kwargs: What :class:`~vbon_lightning.modules.offline.FromTable` takes.
    """

    def __init__(
        self,
        actors: ActorSpec,
        beta: float = 0.2,
        ties: Ties = "exact",
        responses: Source = "table",
        responses_per_prompt: int = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(actors, responses=responses, responses_per_prompt=responses_per_prompt, **kwargs)
        check_positive("beta", beta)
        if beta < _LEAST_BETA:
            raise ValueError(
                f"model.beta={beta:g} asks for log-ratios of up to {1 / beta:.1e} nats, whose hundredths float32 does "
                f"not hold: set it to {_LEAST_BETA:.1e} or more"
            )
        check_choice("ties", ties, get_args(Ties))
        self.beta, self.ties = beta, ties
        self.record_settings(beta=beta, ties=ties)

    def regress(
        self, log_ratio: Tensor, rewards: Tensor, reference_rewards: Tensor, learnt: Tensor | None
    ) -> RegressionLoss:
        """Return the squared distance from the quantile."""
        quantiles = reward_quantiles(rewards, reference_rewards, included=self.responses == "table")
        return qrpo_loss(log_ratio, quantiles, beta=self.beta, ties=self.ties, learnt=learnt)
