"""Preference optimisation on the best and the worst of N."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vbon_lightning.actors import ActorSpec
from vbon_lightning.functional import bonbon_gap, bonbon_loss, dpo_loss, sequence_log_prob
from vbon_lightning.modules.base import check_choice, check_positive, check_unused
from vbon_lightning.modules.offline import OfflineBestOfN, check_at_least_one, select_responses
from vbon_lightning.sampling import pick_groups, response_statistics
from vbon_lightning.types import TableBatch

Loss = Literal["dpo", "bonbon"]


class DPO(OfflineBestOfN):
    r"""Prefer the best to the worst of n of the reference table's responses.

    With the log-ratio :math:`D = \log \pi(y) - \log \pi_{ref}(y)` of whole responses it minimises
    :math:`-\log \sigma(\beta [D_{best} - D_{worst}])` (Rafailov et al., "Direct Preference Optimization", 2023), or
    :math:`-\alpha \log \pi(y_{best}) + (1 - \alpha)(D_{best} - D_{worst} - 1/(2 \beta_n))^2` with
    :math:`1/(2 \beta_n) = (n-1) \sum_{k<n} 1/k` (Gui, Gârbacea and Veitch, "BoNBoN Alignment", 2024); where rewards of
    a prompt tie, the goal is that of tie-aware log-ratios (:func:`~vbon_lightning.functional.bonbon_gap`). Pairs are
    drawn afresh at every step: the M responses a prompt are put into random groups of n, ties broken at random; nothing
    is learnt of groups whose rewards all tie.

    Args:
        actors: The policy, reference and reward, as the data module names them.
        n: N of Best-of-N, an integer > 1 and at most M.
        beta: Weight of the implicit KL to the reference, > 0; ``bonbon`` has its own, which follows from n.
        pairs_per_prompt: Pairs a prompt and step, at most M // n.
        loss: ``dpo`` or ``bonbon``.
        alpha: Weight of the cross-entropy on the best responses in ``bonbon``, in [0, 1].
        **kwargs: What :class:`~vbon_lightning.modules.offline.OfflineBestOfN` takes.
    """

    def __init__(
        self,
        actors: ActorSpec,
        n: int = 4,
        beta: float = 0.1,
        pairs_per_prompt: int = 2,
        loss: Loss = "dpo",
        alpha: float = 0.005,
        **kwargs: Any,
    ) -> None:
        super().__init__(actors, n=n, **kwargs)
        check_at_least_one("pairs_per_prompt", pairs_per_prompt)
        check_positive("beta", beta)
        check_choice("loss", loss, get_args(Loss))
        if not 0 <= alpha <= 1:
            raise ValueError(f"model.alpha must be in [0, 1], got {alpha}")
        if loss == "bonbon":
            check_unused(type(self), "model.loss=bonbon", beta=beta)
        else:
            check_unused(type(self), f"model.loss={loss}", alpha=alpha)
        self.beta, self.pairs_per_prompt, self.loss, self.alpha = beta, pairs_per_prompt, loss, alpha
        self.record_settings(n=n, beta=beta, pairs_per_prompt=pairs_per_prompt, loss=loss, alpha=alpha)

    @property
    def samples_needed(self) -> tuple[int, str]:
        """Return the size of all groups of a step together."""
        pairs = self.pairs_per_prompt
        return pairs * int(self.n), f"model.pairs_per_prompt = {pairs} with groups of model.n = {self.n}"

    def learn(self, batch: TableBatch, rewards: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss of the picked pairs, and the accuracy and margin of the implicit reward."""
        pairs = pick_groups(
            rewards,
            batch.prompts.index.tolist(),
            n=int(self.n),
            groups=self.pairs_per_prompt,
            seed=self.seed,
            stream="pick",
            step=step,
        )
        picked = select_responses(batch.responses, torch.cat([pairs.best, pairs.worst], dim=1))
        actors = self.loaded
        found = response_statistics(
            actors.policy, actors.as_reference, batch.prompts, picked, temperature=actors.temperature
        )
        log_probs = sequence_log_prob(found.log_probs, picked.mask)
        log_ratios = log_probs - sequence_log_prob(found.reference_log_probs, picked.mask)
        best, worst = log_ratios.chunk(2, dim=1)
        apart = rewards.gather(1, pairs.best) > rewards.gather(1, pairs.worst)
        if self.loss == "dpo":
            result = dpo_loss(best, worst, beta=self.beta, told_apart=apart)
        else:
            goal = bonbon_gap(rewards, n=int(self.n)).told_apart[:, None].to(best.dtype)
            result = bonbon_loss(
                log_probs.chunk(2, dim=1)[0],
                best,
                worst,
                n=int(self.n),
                alpha=self.alpha,
                goal=goal,
                told_apart=apart,
            )
        tied = (~apart).float().mean()
        return result.loss, {"accuracy": result.accuracy, "margin": result.margin, "tied_pairs": tied}
