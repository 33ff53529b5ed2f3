"""The ways to sample, by name."""

from __future__ import annotations

import pytest

from vbon_lightning.sampling import SamplerError, make_sampler, sample_completions
from vbon_lightning.sampling.passes import InPasses
from vbon_lightning.sampling.static import GraphSampler


def test_samplers_by_name():
    assert make_sampler("eager") is sample_completions, "the default is the plain loop itself"
    assert isinstance(make_sampler("graph"), GraphSampler)
    limited = make_sampler("graph", max_rows=8)
    assert isinstance(limited, InPasses)
    assert limited.max_rows == 8
    for arguments, message in [
        ({"name": "fast"}, "data.sampler must be one of eager, graph, vllm; got 'fast'"),
        ({"name": "eager", "max_rows": 0}, "data.max_rows must be at least 1, got 0"),
        ({"name": "graph", "engine_options": {"dtype": "half"}}, "data.engine_options are arguments of vLLM's engine"),
    ]:
        with pytest.raises(SamplerError, match=message):
            make_sampler(**arguments)


def test_without_vllm_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SamplerError, match=r"data.sampler=vllm needs vLLM: pip install 'vbon_lightning\[vllm\]'"):
        make_sampler("vllm")
