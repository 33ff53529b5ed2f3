"""From a name, a directory or a config to a Hugging Face causal language model, frozen or trainable."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from vbon_lightning.adapters import AdapterError, add_lora
from vbon_lightning.models.errors import ModelError
from vbon_lightning.models.loading import (
    check_no_missing_weights,
    disable_dropout,
    new_model,
    pretrained_model,
)
from vbon_lightning.models.saved import NOT_TILTED
from vbon_lightning.models.spec import ModelSpec, as_spec
from vbon_lightning.models.tilted import TiltedLM, new_tilted_lm
from vbon_lightning.models.tokenizer import check_same_vocabulary, load_tokenizer
from vbon_lightning.models.value import load_body


def load_causal_lm(
    spec: str | Mapping[str, Any] | ModelSpec, *, seed: int = 0, trainable: bool, dropout: bool = False
) -> PreTrainedModel:
    """Load a causal language model, or make a new one from a config.

    Args:
        spec: The model.
        seed: Seed of a new model's weights; the global random state is left as it was.
        trainable: True: in training mode, every parameter requires a gradient. False: in evaluation mode,
            none does.
        dropout: Keep dropout. Off by default: in reinforcement learning it makes the policy that samples
            differ from the policy that is scored.

    Returns:
        A model that can be exported with :func:`save_pretrained`, dequantised if it came from a GGUF file.

    Raises:
        ModelError: If the model cannot be found or loaded, or its checkpoint lacks weights.
    """
    spec = as_spec(spec)
    if spec.config is not None:
        model = new_model(AutoModelForCausalLM, "causal language model", spec, seed=seed)
    else:
        model, info = pretrained_model(AutoModelForCausalLM, spec)
        check_no_missing_weights(str(spec.name), info)
    if spec.tilt is not None:
        model = _tilted(model, spec, seed)
    if spec.dial is not None:
        _turn(model, spec)
    if not dropout:
        disable_dropout(model)
    model.train(trainable)
    model.requires_grad_(trainable)
    if isinstance(model, TiltedLM):
        model.base.requires_grad_(False)
    if spec.lora is not None:
        try:
            add_lora(model, spec.lora, seed=seed)
        except AdapterError as error:
            raise ModelError(str(error)) from error
        if not dropout:
            disable_dropout(model)
        model.train(trainable)
        if not trainable:
            model.requires_grad_(False)
    if spec.gradient_checkpointing and trainable:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _turn(model: PreTrainedModel, spec: ModelSpec) -> None:
    """Turn a tilted model to an N."""
    if not isinstance(model, TiltedLM):
        raise ModelError(NOT_TILTED.format(spec.name or "a new model"))
    assert spec.dial is not None
    try:
        model.turn(spec.dial)
    except ValueError as error:
        raise ModelError(str(error)) from error


def _tilted(base: PreTrainedModel, spec: ModelSpec, seed: int) -> PreTrainedModel:
    """Give a model a tower that tilts it."""
    tower = dataclasses.replace(
        spec, name=spec.tilt, config=None, gguf_file=None, revision=None, tokenizer=None, tilt=None, dial=None
    )
    check_same_vocabulary(load_tokenizer(spec), load_tokenizer(tower), what="a model and the body that tilts it")
    if isinstance(base, TiltedLM):
        raise ModelError(f"the model {spec.name!r} is tilted already: leave `tilt` out to train it on")
    return new_tilted_lm(base, load_body(tower, seed))
