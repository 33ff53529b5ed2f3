"""The tokens that towers of tilted models read, against what was sampled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers import tiny_llama
from tests.sampling.test_decode import PROMPTS, noise_of, pad_left
from vbon_lightning.models import new_tilted_lm
from vbon_lightning.sampling import decode as decode_module
from vbon_lightning.sampling import sample_completions
from vbon_lightning.sampling.request import SamplingRequest
from vbon_lightning.sampling.towers import metered_towers, note_read


def tilted() -> Any:
    return new_tilted_lm(tiny_llama(24), tiny_llama(24, seed=1).base_model).eval()


def request() -> SamplingRequest:
    tokens, mask = pad_left(PROMPTS)
    return SamplingRequest(tokens, mask, noise_of([0, 1, 2, 3]), [2, 5, 7], 0)


def test_each_meter_counts_for_itself_and_none_without_a_tower() -> None:
    model = tilted()
    note_read(model, 3)  # nobody asks
    with metered_towers() as meter:
        note_read(model, 3)
        note_read(model.base, 100)
        with metered_towers() as inner:
            note_read(model, torch.tensor([[True, False], [True, True]]))
        note_read(model, 4)
    note_read(model, 8)
    assert (meter.tokens, inner.tokens) == (7, 3)


@pytest.mark.parametrize("plain", [False, True])
def test_a_sampler_reads_a_prompt_once_and_all_tokens_but_the_last(
    plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_module, "runs_plain", lambda _: plain)
    with metered_towers() as meter:
        found = sample_completions(tilted(), request())
    lengths = found.mask.sum(-1)
    assert int(lengths.min()) < int(lengths.max()) == 10, "some end before others"
    assert meter.tokens == sum(map(len, PROMPTS)) + int((lengths - 1).sum())
    with metered_towers() as meter:
        sample_completions(tiny_llama(24), request())
    assert meter.tokens == 0
