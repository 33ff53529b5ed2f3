"""A tilted policy without vectors of its own for the tokens: its tower speaks through the reference's embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vbon_lightning.models import TiltedLM
from vbon_lightning.modules import BoNDistillation


class Projected(nn.Module):
    """Make ``[V, H]`` vectors of the tokens from a trained ``[E, H]`` map of fixed embeddings ``[V, E]``."""

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__()
        self.register_buffer("embeddings", embeddings.detach().clone())

    def forward(self, projection: Tensor) -> Tensor:
        """Return the vectors."""
        return self.embeddings @ projection

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the map that new vectors have: they are zero."""
        return torch.zeros(self.embeddings.shape[1], weight.shape[1], dtype=weight.dtype, device=weight.device)


class FixedVectorDistillation(BoNDistillation):
    """:class:`~vbon_lightning.BoNDistillation` of such a policy."""

    def configure_model(self) -> None:
        """Load the models, and tie the tilt's vectors to the reference's embeddings."""
        super().configure_model()
        policy = self.policy
        assert isinstance(policy, TiltedLM)
        for head in policy.heads:
            assert isinstance(head, nn.Linear)
            embeddings = policy.base.get_output_embeddings().weight
            parametrize.register_parametrization(head, "weight", Projected(embeddings), unsafe=True)
            head.bias.requires_grad_(False)

    def on_train_end(self) -> None:
        """Leave plain vectors behind, which an export can hold."""
        policy = self.policy
        assert isinstance(policy, TiltedLM)
        for head in policy.heads:
            parametrize.remove_parametrizations(head, "weight", leave_parametrized=True)
