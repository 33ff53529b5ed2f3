"""Which model to use, in plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vbon_lightning.models.errors import ModelError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class ModelSpec:
    """Say which causal language model to use, in plain data.

    Args:
        name: Hub name or local directory. May use ``~``, ``${VAR}`` and ``package:NAME/path/inside``.
        gguf_file: A GGUF file inside ``name``; its weights are dequantised on loading.
        revision: Branch, tag or commit of a hub model.
        config: A new model instead of a pretrained one: the entries of a Hugging Face config, with its
            ``model_type``. Needs ``tokenizer``; not together with ``name``. A missing ``vocab_size`` and
            missing special token ids are taken from the tokenizer.
        tokenizer: Hub name or local directory of the tokenizer. Default: the model's own.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for what the checkpoint says. Default:
            ``float32``.
        attn_implementation: ``eager``, ``sdpa``, ``flash_attention_2``, ... Default: what transformers
            chooses.
        trust_remote_code: Run model code that comes with the checkpoint.
        lora: Train low-rank adapters instead of the weights: entries of peft's ``LoraConfig``, such as ``r`` and
            ``lora_alpha``. The base then is the reference, unless another is named. Needs the ``lora`` extra.
        tilt: Leave the weights as they are, and train another body to tilt the next-token distribution: a hub name or
            directory of a value model, reward model or language model with the same tokenizer
            (:class:`~vbon_lightning.models.tilted.TiltedLM`). The untilted model is the reference, unless another is
            named.
        gradient_checkpointing: Compute activations again in the backward pass instead of keeping them.
        dial: The N to turn a tilted model to; by default the one that it was exported at.
    """

    name: str | None = None
    gguf_file: str | None = None
    revision: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    dtype: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    lora: dict[str, Any] | None = None
    tilt: str | None = None
    gradient_checkpointing: bool = False
    dial: float | None = None

    @property
    def trained_whole(self) -> bool:
        """Return whether it is the model's own weights that are trained, not what is put on them or beside them."""
        return self.lora is None and self.tilt is None

    def base(self) -> ModelSpec:
        """Return the model without what only training needs: what it is at the start."""
        return dataclasses.replace(self, lora=None, tilt=None, gradient_checkpointing=False)


def as_spec(value: str | Mapping[str, Any] | ModelSpec) -> ModelSpec:
    """Turn a name, a mapping or a spec into a checked spec.

    Args:
        value: A hub name or directory, the fields of a :class:`ModelSpec`, or one.

    Raises:
        ModelError: If a field is unknown, or the fields contradict each other.
    """
    if isinstance(value, ModelSpec):
        spec = value
    elif isinstance(value, str):
        if value.lstrip().startswith("{"):  # a mapping that the command line could not read as one
            names = ", ".join(field.name for field in dataclasses.fields(ModelSpec))
            raise ModelError(f"unknown model field in {value!r}: the fields are {names}")
        spec = ModelSpec(name=value)
    else:
        fields = dict(value.as_dict() if hasattr(value, "as_dict") else value)
        known = [field.name for field in dataclasses.fields(ModelSpec)]
        unknown = sorted(set(fields) - set(known))
        if unknown:
            raise ModelError(f"unknown model field {', '.join(unknown)}: the fields are {', '.join(known)}")
        spec = ModelSpec(**fields)
    if spec.name is None and spec.config is None:
        raise ModelError("give the model's `name` (hub name or directory), or a `config` for a new model")
    if spec.name is not None and spec.config is not None:
        raise ModelError("give the model's `name` or a `config` for a new model, not both")
    if spec.config is not None:
        if spec.tokenizer is None:
            raise ModelError("a new model from `config` needs a `tokenizer` (hub name or directory)")
        if "model_type" not in spec.config:
            raise ModelError("the model's `config` needs a `model_type`, such as gpt2 or llama")
        if spec.gguf_file is not None:
            raise ModelError("`gguf_file` is a file inside `name`; it does not go with `config`")
    if spec.tilt is not None and spec.lora is not None:
        raise ModelError("`tilt` leaves the model's weights as they are, `lora` changes them: give one of them")
    parse_dtype(spec.dtype)
    return spec


def refuse_policy_fields(spec: ModelSpec, what: str) -> None:
    """Refuse what only a policy has, for a model that is trained or loaded whole.

    Args:
        spec: The model.
        what: What it is, for the message: "a reward model".

    Raises:
        ModelError: Naming the field.
    """
    for name in ("lora", "tilt", "dial"):
        if getattr(spec, name) is not None:
            raise ModelError(f"{what} is trained whole: leave `{name}` out")


def parse_dtype(dtype: str | None) -> torch.dtype | str:
    """Turn a dtype's name into a ``torch.dtype``, or ``"auto"``.

    Args:
        dtype: The name; None means ``float32``.

    Raises:
        ModelError: If the name is not known.
    """
    if dtype is None:
        return torch.float32
    if dtype == "auto":
        return "auto"
    if dtype not in _DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}: give one of {', '.join(_DTYPES)}, auto")
    return _DTYPES[dtype]
