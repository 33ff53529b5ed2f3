"""Untrained value models that say much, and what they say of a prefix that is run by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.modules.setting import make_data, make_files, make_table
from vbon_lightning import AlignmentDataModule
from vbon_lightning.functional import RewardBins, reward_bins
from vbon_lightning.models import ValueModel, new_value_model, save_pretrained

BINS = reward_bins(torch.linspace(-0.4, 3.6, 41), bins=5, atoms=4)
TABLE = {"reward": {"class": "Length"}, "seed": 7}
TOKENS = torch.tensor([[3, 4, 8, 9, 5, 6]])
LENGTHS = torch.tensor([[0, 0, 1, 2, 3, 4]])


def scramble(model: ValueModel, seed: int = 0) -> ValueModel:
    """Give a new head weights that tell prefixes and lengths apart."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in (model.head.weight, model.head.bias, model.progress.weight):
            part.copy_(0.5 * torch.randn(part.shape, generator=generator))
    return model


def new_model(source: Any, bins: RewardBins = BINS, **changes: Any) -> ValueModel:
    return new_value_model(source, bins, **({"longest": 4, "fingerprint": TABLE} | changes))


def save_value_model(
    data: AlignmentDataModule, directory: Path, *, body: Any = None, seed: int = 0, fingerprint: Any = None
) -> str:
    """Save an untrained value model that says much, and fits the data's reference, reward and length."""
    made_of = data.fingerprint() if fingerprint is None else fingerprint
    longest = data.actors.max_new_tokens
    model = new_model(body or data.actors.policy, longest=longest, fingerprint=made_of)
    save_pretrained(scramble(model, seed), data.tokenizer, directory)
    return str(directory)


def make_valued_files(directory: Path, **changes: Any) -> Path:
    """Write what :func:`~tests.modules.setting.make_files` does, a reference table, and a value model, ``value``."""
    make_files(directory)
    make_table(directory, **changes)
    save_value_model(make_data(directory, **changes), directory / "value")
    return directory


@torch.no_grad()
def last_state(model: Any, tokens: list[int]) -> Tensor:
    """Return the body's last hidden state after tokens that are run by themselves, ``[H]``."""
    return model.base_model(input_ids=torch.tensor([tokens]), use_cache=False).last_hidden_state[0, -1]


@torch.no_grad()
def bins_after(model: ValueModel, prompt: list[int], response: list[int]) -> Tensor:
    """Return a prefix's log-probabilities ``[K]``, run by itself."""
    return model.forecast(last_state(model, prompt + response), torch.tensor(len(response)))
