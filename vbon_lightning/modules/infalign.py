"""InfAlign-CTRL: reinforcement learning for a policy that Best-of-N, or worst-of-N, is to decode."""

from __future__ import annotations

from typing import Any, Literal, get_args

from vbon_lightning.actors import ActorSpec
from vbon_lightning.functional import (
    InfAlignTies,
    InfAlignTransform,
    Target,
    infalign_slope,
    infalign_target,
    reward_cdf,
)
from vbon_lightning.modules.base import check_above_one, check_choice, check_positive
from vbon_lightning.modules.policy_gradient import PolicyGradient
from vbon_lightning.modules.reference_rewards import CDFEstimator, check_cdf_estimator, check_reference_rewards
from vbon_lightning.types import Rollout

Procedure = Literal["best_of_n", "worst_of_n"]

_NO_REWARDS = (
    "InfAlignCTRL needs reference rewards: name a table (data.reference_table, made by `vbon predict`), or sample them "
    "at every step (model.reference_samples)"
)


class InfAlignCTRL(PolicyGradient):
    r"""Maximise a transform of the reward's quantile under the reference, under a KL penalty: calibrate and transform.

    Maximises :math:`E_\pi[\Phi(u(y))] - \beta KL(\pi \| \pi_{ref})`, u the quantile of the reward among the
    reference's responses to the prompt, and Phi made for what will decode the policy: Balashankar, Sun, Berant and
    others, "InfAlign: Inference-aware language model alignment", 2025.
    :func:`~vbon_lightning.functional.infalign_target` has the formulas.

    Args:
        actors: The policy, reference and reward, as the data module names them.
        n: N of what decodes, any real number > 1. The loss has it from ``slope``, or from ``beta`` of ``log``, where
            these are left out, and else has none of it: it then says what win rates are against in validation, and how
            many reference rewards these need.
        procedure: ``best_of_n``, or ``worst_of_n`` for a policy whose worst of N responses is to be good.
        transform: ``exp``: ``exp(-t (1 - u))``, the paper's ``exp(t u)`` in units of its largest value, or
            ``-exp(-t u)`` for ``worst_of_n``; or ``log``: ``log u``, for ``best_of_n``. With ``ties: below`` and
            beta = 1/(n - 1) the latter is vBoN's lower bound, with the others where no reward ties with one of the
            reference's.
        slope: t of ``exp``, > 0, in place of the one that n implies: 2n - 1 by default, the slope that the win rate of
            Best-of-n over Best-of-n has at the reference (:func:`~vbon_lightning.functional.infalign_slope`).
        beta: Weight of the KL, > 0, in units of the transformed quantile a nat; 1/(n - 1) by default for ``log``, else
            0.1. Of ``best_of_n`` with ``exp`` it is ``exp(-t)`` times the weight that belongs to ``exp(t u)`` itself:
            0.1 at t = 7 stands for 110 there, and that paper's 1 for 0.0009 here.
        ties: Which quantile a reward has that several of the reference's tie with: ``middle`` of the tie, ``average``
            of the transform over it, or ``below`` it.
        cdf_estimator: How the distribution function is estimated from M rewards, as in
            :class:`~vbon_lightning.modules.vbon.VBoN`.
        **kwargs: What :class:`~vbon_lightning.modules.policy_gradient.PolicyGradient` takes, but for a value model.
    """

    reads_value_model = False

    def __init__(
        self,
        actors: ActorSpec,
        n: float = 4.0,
        procedure: Procedure = "best_of_n",
        transform: InfAlignTransform = "exp",
        slope: float | None = None,
        beta: float | None = None,
        ties: InfAlignTies = "middle",
        cdf_estimator: CDFEstimator = "jeffreys",
        **kwargs: Any,
    ) -> None:
        super().__init__(actors, **kwargs)
        check_above_one(n)
        for name, value, kind in (
            ("procedure", procedure, Procedure),
            ("transform", transform, InfAlignTransform),
            ("ties", ties, InfAlignTies),
        ):
            check_choice(name, value, get_args(kind))
        if transform == "log" and (procedure != "best_of_n" or slope is not None):
            raise ValueError("model.transform=log is for best_of_n and has no slope: set model.transform to exp")
        if slope is not None:
            check_positive("slope", slope)
        if beta is not None:
            check_positive("beta", beta)
        check_cdf_estimator(cdf_estimator)
        self.n, self.procedure, self.transform, self.ties = n, procedure, transform, ties
        self.slope = infalign_slope(n) if slope is None else slope
        self.beta = (1 / (n - 1) if transform == "log" else 0.1) if beta is None else beta
        self.cdf_estimator = cdf_estimator
        self.record_settings(
            n=n, procedure=procedure, transform=transform, slope=slope, beta=self.beta, ties=ties,
            cdf_estimator=cdf_estimator,
        )  # fmt: skip

    def setup(self, stage: str) -> None:
        """Refuse to start without enough reference rewards, before anything expensive."""
        super().setup(stage)
        check_reference_rewards(self, n=self.n, none=_NO_REWARDS)

    def target(self, rollout: Rollout) -> Target:
        """Return the transformed quantiles of the rewards and the KL's weight beta."""
        if rollout.reference_rewards is None:
            raise ValueError(_NO_REWARDS)
        cdf = reward_cdf(rollout.rewards, rollout.reference_rewards, estimator=self.cdf_estimator)
        slope = self.slope if self.procedure == "best_of_n" else -self.slope
        return infalign_target(cdf, beta=self.beta, transform=self.transform, slope=slope, ties=self.ties)
