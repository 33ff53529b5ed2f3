"""What methods ask of the reference rewards that their target is made of."""

from __future__ import annotations

from typing import Any, Literal, get_args

from lightning.pytorch.utilities import rank_zero_warn

from vbon_lightning.modules.base import check_choice
from vbon_lightning.modules.policy_gradient import PolicyGradient

CDFEstimator = Literal["jeffreys", "add_one", "laplace", "digamma"]


def check_cdf_estimator(cdf_estimator: str) -> None:
    """Refuse an estimator of the reward's distribution function that is none."""
    check_choice("cdf_estimator", cdf_estimator, get_args(CDFEstimator))


def check_reference_rewards(module: PolicyGradient, *, n: float, none: str, prior_samples: float = 0.0) -> None:
    """Refuse to start with fewer reference rewards a prompt than n, and warn of fewer than 4 n.

    Args:
        module: The module, in its trainer.
        n: N of the Best-of-N that is to be estimated from them.
        none: What to say where there are none, and no value model predicts them.
        prior_samples: How many a value model's prediction counts for.

    Raises:
        ValueError: Naming the option or the table, and what to do.
    """
    samples, what = module.reference_samples, "model.reference_samples"
    if not samples:
        data: Any = getattr(module.trainer, "datamodule", None)
        if data is None or not hasattr(data, "table"):
            return
        if data.reference_table is None:
            if module.uses_value_model:
                return  # which predicts the distribution of the reward
            raise ValueError(none)
        samples, what = data.reference_rewards, f"the reference table {data.reference_table}"
    known = samples + prior_samples
    if known < n:
        raise ValueError(
            f"{what} has M = {samples} reference rewards a prompt, fewer than n = {n:g}: Best-of-n cannot "
            "be estimated from them; sample more or lower model.n"
        )
    if known < 4 * n:
        rank_zero_warn(
            f"{what} has M = {samples} reference rewards a prompt for n = {n:g}: the estimate of log F "
            "near the top has a standard deviation of about sqrt(n/M); M of at least 4 n is advised"
        )
