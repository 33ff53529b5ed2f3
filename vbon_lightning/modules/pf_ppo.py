"""PF-PPO: updates on the responses whose rewards are to be relied on."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import Tensor

from vbon_lightning.actors import ActorSpec
from vbon_lightning.functional import FilterStrategy, filter_counts, filter_probabilities
from vbon_lightning.modules.base import check_choice
from vbon_lightning.modules.kl_rl import KLRL
from vbon_lightning.modules.policy_gradient import KLEstimator
from vbon_lightning.sampling import prompt_noise
from vbon_lightning.types import Rollout


class PFPPO(KLRL):
    r"""Maximise the reward under a KL penalty by updates on a prompt's best, or best and worst, responses.

    The G responses to a prompt are ranked, and a number of them drawn before the update: ``best`` draws the best alone,
    ``best_random`` the best half of the time and one of the others else, ``best_worst`` the best and the worst in equal
    parts. Zhang, Shen, Zhao, Zhang, Xu, Dou and Bian, "Policy Filtration for RLHF to Mitigate Noise in Reward Models",
    2024. The clipped estimator follows, the KL being paid for in the reward. The baseline is the mean reward of all the
    other responses, drawn or not, in place of the paper's critic: that of the drawn ones alone would leave nothing to
    learn where the best is drawn alone.

    What is biased about it: responses are weighted by their rank, so the expected gradient is
    :math:`E[\sum_i w_{rank(i)} A_i \nabla \log \pi(y_i)]`, which is the gradient of no expected reward. Where the
    filter raises the share of what is good, it pulls further than the reward asks; the KL is estimated from the drawn
    responses, which the policy would draw otherwise. ``ref exp(r / beta)`` is not its fixed point. That rewards at both
    ends are more reliable is the paper's reason for it.

    A draw belongs to the prompt, the rollout and the seed. Responses that are not drawn are run through the models all
    the same: the baseline of the KL and the metrics are of all of them.

    Args:
        actors: The policy, reference and reward, as the data module names them.
        filter: ``best``, ``best_random`` or ``best_worst``.
        draws: Responses drawn a prompt; as many as are sampled by default. With ``best`` it counts where the best tie.
        beta: Weight of the KL, > 0, in units of reward a nat.
        estimator: ``clipped``, or ``reinforce``, the same for one update a rollout.
        kl_estimator: ``sampled``, the KL in the reward as in PPO, or one of
            :class:`~vbon_lightning.modules.policy_gradient.PolicyGradient`'s others.
        **kwargs: What :class:`~vbon_lightning.modules.policy_gradient.PolicyGradient` takes, but for a critic.
    """

    reads_value_model = False
    compares_group = True
    follows_target = False

    def __init__(
        self,
        actors: ActorSpec,
        filter: FilterStrategy = "best_random",
        draws: int | None = None,
        beta: float = 0.1,
        estimator: Literal["reinforce", "clipped"] = "clipped",
        kl_estimator: KLEstimator = "sampled",
        **kwargs: Any,
    ) -> None:
        super().__init__(actors, beta=beta, estimator=estimator, kl_estimator=kl_estimator, **kwargs)
        check_choice("filter", filter, get_args(FilterStrategy))
        if draws is not None and (isinstance(draws, bool) or not isinstance(draws, int) or draws < 1):
            raise ValueError(f"model.draws must be an integer >= 1, got {draws!r}")
        self.filter = filter
        self.draws = self.samples_per_prompt if draws is None else draws
        self.record_settings(beta=beta, filter=filter, draws=draws)

    def response_weights(self, rollout: Rollout, mask: Tensor) -> Tensor:
        """Return how often each response is drawn, in units of its share of all draws, ``[B, G]``."""
        kept = mask.any(-1)
        probabilities = filter_probabilities(rollout.rewards, strategy=self.filter, kept=kept)
        identities = rollout.prompts.index.tolist()
        noise = prompt_noise(
            identities, num_samples=1, length=1, seed=self.seed, stream="filter", step=self.rollout_number
        )
        offsets = noise[:, 0, 0].to(probabilities)
        counts = filter_counts(probabilities, offsets, count=self.draws)
        return counts * (kept.sum(1, keepdim=True) / self.draws)
