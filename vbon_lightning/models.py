"""From a name, a directory or a config to a Hugging Face causal language model, frozen or trainable."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from vbon_lightning.adapters import AdapterError, add_lora, has_adapters, merged_copy
from vbon_lightning.paths import PathError, looks_like_path, resolve_path

__all__ = [
    "ModelError",
    "ModelSpec",
    "as_spec",
    "check_no_missing_weights",
    "check_same_vocabulary",
    "disable_dropout",
    "end_token_ids",
    "load_causal_lm",
    "load_tokenizer",
    "locate",
    "model_identity",
    "parse_dtype",
    "save_pretrained",
]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What transformers looks for, in its order of preference.
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_TOKENIZER_FILES = (
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
_TOKENIZER_VOCABULARIES = tuple(
    name for name in _TOKENIZER_FILES if name not in ("tokenizer_config.json", "special_tokens_map.json")
)
# What a config holds that says where or with what it was written, not what the model computes.
_NOT_IDENTITY = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
_RANDOM_REGULARISER = re.compile("drop|jitter")


class ModelError(ValueError):
    """A model description that cannot be turned into a model."""


@dataclass
class ModelSpec:
    """Say which causal language model to use, in plain data.

    Args:
        name: Hub name or local directory. May use ``~``, ``${VAR}`` and ``package:NAME/path/inside``.
        gguf_file: A GGUF file inside ``name``; its weights are dequantised on loading.
        revision: Branch, tag or commit of a hub model.
        config: A new model instead of a pretrained one: the entries of a Hugging Face config, with its
            ``model_type``. Needs ``tokenizer``; not together with ``name``. A missing ``vocab_size`` and
            missing special token ids are taken from the tokenizer.
        tokenizer: Hub name or local directory of the tokenizer. Default: the model's own.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for what the checkpoint says. Default:
            ``float32``.
        attn_implementation: ``eager``, ``sdpa``, ``flash_attention_2``, ... Default: what transformers
            chooses.
        trust_remote_code: Run model code that comes with the checkpoint.
        lora: Train low-rank adapters instead of the weights: entries of peft's ``LoraConfig``, such as ``r`` and
            ``lora_alpha``. The base then is the reference, unless another is named. Needs the ``lora`` extra.
        gradient_checkpointing: Compute activations again in the backward pass instead of keeping them.
    """

    name: str | None = None
    gguf_file: str | None = None
    revision: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    dtype: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    lora: dict[str, Any] | None = None
    gradient_checkpointing: bool = False

    def base(self) -> ModelSpec:
        """Return the model without what only training needs: what it is at the start."""
        return dataclasses.replace(self, lora=None, gradient_checkpointing=False)


def as_spec(value: str | Mapping[str, Any] | ModelSpec) -> ModelSpec:
    """Turn a name, a mapping or a spec into a checked spec.

    Args:
        value: A hub name or directory, the fields of a :class:`ModelSpec`, or one.

    Raises:
        ModelError: If a field is unknown, or the fields contradict each other.
    """
    if isinstance(value, ModelSpec):
        spec = value
    elif isinstance(value, str):
        if value.lstrip().startswith("{"):  # a mapping that the command line could not read as one
            names = ", ".join(field.name for field in dataclasses.fields(ModelSpec))
            raise ModelError(f"unknown model field in {value!r}: the fields are {names}")
        spec = ModelSpec(name=value)
    else:
        fields = dict(value.as_dict() if hasattr(value, "as_dict") else value)
        known = [field.name for field in dataclasses.fields(ModelSpec)]
        unknown = sorted(set(fields) - set(known))
        if unknown:
            raise ModelError(f"unknown model field {', '.join(unknown)}: the fields are {', '.join(known)}")
        spec = ModelSpec(**fields)
    if spec.name is None and spec.config is None:
        raise ModelError("give the model's `name` (hub name or directory), or a `config` for a new model")
    if spec.name is not None and spec.config is not None:
        raise ModelError("give the model's `name` or a `config` for a new model, not both")
    if spec.config is not None:
        if spec.tokenizer is None:
            raise ModelError("a new model from `config` needs a `tokenizer` (hub name or directory)")
        if "model_type" not in spec.config:
            raise ModelError("the model's `config` needs a `model_type`, such as gpt2 or llama")
        if spec.gguf_file is not None:
            raise ModelError("`gguf_file` is a file inside `name`; it does not go with `config`")
    parse_dtype(spec.dtype)
    return spec


def parse_dtype(dtype: str | None) -> torch.dtype | str:
    """Turn a dtype's name into a ``torch.dtype``, or ``"auto"``.

    Args:
        dtype: The name; None means ``float32``.

    Raises:
        ModelError: If the name is not known.
    """
    if dtype is None:
        return torch.float32
    if dtype == "auto":
        return "auto"
    if dtype not in _DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}: give one of {', '.join(_DTYPES)}, auto")
    return _DTYPES[dtype]


def load_tokenizer(spec: str | Mapping[str, Any] | ModelSpec) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer; it has a pad token, which falls back to the EOS token.

    Masks must come from lengths, never from comparing with the pad token.

    Args:
        spec: The model.

    Raises:
        ModelError: If there is no tokenizer, or it has neither a pad token nor an EOS token.
    """
    spec = as_spec(spec)
    if spec.tokenizer is not None:
        field, (name, gguf_file) = "tokenizer", locate("tokenizer", spec.tokenizer)
    else:
        field, (name, gguf_file) = "name", locate("name", str(spec.name), spec.gguf_file)
    if os.path.isdir(name) and gguf_file is None and not _matching(name, _TOKENIZER_VOCABULARIES):
        raise ModelError(
            f"`{field}`: the directory {name!r} holds no tokenizer (such as tokenizer.json): "
            "save one there, or give another `tokenizer`"
        )
    arguments: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    if gguf_file is not None:
        arguments["gguf_file"] = gguf_file
    if spec.revision is not None and spec.tokenizer is None:
        arguments["revision"] = spec.revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **arguments)
    except Exception as error:  # transformers raises many types here; every one means the same to a user
        raise _cannot_load("tokenizer", field, name, error) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"the tokenizer of {name!r} has neither a pad token nor an EOS token: "
                "set `eos_token` in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(
    spec: str | Mapping[str, Any] | ModelSpec, *, seed: int = 0, trainable: bool, dropout: bool = False
) -> PreTrainedModel:
    """Load a causal language model, or make a new one from a config.

    Args:
        spec: The model.
        seed: Seed of a new model's weights; the global random state is left as it was.
        trainable: True: in training mode, every parameter requires a gradient. False: in evaluation mode,
            none does.
        dropout: Keep dropout. Off by default: in reinforcement learning it makes the policy that samples
            differ from the policy that is scored.

    Returns:
        A model that can be exported with :func:`save_pretrained`, dequantised if it came from a GGUF file.

    Raises:
        ModelError: If the model cannot be found or loaded, or its checkpoint lacks weights.
    """
    spec = as_spec(spec)
    model = _new_causal_lm(spec, seed) if spec.config is not None else _pretrained_causal_lm(spec)
    if not dropout:
        disable_dropout(model)
    model.train(trainable)
    model.requires_grad_(trainable)
    if spec.lora is not None:
        try:
            add_lora(model, spec.lora, seed=seed)
        except AdapterError as error:
            raise ModelError(str(error)) from error
        if not dropout:
            disable_dropout(model)
        model.train(trainable)
        if not trainable:
            model.requires_grad_(False)
    if spec.gradient_checkpointing and trainable:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def disable_dropout(model: nn.Module) -> None:
    """Turn dropout off in place, so that training mode computes what evaluation mode does.

    Covers dropout modules, floats that modules keep for functional dropout (``attention_dropout``,
    ``layerdrop``), router jitter, and the entries of the config that are read in the forward pass.

    Args:
        model: The model.
    """
    configs: list[PreTrainedConfig] = []
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        _zero_regularisers(module)
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and not any(config is known for known in configs):
            configs.append(config)
    for config in configs:
        _zero_regularisers(config)
        for inner in vars(config).values():
            if isinstance(inner, PreTrainedConfig):
                _zero_regularisers(inner)


