"""Responses to take away: prompts in, texts with rewards and log-probabilities out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig

from vbon_lightning.actors import Actors, ActorSpec
from vbon_lightning.data.collating import collate_prompts
from vbon_lightning.data.conversations import Message
from vbon_lightning.data.encoding import EncodedPrompt
from vbon_lightning.data.preparing import prepare_rows
from vbon_lightning.data.sources import TextSource, as_row, read_rows
from vbon_lightning.decoding.base import Decoded, Decoder
from vbon_lightning.decoding.cost import DecodingCost
from vbon_lightning.decoding.options import check_counts
from vbon_lightning.models import ModelSpec, as_spec
from vbon_lightning.rewards import RewardCalls, RewardModel
from vbon_lightning.sampling.scoring import response_log_probs
from vbon_lightning.types import Completions, PromptBatch, Responses, known_rewards

STREAM = "sample"
"""The noise of drawn responses: neither that of training nor that of evaluation."""


class Drawn(NamedTuple):
    """One response to a prompt."""

    row: int
    """The prompt's place, from 0."""
    sample: int
    """The response's place among those to its prompt, from 0."""
    prompt: str
    """The prompt as text."""
    response: str
    """The response as text, special tokens left out."""
    reward: float | None
    """Its reward; None without a reward, or where that says nothing of it and is not to stop for that."""
    log_prob: float
    """Its log-probability under the policy at the sampling temperature, in nats."""
    tokens: list[int]
    """Its token ids, the EOS included where there is one."""
    finished: bool
    """Whether an EOS ended it, rather than the length limit."""


def sample(
    policy: str | ModelSpec,
    prompts: TextSource | Sequence[str | list[Message] | Mapping[str, Any]],
    *,
    decoder: Decoder | None = None,
    reward: RewardModel | None = None,
    samples: int = 1,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    end_tokens: Sequence[str] = (),
    chat: Mapping[str, Any] | None = None,
    batch_size: int = 8,
    seed: int = 0,
    device: str = "auto",
    reward_calls: RewardCalls | None = None,
    value_model: str | ModelSpec | None = None,
    missing_eos_penalty: float = 0.0,
) -> Iterator[Drawn]:
    """Draw responses from a policy, or the best of several.

    ``for drawn in sample("runs/vbon/export", ["Once upon a time"]): print(drawn.response)``. A prompt may be a
    conversation, a list of messages, which the policy's chat template renders, or a row of a data set, a mapping, whose
    other columns the reward may read. The noise of a
    response is that of the seed, of its prompt's place and of its own: the batch size changes nothing.

    Args:
        policy: The model: a hub name, a local directory, or a specification.
        prompts: The prompts.
        decoder: How a response is chosen, such as ``BestOfN(8)``; None for samples of the policy.
        reward: What scores the responses (and what Best-of-N chooses by).
        samples: Responses a prompt.
        max_new_tokens: Longest response in tokens; what the export's generation config says by default, or 32.
        temperature: Sampling temperature; what the export's generation config says by default, or 1.
        end_tokens: Tokens that end a response beside the usual ones, as the vocabulary writes them.
        chat: How conversations are rendered, as ``data.chat`` has it.
        batch_size: Prompts that are answered together.
        seed: Seeds the noise.
        device: ``cpu``, ``cuda``, or ``auto`` for a GPU where there is one.
        reward_calls: How the reward is called; a response that it says nothing of has the reward None, if these are to
            be skipped.
        value_model: What ``ValueModelling`` exported, for decoders that read one.
        missing_eos_penalty: Subtracted from the reward of responses that the length limit cut.

    Yields:
        One record a response, prompt by prompt.

    Raises:
        ValueError: On numbers that make no sense, a decoder that needs a reward and has none, or a conversation for a
            policy without a chat template.
        ModelError: If the policy cannot be loaded.
    """
    check_counts(samples=samples, batch_size=batch_size)
    spec = sampling_spec(policy, reward, max_new_tokens, temperature).replaced(
        end_tokens=list(end_tokens),
        chat=chat,
        reward_calls=reward_calls or RewardCalls(),
        value_model=value_model,
        missing_eos_penalty=missing_eos_penalty,
    )
    columns = tuple(getattr(reward, "columns", ()))
    if isinstance(prompts, TextSource) or any(isinstance(prompt, Mapping) for prompt in prompts):
        rows = read_rows(TextSource.of(prompts), columns)  # type: ignore[arg-type]
    else:
        rows = [as_row(prompt, place) for place, prompt in enumerate(prompts, start=1)]  # type: ignore[arg-type]
    encoded = prepare_rows(rows, "prompts", spec.load_tokenizer(), chat=spec.chat, key_columns=columns)
    actors = load_actors(spec, decoder, device)
    yield from draw(actors, enumerate(encoded), decoder=decoder, samples=samples, batch_size=batch_size, seed=seed)


def sampling_spec(
    policy: str | ModelSpec,
    reward: RewardModel | None,
    max_new_tokens: int | None,
    temperature: float | None,
) -> ActorSpec:
    """Say what to sample with: what is not given is as the policy's generation config has it.

    Raises:
        ValueError: On a length or a temperature that nothing can be sampled at.
    """
    check_counts(max_new_tokens=max_new_tokens)
    if temperature is not None and not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    found = generation_settings(policy)
    return ActorSpec(
        policy=policy,
        reward=reward,
        max_new_tokens=max_new_tokens or found.get("max_new_tokens") or 32,
        temperature=temperature or found.get("temperature") or 1.0,
    )


