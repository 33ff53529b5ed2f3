"""The policy, its reference and the reward, loaded, and what they do together: roll out and score."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vbon_lightning._visible import shorten
from vbon_lightning.actors.spec import ActorSpec
from vbon_lightning.actors.value_model import load_scorer
from vbon_lightning.adapters import adapters_off
from vbon_lightning.models import (
    ModelError,
    TiltedLM,
    check_same_vocabulary,
    check_vocabulary_fits,
    end_token_ids,
    load_causal_lm,
    load_tokenizer,
    told_of,
)
from vbon_lightning.prefix_scorer import PrefixScorer
from vbon_lightning.rewards import RewardCalls, RewardError, RewardModel
from vbon_lightning.rewards.calls import CallRecord, PendingRewards, RewardCaller, Scored
from vbon_lightning.sampling import (
    Sampler,
    SamplingRequest,
    make_sampler,
    prompt_noise,
    response_log_probs,
    response_statistics,
    sample_completions,
)
from vbon_lightning.sampling.further import TooManyMissingError, replace_missing
from vbon_lightning.sampling.passes import InPasses, join_completions
from vbon_lightning.sharding import is_sharded
from vbon_lightning.types import Completions, PromptBatch, Responses, Rollout, ScoredResponses, select_prompts


class _Tokens(Protocol):
    """What holds response tokens ``[B, G, T]`` and their mask."""

    @property
    def tokens(self) -> Tensor: ...

    @property
    def mask(self) -> Tensor: ...


class _Drawn(NamedTuple):
    """Responses whose rewards are being found."""

    completions: Completions
    responses: list[list[str]]
    asked: list[PendingRewards]
    """One for each pass, in their order."""

    def scored(self) -> Scored:
        """Wait for the rewards of all passes."""
        found = [one.result() for one in self.asked]
        parts = {name: torch.cat([one.parts[name] for one in found]) for name in found[0].parts}
        return Scored(torch.cat([one.rewards for one in found]), parts)


@dataclass
class Actors:
    """Loaded models and the operations on them; holds no trainable state of its own.

    The reference and the reward are held here and not as sub-modules of a LightningModule: frozen weights
    then stay out of checkpoints, of the optimizer and of DDP's traffic.
    """

    policy: PreTrainedModel
    reference: PreTrainedModel | None
    reward: RewardModel | None
    tokenizer: PreTrainedTokenizerBase
    end_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    missing_eos_penalty: float = 0.0
    shares_base: bool = False
    """Whether the reference is the policy with its adapters or its tilt off; ``reference`` then is None."""
    anchor: PreTrainedModel | None = None
    """A reference that moves; None where it stays, and the anchor is the reference."""
    value: PrefixScorer | None = None
    """What prefixes of responses are worth, where a value model is named."""
    sampler: Sampler = field(default_factory=lambda: sample_completions, repr=False)
    """What samples responses."""
    reward_calls: RewardCalls = field(default_factory=RewardCalls)
    """How the reward is called."""
    record: CallRecord = field(default_factory=CallRecord, repr=False)
    """What calling it has come to."""
    sampler_mismatch: float | None = None
    """Mean absolute difference between the sampler's log-probabilities and the policy's in the last rollout, where
    the sampler is another program than the policy."""
    _placed: Any = field(default=None, repr=False)

    @classmethod
    def load(
        cls,
        spec: ActorSpec,
        *,
        seed: int = 0,
        trainable: bool = True,
        reference: bool = True,
        keep_dropout: bool = False,
        value: bool = False,
    ) -> Actors:
        """Load what the specification names; dropout is off in the policy and the reference alike, unless kept.

        Args:
            spec: What to load.
            seed: Initialises a policy that is made from a config.
            trainable: Whether the policy's parameters get gradients.
            reference: Whether to load the reference.
            keep_dropout: Leave the policy's dropout as its config has it (supervised fine-tuning).
            value: Whether to load the value model, where one is named.

        Raises:
            ModelError: If policy and reference differ in vocabulary, or in the tokens that end a response; or if the
                value model is one of another reference, reward or length.
            SamplerError: If the sampler is not installed.
        """
        # What is not installed is to be known before a model is loaded.
        sampler = make_sampler(spec.sampler, max_rows=spec.max_rows, engine_options=spec.engine_options)
        policy_spec, reference_spec = spec.policy_spec, spec.reference_spec
        tokenizer = spec.load_tokenizer()
        if reference and reference_spec != policy_spec:
            with told_of("reference"):
                check_same_vocabulary(tokenizer, load_tokenizer(reference_spec))
        scorer = None if spec.value_model is None or not value else load_scorer(spec, tokenizer, seed=seed)
        with told_of("policy"):
            policy = load_causal_lm(policy_spec, seed=seed, trainable=trainable, dropout=keep_dropout)
        check_vocabulary_fits(policy, tokenizer)
        if isinstance(policy, TiltedLM) and spec.sampler != "eager":
            raise ModelError(f"a tilted policy is two models: sample with data.sampler eager, not {spec.sampler}")
        frozen = None
        if reference and not spec.shares_base:
            with told_of("reference"):
                frozen = load_causal_lm(reference_spec, seed=seed, trainable=False)
            _check_same_outputs(policy, frozen, tokenizer)
        return cls(
            policy=policy,
            reference=frozen,
            reward=spec.reward,
            tokenizer=tokenizer,
            end_ids=end_token_ids(policy, tokenizer, spec.end_tokens),
            max_new_tokens=spec.max_new_tokens,
            temperature=spec.temperature,
            missing_eos_penalty=spec.missing_eos_penalty,
            shares_base=reference and spec.shares_base,
            value=scorer,
            sampler=sampler,
            reward_calls=spec.reward_calls,
        )

    @contextmanager
    def as_reference(self) -> Iterator[PreTrainedModel]:
        """Give the reference for a while: its own model, or the policy with its adapters or its tilt off."""
        if self.shares_base and isinstance(self.policy, TiltedLM):
            yield self.policy.base
        elif self.shares_base:
            with adapters_off(self.policy) as base:
                yield base
        elif self.reference is not None:
            yield self.reference
        else:
            raise ValueError("this needs the reference model")

    @contextmanager
    def as_anchor(self) -> Iterator[PreTrainedModel]:
        """Give the anchor for a while: the reference, where that does not move."""
        if self.anchor is not None:
            yield self.anchor
        else:
            with self.as_reference() as reference:
                yield reference

    def place(self) -> None:
        """Move the frozen models to where the policy is, in its precision; a no-op once they are there."""
        parameter = next(self.policy.parameters())
        where = (parameter.device, parameter.dtype)
        if self._placed != where:
            if self.reference is not None and not is_sharded(self.reference):
                nn.Module.to(self.reference, device=parameter.device, dtype=parameter.dtype)
            if self.reward is not None and hasattr(self.reward, "to"):
                self.reward.to(parameter.device)
            if self.value is not None:
                self.value.to(parameter.device)
            self._placed = where

    def sample(
        self,
        model: PreTrainedModel,
        prompts: PromptBatch,
        *,
        num_samples: int,
        seed: int,
        stream: str,
        step: int,
        first: int = 0,
    ) -> Completions:
        """Sample G responses a prompt; :func:`~vbon_lightning.sampling.prompt_noise` says how."""
        noise = self.noise(prompts, num_samples=num_samples, seed=seed, stream=stream, step=step, first=first)
        return self.sampler(model, self.request(prompts, noise))

    def noise(
        self, prompts: PromptBatch, *, num_samples: int, seed: int, stream: str, step: int, first: int = 0
    ) -> Tensor:
        """Return the uniforms ``[B, G, T]`` that G responses a prompt are sampled by."""
        return prompt_noise(
            prompts.index.tolist(),
            num_samples=num_samples,
            length=self.max_new_tokens,
            seed=seed,
            stream=stream,
            step=step,
            first=first,
        )

    def request(self, prompts: PromptBatch, noise: Tensor) -> SamplingRequest:
        """Return what to ask a sampler for.

        Args:
            prompts: B prompts.
            noise: ``[B, G, T]`` uniforms.
        """
        return SamplingRequest(prompts.tokens, prompts.mask, noise, self.end_ids, self._pad_id, self.temperature)

    @property
    def _pad_id(self) -> int:
        pad_id = self.tokenizer.pad_token_id
        return self.end_ids[0] if pad_id is None else int(pad_id)

    def token_ids(self, completions: _Tokens) -> list[list[list[int]]]:
        """Return the responses' token ids without padding, the EOS included where there is one: ``[B][G][...]``."""
        lengths = completions.mask.sum(-1).tolist()
        tokens = completions.tokens.tolist()
        return [
            [ids[:length] for ids, length in zip(*group, strict=True)] for group in zip(tokens, lengths, strict=True)
        ]

    def decode(self, token_ids: list[list[list[int]]], prompts: PromptBatch | None = None) -> list[list[str]]:
        """Decode ``[B][G]`` lists of token ids to text, special tokens left out.

        With the prompts, each response is decoded behind its prompt's last token, so that ``prompt + response`` is
        the text the model wrote: on their own, many tokenizers drop the space a response begins with.
        """
        lasts = [None] * len(token_ids) if prompts is None else prompts.tokens[:, -1].tolist()
        heads = ["" if last is None else self._decode([[last]])[0] for last in lasts]
        texts = self._decode(
            [
                ids if last is None else [last, *ids]
                for last, group in zip(lasts, token_ids, strict=True)
                for ids in group
            ]
        )
        decoded, start = [], 0
        for head, group in zip(heads, token_ids, strict=True):
            behind = texts[start : start + len(group)]
            # Where half a character stands at the seam, it belongs to neither side.
            decoded.append(
                [
                    text[len(head) :] if text.startswith(head) else self._decode([ids])[0]
                    for ids, text in zip(group, behind, strict=True)
                ]
            )
            start += len(group)
        return decoded

    def _decode(self, rows: list[list[int]]) -> list[str]:
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @torch.no_grad()
    def score(
        self, prompts: PromptBatch, responses: list[list[str]], token_ids: list[list[list[int]]], finished: Tensor
    ) -> Tensor:
        """Return rewards ``[B, G]``, the missing-EOS penalty included, on the device of ``finished``.

        A response without a reward has NaN, where these are to be left out (``data.reward_calls.on_missing``).
        """
        with self.asking() as caller:
            asked = caller.start(prompts.text, responses, token_ids, prompts.beside)
            raw = asked.result().rewards
        self.count_missing(raw, prompts, responses)
        return self._penalised(raw, finished)

    def asking(self, *, ahead: bool = False) -> RewardCaller:
        """Return what calls the reward, a context.

        Args:
            ahead: Whether it begins before it is asked for the answers, in a thread, with one worker too.

        Raises:
            ValueError: If there is no reward.
        """
        if self.reward is None:
            raise ValueError("this needs a reward: set `data.reward`")
        return RewardCaller(self.reward, self.reward_calls, self.record, ahead=ahead)

    def count_missing(self, rewards: Tensor, prompts: PromptBatch, responses: list[list[str]]) -> None:
        """Count the responses that have no reward, and warn of the first.

        Args:
            rewards: ``[B, G]``.
            prompts: B prompts; those that only even out the ranks do not count.
            responses: B lists of G responses.
        """
        if self.reward_calls.skips:
            missing = (rewards.isnan() & prompts.valid.to(rewards.device)[:, None]).nonzero().tolist()
            for row, column in missing[:1]:
                example = f"response {shorten(responses[row][column])} to prompt {shorten(prompts.text[row])}"
                self.record.left_out(len(missing), example)

    def _penalised(self, raw: Tensor, finished: Tensor) -> Tensor:
        raw = raw.to(device=finished.device, dtype=torch.float32)
        return raw - self.missing_eos_penalty * (~finished).float()

    @torch.no_grad()
    def rollout(self, prompts: PromptBatch, **how: Any) -> Rollout:
        """Sample from the policy, score the responses, and compare policy and reference token by token.

        Args:
            prompts: B prompts.
            **how: What :meth:`scored_responses` takes.
        """
        return self.statistics(self.scored_responses(prompts, **how))[0]

    @torch.no_grad()
    def scored_responses(
        self,
        prompts: PromptBatch,
        *,
        num_samples: int,
        seed: int,
        stream: str,
        step: int,
        reference_samples: int = 0,
        predict_rewards: bool = False,
        anchored: bool = False,
        keep_references: bool = False,
        by_anchor: bool = False,
    ) -> ScoredResponses:
        """Sample from the policy and score the responses.

        A training step that does one update a rollout gets the rest from its own forward pass.

        Args:
            prompts: B prompts.
            num_samples: G, samples a prompt.
            seed: The run's seed.
            stream: The noise's stream.
            step: The rollout's number within the stream.
            reference_samples: M reference responses a prompt to sample and score where the batch brings no
                reference rewards (the ``online`` mode); 0 for none.
            predict_rewards: Predict the distribution of the reward also where there are reference rewards.
            anchored: Sample the reference responses from the anchor.
            keep_references: Return the reference responses that were sampled, too, as ``extra``.
            by_anchor: Sample the responses from the anchor instead of the policy.
        """
        self.place()
        reference_rewards, fresh = prompts.reference_rewards, None
        with self.asking() as caller:
            how: dict[str, Any] = {"seed": seed, "step": step}
            with self.as_anchor() if by_anchor else nullcontext(self.policy) as model:
                drawn = self._draw(caller, model, prompts, num_samples=num_samples, stream=stream, **how)
            self.sampler_mismatch = getattr(self.sampler, "mismatch", None)
            # With one worker nothing is won by leaving it for later.
            scored = drawn.scored() if self.reward_calls.workers == 1 else None
            if reference_rewards is None and reference_samples > 0:
                fresh, reference_rewards = self.reference_responses(
                    prompts,
                    num_samples=reference_samples,
                    stream=f"{stream}/reference",
                    caller=caller,
                    anchored=anchored,
                    **how,
                )
            scored = scored or drawn.scored()
        self.count_missing(scored.rewards, prompts, drawn.responses)
        predicted = None
        if (reference_rewards is None or predict_rewards) and self.value is not None:
            predicted = self.value.log_cdf(prompts)
        rewards = self._penalised(scored.rewards, drawn.completions.finished)
        return ScoredResponses(
            prompts=prompts,
            completions=drawn.completions,
            responses=drawn.responses,
            rewards=rewards,
            reference_rewards=reference_rewards,
            reference_log_cdf=predicted,
            reward_parts={name: part.to(rewards.device) for name, part in scored.parts.items()} or None,
            extra=fresh if keep_references else None,
        )

    def reference_rewards(self, prompts: PromptBatch, **how: Any) -> Tensor:
        """Sample M responses a prompt from the reference and return their rewards ``[B, M]``.

        Args:
            prompts: B prompts.
            **how: What :meth:`reference_responses` takes.
        """
        return self.reference_responses(prompts, **how)[1]

    @torch.no_grad()
    def reference_responses(
        self,
        prompts: PromptBatch,
        *,
        num_samples: int,
        seed: int,
        stream: str,
        step: int,
        caller: RewardCaller | None = None,
        anchored: bool = False,
    ) -> tuple[Responses, Tensor]:
        """Sample M responses a prompt from the reference, ``[B, M, T]``, and return them and their rewards ``[B, M]``.

        Where responses without a reward are left out, further ones are drawn in their place: M stays M.

        Args:
            prompts: B prompts.
            num_samples: M.
            seed: The run's seed.
            stream: The noise's stream.
            step: The call's number within the stream.
            caller: What calls the reward already; one of its own by default.
            anchored: Sample from the anchor instead.

        Raises:
            RewardError: If a prompt's responses have no reward, however many are drawn.
        """
        giver = self.as_anchor if anchored else self.as_reference

        def draw(some: PromptBatch, count: int, stream: str) -> tuple[Completions, Tensor]:
            with self.asking() if caller is None else nullcontext(caller) as asking, giver() as reference:
                drawn = self._draw(asking, reference, some, num_samples=count, seed=seed, stream=stream, step=step)
                raw = drawn.scored().rewards
            self.count_missing(raw, some, drawn.responses)
            return drawn.completions, self._penalised(raw, drawn.completions.finished)

        def listed(completions: Completions, rewards: Tensor) -> list[list[tuple[float, list[int]]]]:
            ids = self.token_ids(completions)
            return [list(zip(*group, strict=True)) for group in zip(rewards.tolist(), ids, strict=True)]

        def again(row: int, places: list[int], number: int) -> list[tuple[float, list[int]]]:
            return listed(*draw(select_prompts(prompts, [row]), len(places), f"{stream}/further{number}"))[0]

        completions, rewards = draw(prompts, num_samples, stream)
        if not self.reward_calls.skips or not bool(rewards.isnan().any()):
            return Responses(completions.tokens, completions.mask), rewards
        try:
            filled, _ = replace_missing(
                listed(completions, rewards),
                lambda one: math.isnan(one[0]),
                again,
                lambda row: f"row {row}, prompt {shorten(prompts.text[row])}",
            )
        except TooManyMissingError as problem:
            raise RewardError(str(problem)) from problem
        found = [[reward for reward, _ in group] for group in filled]
        return self._padded([[ids for _, ids in group] for group in filled], rewards.device), rewards.new_tensor(found)

    def _padded(self, token_ids: list[list[list[int]]], device: torch.device) -> Responses:
        """Pad ``[B][M]`` lists of token ids to ``[B, M, T]``."""
        width = max(len(ids) for group in token_ids for ids in group)
        tokens = [[ids + [self._pad_id] * (width - len(ids)) for ids in group] for group in token_ids]
        lengths = torch.tensor([[len(ids) for ids in group] for group in token_ids], device=device)
        return Responses(torch.tensor(tokens, device=device), torch.arange(width, device=device) < lengths[..., None])

    def _draw(
        self,
        caller: RewardCaller,
        model: PreTrainedModel,
        prompts: PromptBatch,
        *,
        num_samples: int,
        seed: int,
        stream: str,
        step: int,
    ) -> _Drawn:
        """Sample responses and have them scored: with several workers, a pass while the next is sampled."""
        noise = self.noise(prompts, num_samples=num_samples, seed=seed, stream=stream, step=step)
        if caller.calls.workers > 1 and isinstance(self.sampler, InPasses):
            passes = self.sampler.by_prompts(model, self.request(prompts, noise))
        else:
            found = self.sampler(model, self.request(prompts, noise))
            passes = iter([(list(range(len(prompts.text))), found)])
        parts: list[Completions] = []
        responses: list[list[str]] = []
        asked: list[PendingRewards] = []
        for rows, part in passes:
            some = prompts if len(rows) == len(prompts.text) else select_prompts(prompts, rows)
            ids = self.token_ids(part)
            texts = self.decode(ids, some)
            asked.append(caller.start(some.text, texts, ids, some.beside))
            parts.append(part)
            responses += texts
        return _Drawn(join_completions(parts, dim=0, pad_id=self._pad_id), responses, asked)

    def statistics(
        self, rollout: ScoredResponses | Rollout, *, hidden: bool = False, anchored: bool = False
    ) -> tuple[Rollout, Tensor | None]:
        """Find log-probabilities and the exact KL of given responses, differentiable in the policy.

        Args:
            rollout: Prompts and responses.
            hidden: Also return the policy's last hidden states ``[B, G, T, H]``, for a value head.
            anchored: Compare the policy with the anchor.
        """
        found = response_statistics(
            self.policy,
            self.as_anchor if anchored else self.as_reference,
            rollout.prompts,
            rollout.completions,
            temperature=self.temperature,
            hidden=hidden,
            extra=rollout.extra,
        )
        known = {
            "log_probs": found.log_probs,
            "reference_log_probs": found.reference_log_probs,
            "token_kl": found.kl,
            "extra_log_probs": found.extra_log_probs,
        }
        return Rollout(**(rollout._asdict() | known)), found.hidden

    def policy_log_probs(self, rollout: ScoredResponses | Rollout) -> Tensor:
        """Find log-probabilities of given responses under the policy alone, ``[B, G, T]``, differentiable.

        Args:
            rollout: Prompts and responses.
        """
        return response_log_probs(self.policy, rollout.prompts, rollout.completions, temperature=self.temperature)


def _check_same_outputs(
    policy: PreTrainedModel, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Check what the tokenizers do not tell: padded vocabularies, and the tokens that end a response."""
    sizes = [model.config.get_text_config().vocab_size for model in (policy, reference)]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"policy and reference need one vocabulary, but their outputs have {sizes[0]} and {sizes[1]} entries: "
            "resize the embeddings of one, or name another reference"
        )
    ends = [end_token_ids(model, tokenizer) for model in (policy, reference)]
    if set(ends[0]) != set(ends[1]):
        raise ModelError(
            f"policy and reference end their responses differently, with the tokens {list(ends[0])} and "
            f"{list(ends[1])}: give both the same `eos_token_id` in generation_config.json"
        )
