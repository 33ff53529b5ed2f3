"""Rewards that judge by a column of the data set, through tables, training and comparison."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from tests.modules.setting import make_data, make_files, make_module, make_trainer
from vbon_lightning import ReferenceSampler, TextSource
from vbon_lightning.callbacks import PolicyExport, RewardMonitor
from vbon_lightning.data.sources import SourceError
from vbon_lightning.evaluation.command import compare
from vbon_lightning.reference_table import ReferenceTable
from vbon_lightning.rewards import CallableReward, RegexReward, WeightedReward

REWARDS = """
def letters(prompts, completions, letter, **kwargs):
    calls.append(kwargs)
    return [float(text.count(one)) - 0.01 * len(text) for text, one in zip(completions, letter)]

def judge(prompts, responses, level):
    return [[float(number)] * len(row) for number, row in zip(level, responses)]

calls = []
"""
ROWS = [{"text": "ab", "letter": "a", "level": 1}, {"text": "ab", "letter": "b", "level": 2}] + [
    {"text": text, "letter": "cde"[i % 3], "level": i} for i, text in enumerate(["abc", "d", "ef", "gab", "h", "cde"])
]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    make_files(tmp_path)
    (tmp_path / "column_rewards.py").write_text(REWARDS)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("column_rewards", None)


def letters_data(files: Path, **changes: Any) -> Any:
    source = TextSource(path=str(files / "rows.jsonl"))
    given = {"train": source, "val": source, "test": source, "reward": CallableReward("column_rewards.letters")}
    return make_data(files, **({"reference_table": str(files / "table")} | given | changes))


def fill(files: Path, **changes: Any) -> Any:
    data = letters_data(files, **changes)
    make_trainer(files, enable_checkpointing=False, callbacks=[]).predict(
        ReferenceSampler(data.actors, samples=16), data, return_predictions=False
    )
    return data


def by_hand(texts: list[str], letter: str) -> list[float]:
    return [text.count(letter) - 0.01 * len(text) for text in texts]


def test_prompts_that_differ_in_the_answer_have_rewards_of_their_own(files: Path) -> None:
    data = fill(files)
    prompts = data.prompts("train")
    assert prompts[0].tokens == prompts[1].tokens
    assert len({row.key for row in prompts}) == len(ROWS)
    table = ReferenceTable.open(str(files / "table"))
    for row, prompt in zip(ROWS, prompts, strict=True):
        found = table.row(prompt.key, prompt.text)
        assert list(found.rewards) == pytest.approx(by_hand(found.responses, row["letter"]), abs=1e-6)
    # A second run finds them all.
    before = sorted(path.name for path in (files / "table").iterdir())
    fill(files)
    assert sorted(path.name for path in (files / "table").iterdir()) == before


def test_training_and_evaluation_judge_by_the_prompts_own_row(files: Path, tmp_path: Path) -> None:
    data = fill(files)
    module: Any = make_module("clipped", data, reference_samples=0)
    rollouts: list[Any] = []

    class Record(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *rest: Any) -> None:
            rollouts.append(outputs["rollout"])

        def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *rest: Any) -> None:
            rollouts.append(outputs["rollout"])

    make_trainer(tmp_path, Record(), steps=4, val_check_interval=2).fit(module, data)
    assert len(rollouts) > 4
    for rollout in rollouts:
        for row, letter in enumerate(rollout.prompts.columns["letter"]):
            number = int(rollout.prompts.index[row])
            assert letter == ROWS[number]["letter"]
            assert rollout.rewards[row].tolist() == pytest.approx(by_hand(rollout.responses[row], letter), abs=1e-6)
    again: Any = make_module("clipped", letters_data(files), reference_samples=0)
    resumed = make_trainer(tmp_path, steps=6)
    resumed.fit(again, letters_data(files), ckpt_path=str(tmp_path / "last.ckpt"))
    assert resumed.global_step == 6


def test_columns_that_are_asked_for_come_along(files: Path) -> None:
    data = letters_data(files, reward_columns=["level"], reference_table=None)
    assert data.columns_read == ("letter", "level")
    batch = next(iter(data.split_dataloader("test")))
    assert batch.columns == {"letter": ["a", "b"], "level": [1, 2]}
    module: Any = make_module("klrl", data)
    module.configure_model()
    module.loaded.rollout(batch, num_samples=2, seed=0, stream="a", step=0)
    assert importlib.import_module("column_rewards").calls == [{"level": [1, 1, 2, 2]}]
    plain = letters_data(files)
    assert {row.key for row in plain.prompts("test")}.isdisjoint(row.key for row in data.prompts("test"))


def test_a_judge_reads_columns_that_the_table_knows_nothing_of(files: Path, tmp_path: Path) -> None:
    data = fill(files)
    module: Any = make_module("klrl", data)
    module.configure_model()
    make_trainer(tmp_path, PolicyExport(tmp_path / "export"), steps=1).fit(module, data)
    found = compare(
        letters_data(files),
        policies={"one": str(tmp_path / "export")},
        judge=CallableReward("column_rewards.judge"),
        n=[2],
        samples=2,
        output=str(tmp_path / "comparison"),
    )
    levels = sum(row["level"] for row in ROWS) / len(ROWS)
    assert [report.judge_reward.mean for report in found] == pytest.approx([levels] * len(found))


def test_a_column_that_is_not_there_is_named_before_anything_is_loaded(files: Path) -> None:
    (files / "rows.jsonl").write_text('{"text": "a", "letter": "a"}\n{"text": "b"}\n')
    with pytest.raises(SourceError, match="line 2: there is no column 'letter', which the reward reads; the columns"):
        letters_data(files).prompts("train")
    data = letters_data(files, train=TextSource(path=str(files / "rows.jsonl"), stop=1), batch_size=1, val=None)
    module: Any = make_module("sft", data)
    make_trainer(files, steps=1).fit(module, data)  # which reads no rewards, and no columns for them


def test_parts_of_a_reward_and_ties_are_logged_and_resumed(files: Path, tmp_path: Path) -> None:
    def options() -> dict[str, Any]:
        parts = {"letters": CallableReward("column_rewards.letters"), "short": RegexReward("^.?$")}
        reward = WeightedReward(parts, {"short": 0.5})
        return {"reward": reward, "reference_table": None, "val": TextSource(path=str(files / "rows.jsonl"))}

    data = letters_data(files, **options())
    module: Any = make_module("clipped", data, reference_samples=16)
    rollouts: list[Any] = []

    class Record(Callback):
        def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *rest: Any) -> None:
            rollouts.append(outputs["rollout"])

    trainer = make_trainer(tmp_path, RewardMonitor(), Record(), steps=3, log_every_n_steps=1, val_check_interval=3)
    trainer.fit(module, data)
    logged = trainer.callback_metrics
    assert {"train/reward/letters", "train/reward/short", "train/tied_groups"} <= set(logged)
    rewards = torch.cat([rollout.rewards for rollout in rollouts])
    parts = {name: torch.cat([rollout.reward_parts[name] for rollout in rollouts]) for name in ("letters", "short")}
    torch.testing.assert_close(rewards, parts["letters"] + 0.5 * parts["short"])
    for name, part in parts.items():
        assert float(logged[f"val/reward/{name}"]) == pytest.approx(float(part.mean()), abs=1e-5)
    tied = [len(set(row)) == 1 for row in rewards.tolist()]
    assert float(logged["val/tied_groups"]) == pytest.approx(sum(tied) / len(tied))
    assert set(parts["short"].flatten().tolist()) == {0.0, 1.0}
    again: Any = make_module("clipped", letters_data(files, **options()), reference_samples=16)
    resumed = make_trainer(tmp_path, RewardMonitor(), steps=5)
    resumed.fit(again, letters_data(files, **options()), ckpt_path=str(tmp_path / "last.ckpt"))
    assert resumed.global_step == 5
