"""Tokenizers, and the tokens that end a response."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from vbon_lightning.models.errors import ModelError, cannot_load
from vbon_lightning.models.files import TOKENIZER_FILES, TOKENIZER_VOCABULARIES, locate, matching, read_json
from vbon_lightning.models.spec import ModelSpec, as_spec


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
    if os.path.isdir(name) and gguf_file is None and not matching(name, TOKENIZER_VOCABULARIES):
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
        if os.path.isdir(name) and gguf_file is None:
            _check_json_files(name, field)
        raise cannot_load("tokenizer", field, name, error) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"the tokenizer of {name!r} has neither a pad token nor an EOS token: "
                "set `eos_token` in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_json_files(directory: str, field: str) -> None:
    """Name the file that keeps a tokenizer from being loaded, where it is one that is no JSON, or of something else."""
    for path in matching(directory, ("config.json", *(name for name in TOKENIZER_FILES if name.endswith(".json")))):
        found = read_json(path, field)
        if path.name == "tokenizer.json" and "model" not in found:
            raise ModelError(f"`{field}`: {str(path)!r} is no tokenizer: it says nothing of a `model`. Copy it again")


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that a tokenizer puts before every text: mostly its BOS, or none."""
    whole = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    for place in range(len(whole) - len(bare) + 1):
        if bare and whole[place : place + len(bare)] == bare:
            return whole[:place]
    return [tokenizer.bos_token_id] if whole[:1] == [tokenizer.bos_token_id] else []


def drop_repeated_opening(tokens: list[int], opening: Sequence[int]) -> list[int]:
    """Return tokens with one opening where a text that is written with its own got another before it.

    Args:
        tokens: Token ids with the tokenizer's special tokens.
        opening: Its :func:`opening_ids`.
    """
    count = len(opening)
    return tokens[count:] if count and tokens[: 2 * count] == [*opening, *opening] else tokens


