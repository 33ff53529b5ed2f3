"""What loading any kind of model has in common."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from vbon_lightning.finite import first_not_finite
from vbon_lightning.models.errors import ModelError, cannot_load, shorten
from vbon_lightning.models.files import check_directory, locate
from vbon_lightning.models.spec import ModelSpec, parse_dtype
from vbon_lightning.models.tokenizer import load_tokenizer

_RANDOM_REGULARISER = re.compile("drop|jitter")


def check_no_missing_weights(name: str, info: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that left weights at random values, which transformers only warns of.

    Args:
        name: The model's name, for the message.
        info: What ``from_pretrained(..., output_loading_info=True)`` returned beside the model.

    Raises:
        ModelError: If weights are missing or have another shape.
    """
    missing = sorted(str(key) for key in info.get("missing_keys", ()))
    missing += sorted(str(key) for key in info.get("mismatched_keys", ()))
    if missing:
        raise ModelError(
            f"the checkpoint {name!r} lacks {len(missing)} weights of this kind of model, such as "
            f"{', '.join(missing[:3])}: they would be random; give a checkpoint that was trained for the task"
        )


def check_finite(name: str, model: nn.Module) -> None:
    """Refuse a model whose weights are no numbers: of a run that diverged, or of a file that is broken.

    Args:
        name: The model's name, for the message.
        model: The model.

    Raises:
        ModelError: Naming the first weight that holds NaN or infinity.
    """
    bad = first_not_finite(model.named_parameters())
    if bad is not None:
        raise ModelError(
            f"the weight {bad} of the model {name!r} holds NaN or infinity: it comes from a run that diverged, or is "
            "broken; give another model, or export it again from its last good checkpoint"
        )


