"""Which models and reward a run has, and how responses are sampled: plain options, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from vbon_lightning.models import (
    ModelSpec,
    as_spec,
    check_saved,
    load_tokenizer,
    model_identity,
    told_of,
)
from vbon_lightning.reference_table.fingerprint import FingerprintMismatch
from vbon_lightning.rewards import RewardCalls, RewardModel
from vbon_lightning.sampling import (
    check_sampler,
)


class ActorSpec:
    """Names the policy, the reference and the reward, and how responses are sampled.

    It is the one thing a data module and the modules share: ``VBoN(actors=datamodule.actors, n=4)``.

    Args:
        policy: The model to train: a hub name, a local directory, or a :class:`~vbon_lightning.models.ModelSpec`.
        reference: The model to stay close to and to take Best-of-N of; the policy's own start by default.
        reward: The reward model; not needed for supervised fine-tuning.
        max_new_tokens: Longest response, in tokens.
        temperature: Sampling temperature, > 0; log-probabilities and KL are of the tempered models.
        missing_eos_penalty: Subtracted from the reward of responses that the length limit cut, in the table's
            rewards and in the policy's alike.
        sampler: How responses are sampled: ``eager`` (the decode loop), ``graph`` (the same samples in fixed shapes,
            replayed as a CUDA graph) or ``vllm`` (needs the extra ``vllm``). docs/sampling.md says more.
        max_rows: Most responses that are sampled at once, which bounds the memory; by default all of a batch.
        engine_options: Arguments of ``vllm.LLM``, such as ``gpu_memory_utilization``, for ``vllm``.
        value_model: A model of the reward to come (what ``ValueModelling`` exported), where a method uses one.
        end_tokens: Tokens that end a response, as the vocabulary writes them (``<|im_end|>``), beside those that always
            do: the tokenizer's EOS, which supervised fine-tuning teaches, and the generation config's.
        chat: How conversations are rendered: ``template`` (Jinja) in place of the tokenizer's own, which exports then
            carry, ``system`` for those without a system message, and anything else for the template itself, such as
            ``enable_thinking``.
        reward_calls: How the reward is called, and what is done with a response that it says nothing of: ``workers``,
            ``retries``, ``timeout_s``, ``on_missing`` and so on (docs/rewards.md).
    """

    # Not a dataclass: jsonargparse would spread its fields over every module's options.
    def __init__(
        self,
        policy: str | ModelSpec,
        reference: str | ModelSpec | None = None,
        reward: RewardModel | None = None,
        max_new_tokens: int = 32,
        temperature: float = 1.0,
        missing_eos_penalty: float = 0.0,
        sampler: Literal["eager", "graph", "vllm"] = "eager",
        max_rows: int | None = None,
        engine_options: dict[str, Any] | None = None,
        value_model: str | ModelSpec | None = None,
        end_tokens: list[str] = [],  # noqa: B006 (never mutated)
        chat: dict[str, Any] | None = None,
        reward_calls: RewardCalls = RewardCalls(),  # noqa: B008 (frozen)
    ) -> None:
        check_sampler(sampler, max_rows=max_rows, engine_options=engine_options)
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {temperature}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if not 0 <= missing_eos_penalty < math.inf:
            raise ValueError(
                f"missing_eos_penalty is subtracted, so it must be finite and >= 0, got {missing_eos_penalty}"
            )
        self.policy, self.reference, self.reward = policy, reference, reward
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.missing_eos_penalty = missing_eos_penalty
        self.sampler, self.max_rows, self.engine_options = sampler, max_rows, engine_options
        self.value_model, self.end_tokens = value_model, list(end_tokens)
        self.chat = dict(chat or {})
        self.reward_calls = reward_calls

    def replaced(self, **changes: Any) -> ActorSpec:
        """Return a copy with other values of some arguments."""
        return ActorSpec(**(vars(self) | changes))

    @property
    def policy_spec(self) -> ModelSpec:
        """Return the policy's specification."""
        return as_spec(self.policy)

    @property
    def reference_spec(self) -> ModelSpec:
        """Return the reference's specification: the policy's start where none is named."""
        return as_spec(self.policy).base() if self.reference is None else as_spec(self.reference)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the policy's tokenizer, with the chat template that exports are to carry."""
        with told_of("policy"):
            tokenizer = load_tokenizer(self.policy_spec)
        if "template" in self.chat:
            tokenizer.chat_template = self.chat["template"]
        return tokenizer

    @property
    def shares_base(self) -> bool:
        """Return whether the policy is adapters on the reference, or tilts it: one copy of the weights serves both."""
        policy = self.policy_spec
        return not policy.trained_whole and self.reference_spec == policy.base()

    def identity(self, *, reward: bool = True, reference: bool = True) -> dict[str, Any]:
        """Describe the models by content, in plain values: what a checkpoint must agree with to be resumed.

        Args:
            reward: Whether the reward counts; one that a method does not use need not even exist.
            reference: Whether the reference does; where the policy alone is sampled there is none.
        """
        with told_of("policy"):
            policy = model_identity(self.policy_spec)
        return {
            "policy": policy,
            **({"reference": self._reference_identity()} if reference else {}),
            "reward": self.reward.identity() if reward and self.reward is not None else None,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "missing_eos_penalty": self.missing_eos_penalty,
            **self._ends(),
            **self._skips(),
            # The other samplers draw the same samples.
            **({"sampler": "vllm"} if self.sampler == "vllm" else {}),
            **({} if self.value_model is None else {"value_model": model_identity(as_spec(self.value_model))}),
        }

    @contextmanager
    def reference_checked(self) -> Iterator[None]:
        """Say of a table that does not fit the reference what is wrong with the reference's own files, if anything is.

        Raises:
            ModelError: Naming the file, in place of a :class:`FingerprintMismatch`.
        """
        try:
            yield
        except FingerprintMismatch as mismatch:
            if any(field.startswith("reference") for field in mismatch.differences):
                with told_of("reference"):
                    check_saved(self.reference_spec)
            raise

    def _reference_identity(self, seed: int = 0) -> dict[str, str]:
        with told_of("reference"):
            return model_identity(self.reference_spec, seed=seed)

    def _ends(self) -> dict[str, Any]:
        return {"end_tokens": self.end_tokens} if self.end_tokens else {}

    def _skips(self) -> dict[str, Any]:
        return {"on_missing": "skip"} if self.reward_calls.skips else {}

    def table_fingerprint(self, *, seed: int, model_seed: int = 0, precision: str = "32-true") -> dict[str, Any]:
        """Describe what the reference table's responses and rewards depend on, in plain values.

        Args:
            seed: Seed of the table's responses.
            model_seed: Seed of a reference that is made from a config.
            precision: The Trainer's, in which the reference samples. Tables from before it was written down count as
                made in the default, which is not written down.
        """
        if self.reward is None:
            raise ValueError("a reference table needs a reward: set `data.reward`")
        return {
            "reference": self._reference_identity(seed=model_seed),
            "reward": self.reward.identity(),
            "temperature": self.temperature,
            "max_new_tokens": self.max_new_tokens,
            "eos_rule": "first end token, kept; none added to a cut response",
            **self._ends(),
            **self._skips(),
            **({} if precision == "32-true" else {"precision": precision}),
            "seed": seed,
        }
