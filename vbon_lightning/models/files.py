"""Where a model's files are, and which of them it needs."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vbon_lightning.models.errors import ModelError, shorten
from vbon_lightning.models.sums import check_sums
from vbon_lightning.paths import PathError, looks_like_path, resolve_path
from vbon_lightning.staging import stand_in

# What transformers looks for, in its order of preference.
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)

# Files that can be a tokenizer on their own; the others only describe one.
TOKENIZER_VOCABULARIES = tuple(
    name for name in TOKENIZER_FILES if name not in ("tokenizer_config.json", "special_tokens_map.json")
)


def locate(field: str, text: str, gguf_file: str | None = None) -> tuple[str, str | None]:
    """Resolve a model's name to a directory that exists, or to a hub name, and the GGUF file in it.

    Args:
        field: The field it was given in, for messages.
        text: The name as given; a path to a GGUF file is taken apart.
        gguf_file: A GGUF file inside it.

    Raises:
        ModelError: If it can only be a path, and nothing is there.
    """
    try:
        name = resolve_path(text)
    except PathError as error:
        raise ModelError(f"`{field}`: {error}") from error
    if os.path.isfile(name):
        if not name.endswith(".gguf") or gguf_file is not None:
            raise ModelError(f"`{field}`: {name!r} is a file; give the directory that holds it")
        name, gguf_file = os.path.split(os.path.abspath(name))
    if not os.path.exists(name) and (kept := stand_in(Path(name).absolute())) is not None:
        warnings.warn(
            f"`{field}`: {name!r} was being replaced when its writer died: {str(kept)!r} is read", stacklevel=2
        )
        name = str(kept)
    if not os.path.isdir(name) and looks_like_path(name):
        raise ModelError(f"`{field}`: the directory {name!r} does not exist")
    if gguf_file is not None and os.path.isdir(name) and not os.path.isfile(os.path.join(name, gguf_file)):
        found = [path.name for path in matching(name, ("*.gguf",))]
        raise ModelError(
            f"`gguf_file`: the directory {name!r} holds no {gguf_file!r}; its GGUF files: {', '.join(found) or 'none'}"
        )
    return name, gguf_file


def check_directory(name: str, gguf_file: str | None, field: str = "name") -> None:
    """Refuse a directory without a config or weights, and say what it holds instead; and one whose files are broken.

    Args:
        name: The directory.
        gguf_file: The GGUF file in it that is meant, which needs nothing beside it.
        field: The field it was given in, for messages.

    Raises:
        ModelError: Naming the file that is broken, or what is missing.
    """
    if gguf_file is not None:
        return
    gguf = [path.name for path in matching(name, ("*.gguf",))]
    hint = f": it holds {', '.join(gguf)}, give `gguf_file`" if gguf else ""
    configs = matching(name, ("config.json", "adapter_config.json"))
    if not configs:
        raise ModelError(f"`{field}`: the directory {name!r} holds no config.json" + (hint or ": is it a saved model?"))
    for path in configs:
        read_json(path, field)
    weights = weight_files(name)
    if not weights:
        raise ModelError(
            f"`{field}`: the directory {name!r} holds no weights ({', '.join(_WEIGHTS)})"
            + (hint or ": for a new model, give a `config` and a `tokenizer` instead")
        )
    for path in weights:
        _check_whole(path, field)
    check_sums(name, field)


def read_json(path: Path, field: str = "name") -> dict[str, Any]:
    """Return what a JSON file of a model says.

    Args:
        path: The file.
        field: The field its directory was given in, for the message.

    Raises:
        ModelError: If it cannot be read, is no JSON or no mapping.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"`{field}`: {str(path)!r} is broken, it is no JSON: {shorten(error)}") from error
    if not isinstance(found, dict):
        raise ModelError(f"`{field}`: {str(path)!r} is broken: it holds no mapping but a {type(found).__name__}")
    return found


def _check_whole(path: Path, field: str) -> None:
    if path.stat().st_size == 0:
        raise ModelError(f"`{field}`: {str(path)!r} is broken: it is empty. Copy it again, or export it again")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):  # which compares its header with its size
                pass
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(
                f"`{field}`: {str(path)!r} is broken or cut short: {shorten(error)}. Copy it again, or export it again"
            ) from error


def matching(directory: str, patterns: tuple[str, ...]) -> list[Path]:
    """Return the files of a directory that fit one of the patterns."""
    return sorted({path for pattern in patterns for path in Path(directory).glob(pattern) if path.is_file()})


def weight_files(directory: str) -> list[Path]:
    """Return the files of weights that transformers would take."""
    return next((files for pattern in _WEIGHTS if (files := matching(directory, (pattern,)))), [])
