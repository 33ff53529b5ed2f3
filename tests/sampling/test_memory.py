"""The bytes that caches hold, against what their shapes say."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from tests.helpers import tiny_llama
from tests.sampling.test_decode import PROMPTS, noise_of, pad_left
from vbon_lightning.sampling import sample_completions
from vbon_lightning.sampling.memory import cache_bytes, metered_caches, note_cache
from vbon_lightning.sampling.request import SamplingRequest


def cache_of(rows: int, length: int) -> DynamicCache:
    cache = DynamicCache()
    cache.update(torch.zeros(rows, 1, length, 8), torch.zeros(rows, 1, length, 8), 0)
    return cache


def test_the_most_that_caches_held_together() -> None:
    first, second = cache_of(2, 3), cache_of(4, 5)
    assert cache_bytes(first) == 2 * 3 * 2 * 8 * 4
    note_cache(first)  # nobody asks
    with metered_caches() as meter:
        note_cache(first)
        note_cache(second)
        note_cache(second)
        both = meter.peak
        second.batch_select_indices(torch.tensor([0]))
        note_cache(second)
        assert both == meter.peak == cache_bytes(first) + 4 * 5 * 2 * 8 * 4
        del second
        note_cache(first)
        with metered_caches() as inner:
            note_cache(first)
    assert inner.peak == cache_bytes(first) < meter.peak


def test_sampling_tells() -> None:
    model, (tokens, mask), samples, length = tiny_llama(24), pad_left(PROMPTS), 6, 10
    request = SamplingRequest(tokens, mask, noise_of([0, 1, 2, 3], samples, length), [2], 0)
    with metered_caches() as meter:
        sample_completions(model, request)
    rows, width = len(PROMPTS) * samples, tokens.shape[1] + length - 1
    assert meter.peak == rows * width * 2 * 8 * 4, "a key and a value of 8 floats a token, with room for all to come"
