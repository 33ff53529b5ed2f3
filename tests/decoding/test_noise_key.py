"""Where the noise of responses lies."""

from __future__ import annotations

import pytest
import torch

from vbon_lightning.decoding import NoiseKey
from vbon_lightning.sampling import prompt_noise

KEY = NoiseKey(5, 3, "test", 2)


def noise(key: NoiseKey) -> torch.Tensor:
    return prompt_noise([4, 9], length=3, **key._asdict())


@pytest.mark.parametrize("most", [1, 2, 5, 8])
def test_parts_have_the_noise_of_the_whole(most: int) -> None:
    parts = KEY.parts(most)
    assert max(part.num_samples for part in parts) == min(most, 5)
    assert torch.equal(torch.cat([noise(part) for part in parts], dim=1), noise(KEY))
    assert [part for piece in KEY.parts(4) for part in piece.parts(2)] == [
        NoiseKey(2, 3, "test", 2, 0), NoiseKey(2, 3, "test", 2, 2), NoiseKey(1, 3, "test", 2, 4)
    ]  # fmt: skip


def test_the_candidates_of_a_response_are_the_same_in_any_part() -> None:
    whole = noise(KEY.of_each(4))
    parts = [noise(part.of_each(4)) for part in KEY.parts(2)]
    assert whole.shape == (2, 20, 3) and torch.equal(torch.cat(parts, dim=1), whole)


def test_what_is_named_apart_is_other_noise_of_the_same_responses() -> None:
    other = KEY.apart("choice")
    assert other == NoiseKey(5, 3, "test/choice", 2)
    assert not torch.isclose(noise(other), noise(KEY)).any()
