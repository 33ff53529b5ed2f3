"""Distributional value models: token classifiers whose labels are bins of the reward to come."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForTokenClassification, PreTrainedModel

from vbon_lightning.functional import RewardBins
from vbon_lightning.models.errors import ModelError
from vbon_lightning.models.loading import (
    check_body,
    check_no_missing_weights,
    disable_dropout,
    new_model,
    new_weights,
    pretrained_model,
)
from vbon_lightning.models.spec import ModelSpec, as_spec

_ENTRY = "value_model"
"""The entry of the model's config that holds the bins and what they were made of."""


def new_value_model(
    spec: str | Mapping[str, Any] | ModelSpec,
    bins: RewardBins,
    *,
    fingerprint: Mapping[str, Any],
    seed: int = 0,
    dropout: bool = False,
) -> PreTrainedModel:
    """Put a head of K bins on a model's body, to be trained.

    Args:
        spec: A language model, a reward model or a value model whose body to start from.
        bins: The bins.
        fingerprint: What the rewards are of, in plain values: the reference table's.
        seed: Seed of the new head (or of a new model); the global random state is left as it was.
        dropout: Keep the dropout that the model's config asks for.

    Returns:
        A token classifier with K labels, in training mode, whose config holds the bins.

    Raises:
        ModelError: If the model cannot be found or loaded, or lacks more than its head.
    """
    spec = as_spec(spec)
    if spec.lora is not None:
        raise ModelError("a value model is trained whole: leave `lora` out")
    labels = {"num_labels": bins.size}
    if spec.config is not None:
        model = new_model(AutoModelForTokenClassification, "token classifier", spec, seed=seed, **labels)
    else:
        with new_weights(seed):  # of the head
            model, info = pretrained_model(
                AutoModelForTokenClassification, spec, ignore_mismatched_sizes=True, **labels
            )
        check_body(spec, model, info)
    head = value_head(model)
    # Every bin alike at first: a reward model's head has other labels.
    nn.init.zeros_(head.weight)
    if head.bias is not None:
        nn.init.zeros_(head.bias)
    entry = {"edges": bins.edges.tolist(), "atoms": bins.atoms.tolist(), "table": dict(fingerprint)}
    setattr(model.config, _ENTRY, entry)
    if not dropout:
        disable_dropout(model)
    if spec.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train().requires_grad_(True)


def load_value_model(spec: str | Mapping[str, Any] | ModelSpec) -> PreTrainedModel:
    """Load a trained value model, frozen.

    Args:
        spec: What ``vbon fit`` with ``ValueModelling`` exported.

    Returns:
        A token classifier in evaluation mode whose parameters require no gradient.

    Raises:
        ModelError: If there is no such model, or it is none of the reward to come.
    """
    spec = as_spec(spec)
    if spec.name is None:
        raise ModelError("a value model is trained first: give its directory as `name`")
    model, info = pretrained_model(AutoModelForTokenClassification, spec)
    value_bins(model)
    check_no_missing_weights(str(spec.name), info)
    disable_dropout(model)
    return model.eval().requires_grad_(False)


def value_bins(model: PreTrainedModel) -> RewardBins:
    """Return the bins of a value model.

    Raises:
        ModelError: If the model is none.
    """
    entry = _entry(model)
    return RewardBins(
        torch.tensor(entry["edges"], dtype=torch.float64), torch.tensor(entry["atoms"], dtype=torch.float64)
    )


def value_fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """Return what a value model's rewards are of: the fingerprint of the table it was trained on."""
    return dict(_entry(model)["table"])


def value_head(model: PreTrainedModel) -> nn.Linear:
    """Return the layer that turns a value model's hidden states into bins.

    Raises:
        ModelError: If there is not exactly one linear layer behind the body.
    """
    body = model.base_model
    inside = {id(module) for module in body.modules()}
    heads = [module for module in model.modules() if isinstance(module, nn.Linear) and id(module) not in inside]
    if len(heads) != 1:
        raise ModelError(f"{type(model).__name__} has {len(heads)} linear layers behind its body where one is needed")
    return heads[0]


def _entry(model: PreTrainedModel) -> dict[str, Any]:
    entry = getattr(model.config, _ENTRY, None)
    if not isinstance(entry, dict):
        raise ModelError(
            f"{getattr(model.config, '_name_or_path', '') or 'this model'!r} is no value model: its config has no "
            f"{_ENTRY!r} entry; train one with `ValueModelling` and give its export"
        )
    return entry
