"""From a name, a directory or a config to a Hugging Face sequence classifier that is to be trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from vbon_lightning.models import (
    ModelError,
    ModelSpec,
    as_spec,
    disable_dropout,
    load_tokenizer,
    locate,
    parse_dtype,
)


def load_classifier(
    spec: str | Mapping[str, Any] | ModelSpec, *, labels: Sequence[str], seed: int = 0, dropout: bool = True
) -> PreTrainedModel:
    """Load a sequence classifier to train: a language model's body with a new head, or a classifier as it is.

    Args:
        spec: The model: any checkpoint whose body transformers can put a classification head on.
        labels: Names of the labels, by index; one makes a scalar reward model.
        seed: Seed of a new head (or of a new model); the global random state is left as it was.
        dropout: Keep the dropout that the model's config asks for.

    Returns:
        A model in training mode whose parameters all require a gradient.

    Raises:
        ModelError: If the model cannot be found or loaded, lacks more than its head, or has another number of labels.
    """
    spec = as_spec(spec)
    if spec.lora is not None:
        raise ModelError("a reward model is trained whole: leave `lora` out")
    tokenizer = load_tokenizer(spec)
    names = {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
        "pad_token_id": tokenizer.pad_token_id,
    }
    # On the CPU whatever the default device is: the same seed then gives the same head everywhere.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        try:
            model = _new(spec, names) if spec.config is not None else _pretrained(spec, names)
        except ModelError:
            raise
        except Exception as error:  # transformers raises many types here; every one means the same to a user
            reason = " ".join(str(error).split())[:400]
            raise ModelError(f"no sequence classifier from {spec.name or spec.config!r}: {reason}") from error
    if not dropout:
        disable_dropout(model)
    if spec.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train().requires_grad_(True)


def _new(spec: ModelSpec, names: dict[str, Any]) -> PreTrainedModel:
    entries = dict(spec.config or {})
    model_type = entries.pop("model_type")
    entries.setdefault("vocab_size", len(load_tokenizer(spec)))
    config = AutoConfig.for_model(model_type, **(entries | names))
    dtype = parse_dtype(spec.dtype)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(
        config, dtype=torch.float32 if dtype == "auto" else dtype
    )
    return model


def _pretrained(spec: ModelSpec, names: dict[str, Any]) -> PreTrainedModel:
    name, gguf_file = locate("name", str(spec.name), spec.gguf_file)
    where = {"gguf_file": gguf_file, "revision": spec.revision}
    where = {key: value for key, value in where.items() if value is not None}
    _check_labels(name, where, spec.trust_remote_code, names["num_labels"])
    given = where | ({} if spec.attn_implementation is None else {"attn_implementation": spec.attn_implementation})
    loaded: Any = AutoModelForSequenceClassification.from_pretrained(
        name,
        dtype=parse_dtype(spec.dtype),
        trust_remote_code=spec.trust_remote_code,
        output_loading_info=True,
        **given,
        **names,
    )
    model, info = loaded
    # A head that a language model lacks is new; a body with gaps would be half random.
    body = model.base_model_prefix
    missing = sorted(str(key) for key in info.get("missing_keys", ()) if str(key).startswith(f"{body}."))
    missing = [key for key in missing if ".pooler." not in key]
    if missing:
        raise ModelError(
            f"the checkpoint {name!r} lacks {len(missing)} weights of the model's body, such as "
            f"{', '.join(missing[:3])}: they would be random"
        )
    return model


def _check_labels(name: str, where: dict[str, Any], trusted: bool, wanted: int) -> None:
    config: Any = AutoConfig.from_pretrained(name, trust_remote_code=trusted, **where)
    classifies = any("ForSequenceClassification" in str(kind) for kind in config.architectures or ())
    if classifies and config.num_labels != wanted:
        raise ModelError(
            f"the classifier {name!r} has {config.num_labels} labels ({', '.join(config.id2label.values())}), "
            f"model.labels has {wanted}: name the same ones, or start from another model"
        )
