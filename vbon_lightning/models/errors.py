"""What is said where a model cannot be had."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


class ModelError(ValueError):
    """A model description that cannot be turned into a model."""


@contextmanager
def told_of(role: str) -> Iterator[None]:
    """Say of a model that cannot be had which of a run's models it is.

    Args:
        role: What it is in the run, such as ``policy``.

    Raises:
        ModelError: As it comes, with the role before a message that begins with a field of the model's.
    """
    try:
        yield
    except ModelError as problem:
        if not str(problem).startswith("`"):
            raise
        raise ModelError(f"the {role}: {problem}") from problem


def cannot_load(what: str, field: str, name: str, error: Exception) -> ModelError:
    """Return the error for what transformers could not load."""
    if os.path.isdir(name):
        return ModelError(f"`{field}`: cannot load the {what} in the directory {name!r}: {shorten(error)}")
    return ModelError(
        f"`{field}`: cannot load the {what} {name!r}: no such directory here, and from the hub: {shorten(error)}"
    )


def shorten(error: Exception, limit: int = 400) -> str:
    """Return an error's type and message in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= limit else text[:limit] + ' ...'}"
