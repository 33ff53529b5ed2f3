"""Supervised modules: dropout's seed, and a reward model's loss and accuracy by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.modules.fake import FakeTrainer, attach
from tests.modules.setting import make_data, make_module
from vbon_lightning import RewardModelling, TextSource
from vbon_lightning.modules import (
    supervised,
)
from vbon_lightning.sampling import noise_seed


def test_each_batch_and_rank_has_its_own_dropout(files: Path, spy: Any) -> None:
    seeded = spy(supervised.torch, "manual_seed")
    module: Any = make_module("sft", make_data(files), seed=7)
    attach(module, FakeTrainer(global_rank=1))
    for number in range(3):
        module.begin_batch()
        assert seeded.calls[-1] == ((noise_seed(7, "dropout", 1, number),), {})
        assert module.batches_seen == number + 1
    assert (module.response_room, module.needs_reference, module.uses_reward) == (0, False, False)


@pytest.mark.parametrize("objective", ["classification", "preference"])
def test_rewards_are_learnt_and_counted_by_hand(objective: str, files: Path, tmp_path: Path) -> None:
    rows = [
        {"text": "ab" * (i % 3 + 1), "response": "cdefgh"[: i + 1], "worse": "hgf"[: 1 + i % 3], "label": i % 3}
        for i in range(5)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    compares = objective == "preference"
    columns = {"response_column": "response", "rejected_column": "worse"} if compares else {"label_column": "label"}
    source = TextSource(path=str(path), **columns)
    data = make_data(files, train=source, val=source, test=source)
    labels = {} if compares else {"labels": ["x", "y", "z"]}
    module = RewardModelling(data.actors, objective=objective, dropout=False, centre=0.5 if compares else 0.0, **labels)
    module.configure_model()
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.policy.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise))
    data.trainer = SimpleNamespace(lightning_module=module, world_size=1, global_rank=0)
    kind = module.batch_kind
    batch = data._collate_judged([(i, True, row) for i, row in enumerate(data._split("train", kind).rows)])

    def logits(tokens: Any, mask: Any) -> Any:
        with torch.no_grad():
            return module.policy(tokens[mask][None]).logits[0].double()

    losses, right = [], []
    for row in range(len(rows)):
        found = [logits(t, m) for t, m in zip(batch.tokens[row], batch.mask[row], strict=True)]
        if compares:
            gap = (found[0] - found[1]).item()
            middle = (found[0] + found[1]).item()
            losses.append(math.log1p(math.exp(-gap)) + 0.5 * middle**2)
            right.append(gap > 0)
        else:
            label = rows[row]["label"]
            losses.append((found[0].logsumexp(-1) - found[0][label]).item())
            right.append(int(found[0].argmax()) == label)
    assert 0 < sum(right) < len(right)
    logged = attach(module, FakeTrainer())
    loss = module.training_step(batch, 0)["loss"]
    assert loss.requires_grad
    assert loss.item() == pytest.approx(sum(losses) / 5, rel=1e-4)
    assert logged == {
        "train/loss": (pytest.approx(sum(losses) / 5, rel=1e-4), {"prog_bar": True}),
        "train/accuracy": (pytest.approx(sum(right) / 5), {"prog_bar": True}),
    }
    # Rows that pad a rank's share are no part of what is counted.
    module._start_counting()
    module.count(batch._replace(valid=torch.tensor([True, True, True, False, False])))
    module.count(batch._replace(valid=torch.tensor([False, False, False, True, False])))
    counted = {name: value.item() for name, value in module.counted().items()}
    assert counted == {
        "loss": pytest.approx(sum(losses[:4]) / 4, rel=1e-4),
        "accuracy": pytest.approx(sum(right[:4]) / 4),
    }


def test_two_texts_of_one_score_are_not_told_apart(files: Path) -> None:
    module = RewardModelling(make_data(files).actors, objective="preference")
    batch: Any = SimpleNamespace(labels=None)
    scores = torch.tensor([[[1.0], [1.0]], [[2.0], [1.0]], [[1.0], [2.0]]])
    assert module._right(scores, batch).tolist() == [False, True, False]
