"""What models say about given responses: one pass over each prompt, one over its responses, logits in chunks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel
from transformers.generation import GenerationMixin

from vbon_lightning.functional import token_log_probs, token_statistics
from vbon_lightning.models.loading import evaluating
from vbon_lightning.models.tilted import JointHead, TiltedLM
from vbon_lightning.sampling.cache import can_share_prompts
from vbon_lightning.sampling.decode import forget_casts, keep_logits, recomputes
from vbon_lightning.sampling.plain import prompts_with_room, runs_plain
from vbon_lightning.sharding import is_sharded
from vbon_lightning.types import Completions, PromptBatch, Responses

MAX_LOGITS = 2**25
"""Logits that live at once, of each model: 128 MiB in float32."""


class ResponseLogits(NamedTuple):
    """What one pass over prompts and responses gives."""

    logits: Tensor
    """``[N, T, V]``: logits that predict each response token, N = B x G rows."""
    hidden: Tensor | None
    """``[N, T, H]``: last hidden states at the same positions, where asked for."""


class ResponseStatistics(NamedTuple):
    """What policy and reference say about each response token; 0 outside the mask."""

    log_probs: Tensor
    """``[B, G, T]``: log-probability under the policy, differentiable."""
    reference_log_probs: Tensor
    """``[B, G, T]``: the same under the reference."""
    kl: Tensor
    """``[B, G, T]``: exact KL(policy || reference) over the vocabulary, differentiable."""
    hidden: Tensor | None
    """``[B, G, T, H]``: the policy's last hidden states, where asked for."""
    extra_log_probs: Tensor | None = None
    """``[B, K, T]``: log-probability of further responses' tokens under the policy, differentiable, where asked for."""


def response_logits(
    model: PreTrainedModel, prompts: PromptBatch, completions: Completions | Responses, *, hidden: bool = False
) -> ResponseLogits:
    """Run prompts and their responses through a model and keep what predicts the response tokens.

    Each prompt is run once, and its keys and values shared by its responses. Positions come from the mask, so
    that a row does not depend on how far its neighbours pad it.

    Args:
        model: A causal language model.
        prompts: ``[B, P]`` prompts.
        completions: ``[B, G, T]`` responses.
        hidden: Also return the last hidden states, for a value head.
    """

    def read(output: Any) -> list[Tensor]:
        return [output.logits, output.hidden_states[-1]] if hidden else [output.logits]

    logits, *states = _predictions(model, model, prompts, completions, read, output_hidden_states=hidden)
    return ResponseLogits(logits=logits, hidden=states[0] if hidden else None)


def response_statistics(
    policy: PreTrainedModel,
    reference: PreTrainedModel | Callable[[], AbstractContextManager[PreTrainedModel]],
    prompts: PromptBatch,
    completions: Completions | Responses,
    *,
    temperature: float = 1.0,
    hidden: bool = False,
    extra: Responses | None = None,
    max_logits: int = MAX_LOGITS,
) -> ResponseStatistics:
    """Compute log-probabilities of response tokens under both models and the exact KL at each.

    Logits are made for response tokens only, ``max_logits`` of them at a time, and made again for the gradient:
    memory grows with B x G x T, and with the vocabulary only through the weights.

    Args:
        policy: A causal language model; gradients flow to it where they are enabled.
        reference: Another of the same vocabulary, which gets no gradient, or a context that gives it for the time
            of its pass: the policy's own base, its adapters off.
        prompts: ``[B, P]`` prompts.
        completions: ``[B, G, T]`` responses.
        temperature: The sampling temperature, applied to both.
        hidden: Also return the policy's last hidden states, for a value head.
        extra: ``[B, K, T]`` further responses, of which only the policy is asked, in the same pass.
        max_logits: Logits of each model that live at once.
    """
    context = nullcontext(reference) if isinstance(reference, PreTrainedModel) else reference()
    given = completions if extra is None else _beside(completions, extra)
    ours = response_states(policy, prompts, given, hidden=hidden)
    found = None
    if extra is not None:
        samples = completions.mask.shape[1]
        further = _rows_of(ours, given.mask, slice(samples, None), extra.mask.shape[-1])
        ours = _rows_of(ours, given.mask, slice(samples), completions.mask.shape[-1])
        (found,) = _by_chunks(_log_prob_chunk, [further], extra.tokens, extra.mask, temperature, max_logits)
    with torch.no_grad(), context as model:
        theirs = base_states(model, ours) or response_states(model, prompts, completions)
    log_probs, reference_log_probs, kl = _by_chunks(
        _chunk, [ours, theirs], completions.tokens, completions.mask, temperature, max_logits
    )
    states = None if ours.hidden is None else ours.hidden.view(*completions.mask.shape, -1)
    return ResponseStatistics(log_probs, reference_log_probs, kl, states, found)


