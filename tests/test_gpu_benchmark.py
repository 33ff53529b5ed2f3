"""The GPU benchmark's own logic, tried on the CPU at tiny size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.gpu_generation import SIZES, main, report, step_bytes, work

JOB: dict[str, Any] = {
    "device": "cpu", "size": "tiny", "rows": 8, "prompts": 2, "prompt": 5, "length": 4, "repeats": 1
}  # fmt: skip


def test_it_times_all_three() -> None:
    found = work(JOB)
    for side in ("eager", "graph", "generate"):
        assert found[side]["share_of_floor"] > 0
        assert found[side]["tokens_per_second"] == pytest.approx(32 / found[side]["seconds"])
    assert not found["captured"]
    lines = report(JOB, found)
    assert [line[0] for line in lines] == [
        "8 rows, eager loop", "8 rows, graph, not captured", "8 rows, transformers.generate"
    ]  # fmt: skip
    assert lines[2][2] == "**1.0**"


def test_the_bytes_of_a_step() -> None:
    config = AutoConfig.for_model("llama", tie_word_embeddings=True, **SIZES["tiny"])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    output = model(torch.zeros(3, 7, dtype=torch.long), use_cache=True)
    cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert step_bytes(config, weights // 2, 3, 7, 2) == weights + cache


def test_the_model_has_the_size_it_says() -> None:
    config = AutoConfig.for_model("llama", tie_word_embeddings=True, **SIZES["135M"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(135e6, rel=0.01)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_it_says_so() -> None:
    with pytest.raises(SystemExit, match="measures a CUDA device, and there is none here"):
        main()
