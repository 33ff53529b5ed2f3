"""From a name, a directory or a config to a Hugging Face sequence classifier that is to be trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from vbon_lightning.models.errors import ModelError, cannot_load
from vbon_lightning.models.files import locate
from vbon_lightning.models.loading import (
    check_body,
    checkpoint_arguments,
    disable_dropout,
    new_model,
    new_weights,
    pretrained_model,
)
from vbon_lightning.models.spec import ModelSpec, as_spec, refuse_policy_fields
from vbon_lightning.models.tokenizer import load_tokenizer


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
    refuse_policy_fields(spec, "a reward model")
    tokenizer = load_tokenizer(spec)
    names = {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
        "pad_token_id": tokenizer.pad_token_id,
    }
    if spec.config is not None:
        model = new_model(AutoModelForSequenceClassification, "sequence classifier", spec, seed=seed, **names)
    else:
        _check_labels(spec, len(labels))
        with new_weights(seed):  # of the head
            model, info = pretrained_model(AutoModelForSequenceClassification, spec, **names)
        check_body(spec, model, info)
    if not dropout:
        disable_dropout(model)
    if spec.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train().requires_grad_(True)


def _check_labels(spec: ModelSpec, wanted: int) -> None:
    name, gguf_file = locate("name", str(spec.name), spec.gguf_file)
    try:
        config: Any = AutoConfig.from_pretrained(name, **checkpoint_arguments(spec, gguf_file))
    except Exception as error:
        raise cannot_load("config", "name", name, error) from error
    classifies = any("ForSequenceClassification" in str(kind) for kind in config.architectures or ())
    if classifies and config.num_labels != wanted:
        raise ModelError(
            f"the classifier {spec.name!r} has {config.num_labels} labels ({', '.join(config.id2label.values())}), "
            f"model.labels has {wanted}: name the same ones, or start from another model"
        )
