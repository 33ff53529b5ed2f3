"""Conversations through the whole chain: fine-tuning, rewards, tables, training, comparison, export."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.data.test_conversations import AGAIN, ALPHABET, ASSISTANT, MORE, TALK, TEMPLATE, USER
from tests.helpers import save_tiny_model
from tests.modules.setting import make_data, make_module, make_trainer
from vbon_lightning import ReferenceSampler, RewardModelling, TextSource
from vbon_lightning.callbacks import PolicyExport
from vbon_lightning.evaluation.command import compare
from vbon_lightning.rewards import CallableReward, ClassifierReward

REWARDS = """
def of_text(prompts, responses, messages):
    calls.append(messages)
    return [[float(text.count(turns[-1]["content"][0])) - 0.01 * len(text) for text in texts]
            for texts, turns in zip(responses, messages)]

def of_trl(prompts, completions, **kwargs):
    return [float(said[0]["content"].count(turns[-1]["content"][0])) - 0.01 * len(said[0]["content"])
            for said, turns in zip(completions, prompts)]

calls = []
"""
PROMPTS = [[USER], [AGAIN], [USER, ASSISTANT, AGAIN], [{"role": "user", "content": "h"}]]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    save_tiny_model(tmp_path / "llama", alphabet=ALPHABET, seed=1, spread=2.0)
    (tmp_path / "chat_rewards.py").write_text(REWARDS)
    lines = {
        "prompts": [{"messages": turns} for turns in PROMPTS],
        "talks": [{"messages": TALK}, {"messages": TALK[:2]}, {"messages": [AGAIN, MORE]}, {"messages": TALK}],
        "pairs": [{"prompt": [USER], "chosen": [ASSISTANT], "rejected": [MORE]}] * 4,
    }
    for name, records in lines.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("chat_rewards", None)


def chat_data(files: Path, name: str = "prompts", **changes: Any) -> Any:
    source = TextSource(path=str(files / f"{name}.jsonl"), column="messages")
    given: dict[str, Any] = {
        "train": source,
        "val": source,
        "test": source,
        "chat": {"template": TEMPLATE},
        "reward": CallableReward("chat_rewards.of_text"),
        "max_new_tokens": 4,
    }
    return make_data(files, **(given | changes))


def test_the_chain(files: Path, tmp_path: Path) -> None:
    tuned = str(tmp_path / "tuned")
    data = chat_data(files, "talks")
    make_trainer(tmp_path / "sft", PolicyExport(tuned), steps=4).fit(make_module("sft", data), data)
    assert AutoTokenizer.from_pretrained(tuned).chat_template == TEMPLATE

    # The export has the template: from here on nobody has to name it.
    own: dict[str, Any] = {"policy": tuned, "chat": None, "reference_table": str(tmp_path / "table")}
    data = chat_data(files, **own)
    make_trainer(tmp_path / "table-run", callbacks=[], enable_checkpointing=False).predict(
        ReferenceSampler(data.actors, samples=16), data, return_predictions=False
    )
    rollouts: list[Any] = []

    class Record(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *rest: Any) -> None:
            rollouts.append(outputs["rollout"])

    data = chat_data(files, **own)
    module: Any = make_module("vbon", data, reference_samples=0)
    make_trainer(tmp_path / "vbon", Record(), PolicyExport(tmp_path / "export"), steps=3).fit(module, data)
    for rollout in rollouts:
        for row, messages in enumerate(rollout.prompts.messages):
            assert messages == PROMPTS[int(rollout.prompts.index[row])]
            letter = messages[-1]["content"][0]
            expected = [text.count(letter) - 0.01 * len(text) for text in rollout.responses[row]]
            assert rollout.rewards[row].tolist() == pytest.approx(expected, abs=1e-6)
    found = compare(
        chat_data(files, **own),
        policies={"vbon": str(tmp_path / "export")},
        n=[2],
        samples=2,
        output=str(tmp_path / "out"),
    )
    assert len(found) > 2
    assert AutoTokenizer.from_pretrained(tmp_path / "export").chat_template == TEMPLATE


def test_trls_rewards_get_conversations(files: Path) -> None:
    data = chat_data(files)
    batch = data.prompt_batch(data.prompts("train"))
    module: Any = make_module("klrl", data)
    module.configure_model()
    ours = module.loaded.rollout(batch, num_samples=3, seed=0, stream="a", step=0).rewards
    module.loaded.reward = CallableReward("chat_rewards.of_trl")
    theirs = module.loaded.rollout(batch, num_samples=3, seed=0, stream="a", step=0).rewards
    assert torch.equal(ours, theirs)
    assert ours.unique().numel() > 3


def test_a_reward_model_reads_conversations_in_its_own_template(files: Path, tmp_path: Path) -> None:
    source = TextSource(
        path=str(files / "pairs.jsonl"), column="prompt", response_column="chosen", rejected_column="rejected"
    )
    data = chat_data(files, train=source, val=None, batch_size=2)
    judge = RewardModelling(data.actors, objective="preference", dropout=False)
    make_trainer(tmp_path / "judge", PolicyExport(tmp_path / "judge-export"), steps=2).fit(judge, data)
    directory = str(tmp_path / "judge-export")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.chat_template == TEMPLATE
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()

    reward = ClassifierReward(directory, label=0)
    data = chat_data(files, reward=reward)
    batch = data.prompt_batch(data.prompts("train"))
    module: Any = make_module("klrl", data)
    module.configure_model()
    rollout = module.loaded.rollout(batch, num_samples=2, seed=0, stream="a", step=0)
    for row, messages in enumerate(PROMPTS):
        for sample, text in enumerate(rollout.responses[row]):
            ids = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": text}], return_dict=False)
            with torch.no_grad():
                expected = model(torch.tensor([list(ids)])).logits[0, 0].item()
            assert rollout.rewards[row, sample].item() == pytest.approx(expected, abs=1e-5)
    # A classifier without a template reads what was said.
    tokenizer.chat_template = None
    tokenizer.save_pretrained(directory)
    (tmp_path / "judge-export" / "chat_template.jinja").unlink(missing_ok=True)
    plain = ClassifierReward(directory, label=0)
    texts = ["".join(f"{turn['content']}\n\n" for turn in messages) for messages in PROMPTS]
    found = plain(["?"] * 4, rollout.responses, (), {"messages": PROMPTS})
    assert torch.equal(found, plain(texts, rollout.responses))


def test_a_model_without_a_template_names_the_option(files: Path, tmp_path: Path) -> None:
    data = chat_data(files, chat=None)
    with pytest.raises(ValueError, match=r"data\.train: the tokenizer has no chat template.* data\.chat\.template"):
        make_trainer(tmp_path, steps=1).fit(make_module("klrl", data), data)


def test_another_template_or_system_message_is_another_run(files: Path, tmp_path: Path) -> None:
    data = chat_data(files)
    make_trainer(tmp_path, steps=1).fit(make_module("klrl", data), data)
    other = chat_data(files, chat={"template": TEMPLATE, "system": "ha"})
    with pytest.raises(ValueError, match="data settings disagree with this run's:\n  chat.system: checkpoint has"):
        make_trainer(tmp_path, steps=2).fit(make_module("klrl", other), other, ckpt_path=str(tmp_path / "last.ckpt"))
