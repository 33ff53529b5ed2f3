"""Supervised fine-tuning: its loss by hand, and what is its own beyond what the modules share."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.helpers import save_tiny_model
from tests.modules.fake import FakeTrainer, attach
from tests.modules.setting import ALPHABET, make_data, make_files, make_module, make_trainer
from vbon_lightning import AlignmentDataModule, TextSource
from vbon_lightning.callbacks import PolicyExport
from vbon_lightning.rewards import ClassifierReward
from vbon_lightning.types import TextBatch

ROWS = [
    {"text": "ab", "response": "cd"},
    {"text": "a", "response": "b"},
    {"text": "cde", "response": "fghab"},
    {"text": "h", "response": "a"},
    {"text": "bcd", "response": "aaaaaa"},
]


def pairs(files: Path, **options: Any) -> AlignmentDataModule:
    (files / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    source = TextSource(path=str(files / "pairs.jsonl"), response_column="response")
    given: dict[str, Any] = {"train": source, "val": source, "test": source, "batch_size": 5, "eval_batch_size": 2}
    return make_data(files, **(given | options))


def losses_by_hand(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> list[list[float]]:
    """-log p of each response token and of the end, a forward pass a text, without padding."""
    found = []
    for row in rows:
        prompt, response = (tokenizer(row[name], add_special_tokens=False).input_ids for name in ("text", "response"))
        ids = prompt + response
        start = len(ids) - len(response)
        ids.append(tokenizer.eos_token_id)
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        found.append([-log_probs[place - 1, ids[place]].item() for place in range(start, len(ids))])
    return found


def whole_batch(data: AlignmentDataModule) -> TextBatch:
    rows = data._split("train", "text").rows
    return data._collate_texts([(place, True, row) for place, row in enumerate(rows)])


def loaded(files: Path, data: AlignmentDataModule, **options: Any) -> Any:
    module: Any = make_module("sft", data, dropout=False, **options)
    module.configure_model()
    return module


def test_the_loss_is_a_mean_over_the_tokens_of_all_responses(tmp_path: Path) -> None:
    data = pairs(make_files(tmp_path))
    module = loaded(tmp_path, data)
    by_hand = [loss for row in losses_by_hand(module.policy, module.tokenizer, ROWS) for loss in row]
    batch = whole_batch(data)
    assert not bool(batch.mask.all())  # or padding is not tried
    logged = attach(module, FakeTrainer(world_size=1))
    loss = module.training_step(batch, 0)["loss"]
    assert loss.item() == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)
    assert logged == {"train/nll": (pytest.approx(loss.item()), {"prog_bar": True})}
    assert module._weights == []  # nothing is accumulated, and nothing is to be weighed


def test_ranks_weigh_their_tokens_alike(tmp_path: Path) -> None:
    data = pairs(make_files(tmp_path))
    module = loaded(tmp_path, data)
    batch = whole_batch(data)
    total, count = module._negative_log_likelihood(batch)
    trainer = FakeTrainer(other=7)
    logged = attach(module, trainer)
    loss = module.training_step(batch, 0)["loss"]
    assert loss.item() == pytest.approx(2 * total.item() / (count.item() + 7), rel=1e-6)
    assert trainer.reductions == ["sum"]
    assert logged["train/nll"][0] == pytest.approx(total.item() / count.item(), rel=1e-6)


@pytest.mark.parametrize("accumulated", [2, 3])
def test_accumulated_batches_weigh_as_many_as_their_tokens(accumulated: int, tmp_path: Path) -> None:
    data = pairs(make_files(tmp_path))
    module = loaded(tmp_path, data)
    batch = whole_batch(data)
    attach(module, FakeTrainer(world_size=1, accumulate_grad_batches=accumulated))
    module.on_train_batch_start(batch, 0)
    first = module.training_step(batch, 0)["loss"]
    assert module._weights[0].item() == sum(len(row["response"]) + 1 for row in ROWS)
    module.on_train_batch_start(batch, 1)
    part = batch._replace(valid=torch.tensor([True, True, False, False, False]))
    second = module.training_step(part, 1)["loss"]
    total, count = module._negative_log_likelihood(part)
    assert module._weights[1].item() == count.item() == 5
    # Each is its tokens' sum, in units of the first batch's count.
    assert second.item() == pytest.approx(total.item() / module._weights[0].item(), rel=1e-6)
    assert first.item() > 0


def test_a_batch_of_one_token_and_one_of_none(tmp_path: Path) -> None:
    data = pairs(make_files(tmp_path))
    module = loaded(tmp_path, data)
    batch = whole_batch(data)
    logged = attach(module, FakeTrainer(world_size=1, accumulate_grad_batches=2))
    _, expected = losses_by_hand(module.policy, module.tokenizer, ROWS[1:2])[0]
    row = next(i for i in range(len(ROWS)) if int(batch.mask[i].sum()) == int(batch.mask.sum(-1).min()))
    last = batch.loss_mask & (batch.loss_mask.long().cumsum(-1) == batch.loss_mask.sum(-1, keepdim=True))
    one = batch._replace(valid=torch.arange(len(ROWS)) == row, loss_mask=last)
    module.on_train_batch_start(one, 0)
    assert module.training_step(one, 0)["loss"].item() == pytest.approx(expected, rel=1e-5)
    assert (logged["train/nll"][0], module._weights[-1].item()) == (pytest.approx(expected, rel=1e-5), 1.0)
    none = batch._replace(valid=torch.zeros(len(ROWS), dtype=torch.bool))
    assert module.training_step(none, 0)["loss"].item() == 0.0
    assert (logged["train/nll"][0], module._weights[-1].item()) == (0.0, 1.0)
    module._start_counting()
    module.count(one)
    module.count(none)
    assert module.counted()["nll"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_evaluation_is_a_mean_over_tokens_and_not_over_batches(stage: str, tmp_path: Path) -> None:
    data = pairs(make_files(tmp_path))
    module = loaded(tmp_path, data)
    trainer = make_trainer(tmp_path, enable_progress_bar=False)
    (found,) = (trainer.validate if stage == "val" else trainer.test)(module, datamodule=data, verbose=False)
    losses = [loss for row in losses_by_hand(module.policy, module.tokenizer, ROWS) for loss in row]
    mean = sum(losses) / len(losses)
    assert found == {
        f"{stage}/nll": pytest.approx(mean, rel=1e-5),
        f"{stage}/perplexity": pytest.approx(math.exp(mean), rel=1e-5),
    }
    assert set(trainer.progress_bar_metrics) == set(found)


def test_dropout_is_of_the_seed_and_the_batch(tmp_path: Path) -> None:
    files = make_files(tmp_path)
    save_tiny_model(files / "dropping", "gpt2", alphabet=ALPHABET, seed=2, resid_pdrop=0.5, embd_pdrop=0.5)
    data = pairs(files, policy=str(files / "dropping"))
    batch = whole_batch(data)

    def losses(**options: Any) -> list[float]:
        module: Any = make_module("sft", data, **options)
        module.configure_model()
        attach(module, FakeTrainer(world_size=1))
        return [module.training_step(batch, number)["loss"].item() for number in range(2)]

    first = losses()
    assert first == losses()
    assert len({*first, *losses(seed=1)}) == 4
    off = losses(dropout=False)
    assert off[0] == off[1]


def test_the_reward_of_later_stages_need_not_exist_yet(tmp_path: Path) -> None:
    """One data file serves all stages; SFT is the first of them, and the reward may be a later one's export."""
    files = make_files(tmp_path)

    def fit(steps: int, resume: str | None = None) -> Trainer:
        data = make_data(
            files,
            train=TextSource(path=str(files / "texts.txt")),
            reward=ClassifierReward(str(tmp_path / "reward-to-come")),
        )
        kept = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=1, save_last=True)
        trainer = Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            callbacks=[kept, PolicyExport(tmp_path / "export")],
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(make_module("sft", data), datamodule=data, ckpt_path=resume)
        return trainer

    fit(1)
    assert fit(2, resume=str(tmp_path / "checkpoints" / "last.ckpt")).global_step == 2
    assert "**Reward:** none" in (tmp_path / "export" / "README.md").read_text()