def generation_settings(policy: str | ModelSpec) -> dict[str, Any]:
    """Return what a policy's generation config says of length and temperature; nothing where it has none."""
    spec = as_spec(policy)
    try:
        config = GenerationConfig.from_pretrained(str(spec.name))
    except (OSError, ValueError):
        return {}
    return {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature if config.do_sample else None}


def check_decoding(spec: ActorSpec, decoder: Decoder) -> None:
    """Refuse a decoder that does not go with what is sampled, before anything is loaded.

    Raises:
        ValueError: If it needs a reward or a value model and none is named, or its options do not fit.
        ModelError: If a model that it names is not there, or has other tokens.
    """
    if decoder.needs_reward and spec.reward is None:
        raise ValueError(f"{type(decoder).__name__} chooses by a reward, and none is named: give `reward`")
    if decoder.needs_value_model and spec.value_model is None:
        raise ValueError(f"{type(decoder).__name__} needs a value model: name one as data.value_model")
    decoder.check_fits(longest=spec.max_new_tokens, max_rows=spec.max_rows)
    decoder.check(spec.load_tokenizer())


def load_actors(spec: ActorSpec, decoder: Decoder | None, device: str = "auto") -> Actors:
    """Load the policy (and a value model, where the decoder reads one) to sample from.

    Raises:
        ValueError: As :func:`check_decoding`.
        ModelError: If a model cannot be loaded, or one that the decoder names has other tokens.
    """
    if decoder is not None:
        check_decoding(spec, decoder)
    place = device_named(device)
    valued = decoder is not None and decoder.needs_value_model
    actors = Actors.load(spec, trainable=False, reference=False, value=valued)
    torch.nn.Module.to(actors.policy, place)  # the rest follows it: Actors.place
    actors.reference = actors.policy
    return actors


@torch.no_grad()
def draw(
    actors: Actors,
    prompts: Iterator[tuple[int, EncodedPrompt]],
    *,
    decoder: Decoder | None = None,
    samples: int = 1,
    batch_size: int = 8,
    seed: int = 0,
    step: int = 0,
    costs: list[DecodingCost] | None = None,
    reference_rewards: Tensor | None = None,
) -> Iterator[Drawn]:
    """Draw responses with loaded models.

    Args:
        actors: The models.
        prompts: Places and prompts.
        decoder: How a response is chosen; None for samples of the policy.
        samples: Responses a prompt.
        batch_size: Prompts that are answered together.
        seed: Seeds the noise.
        step: The draw's number: the same prompts get other responses.
        costs: Gets what each batch of a decoder's responses took to make.
        reference_rewards: ``[P, M]``: the reference's rewards of all prompts by their places, for decoders that read
            them.

    Yields:
        One record a response, prompt by prompt.
    """
    check_counts(samples=samples, batch_size=batch_size)
    pad = actors.tokenizer.pad_token_id
    waiting = iter(prompts)
    while some := list(islice(waiting, batch_size)):
        items = [(place, True, prompt) for place, prompt in some]
        batch = collate_prompts(items, pad_id=0 if pad is None else int(pad))
        if reference_rewards is not None:
            batch = batch._replace(reference_rewards=reference_rewards[batch.index])
        batch = on_device(batch, actors.policy.device)
        yield from _drawn(actors, batch, decoder, samples, seed, step, costs)


def _drawn(
    actors: Actors,
    batch: PromptBatch,
    decoder: Decoder | None,
    samples: int,
    seed: int,
    step: int,
    costs: list[DecodingCost] | None,
) -> Iterator[Drawn]:
    actors.place()
    how: dict[str, Any] = {"num_samples": samples, "seed": seed, "stream": STREAM, "step": step}
    rewards: Tensor | None = None
    found: Completions | Decoded
    if decoder is None:
        found = actors.sample(actors.policy, batch, **how)
        log_probs = found.log_probs
    else:
        found = decoder(actors, batch, **how)
        chosen = Responses(found.tokens, found.mask)
        log_probs = response_log_probs(actors.policy, batch, chosen, temperature=actors.temperature)
        rewards = found.rewards
        if costs is not None:
            costs.append(found.cost)
    ids = actors.token_ids(found)
    texts = actors.decode(ids, batch)
    if rewards is None and actors.reward is not None:
        rewards = actors.score(batch, texts, ids, found.finished)
    scores = None if rewards is None else known_rewards(rewards)
    sums, ends = torch.where(found.mask, log_probs, 0.0).sum(-1).tolist(), found.finished.tolist()
    for row, place in enumerate(batch.index.tolist()):
        for number in range(samples):
            yield Drawn(
                row=place,
                sample=number,
                prompt=batch.text[row],
                response=texts[row][number],
                reward=None if scores is None else scores[row][number],
                log_prob=sums[row][number],
                tokens=ids[row][number],
                finished=ends[row][number],
            )


def on_device(batch: PromptBatch, device: torch.device) -> PromptBatch:
    """Move a batch's tensors to a device."""
    rewards = batch.reference_rewards
    return batch._replace(
        index=batch.index.to(device),
        valid=batch.valid.to(device),
        tokens=batch.tokens.to(device),
        mask=batch.mask.to(device),
        reference_rewards=None if rewards is None else rewards.to(device),
    )


def device_named(device: str) -> torch.device:
    """Return a device by its name; ``auto`` is a GPU where there is one.

    Raises:
        ValueError: If there is no such device.
    """
    try:
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        if place.type == "meta":
            raise RuntimeError("it computes nothing")
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as problem:
        reason = str(problem).strip().splitlines()[0]
        raise ValueError(f"device {device!r} is not there ({reason}): give cpu, or auto") from problem
    return place
