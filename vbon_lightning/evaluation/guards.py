"""What of a comparison's arguments can be known to be wrong before a model is loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase

from vbon_lightning.evaluation.reports import BEST_OF_N, REFERENCE
from vbon_lightning.finite import first_not_finite
from vbon_lightning.models import ModelError, ModelSpec, as_spec, check_same_vocabulary, load_tokenizer, locate
from vbon_lightning.models.files import weight_files

_RESERVED = re.compile(rf"{REFERENCE}|{BEST_OF_N}|Best-of-\d+", re.IGNORECASE)
"""Names of rows that every comparison has by itself."""


def check_names(policies: Mapping[str, Any], decoders: Mapping[str, Any]) -> None:
    """Refuse names that say nothing, that two things have, or that rows of the comparison have by themselves.

    Args:
        policies: What the policies are called.
        decoders: What the decoders are called.

    Raises:
        ValueError: Naming the option and the name.
    """
    seen: dict[str, str] = {}
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
    except OSError as problem:
        raise ValueError(f"output: {output!r} cannot be a directory ({problem.strerror}): name another") from problem


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
        check_same_vocabulary(tokenizer, load_tokenizer(as_spec(model)))
        check_weights(model)
    except ModelError as problem:
        raise ModelError(f"the policy {name!r}: {problem}") from problem


def check_weights(model: str | ModelSpec) -> None:
    """Refuse a model whose files hold weights that are NaN or infinite, without loading it.

    Files of other formats than safetensors, and models of the hub, are looked at when they are loaded.

    Args:
        model: The model.

    Raises:
        ModelError: Naming the file and the weight.
    """
    spec = as_spec(model)
    place, gguf_file = locate("policies", str(spec.name), spec.gguf_file)
    if gguf_file is not None or not os.path.isdir(place):
        return
    for path in weight_files(place):
        if path.suffix != ".safetensors":
            continue
        try:
            with safe_open(path, framework="pt") as file:
                for weight in file.keys():  # noqa: SIM118 (it is no mapping)
                    if first_not_finite([(weight, file.get_tensor(weight))]) is not None:
                        raise ModelError(
                            f"the weight {weight} in {path} holds NaN or infinity: it comes from "
                            "a run that diverged; leave the policy out, or export a good checkpoint"
                        )
        except (SafetensorError, OSError) as problem:
            raise ModelError(f"{path} cannot be read: {problem}") from problem
