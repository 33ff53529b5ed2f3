"""Writing a model in Hugging Face layout."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from vbon_lightning.adapters import has_adapters, merged_copy
from vbon_lightning.finite import NotFiniteError, first_not_finite
from vbon_lightning.models.errors import ModelError
from vbon_lightning.models.read_back import check_read_back
from vbon_lightning.models.spec import parse_dtype
from vbon_lightning.models.sums import write_sums
from vbon_lightning.staging import staged_directory


def save_pretrained(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | os.PathLike[str],
    *,
    generation: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write a model and its tokenizer in Hugging Face layout, whole or not at all, and read it again to compare.

    ``SHA256SUMS`` beside the weights says what they are, for whoever loads them (and for ``sha256sum -c``).

    Args:
        model: The model; it is not changed. Adapters are merged into the weights, and also saved on their own in
            ``adapter``. A tilted model is saved with the code that loads it.
        tokenizer: Its tokenizer.
        directory: The target; replaced if it exists, at once: whoever opens it finds the old model or the new one.
        generation: All that the generation config says beside the token ids, such as the temperature the policy was
            trained at: whatever else the base's says (penalties, cut tails, suppressed tokens) is no part of the
            policy. None keeps the model's own.
        dtype: ``float32``, ``bfloat16`` or ``float16`` to cast the saved weights. Default: as they are.
        texts: Further files to go with it, such as a model card, by name.

    Raises:
        ModelError: If a generation entry is unknown, or the dtype.
        NotFiniteError: If a weight is NaN or infinite, as it is or in that dtype; an older model there stays.
        ReadBackError: If what was written is another model; nothing is left of it.
    """
    target = Path(os.path.abspath(directory))
    if target.exists() and not target.is_dir():
        raise ModelError(f"cannot save a model to {str(target)!r}: it is a file")
    generation_config = None
    if model.can_generate():
        own = model.generation_config or GenerationConfig()
        generation_config = copy.deepcopy(own) if generation is None else _token_ids_of(own)
        unknown = generation_config.update(**(generation or {}))
        if unknown:
            raise ModelError(f"unknown generation entry {', '.join(sorted(unknown))}")
    saved_dtype = parse_dtype(dtype) if dtype not in (None, "auto") else None
    _check_finite(model.state_dict(), target)
    live = model
    with staged_directory(target) as staged:
        if has_adapters(model):
            model.save_pretrained(staged / "adapter")
            model = merged_copy(model)
        if isinstance(saved_dtype, torch.dtype):
            weights = {
                key: value.to(saved_dtype) if value.is_floating_point() else value
                for key, value in model.state_dict().items()
            }
            _check_finite(weights, target, f" in {dtype}")
            model.save_pretrained(staged, state_dict=weights)
            _set_config_dtype(staged / "config.json", str(dtype))
        else:
            model.save_pretrained(staged)
        if generation_config is not None:
            generation_config.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        check_read_back(live, staged, vocabulary=len(tokenizer))
        for name, text in (texts or {}).items():
            Path(staged, name).write_text(text, encoding="utf-8")
        write_sums(staged)


def _check_finite(weights: Mapping[str, torch.Tensor], target: Path, where: str = "") -> None:
    name = first_not_finite(weights.items())
    if name is not None:
        raise NotFiniteError(
            f"the model is not exported to {str(target)!r}: its weight {name} holds NaN or infinity{where}; "
            "what was there before stays as it is"
        )


def _token_ids_of(config: GenerationConfig) -> GenerationConfig:
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    return GenerationConfig(**{name: getattr(config, name, None) for name in names})


def _set_config_dtype(path: Path, dtype: str) -> None:
    entries = json.loads(path.read_text(encoding="utf-8"))
    entries.pop("torch_dtype", None)
    entries["dtype"] = dtype
    path.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")
