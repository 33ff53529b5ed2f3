"""What QRPO, A*-PO and the Best-of-N regression share: a step that regresses log-ratios on what their target says."""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

from torch import Tensor

from vbon_lightning.actors import ActorSpec
from vbon_lightning.functional import RegressionLoss, sequence_log_prob
from vbon_lightning.modules.base import check_choice
from vbon_lightning.modules.offline import FromTable, check_at_least_one, select_responses
from vbon_lightning.sampling import pick_some, response_statistics
from vbon_lightning.types import PromptBatch, Rollout, TableBatch

Source = Literal["table", "policy"]


class LogRatioRegression(FromTable):
    r"""Regress :math:`D = \log \pi(y) - \log \pi_{ref}(y)` on the log-ratio of a known target; a subclass names it.

    There are no pairs and no baseline. On the policy's own responses, sampled at every step and scored, the expected
    gradient is that of the KL to the target (:func:`~vbon_lightning.functional.log_ratio_regression`).

    Args:
        actors: The policy, reference and reward, as the data module names them.
        responses: Whose responses are learnt: ``table`` (picked at random from the reference table's, of which those
            that the policy comes to write are few) or ``policy`` (its own, sampled and scored at every step).
        responses_per_prompt: Responses a prompt and step.
        **kwargs: What :class:`~vbon_lightning.modules.offline.FromTable` takes.
    """

    def __init__(
        self, actors: ActorSpec, responses: Source = "table", responses_per_prompt: int = 8, **kwargs: Any
    ) -> None:
        super().__init__(actors, **kwargs)
        check_choice("responses", responses, get_args(Source))
        check_at_least_one("responses_per_prompt", responses_per_prompt)
        self.responses, self.responses_per_prompt = responses, responses_per_prompt

    def record_settings(self, **settings: Any) -> None:
        """Record whose responses are learnt, and what the target depends on."""
        super().record_settings(responses=self.responses, responses_per_prompt=self.responses_per_prompt, **settings)

    def regress(
        self, log_ratio: Tensor, rewards: Tensor, reference_rewards: Tensor, learnt: Tensor | None
    ) -> RegressionLoss:
        """Return the loss on some responses.

        Args:
            log_ratio: ``[B, G]``, D of each response, differentiable.
            rewards: ``[B, G]``, NaN where a response has none.
            reference_rewards: ``[B, M]``, with those of the responses among them where they are the table's.
            learnt: ``[B, G]`` bool: which responses count. None for all.
        """
        raise NotImplementedError(f"{type(self).__name__} must say what it regresses on")

    @property
    def batch_kind(self) -> str:  # type: ignore[override]
        """Return which batches the data module should bring: without cached responses where the policy samples."""
        return "responses" if self.responses == "table" else "prompts"

    @property
    def samples_needed(self) -> tuple[int, str]:
        """Return how many responses a step picks, of at least two: a reward says nothing of itself alone."""
        if self.responses == "policy":
            return 1, "model.responses = policy"
        count = self.responses_per_prompt
        return max(2, count), f"model.responses_per_prompt = {count}"

    def training_step(self, batch: TableBatch | PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Return the loss on responses of the table, or on such as the policy samples."""
        if self.responses == "table":
            return super().training_step(cast(TableBatch, batch), batch_idx)
        loss, logs, rollout = self._on_policy(cast(PromptBatch, batch), self.next_step())
        self.last_rollout = rollout
        return {**self.log_step(loss, logs | self._sampling_logs(rollout, new=True)), "rollout": rollout}

    def learn(self, batch: TableBatch, rewards: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss of some of the table's responses, and their mean log-ratio and goal."""
        index = pick_some(
            batch.prompts.index.tolist(),
            among=rewards.shape[1],
            count=self.responses_per_prompt,
            seed=self.seed,
            stream="pick",
            step=step,
        ).to(rewards.device)
        picked, actors = select_responses(batch.responses, index), self.loaded
        found = response_statistics(
            actors.policy, actors.as_reference, batch.prompts, picked, temperature=actors.temperature
        )
        log_ratio = sequence_log_prob(found.log_probs - found.reference_log_probs, picked.mask)
        result = self.regress(log_ratio, rewards.gather(1, index), rewards, None)
        return result.loss, {"log_ratio": result.log_ratio, "goal": result.goal}

    def _on_policy(self, prompts: PromptBatch, step: int) -> tuple[Tensor, dict[str, Tensor], Rollout]:
        """Sample and score responses, and return the loss on them, what to log, and the rollout."""
        if prompts.reference_rewards is None:
            raise ValueError(f"{type(self).__name__} needs reference rewards, and the batch brings none")
        scored = self.loaded.scored_responses(
            prompts, num_samples=self.responses_per_prompt, seed=self.seed, stream="train", step=step
        )
        live, _ = self.loaded.statistics(scored)
        mask = live.completions.mask
        log_ratio = sequence_log_prob(live.log_probs - live.reference_log_probs, mask)
        learnt = live.judged if self._skips else None
        result = self.regress(log_ratio, live.rewards, prompts.reference_rewards, learnt)
        loss = result.loss if learnt is None else result.loss * self._share(mask & learnt.unsqueeze(-1))
        rollout = live._replace(log_probs=live.log_probs.detach(), token_kl=live.token_kl.detach())
        return loss, {"log_ratio": result.log_ratio, "goal": result.goal}, rollout