def shared_start(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two texts begin with alike: where a prompt ends in the text that begins with it."""
    pairs = zip(first, second, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int | None, **options: Any
) -> Mapping[str, Any]:
    """Call a tokenizer for lists of ids, with its special tokens, and nothing that a model alone needs.

    Args:
        tokenizer: The tokenizer.
        texts: The texts, one at least.
        max_length: Cut to this many tokens, special ones included.
        **options: What else to ask of it.
    """
    found: Mapping[str, Any] = tokenizer(
        list(texts),
        truncation=max_length is not None,
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        **options,
    )
    return found


def encode_whole_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, max_length: int | None = None
) -> list[list[int]]:
    """Encode texts with the tokenizer's special tokens, none of which is put before a text that begins with it.

    What a chat template renders (``apply_chat_template(tokenize=False)``) has its BOS written out.

    Args:
        tokenizer: The tokenizer.
        texts: The texts.
        max_length: Cut to this many tokens, special ones included.
    """

    def encode(some: Sequence[str], longest: int | None) -> list[list[int]]:
        return [list(ids) for ids in tokenize(tokenizer, some, longest)["input_ids"]] if some else []

    encoded = encode(texts, max_length)
    if not any(ids[0] in ids[1:] for ids in encoded if ids):
        return encoded  # nothing repeats: no need to ask what the opening is
    opening = opening_ids(tokenizer)
    room = None if max_length is None else max_length + len(opening)
    written = [place for place, ids in enumerate(encoded) if drop_repeated_opening(ids, opening) is not ids]
    for place, ids in zip(written, encode([texts[place] for place in written], room), strict=True):
        encoded[place] = drop_repeated_opening(ids, opening)
    return encoded


def named_token_ids(tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> list[int]:
    """Return the ids of tokens that a user names, such as ``<|im_end|>``.

    Args:
        tokenizer: The tokenizer.
        names: Tokens as its vocabulary writes them.

    Raises:
        ModelError: Naming one that is no token of the vocabulary.
    """
    vocabulary = tokenizer.get_vocab()
    unknown = [name for name in names if name not in vocabulary]
    if unknown:
        raise ModelError(
            f"data.end_tokens: {unknown[0]!r} is no token of the policy's vocabulary (a token is meant, not a text): "
            f"its special tokens are {', '.join(map(repr, tokenizer.all_special_tokens)) or 'none'}"
        )
    return [vocabulary[name] for name in names]


def end_token_ids(
    model: PreTrainedModel | GenerationConfig, tokenizer: PreTrainedTokenizerBase, names: Sequence[str] = ()
) -> tuple[int, ...]:
    """Return the ids of the tokens that end a response: the generation config's, the tokenizer's EOS and named ones.

    All of them do: supervised fine-tuning teaches the tokenizer's EOS, and ``generate`` stops at the config's.

    Args:
        model: The model, or its generation config, whose ``eos_token_id`` may be one id or a list.
        tokenizer: The tokenizer.
        names: Further tokens, as the vocabulary writes them (``data.end_tokens``).

    Raises:
        ModelError: If there is no such token, a name is none, or one lies outside the vocabulary.
    """
    generation = model if isinstance(model, GenerationConfig) else getattr(model, "generation_config", None)
    given = getattr(generation, "eos_token_id", None)
    ends = list(given) if isinstance(given, (list, tuple)) else [given]
    ends = [end for end in (*ends, tokenizer.eos_token_id) if end is not None] + named_token_ids(tokenizer, names)
    if not ends:
        raise ModelError(
            "neither the generation config nor the tokenizer names an EOS token, so no response could ever end: set "
            "data.end_tokens, `eos_token_id` in generation_config.json, or the tokenizer's `eos_token`"
        )
    ids = tuple(dict.fromkeys(int(end) for end in ends))
    config = getattr(model, "config", None)
    size = max(len(tokenizer), getattr(config, "vocab_size", 0) or 0)
    outside = [end for end in ids if not 0 <= end < size]
    if outside:
        raise ModelError(
            f"EOS token id {outside[0]} lies outside the vocabulary of {size} tokens: "
            "correct `eos_token_id` in generation_config.json"
        )
    return ids


def vocabulary_size(model: PreTrainedModel) -> int | None:
    """Return how many tokens a model has embeddings for, None where they are not an ordinary table."""
    return getattr(model.get_input_embeddings(), "num_embeddings", None)


def check_vocabulary_fits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with tokens that a model has no embedding for, before training meets one.

    Args:
        model: The model.
        tokenizer: Its tokenizer.

    Raises:
        ModelError: Naming the first such token.
    """
    rows = vocabulary_size(model)
    beyond = [] if rows is None else sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows)
    if beyond:
        place, token = beyond[0]
        raise ModelError(
            f"the tokenizer has {len(beyond)} token(s) that the model has no embedding for, first {token!r} with the "
            f"id {place} of {rows}: resize the model (`model.resize_token_embeddings({beyond[-1][0] + 1})`, then save "
            "it), or take its own tokenizer"
        )


def describe_ends(tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]) -> str:
    """Say what ends a response, in words for a log or a model card."""
    taught = tokenizer.eos_token_id
    names = [f"{tokenizer.convert_ids_to_tokens(end)} ({end})" for end in end_ids]
    which = f"; SFT teaches {tokenizer.convert_ids_to_tokens(taught)}" if len(names) > 1 and taught is not None else ""
    return ", ".join(names) + which


def check_same_vocabulary(
    first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase, *, what: str = "policy and reference"
) -> None:
    """Check that two tokenizers give every token the same id.

    Args:
        first: One tokenizer, such as the policy's.
        second: The other, such as the reference's.
        what: Whose they are, for the message.

    Raises:
        ModelError: If they differ, with the first tokens that do.
    """
    ours, theirs = first.get_vocab(), second.get_vocab()
    differing = sorted(
        (token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)),
        key=lambda token: (ours.get(token, theirs.get(token, 0)), token),
    )
    if differing:
        shown = "; ".join(f"{token!r} is {ours.get(token)} and {theirs.get(token)}" for token in differing[:5])
        raise ModelError(
            f"{what} need one vocabulary, but {len(differing)} tokens differ "
            f"({len(ours)} and {len(theirs)} tokens in all): {shown}"
        )
    for role in ("bos_token_id", "eos_token_id"):
        if getattr(first, role) != getattr(second, role):
            raise ModelError(
                f"{what} need one vocabulary, but `{role}` is {getattr(first, role)} and {getattr(second, role)}"
            )
