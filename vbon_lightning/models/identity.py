"""What a model computes, as hashes for fingerprints."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vbon_lightning.models.files import TOKENIZER_FILES, check_directory, locate, matching, read_json, weight_files
from vbon_lightning.models.spec import ModelSpec, as_spec
from vbon_lightning.models.sums import hash_file

# What a config holds that says where or with what it was written, not what the model computes.
_NOT_IDENTITY = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


def model_identity(spec: str | Mapping[str, Any] | ModelSpec, *, seed: int = 0) -> dict[str, str]:
    """Describe a model by what it computes, for fingerprints, without loading its weights.

    A local model is described by hashes of its config, weights and tokenizer files, whatever its path; a hub
    model by its name and revision; a new model by its config and seed.

    Args:
        spec: The model.
        seed: Seed of a new model's weights, as given to :func:`load_causal_lm`.
    """
    spec = as_spec(spec)
    identity = {"dtype": spec.dtype or "float32"}
    if spec.dial is not None:
        identity["dial"] = repr(float(spec.dial))
    if spec.tilt is not None:
        tilt, _ = locate("tilt", spec.tilt)
        identity |= {f"tilt_{key}": value for key, value in _directory_identity(tilt, None, None).items()}
    if spec.lora is not None:
        identity |= {"lora": _canonical(spec.lora), "lora_seed": str(seed)}
    if spec.config is not None:
        identity |= {"config": _hash_text(_canonical(spec.config)), "seed": str(seed)}
    else:
        name, gguf_file = locate("name", str(spec.name), spec.gguf_file)
        identity |= _directory_identity(name, gguf_file, spec.revision)
    if spec.tokenizer is not None:
        tokenizer, gguf_file = locate("tokenizer", spec.tokenizer)
        if os.path.isdir(tokenizer):
            identity["tokenizer"] = _hash_tokenizer(tokenizer, gguf_file)
        else:
            identity["tokenizer"] = tokenizer
    return identity


def _directory_identity(name: str, gguf_file: str | None, revision: str | None) -> dict[str, str]:
    if not os.path.isdir(name):
        identity = {"name": name, "revision": revision or "main"}
        return identity | ({"gguf_file": gguf_file} if gguf_file else {})
    if gguf_file is not None:
        return {
            "weights": hash_file(os.path.join(name, gguf_file)),
            "tokenizer": _hash_tokenizer(name, gguf_file),
        }
    check_directory(name, None)  # what is missing or broken is to be told as such, not as another model
    identity = {"weights": _hash_files(weight_files(name)), "tokenizer": _hash_tokenizer(name, None)}
    config = Path(name, "config.json")
    if config.is_file():
        identity["config"] = _hash_text(_canonical(read_json(config)))
    generation = Path(name, "generation_config.json")
    if generation.is_file():  # it may name other end tokens than the config, and they decide where responses stop
        ends = read_json(generation).get("eos_token_id")
        identity["end_tokens"] = json.dumps(ends)
    return identity


def _canonical(entries: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in entries.items() if key not in _NOT_IDENTITY}
    return json.dumps(kept, sort_keys=True, default=str)


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _hash_tokenizer(directory: str, gguf_file: str | None) -> str:
    if gguf_file is not None:
        return hash_file(os.path.join(directory, gguf_file))
    return _hash_files(matching(directory, TOKENIZER_FILES))


def _hash_files(paths: list[Path]) -> str:
    return _hash_text("\n".join(f"{path.name} {hash_file(path)}" for path in paths))
