"""Noise belongs to the prompt: the same wherever it is drawn, different for everything else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from vbon_lightning.sampling import noise, noise_seed, prompt_noise


def draw(identities: list, **settings: object) -> Tensor:
    entries: dict = {"num_samples": 3, "length": 4, "seed": 1, "stream": "train", "step": 2}
    return prompt_noise(identities, **(entries | settings))


def test_is_uniform():
    values = draw(list(range(50)), num_samples=20, length=50)
    assert values.dtype == torch.float64
    assert values.shape == (50, 20, 50)
    assert values.min() >= 0
    assert values.max() < 1
    counts = torch.histc(values, bins=10, min=0, max=1)
    assert ((counts - 5000) ** 2 / 5000).sum() < 27.9  # the 0.999 quantile of chi-square with 9 degrees of freedom


def test_does_not_depend_on_the_batch():
    together = draw([4, 9, 17, 2])
    assert torch.equal(draw([17]), together[2:3])
    assert torch.equal(draw([2, 4]), together[[3, 0]])
    torch.rand(7)
    assert torch.equal(draw([4, 9, 17, 2]), together)


def test_some_samples_of_a_prompt_are_those_of_all():
    whole = draw([4, 9], num_samples=5)
    assert torch.equal(draw([4, 9], num_samples=2, first=1), whole[:, 1:3])


def test_leaves_the_global_random_state_alone():
    state = torch.get_rng_state()
    draw([1, 2])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "change", [{"seed": 2}, {"stream": "val"}, {"step": 3}, {"identities": [5]}, {"identities": ["4"]}]
)
def test_differs_where_anything_differs(change):
    settings: dict = {"identities": [4]} | change
    assert not torch.isin(draw(**settings), draw([4])).any()


def test_rows_and_samples_differ():
    values = draw(list(range(20)), num_samples=5)
    assert values.flatten().unique().numel() == values.numel()


def test_parts_do_not_run_together():
    assert noise_seed(1, 23) != noise_seed(12, 3)
    assert noise_seed("a", "bc") != noise_seed("ab", "c")
    assert noise_seed(1) != noise_seed("1")
    assert 0 <= noise_seed(3, "x") < 2**63


def test_all_bits_of_the_seed_count(monkeypatch):
    # A generator that reads 32 bits would give two prompts in 100,000 the same noise.
    monkeypatch.setattr(noise, "noise_seed", lambda seed, stream, step, identity: 5 + (identity << 32))
    one, other = draw([0, 1])
    assert not torch.isin(one, other).any()


def test_is_the_same_in_every_process():
    code = (
        f"import runpy; module = runpy.run_path({noise.__file__!r});"  # alone: the package imports much more
        "noise_seed, prompt_noise = module['noise_seed'], module['prompt_noise'];"
        "print(noise_seed(1, 'train', 2, 'key'));"
        "print(prompt_noise([4, 'key'], num_samples=3, length=4, seed=1, stream='train', step=2).tolist())"
    )
    printed = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": salt},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for salt in ("1", "2")
    ]
    assert printed[0] == printed[1]
    assert printed[0] == f"{noise_seed(1, 'train', 2, 'key')}\n{draw([4, 'key']).tolist()}\n"
