"""What responses take, summed and said."""

from __future__ import annotations

from vbon_lightning.decoding.cost import DecodingCost, cost_amount, describe_cost

ONE, OTHER = DecodingCost(8, 0, 4, 0.5, 2**20, 0), DecodingCost(4, 6, 2, 0.25, 3 * 2**19, 0, 1)


def test_sums_and_peaks() -> None:
    assert ONE.plus(OTHER) == DecodingCost(12, 6, 6, 0.75, 3 * 2**19, 0, 1)
    assert ONE.plus(DecodingCost(0, 0, 0, peak_cuda_bytes=7)).peak_cuda_bytes == 7
    assert ONE.per_response(4) == {
        "generated_tokens": 2,
        "value_tokens": 0,
        "reward_calls": 1,
        "seconds": 0.125,
        "peak_cache_bytes": 2**20,
        "peak_cuda_bytes": 0,
        "fallbacks": 0,
    }


def test_it_is_said_in_a_line() -> None:
    assert describe_cost([ONE, OTHER], 6) == (
        "a response took generated tokens 2.0, value tokens 1.0, reward calls 1.0, seconds 0.12, "
        "peak cache of a batch 1.50 MiB, fallbacks 0.17"
    )
    on_gpu = describe_cost([ONE._replace(peak_cuda_bytes=2**30)], 1)
    assert on_gpu.endswith("peak cuda of a batch 1,024.00 MiB")
    assert cost_amount("generated_tokens", 1234.56) == "1,234.6"
