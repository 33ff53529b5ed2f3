"""A language model that a decoder needs beside the one it decodes from."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vbon_lightning.actors import Actors
from vbon_lightning.models import (
    ModelError,
    ModelSpec,
    as_spec,
    check_same_vocabulary,
    load_causal_lm,
    load_tokenizer,
    model_identity,
    vocabulary_size,
)


class FurtherModel:
    """A causal language model that is named, checked by its files, and loaded once, frozen.

    Args:
        spec: A hub name, a directory, or a :class:`~vbon_lightning.models.ModelSpec`.
        role: What the decoder calls it, for messages.
    """

    def __init__(self, spec: str | ModelSpec, role: str) -> None:
        self.spec, self.role = as_spec(spec), role
        self._model: PreTrainedModel | None = None

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a model that is not there, or whose tokens are not the policy's.

        Args:
            tokenizer: The policy's.

        Raises:
            ModelError: Naming the decoder's option and what differs.
        """
        try:
            check_same_vocabulary(tokenizer, load_tokenizer(self.spec), what="it and the model that is decoded from")
        except ModelError as problem:
            raise ModelError(f"the decoder's {self.role} {self.spec.name!r}: {problem}") from problem

    def load(self, actors: Actors) -> PreTrainedModel:
        """Load the model, unless it is, and put it where the policy is, in its precision.

        Args:
            actors: What is decoded with.

        Raises:
            ModelError: If it cannot be loaded, or has other outputs than the policy.
        """
        if self._model is None:
            self.check(actors.tokenizer)
            self._model = load_causal_lm(self.spec, trainable=False)
            sizes = vocabulary_size(actors.policy), vocabulary_size(self._model)
            if sizes[0] != sizes[1]:
                raise ModelError(
                    f"the decoder's {self.role} {self.spec.name!r} has {sizes[1]} outputs, and the policy {sizes[0]}: "
                    "resize the embeddings of one"
                )
        like = next(actors.policy.parameters())
        torch.nn.Module.to(self._model, device=like.device, dtype=like.dtype)
        return self._model

    def release(self) -> None:
        """Forget the model."""
        self._model = None

    def identity(self) -> dict[str, Any]:
        """Describe the model by content."""
        return model_identity(self.spec)
