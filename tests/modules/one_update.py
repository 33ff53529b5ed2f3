"""One update of a method on a rollout, and its parts by hand, each response run by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.modules.setting import make_data, prepared
from vbon_lightning.types import Rollout

UNEVEN: dict[str, Any] = {"end_tokens": list("abcd"), "max_new_tokens": 6, "val": None}
"""Responses of unequal lengths."""


def set_up(kind: str, files: Path, data: dict[str, Any] | None = None, **options: Any) -> tuple[Any, Any]:
    """Return a module away from its reference, and four prompts."""
    brought = make_data(files, **(UNEVEN | (data or {})))
    module = prepared(kind, brought, **({"lr_scheduler": None} | options))
    batch = brought._collate_prompts([(i, True, row) for i, row in enumerate(brought.prompts("train")[:4])])
    return module, batch


def move(module: Any, by: float = 0.02) -> None:
    """Move the policy away from where it sampled."""
    with torch.no_grad():
        for index, parameter in enumerate(module.policy.parameters()):
            parameter += by * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1000 + index))


def token_log_probs(model: Any, rollout: Rollout) -> list[list[Tensor]]:
    """Return log-probabilities ``[t]`` of each response's tokens."""
    rows = []
    for row in range(len(rollout.prompts.text)):
        prompt = rollout.prompts.tokens[row][rollout.prompts.mask[row]]
        found = []
        for tokens, mask in zip(rollout.completions.tokens[row], rollout.completions.mask[row], strict=True):
            response = tokens[mask]
            logits = model(input_ids=torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
            found.append(logits.log_softmax(-1).gather(-1, response[:, None])[:, 0])
        rows.append(found)
    return rows


def gradient(module: Any, loss: Tensor) -> Tensor:
    """Return the gradient in the policy as one vector."""
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(module.policy.parameters()))])


def assert_same_gradient(module: Any, ours: Tensor, by_hand: Tensor) -> None:
    """Compare two losses by their gradients, which may not be nothing."""
    expected = gradient(module, by_hand)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(gradient(module, ours), expected, rtol=1e-3, atol=2e-6 * max(1, expected.abs().max()))