def end_token_ids(
    model: PreTrainedModel | GenerationConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """Return the ids of the tokens that end a response, the generation config's before the tokenizer's.

    Args:
        model: The model, or its generation config, whose ``eos_token_id`` may be one id or a list.
        tokenizer: Gives its EOS token where the generation config names none.

    Raises:
        ModelError: If there is no such token, or it lies outside the vocabulary.
    """
    generation = model if isinstance(model, GenerationConfig) else getattr(model, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    if ends is None or ends == []:
        ends = tokenizer.eos_token_id
    if ends is None:
        raise ModelError(
            "neither the generation config nor the tokenizer names an EOS token, so no response could "
            "ever end: set `eos_token_id` in generation_config.json, or the tokenizer's `eos_token`"
        )
    ids = tuple(dict.fromkeys(int(end) for end in (ends if isinstance(ends, (list, tuple)) else [ends])))
    config = getattr(model, "config", None)
    size = max(len(tokenizer), getattr(config, "vocab_size", 0) or 0)
    outside = [end for end in ids if not 0 <= end < size]
    if outside:
        raise ModelError(
            f"EOS token id {outside[0]} lies outside the vocabulary of {size} tokens: "
            "correct `eos_token_id` in generation_config.json"
        )
    return ids


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


def check_same_vocabulary(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> None:
    """Check that two tokenizers give every token the same id.

    Args:
        first: One tokenizer, such as the policy's.
        second: The other, such as the reference's.

    Raises:
        ModelError: If they differ, with the first tokens that do.
    """
    ours, theirs = first.get_vocab(), second.get_vocab()
    differing = sorted(
        (token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)),
        key=lambda token: (ours.get(token, theirs.get(token, 0)), token),
    )
    if differing:
        shown = "; ".join(
            f"{token!r} is {ours.get(token)} and {theirs.get(token)}" for token in differing[:5]
        )
        raise ModelError(
            f"policy and reference need one vocabulary, but {len(differing)} tokens differ "
            f"({len(ours)} and {len(theirs)} tokens in all): {shown}"
        )
    for role in ("bos_token_id", "eos_token_id"):
        if getattr(first, role) != getattr(second, role):
            raise ModelError(
                f"policy and reference need one vocabulary, but `{role}` is "
                f"{getattr(first, role)} and {getattr(second, role)}"
            )


def save_pretrained(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | os.PathLike[str],
    *,
    generation: Mapping[str, Any] | None = None,
    dtype: str | None = None,
) -> None:
    """Write a model and its tokenizer in Hugging Face layout, whole or not at all.

    Args:
        model: The model; it is not changed. Adapters are merged into the weights, and also saved on their own in
            ``adapter``.
        tokenizer: Its tokenizer.
        directory: The target; replaced if it exists.
        generation: Entries of the generation config to set, such as the temperature the policy was trained
            at.
        dtype: ``float32``, ``bfloat16`` or ``float16`` to cast the saved weights. Default: as they are.

    Raises:
        ModelError: If a generation entry is unknown, or the dtype.
    """
    target = Path(os.path.abspath(directory))
    if target.exists() and not target.is_dir():
        raise ModelError(f"cannot save a model to {str(target)!r}: it is a file")
    generation_config = None
    if model.can_generate():
        generation_config = copy.deepcopy(model.generation_config or GenerationConfig())
        unknown = generation_config.update(**(generation or {}))
        if unknown:
            raise ModelError(f"unknown generation entry {', '.join(sorted(unknown))}")
    saved_dtype = parse_dtype(dtype) if dtype not in (None, "auto") else None
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:8]
    beside = target.with_name(f".{target.name}.{mark}.partial")
    old = target.with_name(f".{target.name}.{mark}.old")
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
        found = [path.name for path in _matching(name, ("*.gguf",))]
        raise ModelError(
            f"`gguf_file`: the directory {name!r} holds no {gguf_file!r}; its GGUF files: "
            f"{', '.join(found) or 'none'}"
        )
    return name, gguf_file


def check_no_missing_weights(name: str, info: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that left weights at random values, which transformers only warns of.

    Args:
        name: The model's name, for the message.
        info: What ``from_pretrained(..., output_loading_info=True)`` returned beside the model.

    Raises:
        ModelError: If weights are missing or have another shape.
    """
    missing = sorted(str(key) for key in info.get("missing_keys", ()))
    missing += sorted(str(key) for key in info.get("mismatched_keys", ()))
    if missing:
        raise ModelError(
            f"the checkpoint {name!r} lacks {len(missing)} weights of this kind of model, such as "
            f"{', '.join(missing[:3])}: they would be random; give a checkpoint that was trained for the task"
        )


def _new_causal_lm(spec: ModelSpec, seed: int) -> PreTrainedModel:
    tokenizer = load_tokenizer(spec)
    entries = dict(spec.config or {})
    model_type = entries.pop("model_type")
    entries.setdefault("vocab_size", len(tokenizer))
    if entries["vocab_size"] < len(tokenizer):
        raise ModelError(
            f"the model's `config` has vocab_size {entries['vocab_size']}, but its tokenizer has "
            f"{len(tokenizer)} "
            "tokens: leave vocab_size out, or raise it"
        )
    # A config class has ids of its own for these, which mean other tokens in this tokenizer.
    for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
        entries.setdefault(role, getattr(tokenizer, role))
    try:
        config = AutoConfig.for_model(model_type, **entries)
    except Exception as error:
        raise ModelError(f"the model's `config` is refused by transformers: {_shorten(error)}") from error
    dtype = parse_dtype(spec.dtype)
    arguments: dict[str, Any] = {"dtype": torch.float32 if dtype == "auto" else dtype}
    if spec.attn_implementation is not None:
        arguments["attn_implementation"] = spec.attn_implementation
    # On the CPU whatever the default device is: the same seed then gives the same weights everywhere.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        try:
            return AutoModelForCausalLM.from_config(config, **arguments)
        except ValueError as error:
            raise ModelError(f"no causal language model from `config`: {_shorten(error)}") from error


def _pretrained_causal_lm(spec: ModelSpec) -> PreTrainedModel:
    name, gguf_file = locate("name", str(spec.name), spec.gguf_file)
    if os.path.isdir(name):
        _check_directory(name, gguf_file)
    arguments: dict[str, Any] = {
        "dtype": parse_dtype(spec.dtype),
        "trust_remote_code": spec.trust_remote_code,
    }
    for key, value in (
        ("gguf_file", gguf_file),
        ("revision", spec.revision),
        ("attn_implementation", spec.attn_implementation),
    ):
        if value is not None:
            arguments[key] = value
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **arguments)
    except Exception as error:
        raise _cannot_load("model", "name", name, error) from error
    model, info = loaded
    check_no_missing_weights(name, info)
    return _without_quantisation(model) if gguf_file is not None else model


def _without_quantisation(model: PreTrainedModel) -> PreTrainedModel:
    # transformers marks a model that it dequantised from a GGUF file as quantised, and then will not save it.
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        plain: Any = type(model)(config)
    plain.to(model.dtype).load_state_dict(model.state_dict(), strict=True)
    plain.generation_config = model.generation_config
    return cast(PreTrainedModel, plain.to(model.device))


def _zero_regularisers(holder: object) -> None:
    for key, value in list(vars(holder).items()):
        if isinstance(value, float) and value and _RANDOM_REGULARISER.search(key):
            setattr(holder, key, 0.0)


def _check_directory(name: str, gguf_file: str | None) -> None:
    if gguf_file is not None:
        return
    gguf = [path.name for path in _matching(name, ("*.gguf",))]
    hint = f": it holds {', '.join(gguf)}, give `gguf_file`" if gguf else ""
    if not _matching(name, ("config.json", "adapter_config.json")):
        raise ModelError(
            f"`name`: the directory {name!r} holds no config.json" + (hint or ": is it a saved model?")
        )
    if not _weight_files(name):
        raise ModelError(
            f"`name`: the directory {name!r} holds no weights ({', '.join(_WEIGHTS)})"
            + (hint or ": for a new model, give a `config` and a `tokenizer` instead")
        )


def _directory_identity(name: str, gguf_file: str | None, revision: str | None) -> dict[str, str]:
    if not os.path.isdir(name):
        identity = {"name": name, "revision": revision or "main"}
        return identity | ({"gguf_file": gguf_file} if gguf_file else {})
    if gguf_file is not None:
        return {
            "weights": _hash_file(os.path.join(name, gguf_file)),
            "tokenizer": _hash_tokenizer(name, gguf_file),
        }
    identity = {"weights": _hash_files(_weight_files(name)), "tokenizer": _hash_tokenizer(name, None)}
    config = Path(name, "config.json")
    if config.is_file():
        identity["config"] = _hash_text(_canonical(json.loads(config.read_text(encoding="utf-8"))))
    generation = Path(name, "generation_config.json")
    if generation.is_file():  # it may name other end tokens than the config, and they decide where responses stop
        ends = json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id")
        identity["end_tokens"] = json.dumps(ends)
    return identity


def _matching(directory: str, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in Path(directory).glob(pattern) if path.is_file()})


def _weight_files(directory: str) -> list[Path]:
    return next((files for pattern in _WEIGHTS if (files := _matching(directory, (pattern,)))), [])


def _set_config_dtype(path: Path, dtype: str) -> None:
    entries = json.loads(path.read_text(encoding="utf-8"))
    entries.pop("torch_dtype", None)
    entries["dtype"] = dtype
    path.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _cannot_load(what: str, field: str, name: str, error: Exception) -> ModelError:
    if os.path.isdir(name):
        return ModelError(f"`{field}`: cannot load the {what} in the directory {name!r}: {_shorten(error)}")
    return ModelError(
        f"`{field}`: cannot load the {what} {name!r}: no such directory here, and from the hub: "
        f"{_shorten(error)}"
    )


def _shorten(error: Exception, limit: int = 400) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= limit else text[:limit] + ' ...'}"


def _canonical(entries: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in entries.items() if key not in _NOT_IDENTITY}
    return json.dumps(kept, sort_keys=True, default=str)


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _hash_tokenizer(directory: str, gguf_file: str | None) -> str:
    if gguf_file is not None:
        return _hash_file(os.path.join(directory, gguf_file))
    return _hash_files(_matching(directory, _TOKENIZER_FILES))


def _hash_files(paths: list[Path]) -> str:
    return _hash_text("\n".join(f"{path.name} {_hash_file(path)}" for path in paths))


def _hash_file(path: str | os.PathLike[str]) -> str:
    # The cache is keyed by size and time too, so that a rewritten file is read again.
    status = os.stat(path)
    return _hash_content(os.path.abspath(path), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _hash_content(path: str, size: int, modified: int) -> str:
    del size, modified
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
