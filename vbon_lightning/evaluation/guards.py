"""What of a comparison's arguments can be known to be wrong before a model is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from vbon_lightning.actors import ActorSpec
from vbon_lightning.decoding import Decoder
from vbon_lightning.evaluation.logs import file_name
from vbon_lightning.evaluation.reports import BEST_OF_N, REFERENCE
from vbon_lightning.models import ModelError, ModelSpec, as_spec, check_same_vocabulary, check_saved, load_tokenizer

_RESERVED = re.compile(rf"{REFERENCE}|{BEST_OF_N}|Best-of-\d+", re.IGNORECASE)
"""Names of rows that every comparison has by itself."""

_OF_A_MODEL = ("config.json", "model.safetensors", "adapter_config.json")
"""Files by which a model's directory is known."""


def check_names(policies: Mapping[str, Any], decoders: Mapping[str, Any]) -> None:
    """Refuse names that say nothing, that two things have, or that rows of the comparison have by themselves.

    Args:
        policies: What the policies are called.
        decoders: What the decoders are called.

    Raises:
        ValueError: Naming the option and the name.
    """
    seen: dict[str, str] = {}
    files: dict[str, str] = {}
    for option, names in (("policies", policies), ("decoders", decoders)):
        for name in names:
            words = " ".join(name.split())
            if not words:
                raise ValueError(f"{option}: a name is blank ({name!r}): give what the table is to call it")
            if _RESERVED.fullmatch(words) or words.split()[0] in (REFERENCE, BEST_OF_N):
                raise ValueError(
                    f"{option}: {name!r} is what the comparison calls rows of its own ({REFERENCE}, {BEST_OF_N}, "
                    "Best-of-4 and so on, by the whole name or its first word): give another name"
                )
            if words in seen:
                raise ValueError(f"{option}: {name!r} names a second thing, after {seen[words]}: give another name")
            seen[words] = f"one of {option}"
            file = file_name(words).casefold()  # some file systems know no capitals
            if file in files:
                raise ValueError(
                    f"{option}: {name!r} is too much like {files[file]!r}: both are {file_name(words)!r} as a file's "
                    "name, which TensorBoard shows. Give another name"
                )
            files[file] = name


def check_methods(methods: Mapping[str, str], names: Sequence[str]) -> None:
    """Refuse methods of what is not compared, and those that say nothing or that rows of the comparison's own have.

    Args:
        methods: Methods by the names that they belong to.
        names: What the policies and decoders are called.

    Raises:
        ValueError: Naming the option and the name.
    """
    for name, method in methods.items():
        if name not in names:
            listed = ", ".join(map(repr, names))
            raise ValueError(f"methods: {name!r} is no policy or decoder of this comparison: name one of {listed}")
        if not method.strip() or method in (REFERENCE, BEST_OF_N):
            raise ValueError(
                f"methods: {name!r} has the method {method!r}, which is blank or that of the comparison's own rows: "
                "give another"
            )


def check_numbers(*, n: Sequence[int], samples: int, shown_prompts: int, shown_samples: int) -> None:
    """Refuse numbers of responses that make no comparison.

    Args:
        n: Which Best-of-N.
        samples: Responses a prompt and policy.
        shown_prompts: Prompts to show.
        shown_samples: Responses a prompt and policy to show.

    Raises:
        ValueError: Naming the option.
    """
    for name, count, least in (
        ("samples", samples, 1),
        ("shown_prompts", shown_prompts, 0),
        ("shown_samples", shown_samples, 1),
    ):
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise ValueError(f"{name} must be an integer >= {least}, got {count!r}")
    for number in n:
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"n must be integers >= 1, got {list(n)}")
    if len(set(n)) < len(n):
        raise ValueError(f"n names a number twice: {list(n)}")


def make_directory(output: str) -> None:
    """Make the directory that a comparison is written to, before anything is sampled.

    Raises:
        ValueError: If that cannot be.
    """
    if not output.strip():
        raise ValueError(f"output: {output!r} is blank: name a directory")
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
        holds = next((path.name for path in Path(output).iterdir() if path.name in _OF_A_MODEL), None)
    except OSError as problem:
        raise ValueError(f"output: {output!r} cannot be a directory ({problem.strerror}): name another") from problem
    if holds is not None:
        raise ValueError(
            f"output: {output!r} is the directory of a model, it holds {holds}: give the comparison one of its own"
        )


def check_policy(name: str, model: str | ModelSpec, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a policy that is not there, has other tokens than the reference, or weights that are no numbers.

    Args:
        name: What the comparison calls it.
        model: The policy.
        tokenizer: The reference's tokenizer.

    Raises:
        ModelError: Naming the policy.
    """
    try:
        check_saved(model)
        check_same_vocabulary(tokenizer, load_tokenizer(as_spec(model)))
    except ModelError as problem:
        raise ModelError(f"the policy {name!r}: {problem}") from problem


def check_decoder(name: str, decoder: Decoder, spec: ActorSpec, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a decoder whose models are not named, not there, or of other tokens, or whose options do not fit a run.

    Args:
        name: What the comparison calls it.
        decoder: The decoder.
        spec: The run's models.
        tokenizer: The reference's tokenizer.

    Raises:
        ValueError: Naming the decoder and the option.
        ModelError: Naming the decoder.
    """
    if decoder.needs_value_model and spec.value_model is None:
        raise ValueError(f"the decoder {name!r} needs a value model: set data.value_model")
    try:
        decoder.check_fits(longest=spec.max_new_tokens, max_rows=spec.max_rows)
    except ValueError as problem:
        raise ValueError(f"the decoder {name!r}: {problem}") from problem
    try:
        decoder.check(tokenizer)
    except ModelError as problem:
        raise ModelError(f"the decoder {name!r}: {problem}") from problem
