"""Writing a model in Hugging Face layout."""

from __future__ import annotations

import copy
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from vbon_lightning.adapters import has_adapters, merged_copy
from vbon_lightning.models.errors import ModelError
from vbon_lightning.models.read_back import check_read_back
from vbon_lightning.models.spec import parse_dtype


def save_pretrained(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | os.PathLike[str],
    *,
    generation: Mapping[str, Any] | None = None,
    dtype: str | None = None,
) -> None:
    """Write a model and its tokenizer in Hugging Face layout, whole or not at all, and read it again to compare.

    Args:
        model: The model; it is not changed. Adapters are merged into the weights, and also saved on their own in
            ``adapter``. A tilted model is saved with the code that loads it.
        tokenizer: Its tokenizer.
        directory: The target; replaced if it exists.
        generation: All that the generation config says beside the token ids, such as the temperature the policy was
            trained at: whatever else the base's says (penalties, cut tails, suppressed tokens) is no part of the
            policy. None keeps the model's own.
        dtype: ``float32``, ``bfloat16`` or ``float16`` to cast the saved weights. Default: as they are.

    Raises:
        ModelError: If a generation entry is unknown, or the dtype.
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
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:8]
    beside = target.with_name(f".{target.name}.{mark}.partial")
    old = target.with_name(f".{target.name}.{mark}.old")
    live = model
    try:
        beside.mkdir()
        if has_adapters(model):
            model.save_pretrained(beside / "adapter")
            model = merged_copy(model)
        if isinstance(saved_dtype, torch.dtype):
            weights = {
                key: value.to(saved_dtype) if value.is_floating_point() else value
                for key, value in model.state_dict().items()
            }
            model.save_pretrained(beside, state_dict=weights)
            _set_config_dtype(beside / "config.json", str(dtype))
        else:
            model.save_pretrained(beside)
        if generation_config is not None:
            generation_config.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        check_read_back(live, beside, vocabulary=len(tokenizer))
        if target.exists():
            target.rename(old)
        beside.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def _token_ids_of(config: GenerationConfig) -> GenerationConfig:
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    return GenerationConfig(**{name: getattr(config, name, None) for name in names})


def _set_config_dtype(path: Path, dtype: str) -> None:
    entries = json.loads(path.read_text(encoding="utf-8"))
    entries.pop("torch_dtype", None)
    entries["dtype"] = dtype
    path.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")