def check_body(spec: ModelSpec, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose body has gaps, which would be random; a head that it lacks is new.

    Args:
        spec: What was loaded, for the message.
        model: The model.
        info: What ``from_pretrained(..., output_loading_info=True)`` returned beside it.

    Raises:
        ModelError: If weights of the body are missing.
    """
    # A model that is a body (AutoModel's) names its weights without the prefix.
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    missing = sorted(str(key) for key in info.get("missing_keys", ()) if str(key).startswith(prefix))
    missing = [key for key in missing if "pooler" not in key.split(".")]
    if missing:
        raise ModelError(
            f"the checkpoint {spec.name!r} lacks {len(missing)} weights of the model's body, such as "
            f"{', '.join(missing[:3])}: they would be random"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a while; each of its modules goes back to the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def check_causal(spec: ModelSpec, body: PreTrainedModel) -> None:
    """Refuse a body that reads ahead: its state at a prefix would know what follows.

    Args:
        spec: What was loaded, for the message.
        body: The body.

    Raises:
        ModelError: If a token changes the states before it.
    """
    tokens = torch.tensor([[0, 1, 1], [0, 1, 2]], device=body.device) % body.config.get_text_config().vocab_size
    with evaluating(body):
        first, second = body(input_ids=tokens).last_hidden_state[:, :2]
    if not torch.allclose(first, second, atol=1e-4, rtol=1e-3):
        raise ModelError(
            f"the body of {spec.name or 'the config'!r} is no causal one (it reads ahead, as encoders do): give a "
            "language model, or a reward or value model made of one"
        )


def disable_dropout(model: nn.Module) -> None:
    """Turn dropout off in place, so that training mode computes what evaluation mode does.

    Covers dropout modules, floats that modules keep for functional dropout (``attention_dropout``,
    ``layerdrop``), router jitter, and the entries of the config that are read in the forward pass.

    Args:
        model: The model.
    """
    configs: list[PreTrainedConfig] = []
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        _zero_regularisers(module)
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and not any(config is known for known in configs):
            configs.append(config)
    for config in configs:
        _zero_regularisers(config)
        for inner in vars(config).values():
            if isinstance(inner, PreTrainedConfig):
                _zero_regularisers(inner)


def _zero_regularisers(holder: object) -> None:
    for key, value in list(vars(holder).items()):
        if isinstance(value, float) and value and _RANDOM_REGULARISER.search(key):
            setattr(holder, key, 0.0)


def without_quantisation(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model from a GGUF file as one that can be saved: transformers marks what it dequantised as quantised."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        plain: Any = type(model)(config)
    plain.to(model.dtype).load_state_dict(model.state_dict(), strict=True)
    if hasattr(model, "generation_config"):  # classifiers generate nothing
        plain.generation_config = model.generation_config
    return cast(PreTrainedModel, plain.to(model.device))


@contextmanager
def new_weights(seed: int) -> Iterator[None]:
    """Draw new weights from a seed; the global random state is left as it was."""
    # On the CPU whatever the default device is: the same seed then gives the same weights everywhere.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield


def new_model(auto: Any, kind: str, spec: ModelSpec, *, seed: int, **entries: Any) -> PreTrainedModel:
    """Make a model from ``spec.config``; what that leaves out of vocabulary and special tokens is the tokenizer's.

    Args:
        auto: One of transformers' auto classes.
        kind: What it makes, for messages.
        spec: A spec with a config.
        seed: Seed of the weights.
        **entries: Further entries of the config.

    Raises:
        ModelError: If the config is refused, or its vocabulary is smaller than the tokenizer's.
    """
    tokenizer = load_tokenizer(spec)
    values = dict(spec.config or {}) | entries
    model_type = values.pop("model_type")
    values.setdefault("vocab_size", len(tokenizer))
    if values["vocab_size"] < len(tokenizer):
        raise ModelError(
            f"the model's `config` has vocab_size {values['vocab_size']}, but its tokenizer has {len(tokenizer)} "
            "tokens: leave vocab_size out, or raise it"
        )
    # A config class has ids of its own for these, which mean other tokens in this tokenizer.
    for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
        values.setdefault(role, getattr(tokenizer, role))
    try:
        config = AutoConfig.for_model(model_type, **values)
    except Exception as error:
        raise ModelError(f"the model's `config` is refused by transformers: {shorten(error)}") from error
    dtype = parse_dtype(spec.dtype)
    arguments: dict[str, Any] = {"dtype": torch.float32 if dtype == "auto" else dtype}
    if spec.attn_implementation is not None:
        arguments["attn_implementation"] = spec.attn_implementation
    with new_weights(seed):
        try:
            model: PreTrainedModel = auto.from_config(config, **arguments)
        except ValueError as error:
            raise ModelError(f"no {kind} from `config`: {shorten(error)}") from error
    return model


def pretrained_model(auto: Any, spec: ModelSpec, **entries: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a checkpoint, and what transformers says about its weights.

    Args:
        auto: One of transformers' auto classes.
        spec: A spec with a name.
        **entries: Further entries of the config.

    Returns:
        The model, dequantised if it came from a GGUF file, and the loading info.

    Raises:
        ModelError: If there is no such model, or transformers cannot load it.
    """
    name, gguf_file = locate("name", str(spec.name), spec.gguf_file)
    if os.path.isdir(name):
        check_directory(name, gguf_file)
    arguments = checkpoint_arguments(spec, gguf_file)
    if spec.attn_implementation is not None:
        arguments["attn_implementation"] = spec.attn_implementation
    try:
        model, info = auto.from_pretrained(
            name, dtype=parse_dtype(spec.dtype), output_loading_info=True, **arguments, **entries
        )
    except Exception as error:  # transformers raises many types here; every one means the same to a user
        raise cannot_load("model", "name", name, error) from error
    check_finite(name, model)
    return (without_quantisation(model) if gguf_file is not None else model), info


def checkpoint_arguments(spec: ModelSpec, gguf_file: str | None) -> dict[str, Any]:
    """Return what transformers needs to find a checkpoint's files, its config alone too."""
    given = {"gguf_file": gguf_file, "revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    return {key: value for key, value in given.items() if value is not None}
