"""One policy for every N by a soft token: an embedding of log N, added to the input states of plain weights.

The baseline that the tilted policy is measured against: what a user could build without another model.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from transformers import PreTrainedModel

from vbon_lightning.models import save_pretrained
from vbon_lightning.modules import BoNDistillation

_SCALE = math.log(8.0)


class SoftToken(nn.Module):
    """What is added to the embedding of every token at an N: a small network of log N, zero at first.

    Args:
        width: H, of the model's states.
        hidden: Units between.
    """

    def __init__(self, width: int, hidden: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, width))
        nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.layers[-1].bias)  # type: ignore[arg-type]
        self.n = 8.0

    def vector(self) -> Tensor:
        """Return the embedding of the N that is set, ``[H]``."""
        where = next(self.parameters())
        found: Tensor = self.layers(torch.tensor([math.log(self.n) / _SCALE], device=where.device, dtype=where.dtype))
        return found


class SoftTokenDistillation(BoNDistillation):
    """:class:`~vbon_lightning.BoNDistillation` of plain weights that are told N by a soft token.

    Args:
        *args: As there.
        dial: The two N between which each step draws one.
        **kwargs: As there, ``n_range`` left out.
    """

    def __init__(self, *args: Any, dial: list[float] = [1.5, 20.0], **kwargs: Any) -> None:  # noqa: B006 (not mutated)
        super().__init__(*args, **kwargs)
        self.dial = dial
        self.record_settings(dial=dial)

    @property
    def largest_n(self) -> float:
        """Return the largest N that a step may ask for."""
        return max(self.n, self.dial[1])

    def configure_model(self) -> None:
        """Load the models, and put the soft token behind the policy's embedding."""
        super().configure_model()
        policy = self.loaded.policy
        embedding = policy.get_input_embeddings()
        token = SoftToken(policy.config.get_text_config().hidden_size)
        policy.add_module("soft_token", token)
        embedding.register_forward_hook(lambda _module, _inputs, output: output + token.vector())

    @property
    def soft_token(self) -> SoftToken:
        """Return the policy's."""
        token = self.loaded.policy.soft_token
        assert isinstance(token, SoftToken)
        return token

    def drawn_n(self, step: int) -> float:
        """Return the N of a step, and tell the policy."""
        self.n_range = self.dial
        try:
            self.soft_token.n = super().drawn_n(step)
        finally:
            self.n_range = None
        return self.soft_token.n

    def on_after_backward(self) -> None:
        """Go back to the N that is evaluated."""
        self.soft_token.n = self.n


class MergedExports(Callback):
    """When training ends, export plain weights for each N: the soft token is added to the input embedding.

    Args:
        n: The N.
    """

    def __init__(self, n: list[float] = [2, 4, 8, 16]) -> None:  # noqa: B006 (never mutated)
        self.n = n

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``export-N`` for each N."""
        assert isinstance(pl_module, SoftTokenDistillation)
        for n in self.n:
            pl_module.soft_token.n = n
            merged = merge(pl_module.loaded.policy, pl_module.soft_token)
            save_pretrained(merged, pl_module.tokenizer, Path(trainer.default_root_dir, f"export-{n:g}"))


def merge(policy: PreTrainedModel, token: SoftToken) -> PreTrainedModel:
    """Return the policy with the soft token in its input embedding, which its output embedding no longer shares."""
    vector = token.vector().detach()
    merged = copy.deepcopy(policy)
    del merged.soft_token
    embedding, head = merged.get_input_embeddings(), merged.get_output_embeddings()
    embedding._forward_hooks.clear()
    head.weight = nn.Parameter(head.weight.detach().clone())
    embedding.weight = nn.Parameter(embedding.weight.detach() + vector)
    merged.config.tie_word_embeddings = False
    return merged