def _beside(completions: Completions | Responses, extra: Responses) -> Responses:
    """Lay further responses beside each prompt's own: ``[B, G + K, T]``, padded to the longer of the two."""
    both = (Responses(completions.tokens, completions.mask), extra)
    width = max(part.mask.shape[-1] for part in both)
    padded = [[torch.nn.functional.pad(field, (0, width - field.shape[-1])) for field in part] for part in both]
    return Responses(*(torch.cat(fields, dim=1) for fields in zip(*padded, strict=True)))


def _rows_of(states: States, mask: Tensor, rows: slice, length: int) -> States:
    """Return the states of some of each prompt's responses, without the padding that the others needed."""

    def part(values: Tensor) -> Tensor:
        return values.reshape(*mask.shape, values.shape[-1])[:, rows, :length]

    hidden = None if states.hidden is None else part(states.hidden).flatten(0, 1)
    return states._replace(features=part(states.features).flatten(0, 2), hidden=hidden)


def response_log_probs(
    model: PreTrainedModel,
    prompts: PromptBatch,
    completions: Completions | Responses,
    *,
    temperature: float = 1.0,
    max_logits: int = MAX_LOGITS,
) -> Tensor:
    """Compute log-probabilities of response tokens under one model, as :func:`response_statistics` does under two.

    Args:
        model: A causal language model; gradients flow to it where they are enabled.
        prompts: ``[B, P]`` prompts.
        completions: ``[B, G, T]`` responses.
        temperature: The sampling temperature.
        max_logits: Logits that live at once.

    Returns:
        ``[B, G, T]``, differentiable, 0 outside the mask.
    """
    states = response_states(model, prompts, completions)
    (log_probs,) = _by_chunks(_log_prob_chunk, [states], completions.tokens, completions.mask, temperature, max_logits)
    return log_probs


def text_log_probs(
    model: PreTrainedModel, tokens: Tensor, mask: Tensor, asked: Tensor, *, max_logits: int = MAX_LOGITS
) -> Tensor:
    """Compute log-probabilities of some tokens of whole texts, with logits at those places only.

    Args:
        model: A causal language model; gradients flow to it where they are enabled.
        tokens: ``[B, T]`` token ids, padded on the right.
        mask: ``[B, T]`` bool, True on what is no padding.
        asked: ``[B, T]`` bool: the tokens that are wanted. What stands first has no probability.
        max_logits: Logits that live at once.

    Returns:
        ``[B, T - 1]``: of each token but the first; 0 where it is not asked for.
    """
    head = output_head(model)
    given = {"input_ids": tokens, "attention_mask": None if bool(mask.all()) else mask.long(), "use_cache": False}
    if head is None:
        logits = model(**given).logits[:, :-1]
        states = States(logits.flatten(0, 1), None, logits.shape[-1], None)
    else:
        hidden = _body_and_head(model)[0](**given).last_hidden_state[:, :-1]
        states = States(hidden.flatten(0, 1), head, head.out_features, None)
    (log_probs,) = _by_chunks(_log_prob_chunk, [states], tokens[:, 1:], asked[:, 1:], 1.0, max_logits)
    return log_probs


