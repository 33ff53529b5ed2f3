"""BoN-SFT: the loss by hand and what is picked."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import readable
from tests.modules.offline import TEMPERATURE, Record, assert_gradients_equal, by_hand, table_batch, table_data
from tests.modules.setting import make_files, make_module, make_table, make_trainer, prepared
from vbon_lightning import BoNSFT
from vbon_lightning.functional import bon_selection_weights


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_files(tmp_path_factory.mktemp("files"))
    make_table(directory, temperature=TEMPERATURE)
    return directory


@pytest.mark.parametrize("selection", ["weights", "groups"])
def test_bonsft_is_cross_entropy_on_the_picks(selection: str, files: Path) -> None:
    data = table_data(files)
    module, batch = prepared("bonsft", data, selection=selection), table_batch(data)
    rewards = batch.prompts.reference_rewards
    picks = module.pick(batch, rewards, 5)
    assert picks.shape == (4, 3)
    loss, logs = module.learn(batch, rewards, 5)
    hand = torch.stack(
        [-by_hand(module.policy, batch, place, sample) for place in range(4) for sample in picks[place].tolist()]
    )
    assert_gradients_equal(module, loss, hand.mean())
    assert logs["picked_reward"].item() == pytest.approx(rewards.gather(1, picks).mean().item())


@pytest.mark.parametrize("selection", ["weights", "groups"])
def test_bonsft_loss_is_the_weighted_cross_entropy_on_average(selection: str, files: Path) -> None:
    data = table_data(files)
    module, batch = prepared("bonsft", data, selection=selection), table_batch(data)
    rewards = batch.prompts.reference_rewards
    assert (rewards.sort(-1).values.diff() == 0).any(), "some tie"
    with torch.no_grad():
        log_probs = torch.tensor(
            [[by_hand(module.policy, batch, place, sample) for sample in range(16)] for place in range(4)]
        )
    losses = torch.stack([-log_probs.gather(1, module.pick(batch, rewards, step)).mean() for step in range(1500)])
    expected = -(bon_selection_weights(rewards, n=4) * log_probs).sum(-1).mean()
    error = losses.std().item() / math.sqrt(len(losses))
    assert losses.mean().item() == pytest.approx(expected.item(), abs=4 * error)
    plain = -log_probs.mean().item()
    assert abs(plain - expected.item()) > 20 * error, "which cross-entropy on all responses is not"


def test_bonsft_trains_without_the_reference(files: Path, tmp_path: Path) -> None:
    data, record, calls = table_data(files), Record(), []
    module: Any = make_module("bonsft", data)
    module.configure_model()
    module.actors.reference.register_forward_hook(lambda *_: calls.append(1))
    before = make_trainer(tmp_path / "before").validate(module, data)
    assert calls
    calls.clear()
    make_trainer(tmp_path, record, steps=20, limit_val_batches=0).fit(module, data)
    assert not calls
    assert before[0]["val/kl"] == 0  # the policy is the reference still
    losses = [logged["loss"] for logged in record.logged]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


@pytest.mark.parametrize(
    ("cls", "changes", "message"),
    [
        (BoNSFT, {"n": 1}, "model.n must be an integer > 1, got 1: BoNSFT takes the best of n"),
        (BoNSFT, {"n": 2.5}, "model.n must be an integer > 1, got 2.5"),
        (BoNSFT, {"responses_per_prompt": 0}, "model.responses_per_prompt must be an integer >= 1, got 0"),
        (BoNSFT, {"selection": "best"}, "model.selection must be one of weights, groups; got 'best'"),
        (BoNSFT, {"eval_samples": 0}, "model.eval_samples must be an integer >= 1, got 0"),
    ],
    ids=readable,
)
def test_options_that_make_no_sense(cls: Any, changes: dict[str, Any], message: str, files: Path) -> None:
    with pytest.raises(ValueError, match=message):
        cls(table_data(files).actors, **changes)
