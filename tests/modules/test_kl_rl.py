"""KL-constrained RL: advantages from a value model by hand, and weights of the KL that make no sense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import readable
from tests.models.setting import save_value_model
from tests.modules.setting import make_data, make_files
from tests.modules.test_value_critic import advantages_by_hand, log_values_by_hand, rolled
from tests.sampling.test_distilling import worth
from vbon_lightning import KLRL


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_files(tmp_path_factory.mktemp("files"))
    save_value_model(make_data(directory), directory / "value")
    return directory


def test_advantages_of_kl_rl(files: Path) -> None:
    module, rollout = rolled(files, "klrl", beta=0.3, samples_per_prompt=1)
    atoms = module.loaded.value.bins.atoms
    log_values = log_values_by_hand(module, rollout, (atoms / 0.3).exp().mean(-1).log()[None])
    found, _ = module._advantages(module.target(rollout), rollout, None)
    expected = advantages_by_hand(log_values, rollout, rollout.rewards, 0.3, 1.0, False)
    # What a prompt is worth is in all of its advantages or in none.
    both = rollout.completions.mask[..., 1:]
    torch.testing.assert_close(found.diff(dim=-1)[both], expected.diff(dim=-1)[both], atol=1e-4, rtol=1e-3)
    assert found.diff(dim=-1)[both].abs().mean() > 0.01


def test_kl_rl_below_lambda_one_ends_where_its_values_do(tmp_path_factory: pytest.TempPathFactory) -> None:
    """``exp(r / beta)`` has no mean of 1: its values keep the constant that the whole response's has."""
    directory = make_files(tmp_path_factory.mktemp("files"))
    save_value_model(make_data(directory), directory / "value")
    module, rollout = rolled(directory, "klrl", beta=0.3, samples_per_prompt=1, value_lambda=0.5)
    weights = (module.loaded.value.bins.atoms / 0.3).exp().mean(-1).log()[None]
    prompts = [row[keep] for row, keep in zip(rollout.prompts.tokens, rollout.prompts.mask, strict=True)]
    start = torch.stack([worth(module.loaded.value, row[None], 0, weights[0]).log().squeeze() for row in prompts])
    assert start.abs().min() > 1
    values = log_values_by_hand(module, rollout, weights) + start[:, None, None]
    expected = advantages_by_hand(values, rollout, rollout.rewards, 0.3, 0.5, False)
    found, _ = module._advantages(module.target(rollout), rollout, None)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("cls", "changes", "message"),
    [
        (KLRL, {"beta": 0.0}, "model.beta must be a number > 0"),
        (KLRL, {"beta": -1.0}, "model.beta must be a number > 0"),
    ],
    ids=readable,
)
def test_options_that_make_no_sense(cls: Any, changes: dict[str, Any], message: str, files: Path) -> None:
    with pytest.raises(ValueError, match=message):
        cls(make_data(files).actors, **changes)