def body_outputs(model: PreTrainedModel, prompts: PromptBatch, completions: Completions | Responses) -> Tensor:
    """Run a model's body over prompts and their responses, each prompt once.

    Args:
        model: A model with a causal body.
        prompts: ``[B, P]`` prompts.
        completions: ``[B, G, T]`` responses.

    Returns:
        ``[B G, T, H]``: last hidden states after 0, 1, ... T - 1 tokens of each response.
    """
    body, _ = _body_and_head(model)
    (states,) = _predictions(model, body, prompts, completions, lambda output: [output.last_hidden_state])
    return states


class Head(Protocol):
    """What makes logits of states: a linear layer, or one on each of two models' states."""

    in_features: int
    out_features: int

    def __call__(self, states: Tensor, /) -> Tensor:
        """Return logits ``[..., V]`` of states ``[..., H]``."""
        ...


def _body_and_head(model: PreTrainedModel) -> tuple[Any, Any]:
    if isinstance(model, TiltedLM):
        return model.body_and_head()
    return getattr(model, "base_model", None), getattr(model, "get_output_embeddings", lambda: None)()


def output_head(model: PreTrainedModel) -> Head | None:
    """Return the layer that makes a model's logits of its last hidden states, or None where more is done to them.

    Some models scale or squash their logits. A forward pass over two tokens tells; it is made once a model.
    """
    if model not in _HEADS:
        with evaluating(model):
            _HEADS[model] = _plain_head(model)
    return cast(Head, _body_and_head(model)[1]) if _HEADS[model] else None


_HEADS: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def try_out(model: PreTrainedModel) -> None:
    """Find out now what is otherwise found out when it is first needed, by passes over a few tokens.

    Once a model is sharded no process can make a pass alone.
    """
    with evaluating(model):
        if isinstance(model, GenerationMixin) and not runs_plain(model):
            can_share_prompts(model)
        output_head(model)


@torch.no_grad()
def _plain_head(model: PreTrainedModel) -> bool:
    body, head = _body_and_head(model)
    if body is None or body is model or not isinstance(head, nn.Linear | JointHead):
        return False
    if isinstance(model, TiltedLM):
        if not _plain_head(model.base):
            return False
    elif isinstance(head, nn.Linear) and not _is_all_there_is(model, body, head):
        return False
    probe = torch.tensor([[0, 1]], device=next(model.parameters()).device)
    expected = model(input_ids=probe, use_cache=False).logits
    states = getattr(body(input_ids=probe, use_cache=False), "last_hidden_state", None)
    forget_casts(probe.device)
    if states is None or states.shape[-1] != head.in_features:
        return False
    logits = head(states)
    forget_casts(probe.device)
    return logits.shape == expected.shape and torch.allclose(logits, expected, atol=1e-5, rtol=1e-4)


def _is_all_there_is(model: PreTrainedModel, body: Any, head: nn.Linear) -> bool:
    """Return whether a model does nothing to its logits but multiply, also where they are large.

    The states of a model that is fresh from a config are too small to tell a squashed logit: larger ones take their
    place.
    """
    weight = head.weight
    noise = torch.Generator().manual_seed(0)
    states = torch.randn(1, 2, head.in_features, generator=noise).to(weight)
    large = states * (200 / head(states).abs().max().clamp(min=1e-3))

    def replace(module: nn.Module, given: Any, output: Any) -> Any:
        output["last_hidden_state"] = large
        return output

    handle = body.register_forward_hook(replace)
    try:
        logits = model(input_ids=torch.tensor([[0, 1]], device=weight.device), use_cache=False).logits
    except Exception:  # a body whose output is another thing
        return False
    finally:
        handle.remove()
    forget_casts(weight.device)
    expected = head(large)
    forget_casts(weight.device)
    return logits.shape == expected.shape and torch.allclose(logits.float(), expected.float(), atol=1e-2, rtol=1e-2)


