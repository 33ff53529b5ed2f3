"""Token-level distillation of Best-of-N from the reference table and a value model: nothing sampled, nothing scored."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vbon_lightning.actors import ActorSpec
from vbon_lightning.functional import reward_cdf
from vbon_lightning.functional.best_of_n import bon_log_ratio
from vbon_lightning.models import TiltedLM
from vbon_lightning.modules.base import (
    check_above_one,
    check_choice,
    check_log_ratio_floor,
    check_not_negative,
    check_unused,
)
from vbon_lightning.modules.offline import OfflineBestOfN, check_at_least_one, select_responses
from vbon_lightning.sampling import noise_seed, pick_some, pick_weighted, prompt_noise
from vbon_lightning.sampling.distilling import CandidateRequest, distil
from vbon_lightning.types import PromptBatch, Responses, TableBatch

States = Literal["reference", "best_of_n", "policy"]
Divergence = Literal["forward", "reverse"]

_GOLDEN = (5**0.5 - 1) / 2


class BoNDistillation(OfflineBestOfN):
    r"""Match Best-of-N's next-token distribution at the prefixes of the reference table's responses.

    With W the value of a prefix under the value model (``data.value_model``), Best-of-N's next-token distribution is
    :math:`\pi_{bon}(a \mid s) = \pi_{ref}(a \mid s) W(s a) / W(s)`, exactly. At each prefix it is computed over
    candidate tokens, all in one pass of the value model, and the policy learns it:
    :math:`-\sum_a t(a \mid s) \log \pi(a \mid s)` with the reference's part exact over the vocabulary. No response is
    sampled and no reward is called.

    Args:
        actors: The policy, reference, reward and value model, as the data module names them.
        n: N of Best-of-N, any real number > 1.
        responses_per_prompt: Responses a prompt and step, picked at random from the table's.
        top: Candidates at each prefix: this many of the reference's most likely tokens.
        draws: And this many drawn from its other tokens; 0 takes these as one, worth what the prefix is.
        states: Whose prefixes: ``reference`` (the table's, each response alike), ``best_of_n`` (the table's, responses
            picked as often as Best-of-N returns them) or ``policy`` (the policy samples its own; no reward is called).
        n_range: Train one policy for every N between these two, of which each step draws one; n then is the N that is
            evaluated and exported, and an export can be turned to any other (``vbon dial``, or ``dial`` of a model).
            Needs a tilted policy (``data.policy.tilt``).
        dial_degree: Degree of the polynomial in log N that its log-ratios to the reference follow.
        divergence: At each prefix ``forward``, KL(teacher || policy), over candidates of the reference, or ``reverse``,
            KL(policy || teacher), over candidates of the policy: what a policy gradient with the value model as critic
            follows, with many actions at each prefix in place of one. On the policy's own prefixes the latter is the
            gradient of KL(policy || Best-of-N) but for what an action does to later prefixes.
        log_ratio_floor: Raise the log-weights of the reward's bins below this many nats (negative) to it, which spares
            the gradient the noise of the worst responses; None for none.
        prior_samples: How many reference rewards of a prompt the value model's prediction counts for, beside the
            table's: few responses a prompt then do as well as many.
        **kwargs: What :class:`~vbon_lightning.modules.offline.OfflineBestOfN` takes.
    """

    uses_value_model = True

    def __init__(
        self,
        actors: ActorSpec,
        n: float = 4.0,
        responses_per_prompt: int = 8,
        top: int = 8,
        draws: int = 8,
        states: States = "best_of_n",
        n_range: list[float] | None = None,
        dial_degree: int = 2,
        divergence: Divergence = "forward",
        log_ratio_floor: float | None = None,
        prior_samples: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(actors, n=n, **kwargs)
        check_not_negative("prior_samples", prior_samples)
        if n_range is not None and not (len(n_range) == 2 and 1 < n_range[0] < n_range[1] < math.inf):
            raise ValueError(f"model.n_range must be two numbers, 1 < least < most, got {n_range}")
        check_at_least_one("dial_degree", dial_degree)
        if n_range is None:
            check_unused(type(self), "model.n_range=null", dial_degree=dial_degree)
        check_at_least_one("responses_per_prompt", responses_per_prompt)
        if top < 0 or draws < 0 or top + draws < 2:
            raise ValueError(f"model.top and model.draws must together name at least 2 candidates, got {top}, {draws}")
        check_choice("states", states, get_args(States))
        check_choice("divergence", divergence, get_args(Divergence))
        check_log_ratio_floor(log_ratio_floor)
        self.log_ratio_floor, self.prior_samples = log_ratio_floor, prior_samples
        self.responses_per_prompt, self.states, self.divergence = responses_per_prompt, states, divergence
        self.request = CandidateRequest(top=top, draws=draws)
        self.n_range, self.dial_degree = n_range, dial_degree
        self.record_settings(
            n=n,
            n_range=n_range,
            dial_degree=dial_degree,
            responses_per_prompt=responses_per_prompt,
            top=top,
            draws=draws,
            states=states,
            divergence=divergence,
            log_ratio_floor=log_ratio_floor,
            **({"prior_samples": prior_samples} if prior_samples else {}),
        )

    @property
    def batch_kind(self) -> str:  # type: ignore[override]
        """Return which batches the data module should bring: the policy's own prefixes need no cached responses."""
        return "prompts" if self.states == "policy" else "responses"

    def check_n(self, n: float) -> None:
        """Refuse an n that is no number above 1."""
        check_above_one(n)

    @property
    def largest_n(self) -> float:
        """Return the largest N that a step may ask for."""
        return self.n if self.n_range is None else max(self.n, self.n_range[1])

    @property
    def samples_needed(self) -> tuple[int, str]:
        """Return how many responses a prompt a step picks, or the table must have to tell what Best-of-N is."""
        count, largest = 0 if self.states == "policy" else self.responses_per_prompt, self.largest_n
        picks = "" if self.states == "policy" else f"model.responses_per_prompt = {count} and "
        return max(count, math.ceil(largest)), f"{picks}Best-of-{largest:g}"

    def setup(self, stage: str) -> None:
        """Refuse to start without a value model or what it is to teach from, before anything expensive."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if self.states != "policy" or getattr(data, "reference_table", None) is not None:
            super().setup(stage)
        if self.actor_spec.value_model is None:
            raise ValueError(
                "BoNDistillation learns from a value model: train one with `ValueModelling` and name its export as "
                "data.value_model"
            )

    def configure_model(self) -> None:
        """Load the models, and turn a tilted policy to n."""
        super().configure_model()
        policy = self.loaded.policy
        if isinstance(policy, TiltedLM):
            policy.turn(self.n)
            if self.n_range is not None:
                policy.add_heads(max(self.dial_degree, policy.config.degree))
        elif self.n_range is not None:
            raise ValueError(
                "one policy for every N is a tilted one: name the body that tilts it (`tilt` of data.policy), or set "
                "model.n_range to null"
            )

    def drawn_n(self, step: int) -> float:
        """Return the N of a step: log N evenly spread over the range, however few the steps."""
        if self.n_range is None:
            return self.n
        least, most = (math.log(n) for n in self.n_range)
        share = (noise_seed(self.seed, "dial") / 2**63 + step * _GOLDEN) % 1.0
        return math.exp(least + share * (most - least))

    def training_step(self, batch: TableBatch | PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Return the loss of a step; prompts alone are enough for the policy's own prefixes."""
        if isinstance(batch, TableBatch):
            return super().training_step(batch, batch_idx)
        return self.log_step(*self.distil(batch, None, self.next_step()))

    def learn(self, batch: TableBatch, rewards: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean divergence of the picked responses' prefixes, summed over tokens, in nats."""
        return self.distil(batch.prompts, batch.responses, step)

    def distil(self, prompts: PromptBatch, cached: Responses | None, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a step and what else to log.

        Args:
            prompts: B prompts; without reference rewards the value model predicts their distribution.
            cached: The table's responses, where their prefixes are learnt from.
            step: The number of the step, for the noise.
        """
        n = self.drawn_n(step)
        if isinstance(self.loaded.policy, TiltedLM):
            self.loaded.policy.turn(n)  # until after the backward pass, which may compute logits again
        actors, rewards = self.loaded, prompts.reference_rewards
        scorer = actors.value
        assert scorer is not None
        predicted = None
        if rewards is not None and self.prior_samples:
            predicted = scorer.log_cdf(prompts)
            log_cdf = scorer.mixed_log_cdf(rewards, predicted, prior_samples=self.prior_samples)
        else:
            log_cdf = scorer.log_cdf(prompts, rewards)
        log_weights = scorer.bon_log_weights(log_cdf, n=n)
        if self.log_ratio_floor is not None:
            log_weights = log_weights.clamp(min=self.log_ratio_floor)
        if cached is None or self.states == "policy":
            found = actors.sample(
                actors.policy,
                prompts,
                num_samples=self.responses_per_prompt,
                seed=self.seed,
                stream="train",
                step=step,
            )
            responses, ends = Responses(found.tokens, found.mask), None
        else:
            assert rewards is not None
            responses, ends = self._picked(prompts, cached, rewards, predicted, step, n)
        log_values = scorer.log_values(prompts, responses, log_weights, normalised=False)
        result = distil(
            actors.policy,
            actors.as_reference,
            scorer,
            prompts,
            responses,
            log_weights,
            log_values,
            self.request,
            ends=None if ends is None else ends + log_values[..., 0],
            uniforms=self._uniforms(prompts, responses, step),
            temperature=actors.temperature,
            reverse=self.divergence == "reverse",
        )
        # Both are 0 behind a response's end.
        return result.divergence.sum(-1).mean(), {"teacher_kl": result.teacher_kl.sum(-1).mean()}

    def on_after_backward(self) -> None:
        """Go back to the N that is evaluated and exported."""
        if isinstance(self.policy, TiltedLM):
            self.policy.turn(self.n)

    def _picked(
        self, prompts: PromptBatch, cached: Responses, rewards: Tensor, predicted: Tensor | None, step: int, n: float
    ) -> tuple[Responses, Tensor]:
        """Return some of the table's responses, and the log-weights that Best-of-N gives them."""
        cdf = reward_cdf(rewards.double(), rewards.double())
        if predicted is not None:
            assert self.loaded.value is not None
            cdf = self.loaded.value.mixed_reward_cdf(
                cdf, rewards.double(), predicted, samples=rewards.shape[1], prior_samples=self.prior_samples
            )
        # Of sampled responses the table's share of the probability is all that is known.
        none = torch.full_like(cdf.log_below, -torch.inf)
        log_ratio = bon_log_ratio(none, cdf.log_below, n=n, log_at_or_below=cdf.log_at_or_below)
        identities, count = prompts.index.tolist(), self.responses_per_prompt
        given: dict[str, Any] = {"count": count, "seed": self.seed, "stream": "pick", "step": step}
        if self.states == "best_of_n":
            index = pick_weighted(rewards, log_ratio.softmax(-1), identities, **given)
        else:
            index = pick_some(identities, among=rewards.shape[1], **given).to(rewards.device)
        return select_responses(cached, index), log_ratio.gather(1, index).float()

    def _uniforms(self, prompts: PromptBatch, responses: Responses, step: int) -> Tensor | None:
        draws = self.request.draws
        if not draws:
            return None
        _, samples, length = responses.mask.shape
        noise = prompt_noise(
            prompts.index.tolist(),
            num_samples=samples,
            length=length * draws,
            seed=noise_seed(self.seed, "candidates"),
            stream="candidates",
            step=step,
        )
        return noise.view(*responses.mask.shape, draws).to(responses.mask.device)
