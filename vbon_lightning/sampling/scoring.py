"""Teacher-forced logits of responses: one pass, logits for response positions only."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vbon_lightning.sampling.decode import forget_casts, keep_logits
from vbon_lightning.types import Completions, PromptBatch


class ResponseLogits(NamedTuple):
    """What one pass over prompts and responses gives."""

    logits: Tensor
    """``[N, T, V]``: logits that predict each response token, N = B x G rows."""
    hidden: Tensor | None
    """``[N, T, H]``: last hidden states at the same positions, where asked for."""


def response_logits(
    model: PreTrainedModel, prompts: PromptBatch, completions: Completions, *, hidden: bool = False
) -> ResponseLogits:
    """Run prompts and their responses through a model and keep what predicts the response tokens.

    Positions come from the mask, so that a row does not depend on how far its neighbours pad it.

    Args:
        model: A causal language model.
        prompts: ``[B, P]`` prompts.
        completions: ``[B, G, T]`` responses.
        hidden: Also return the last hidden states, for a value head.
    """
    _, samples, length = completions.tokens.shape
    prompt_mask = prompts.mask.repeat_interleave(samples, dim=0)
    tokens = torch.cat(
        [prompts.tokens.repeat_interleave(samples, dim=0), completions.tokens.reshape(-1, length)], dim=-1
    )
    # Padding behind the EOS needs no mask: it is causal-later than every token that counts.
    attended = torch.nn.functional.pad(prompt_mask, (0, length), value=True)
    padded = not bool(prompts.mask.all())
    output = model(
        input_ids=tokens,
        attention_mask=attended.long() if padded else None,
        position_ids=(attended.long().cumsum(-1) - 1).clamp_(min=0),
        use_cache=False,
        output_hidden_states=hidden,
        **keep_logits(model, length + 1),
    )
    if not torch.is_grad_enabled():
        forget_casts(tokens.device)
    states = output.hidden_states[-1][:, -length - 1 : -1] if hidden else None
    return ResponseLogits(logits=output.logits[:, -length - 1 : -1], hidden=states)
