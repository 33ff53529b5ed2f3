"""Where a model's files are, and which of them it needs."""

from __future__ import annotations

import os
from pathlib import Path

from vbon_lightning.models.errors import ModelError
from vbon_lightning.paths import PathError, looks_like_path, resolve_path

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
    if not os.path.isdir(name) and looks_like_path(name):
        raise ModelError(f"`{field}`: the directory {name!r} does not exist")
    if gguf_file is not None and os.path.isdir(name) and not os.path.isfile(os.path.join(name, gguf_file)):
        found = [path.name for path in matching(name, ("*.gguf",))]
        raise ModelError(
            f"`gguf_file`: the directory {name!r} holds no {gguf_file!r}; its GGUF files: {', '.join(found) or 'none'}"
        )
    return name, gguf_file


def check_directory(name: str, gguf_file: str | None) -> None:
    """Refuse a directory without a config or weights, and say what it holds instead."""
    if gguf_file is not None:
        return
    gguf = [path.name for path in matching(name, ("*.gguf",))]
    hint = f": it holds {', '.join(gguf)}, give `gguf_file`" if gguf else ""
    if not matching(name, ("config.json", "adapter_config.json")):
        raise ModelError(f"`name`: the directory {name!r} holds no config.json" + (hint or ": is it a saved model?"))
    if not weight_files(name):
        raise ModelError(
            f"`name`: the directory {name!r} holds no weights ({', '.join(_WEIGHTS)})"
            + (hint or ": for a new model, give a `config` and a `tokenizer` instead")
        )


def matching(directory: str, patterns: tuple[str, ...]) -> list[Path]:
    """Return the files of a directory that fit one of the patterns."""
    return sorted({path for pattern in patterns for path in Path(directory).glob(pattern) if path.is_file()})


def weight_files(directory: str) -> list[Path]:
    """Return the files of weights that transformers would take."""
    return next((files for pattern in _WEIGHTS if (files := matching(directory, (pattern,)))), [])