class States(NamedTuple):
    """A pass's result before it is turned into logits."""

    features: Tensor
    """``[N T, H]`` last hidden states, or ``[N T, V]`` logits where there is no head."""
    head: Head | None
    vocabulary: int
    hidden: Tensor | None
    """``[N, T, H]``, where asked for."""


def response_states(
    model: PreTrainedModel, prompts: PromptBatch, completions: Completions | Responses, *, hidden: bool = False
) -> States:
    """Run prompts and responses and return what the logits of the response tokens are made of.

    Args:
        model: A causal language model.
        prompts: ``[B, P]`` prompts.
        completions: ``[B, G, T]`` responses.
        hidden: Also keep the last hidden states, for a value head.
    """
    head = output_head(model)
    if head is None:
        scored = response_logits(model, prompts, completions, hidden=hidden)
        return States(scored.logits.flatten(0, 1), None, scored.logits.shape[-1], scored.hidden)
    states = body_outputs(model, prompts, completions)
    return States(states.flatten(0, 1), head, head.out_features, states if hidden else None)


def base_states(reference: PreTrainedModel, ours: States) -> States | None:
    """Return the reference's part of a tilted policy's states where it is the policy's base, or None."""
    if not isinstance(ours.head, JointHead) or ours.head.model.base is not reference:
        return None
    return States(ours.features[:, : ours.head.split].detach(), ours.head.base, ours.vocabulary, None)


