"""DPO: the loss by hand, where it starts and what it learns."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.functional.test_preference import gap_by_quadrature
from tests.helpers import readable
from tests.modules.offline import TEMPERATURE, Record, assert_gradients_equal, by_hand, table_batch, table_data
from tests.modules.setting import make_data, make_files, make_module, make_table, make_trainer, prepared
from vbon_lightning import DPO
from vbon_lightning.sampling import pick_groups


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_files(tmp_path_factory.mktemp("files"))
    make_table(directory, temperature=TEMPERATURE)
    return directory


@pytest.mark.parametrize("loss_name", ["dpo", "bonbon"])
def test_dpo_by_hand(loss_name: str, files: Path) -> None:
    data = table_data(files)
    own = {"beta": 0.4} if loss_name == "dpo" else {"alpha": 0.1}
    module, batch = prepared("dpo", data, loss=loss_name, **own), table_batch(data)
    rewards, reference = batch.prompts.reference_rewards, module.actors.reference
    loss, logs = module.learn(batch, rewards, 3)
    pairs = pick_groups(rewards, [0, 1, 2, 3], n=4, groups=2, seed=module.seed, stream="pick", step=3)
    terms, gaps = [], []
    for place in range(4):
        goal, ties = gap_by_quadrature(rewards[place].tolist(), 4)
        for best, worst in zip(pairs.best[place].tolist(), pairs.worst[place].tolist(), strict=True):
            assert rewards[place, best] >= rewards[place, worst]
            ours = [by_hand(module.policy, batch, place, sample) for sample in (best, worst)]
            with torch.no_grad():
                theirs = [by_hand(reference, batch, place, sample) for sample in (best, worst)]
            gap = ours[0] - theirs[0] - ours[1] + theirs[1]
            apart = float(rewards[place, best] > rewards[place, worst])
            gaps += [gap.item()] if apart else []
            if loss_name == "dpo":
                terms.append(apart * torch.log1p(torch.exp(-0.4 * gap)))
            else:
                terms.append(-0.1 * ours[0] + 0.9 * apart * (gap - goal / (1 - ties)) ** 2)
    assert_gradients_equal(module, loss, torch.stack(terms).mean())
    assert 0 < len(gaps) < 8, "some groups tie"
    assert logs["tied_pairs"].item() == pytest.approx(1 - len(gaps) / 8)
    assert logs["accuracy"].item() == pytest.approx(sum(gap > 0 for gap in gaps) / len(gaps), abs=1e-6)
    beta = 0.4 if loss_name == "dpo" else 1 / (2 * 3 * (1 + 1 / 2 + 1 / 3))
    assert logs["margin"].item() == pytest.approx(beta * sum(gaps) / len(gaps), rel=1e-4)


def test_dpo_starts_at_the_reference_and_learns(files: Path, tmp_path: Path) -> None:
    data, record = table_data(files), Record()
    make_trainer(tmp_path, record, steps=30, limit_val_batches=0).fit(make_module("dpo", data, beta=1.0), data)
    first = record.logged[0]
    apart = 1 - first.pop("tied_pairs")
    assert first == pytest.approx({"loss": apart * math.log(2), "accuracy": 0.5, "margin": 0.0}, abs=1e-6)
    last = record.logged[-5:]
    assert sum(logged["accuracy"] for logged in last) / 5 > 0.8
    assert sum(logged["margin"] for logged in last) / 5 > 0.5


def test_dropout_is_off(files: Path, tmp_path: Path) -> None:
    make_table(make_files(tmp_path / "files"), policy=str(tmp_path / "files" / "gpt2"))
    data = make_data(
        tmp_path / "files", policy=str(tmp_path / "files" / "gpt2"), reference_table=str(tmp_path / "files" / "table")
    )
    record = Record()
    make_trainer(tmp_path, record, steps=1).fit(make_module("dpo", data), data)
    assert record.logged[0]["margin"] == 0.0


@pytest.mark.parametrize(
    ("cls", "changes", "message"),
    [
        (DPO, {"n": 0}, "model.n must be an integer > 1, got 0: DPO"),
        (DPO, {"n": True}, "model.n must be an integer > 1, got True"),
        (DPO, {"pairs_per_prompt": 1.5}, "model.pairs_per_prompt must be an integer >= 1, got 1.5"),
        (DPO, {"beta": 0.0}, "model.beta must be a number > 0"),
        (DPO, {"beta": float("nan")}, "model.beta must be a number > 0"),
        (DPO, {"loss": "ipo"}, "model.loss must be one of dpo, bonbon; got 'ipo'"),
        (DPO, {"alpha": 1.5}, r"model.alpha must be in \[0, 1\], got 1.5"),
    ],
    ids=readable,
)
def test_options_that_make_no_sense(cls: Any, changes: dict[str, Any], message: str, files: Path) -> None:
    with pytest.raises(ValueError, match=message):
        cls(table_data(files).actors, **changes)
