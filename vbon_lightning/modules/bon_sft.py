"""Supervised fine-tuning on Best-of-N."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import Tensor

from vbon_lightning.actors import ActorSpec
from vbon_lightning.functional import sequence_log_prob
from vbon_lightning.modules.base import check_choice
from vbon_lightning.modules.offline import OfflineBestOfN, check_at_least_one, select_responses
from vbon_lightning.sampling import pick_best, pick_groups, response_log_probs
from vbon_lightning.types import TableBatch

Selection = Literal["weights", "groups"]


class BoNSFT(OfflineBestOfN):
    r"""Fit the policy to the best of n of the reference table's responses: the forward KL to Best-of-N.

    Minimises :math:`-E_{y \sim \pi_{bon}}[\log \pi(y)]`, which is :math:`KL(\pi_{bon} \| \pi)` up to a constant, with
    Best-of-n of the M responses a prompt that the table holds in place of :math:`\pi_{bon}`, ties broken at random.
    Nothing is sampled in training, and the reference has no part in it.

    Args:
        actors: The policy, reference and reward, as the data module names them.
        n: N of Best-of-N, an integer > 1 and at most M.
        responses_per_prompt: Responses a prompt and step.
        selection: How they are picked: ``weights`` draws each with the exact probability that the best of n of the M
            is it, by systematic resampling; ``groups`` puts the M into random groups of n and takes the best of each.
            The loss is the same on average, its variance lower with ``weights``.
        **kwargs: What :class:`~vbon_lightning.modules.offline.OfflineBestOfN` takes.
    """

    def __init__(
        self,
        actors: ActorSpec,
        n: int = 4,
        responses_per_prompt: int = 4,
        selection: Selection = "weights",
        **kwargs: Any,
    ) -> None:
        super().__init__(actors, n=n, **kwargs)
        check_at_least_one("responses_per_prompt", responses_per_prompt)
        check_choice("selection", selection, get_args(Selection))
        self.responses_per_prompt, self.selection = responses_per_prompt, selection
        self.record_settings(n=n, responses_per_prompt=responses_per_prompt, selection=selection)

    @property
    def samples_needed(self) -> tuple[int, str]:
        """Return n, or the size of all groups of a step together."""
        if self.selection == "weights":
            return super().samples_needed
        count = self.responses_per_prompt
        return count * int(self.n), f"model.responses_per_prompt = {count} in groups of model.n = {self.n}"

    def learn(self, batch: TableBatch, rewards: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean negative log-likelihood of the picked responses, in nats, and their mean reward."""
        index = self.pick(batch, rewards, step)
        picked = select_responses(batch.responses, index)
        log_probs = response_log_probs(self.loaded.policy, batch.prompts, picked, temperature=self.loaded.temperature)
        loss = -sequence_log_prob(log_probs, picked.mask).mean()
        return loss, {"picked_reward": rewards.gather(1, index).mean()}

    def pick(self, batch: TableBatch, rewards: Tensor, step: int) -> Tensor:
        """Return the places of the responses to learn in a step, ``[B, responses_per_prompt]``."""
        identities, count = batch.prompts.index.tolist(), self.responses_per_prompt
        if self.selection == "weights":
            return pick_best(rewards, identities, n=int(self.n), count=count, seed=self.seed, stream="pick", step=step)
        return pick_groups(
            rewards, identities, n=int(self.n), groups=count, seed=self.seed, stream="pick", step=step
        ).best
