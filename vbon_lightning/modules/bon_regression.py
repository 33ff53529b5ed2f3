"""Regression on Best-of-N's own log-ratio to the reference."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from vbon_lightning.actors import ActorSpec
from vbon_lightning.functional import RegressionLoss, bon_regression_loss, pooled_reward_cdf
from vbon_lightning.modules.base import check_above_one, check_log_ratio_floor
from vbon_lightning.modules.log_ratio_regression import LogRatioRegression, Source


class BoNRegression(LogRatioRegression):
    r"""Regress on the log-ratio of Best-of-N to the reference, which is a distribution's as it stands.

    Minimises :math:`(D(y) - \log w_N(y))^2` with :math:`w_N = (F_{\le}^N - F_<^N) / (F_\le - F_<)`, ties included:
    QRPO's regression (Matrenok, Moalla and Gulcehre, 2025) with Best-of-N for a target, whose normaliser is 1 for every
    N. The distribution function is that of the table's M rewards, the response's own among them, so that of the table's
    responses Best-of-N is exact; of the reference it is an estimate whose lower tail is noisy, and ends where M
    responses tell no more: at ``-(N - 1) log M`` nats (:func:`~vbon_lightning.functional.bon_regression_loss`).

    Args:
        actors: The policy, reference and reward, as the data module names them.
        n: N of Best-of-N, any real number > 1.
        log_ratio_floor: Raise goals below this many nats (negative) to it: it ends the lower tail; None for none.
        responses: Whose responses are learnt, the ``table``'s or the ``policy``'s own.
        responses_per_prompt: Responses a prompt and step.
        **kwargs: What :class:`~vbon_lightning.modules.offline.FromTable` takes.
    """

    def __init__(
        self,
        actors: ActorSpec,
        n: float = 4.0,
        log_ratio_floor: float | None = None,
        responses: Source = "table",
        responses_per_prompt: int = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(actors, responses=responses, responses_per_prompt=responses_per_prompt, **kwargs)
        check_above_one(n)
        check_log_ratio_floor(log_ratio_floor)
        self.n, self.log_ratio_floor = n, log_ratio_floor
        self.record_settings(n=n, log_ratio_floor=log_ratio_floor)

    @property
    def samples_needed(self) -> tuple[int, str]:
        """Return how many responses a step picks, and no fewer than tell what Best-of-n is."""
        count, why = super().samples_needed
        return max(count, math.ceil(self.n)), f"{why} and model.n = {self.n:g}"

    def regress(
        self, log_ratio: Tensor, rewards: Tensor, reference_rewards: Tensor, learnt: Tensor | None
    ) -> RegressionLoss:
        """Return the squared distance from Best-of-N's log-ratio."""
        cdf = pooled_reward_cdf(rewards, reference_rewards, included=self.responses == "table")
        return bon_regression_loss(log_ratio, cdf, n=float(self.n), log_ratio_floor=self.log_ratio_floor, learnt=learnt)
