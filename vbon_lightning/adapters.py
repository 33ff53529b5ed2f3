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
    _check_base_untouched(model, settings)


def _check_base_untouched(model: PreTrainedModel, settings: Mapping[str, Any]) -> None:
    """Refuse adapters with which the base could not be had by switching them off, or the whole not be exported."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    if settings.get("bias", "none") != "none":
        raise AdapterError(
            f"`lora` has bias {settings['bias']!r}: the base's own biases would be trained, and the base is the "
            "reference; leave `bias` out"
        )
    changed = {name: part for name, part in model.named_modules() if isinstance(part, AuxiliaryTrainingWrapper)}
    for name, part in changed.items():
        if not isinstance(part, ModulesToSaveWrapper):
            raise AdapterError(f"`lora` trains parts of {name}, which cannot be switched off to have the reference")
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper):
            name = next(name for name, module in model.named_modules() if module is layer)
            raise AdapterError(
                f"`lora` trains {name}, and this model's input and output embeddings are one matrix: they would be two "
                "after training, which its config cannot say; leave it out of `target_modules` and `modules_to_save`, "
                "or start from a copy of the model whose embeddings are untied (`tie_word_embeddings: false`)"
            )


def has_adapters(model: nn.Module) -> bool:
    """Return whether a model has adapters."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


@contextmanager
def adapters_off(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Switch a model's adapters off for a while: it then is its base."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    # transformers' own switch does not turn the layers that are trained whole on again.
    parts = [part for part in model.modules() if isinstance(part, BaseTunerLayer | ModulesToSaveWrapper)]
    for part in parts:
        part.enable_adapters(enabled=False)
    try:
        yield model
    finally:
        for part in parts:
            part.enable_adapters(enabled=True)


def merged_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model with its adapters added into the weights: a plain model, which needs no peft."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    copied = copy.deepcopy(model)
    for name, module in list(copied.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            copied.set_submodule(name, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            copied.set_submodule(name, module.modules_to_save[module.active_adapters[0]])
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
    from peft.utils import ModulesToSaveWrapper

    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    copies = {name: module for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    for name, parameter in model.named_parameters():
        owner = next((layer for layer in layers if name.startswith(f"{layer}.")), None)
        copied = next((wrapper for wrapper in copies if name.startswith(f"{wrapper}.")), None)
        if copied is not None:
            wrapper: Any = copies[copied]
            used = "original_module" if wrapper.disable_adapters else f"modules_to_save.{wrapper.active_adapters[0]}"
            if name.startswith(f"{copied}.{used}."):
                yield name.replace(f".{used}.", "."), parameter.detach()
        elif owner is None:
            yield name, parameter.detach()
        elif name.startswith(f"{owner}.base_layer."):
            layer: Any = layers[owner]
            weight = parameter.detach()
            if name == f"{owner}.base_layer.weight" and not layer.disable_adapters:
                for adapter in layer.active_adapters:
                    weight = weight + layer.get_delta_weight(adapter).detach().to(weight.dtype)
            yield name.replace(".base_layer.", "."), weight
