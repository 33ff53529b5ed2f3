"""A batch sampled in passes of so many rows."""

from __future__ import annotations

from typing import Any

import pytest

from tests.sampling.test_static import compare, model_of
from vbon_lightning.sampling import sample_completions
from vbon_lightning.sampling.passes import InPasses
from vbon_lightning.sampling.static import GraphSampler
from vbon_lightning.types import Completions


@pytest.mark.parametrize("base", [sample_completions, GraphSampler()], ids=["eager", "graph"])
@pytest.mark.parametrize("max_rows", [1, 4, 6, 7, 13, 24, 100])
def test_samples_do_not_depend_on_the_passes(max_rows, base):
    model = model_of("gpt2")
    seen = []

    def counting(model: Any, tokens: Any, mask: Any, noise: Any, **settings: Any) -> Completions:
        seen.append(noise.shape[0] * noise.shape[1])
        return base(model, tokens, mask, noise, **settings)

    compare(InPasses(counting, max_rows), model)
    assert max(seen) <= max_rows
    assert sum(seen) == 24
