"""A batch sampled in passes of so many rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.sampling.test_static import compare, model_of
from vbon_lightning.sampling import sample_completions
from vbon_lightning.sampling.passes import InPasses
from vbon_lightning.sampling.request import SamplingRequest
from vbon_lightning.sampling.static import GraphSampler
from vbon_lightning.types import Completions


@pytest.mark.parametrize("base", [sample_completions, GraphSampler()], ids=["eager", "graph"])
@pytest.mark.parametrize("max_rows", [1, 4, 6, 7, 13, 24, 100])
def test_samples_do_not_depend_on_the_passes(max_rows, base):
    model = model_of("gpt2")
    seen = []

    def counting(model: Any, request: SamplingRequest) -> Completions:
        seen.append(request.noise.shape[0] * request.noise.shape[1])
        return base(model, request)

    compare(InPasses(counting, max_rows), model)
    assert max(seen) <= max_rows
    assert sum(seen) == 24


def test_passes_come_one_by_one_with_all_responses_of_their_prompts():
    model = model_of("gpt2")
    tokens, mask = torch.full((5, 3), 4), torch.ones(5, 3, dtype=torch.bool)
    noise = torch.rand(5, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    request = SamplingRequest(tokens, mask, noise, end_ids=(2,), pad_id=0)
    whole = sample_completions(model, request)
    for max_rows, sizes in ((8, [2, 2, 1]), (3, [1] * 5), (100, [5])):
        begun = []

        def counting(*asked: Any, begun: list[int] = begun) -> Completions:
            begun.append(1)
            return sample_completions(*asked)

        passes = InPasses(counting, max_rows).by_prompts(model, request)
        rows, first = next(passes)
        assert rows == list(range(sizes[0]))
        assert len(begun) == (2 if max_rows == 3 else 1), "nothing of the next pass yet"
        assert first.tokens.shape[:2] == (sizes[0], 4)
        width = first.tokens.shape[-1]
        assert torch.equal(first.tokens, whole.tokens[: sizes[0], :, :width])
        assert [len(rows) for rows, _ in passes] == sizes[1:]
