"""What a sampler may be asked for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.helpers import tiny_llama
from vbon_lightning.sampling import SamplingRequest, sample_completions
from vbon_lightning.sampling.request import check_context, check_request

ASKED = SamplingRequest(
    prompt_tokens=torch.tensor([[3], [4]]),
    prompt_mask=torch.ones(2, 1, dtype=torch.bool),
    noise=torch.zeros(2, 1, 4, dtype=torch.float64),
    end_ids=[2],
    pad_id=0,
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"temperature": -1.0}, "temperature must be positive and finite, got -1.0"),
        ({"temperature": math.nan}, "temperature must be positive and finite, got nan"),
        ({"end_ids": []}, "end_ids must name at least one token"),
        ({"noise": torch.zeros(2, 1, 0, dtype=torch.float64)}, r"at least one token a sample, got shape \(2, 1, 0\)"),
        ({"prompt_mask": torch.tensor([[True], [False]])}, "every prompt needs at least one token"),
        ({"noise": torch.zeros(2, 1, 8, dtype=torch.float64)}, "exceed the model's context of 8 tokens"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, Any], message: str) -> None:
    model = tiny_llama(24, max_position_embeddings=8)
    check_request(model, ASKED)
    for refuse in (check_request, sample_completions):
        with pytest.raises(ValueError, match=message):
            refuse(model, ASKED._replace(**change))


def test_a_context_without_end() -> None:
    model = tiny_llama(24)
    for limit in (-1, 0):  # what models without one say
        model.config.max_position_embeddings = limit
        check_context(model, 10_000, 10_000)
    model.config.max_position_embeddings = 8
    with pytest.raises(ValueError, match="exceed the model's context of 8 tokens"):
        check_context(model, 6, 3)