def _by_chunks(
    chunk: Callable[..., tuple[Tensor, ...]],
    models: list[States],
    tokens: Tensor,
    mask: Tensor,
    temperature: float,
    max_logits: int,
) -> list[Tensor]:
    """Turn states into what is known of each real token, ``max_logits`` at a time: tensors of the mask's shape.

    Args:
        chunk: Computes it for some tokens, from each model's states and its features there, tokens, temperature.
        models: The states; those of the first carry the gradient.
        tokens: Token ids, a row of states each.
        mask: Which of them count, of the same shape.
        temperature: The sampling temperature.
        max_logits: Logits of each model that live at once.
    """
    real = mask.reshape(-1).nonzero().squeeze(-1)
    tokens = tokens.reshape(-1)[real]
    size = max(1, max_logits // models[0].vocabulary)
    again = len(real) > size and torch.is_grad_enabled()
    pieces = []
    for start in range(0, max(1, len(real)), size):
        part = slice(start, start + size)
        # Without padding the rows are the positions: a slice copies nothing.
        rows = part if len(real) == mask.numel() else real[part]
        features = [value for states in models for value in (states, states.features[rows])]
        arguments = (*features, tokens[part], temperature)
        pieces.append(checkpoint(chunk, *arguments, use_reentrant=False) if again else chunk(*arguments))

    def spread(values: tuple[Tensor, ...]) -> Tensor:
        joined = torch.cat(values)
        if len(real) == mask.numel():
            return joined.view(mask.shape)
        return joined.new_zeros(mask.numel()).index_copy(0, real, joined).view(mask.shape)

    return [spread(values) for values in zip(*pieces, strict=True)]


def _chunk(
    ours: States, states: Tensor, theirs: States, their_states: Tensor, tokens: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        reference_logits = their_states if theirs.head is None else theirs.head(their_states)
    forget_casts(states.device)
    logits = states if ours.head is None else ours.head(states)
    statistics = token_statistics(logits, reference_logits, tokens, temperature=temperature)
    assert statistics.reference_log_probs is not None
    assert statistics.kl is not None
    return statistics.log_probs, statistics.reference_log_probs, statistics.kl


def _log_prob_chunk(ours: States, states: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor]:
    logits = states if ours.head is None else ours.head(states)
    return (token_log_probs(logits, tokens, temperature=temperature),)


def _plain_predictions(
    part: Any, prompts: PromptBatch, tokens: Tensor, samples: int, read: Callable[[Any], list[Tensor]], **arguments: Any
) -> list[Tensor]:
    """Run whole texts without a cache."""
    length = tokens.shape[1]
    text, lengths = prompts_with_room(prompts.tokens, prompts.mask, samples, length)
    places = lengths[:, None] + torch.arange(length, device=tokens.device)
    text = text.scatter(1, places, tokens)
    rows = torch.arange(len(text), device=text.device)[:, None]
    output = part(input_ids=text, use_cache=False, **arguments)
    return [values[rows, places - 1] for values in read(output)]


def _predictions(
    model: PreTrainedModel,
    part: Any,
    prompts: PromptBatch,
    completions: Completions | Responses,
    read: Callable[[Any], list[Tensor]],
    **arguments: Any,
) -> list[Tensor]:
    """Run a model, or its body, and return what it says at the positions that predict the response tokens.

    Args:
        model: The whole model.
        part: What to run: the model or its body.
        prompts: ``[B, P]`` prompts.
        completions: ``[B, G, T]`` responses.
        read: Picks tensors ``[rows, positions, ...]`` from an output.
        **arguments: Passed on.

    Returns:
        Of each tensor that is read, ``[B G, T, ...]``.
    """
    _, samples, length = completions.tokens.shape
    tokens = completions.tokens.reshape(-1, length)
    if length == 1 and is_sharded(model):
        # Of one token there is no second pass, which another process may need.
        filled = Responses(*(torch.nn.functional.pad(part, (0, 1)) for part in (completions.tokens, completions.mask)))
        return [values[:, :1] for values in _predictions(model, part, prompts, filled, read, **arguments)]
    if isinstance(model, GenerationMixin) and runs_plain(model):
        return _plain_predictions(part, prompts, tokens, samples, read, **arguments)
    prompt_mask = prompts.mask.long()
    padded = not bool(prompts.mask.all())
    limit = keep_logits(model, length + 1) if part is model else {}
    if recomputes(model):  # which allows no cache
        each = prompt_mask.repeat_interleave(samples, dim=0)
        attended = torch.nn.functional.pad(each, (0, length), value=1)
        output = part(
            input_ids=torch.cat([prompts.tokens.repeat_interleave(samples, dim=0), tokens], dim=-1),
            attention_mask=attended if padded else None,
            position_ids=(attended.cumsum(-1) - 1).clamp_(min=0),
            use_cache=False,
            **limit,
            **arguments,
        )
        return [values[:, -length - 1 : -1] for values in read(output)]

    cache = DynamicCache(config=model.config)
    output = part(
        input_ids=prompts.tokens,
        attention_mask=prompt_mask if padded else None,
        position_ids=(prompt_mask.cumsum(-1) - 1).clamp_(min=0),
        past_key_values=cache,
        use_cache=True,
        **(keep_logits(model, 1) if limit else {}),
        **arguments,
    )
    found = [values[:, -1:].repeat_interleave(samples, dim=0) for values in read(output)]
    if length > 1:
        cache.batch_repeat_interleave(samples)
        lengths = prompt_mask.sum(-1).repeat_interleave(samples)
        # Padding behind the EOS needs no mask: it is causal-later than every token that counts.
        attended = torch.nn.functional.pad(prompt_mask.repeat_interleave(samples, dim=0), (0, length - 1), value=1)
        output = part(
            input_ids=tokens[:, :-1],
            attention_mask=attended if padded else None,
            position_ids=lengths[:, None] + torch.arange(length - 1, device=tokens.device),
            past_key_values=cache,
            use_cache=True,
            **limit,
            **arguments,
        )
        found = [torch.cat(both, dim=1) for both in zip(found, read(output), strict=True)]
    if not torch.is_grad_enabled():
        forget_casts(tokens.device)
    return found
