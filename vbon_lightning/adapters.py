"""Low-rank adapters (LoRA) by peft: a policy whose base, its adapters switched off, is the reference."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class AdapterError(ValueError):
    """A description of adapters that peft refuses, or peft itself missing."""


def add_lora(model: PreTrainedModel, entries: Mapping[str, Any], *, seed: int = 0) -> None:
    """Give a model low-rank adapters in place; only they require a gradient afterwards.

    The model keeps its class and computes what it did before, since new adapters add zero; https://arxiv.org/abs/2106.09685.

    Args:
        model: A causal language model.
        entries: Entries of peft's ``LoraConfig``, such as ``r`` and ``lora_alpha``. ``target_modules`` is every
            linear layer but the output head by default.
        seed: Seeds the adapters' weights; the global random state is left as it was.

    Raises:
        AdapterError: If peft is not installed or refuses the entries.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise AdapterError("`lora` needs peft: pip install 'vbon_lightning[lora]'") from error
    settings = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"} | dict(entries)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        try:
            model.add_adapter(LoraConfig(**settings))
        except (TypeError, ValueError) as error:
            raise AdapterError(f"`lora` is refused by peft: {error}") from error


def has_adapters(model: nn.Module) -> bool:
    """Return whether a model has adapters."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


@contextmanager
def adapters_off(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Switch a model's adapters off for a while: it then is its base."""
    model.disable_adapters()
    try:
        yield model
    finally:
        model.enable_adapters()


def merged_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model with its adapters added into the weights: a plain model, which needs no peft."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    copied = copy.deepcopy(model)
    for name, module in list(copied.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            copied.set_submodule(name, module.get_base_layer())
    del copied.peft_config
    copied._hf_peft_config_loaded = False
    return copied


def adapters_active(model: nn.Module) -> bool:
    """Return whether a model has adapters and they are on."""
    if not has_adapters(model):
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) and not module.disable_adapters for module in model.modules())


def merged_parameters(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Give the parameters of the plain model that a model with adapters equals now, under the plain model's names.

    Each weight is merged when it is asked for: no second copy of the model is made. Without adapters, or with them
    off, these are the model's own parameters. Tied parameters appear once.
    """
    if not has_adapters(model):
        for name, parameter in model.named_parameters():
            yield name, parameter.detach()
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    for name, parameter in model.named_parameters():
        owner = next((layer for layer in layers if name.startswith(f"{layer}.")), None)
        if owner is None:
            yield name, parameter.detach()
        elif name.startswith(f"{owner}.base_layer."):
            layer: Any = layers[owner]
            weight = parameter.detach()
            if name == f"{owner}.base_layer.weight" and not layer.disable_adapters:
                for adapter in layer.active_adapters:
                    weight = weight + layer.get_delta_weight(adapter).detach().to(weight.dtype)
            yield name.replace(".base_layer.", "."), weight
