"""Reward models: what they learn, what they export, and what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.crashes import count_calls, killed_at
from tests.helpers import save_tiny_classifier, save_tiny_model
from tests.modules.setting import KillAt, Killed, adam, make_trainer, weights
from vbon_lightning import AlignmentDataModule, RewardModelling, TextSource
from vbon_lightning.callbacks import PolicyExport
from vbon_lightning.checks import ConfigMismatchError
from vbon_lightning.data.encoding import PromptError
from vbon_lightning.data.sources import SourceError
from vbon_lightning.models import ModelError
from vbon_lightning.rewards import ClassifierReward

WORDS = ["good film", "a good one", "so good it is", "good", "it was good", "how good"]
LABELLED = [{"text": text, "label": 1} for text in WORDS]
LABELLED += [{"text": text.replace("good", "bad"), "label": 0} for text in WORDS]
PAIRS = [{"prompt": f"film {i}:", "better": " good", "worse": " bad"} for i in range(8)]


def make_files(directory: Path) -> Path:
    """Write models and what to learn rewards from to a directory."""
    save_tiny_model(directory / "llama", seed=1)
    save_tiny_model(directory / "gpt2", "gpt2", seed=1)
    save_tiny_classifier(directory / "bert", seed=1)
    for name, rows in (("labelled", LABELLED), ("pairs", PAIRS)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("rewards"))


def make_data(files: Path, objective: str, policy: str = "llama", **changes: Any) -> AlignmentDataModule:
    if objective == "classification":
        source = TextSource(path=str(files / "labelled.jsonl"), label_column="label")
    else:
        source = TextSource(
            path=str(files / "pairs.jsonl"), column="prompt", response_column="better", rejected_column="worse"
        )
    arguments: dict[str, Any] = {"policy": str(files / policy), "train": source, "val": source, "batch_size": 4}
    return AlignmentDataModule(**(arguments | changes))


def fit(files: Path, directory: Path, objective: str, *callbacks: Any, steps: int = 40, **changes: Any) -> Any:
    data = make_data(files, objective, **changes.pop("data", {}))
    module = RewardModelling(data.actors, objective=objective, optimizer=adam, **changes)
    resume = directory / "last.ckpt"
    trainer = make_trainer(directory, *callbacks, steps=steps)
    trainer.fit(module, data, ckpt_path=resume if resume.exists() else None)
    return module, trainer


@pytest.mark.parametrize("policy", ["llama", "gpt2", "bert"])
def test_a_classifier_learns_and_its_export_is_a_reward(policy: str, files: Path, tmp_path: Path) -> None:
    export = PolicyExport(str(tmp_path / "export"))
    module, trainer = fit(files, tmp_path, "classification", export, data={"policy": policy}, dropout=False)
    assert trainer.callback_metrics["val/accuracy"] == 1.0
    assert trainer.callback_metrics["val/loss"] < 0.2
    reward = ClassifierReward(str(tmp_path / "export"), label="POSITIVE", output="log_odds")
    scores = reward(["it is so", "it is so"], [[" good"], [" bad"]])
    assert scores[0, 0] > 0 > scores[1, 0]
    # The reward is the trained model, read as it was trained.
    batch = next(iter(trainer.datamodule.val_dataloader()))
    with torch.no_grad():
        logits = module.scores(batch)[:, 0]
    texts = [row["text"] for row in LABELLED[: len(logits)]]
    raw = ClassifierReward(str(tmp_path / "export"))([""] * len(texts), [[text] for text in texts])
    torch.testing.assert_close(raw[:, 0], logits[:, 1], atol=1e-5, rtol=1e-4)
    card = (tmp_path / "export" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "AutoModelForSequenceClassification" in card
    assert not (tmp_path / "export" / "generation_config.json").exists()


def test_preferences_are_learnt(files: Path, tmp_path: Path) -> None:
    export = PolicyExport(str(tmp_path / "export"))
    module, trainer = fit(files, tmp_path, "preference", export, centre=0.01)
    assert trainer.callback_metrics["val/accuracy"] == 1.0
    reward = ClassifierReward(str(tmp_path / "export"))
    scores = reward(["film 3:"], [[" good", " bad"]])
    assert scores[0, 0] > scores[0, 1]
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export")
    assert loaded.config.num_labels == 1
    assert module.labels == ["REWARD"]


def test_the_first_loss_is_that_of_the_texts(files: Path, tmp_path: Path) -> None:
    data = make_data(files, "preference")
    module = RewardModelling(data.actors, objective="preference", optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    trainer = make_trainer(tmp_path, steps=1)
    trainer.fit(module, data)
    tokenizer, policy = module.tokenizer, module.policy
    assert policy is not None
    policy.eval()
    losses = []
    for pair in PAIRS:
        scores = [
            policy(**tokenizer(pair["prompt"] + pair[side], return_tensors="pt")).logits.double().item()
            for side in ("better", "worse")
        ]
        losses.append(-torch.nn.functional.logsigmoid(torch.tensor(scores[0] - scores[1])).item())
    trainer.validate(module, data, verbose=False)
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_a_resumed_run_is_the_same_bit_for_bit(files: Path, tmp_path: Path) -> None:
    data = {"policy": "gpt2"}  # it has dropout
    whole, _ = fit(files, tmp_path / "whole", "classification", steps=7, data=data)
    with pytest.raises(Killed):
        fit(files, tmp_path / "killed", "classification", KillAt(4), steps=7, data=data)
    resumed, _ = fit(files, tmp_path / "killed", "classification", steps=7, data=data)
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())


def test_a_process_killed_as_it_writes_a_checkpoint_goes_on_bit_for_bit(files: Path, tmp_path: Path) -> None:
    data, run = {"policy": "gpt2"}, tmp_path / "killed"
    whole, _ = fit(files, tmp_path / "whole", "classification", steps=3, data=data)

    def train() -> Any:
        return fit(files, run, "classification", steps=3, data=data)[0]

    calls = count_calls(train, run)
    shutil.rmtree(run)
    assert killed_at(calls * 2 // 3, train, run) == "died"
    assert (run / "last.ckpt").exists()
    found, expected = weights(train()), weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_a_resume_with_other_labels_is_refused(files: Path, tmp_path: Path) -> None:
    fit(files, tmp_path, "classification", steps=1)
    with pytest.raises(ConfigMismatchError, match=r"labels: checkpoint has \['NEGATIVE', 'POSITIVE'\]"):
        fit(files, tmp_path, "classification", steps=2, labels=["BAD", "GOOD"])


def test_pieces_of_a_long_text_share_its_label(files: Path, tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "abcdefghij", "label": "POSITIVE"}) + "\n")
    source = TextSource(path=str(tmp_path / "long.jsonl"), label_column="label")

    def lengths(long_text: Any) -> list[int]:
        data = make_data(files, "classification", train=source, max_text_tokens=4, long_text=long_text, batch_size=1)
        trainer = make_trainer(tmp_path / long_text, steps=1)
        trainer.fit(RewardModelling(data.actors), data)
        return [len(row.texts[0]) for row in data._split("train", "labelled").rows]

    assert lengths("truncate") == [4]
    assert lengths("split") == [4, 4, 2]


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([{"text": "fine", "label": 3}], PromptError, "row 1: the label 3 is none of model.labels, NEGATIVE, POSITIVE"),
        ([{"text": "fine", "label": None}], SourceError, r"line 1: the label \(column 'label'\) must be a number"),
        ([{"text": "fine"}], SourceError, "there is no column 'label'; the columns are 'text'"),
    ],
)
def test_bad_labels(
    rows: list[dict[str, Any]], error: type[Exception], message: str, files: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = TextSource(path=str(tmp_path / "bad.jsonl"), label_column="label")
    data = make_data(files, "classification", train=source, batch_size=1)
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, steps=1).fit(RewardModelling(data.actors), data)


def test_bad_pairs(files: Path, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "a", "better": "b", "worse": "b"}) + "\n")
    source = TextSource(path=str(path), column="prompt", response_column="better", rejected_column="worse")
    data = make_data(files, "preference", train=source, batch_size=1)
    with pytest.raises(PromptError, match="row 1: both responses are the same 2 tokens"):
        make_trainer(tmp_path, steps=1).fit(RewardModelling(data.actors, objective="preference"), data)
    without = TextSource(path=str(path), column="prompt", response_column="better")
    data = make_data(files, "preference", train=without, batch_size=1)
    with pytest.raises(PromptError, match=r"row 1 lacks the worse response: name the columns"):
        make_trainer(tmp_path, steps=1).fit(RewardModelling(data.actors, objective="preference"), data)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "regression"}, "model.objective must be classification or preference"),
        ({"labels": ["ONE"]}, "model.labels must name at least two different labels"),
        ({"centre": -0.1}, "model.centre must be >= 0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str, files: Path) -> None:
    with pytest.raises(ValueError, match=message):
        RewardModelling(make_data(files, "classification").actors, **settings)


def test_a_classifier_with_other_labels_is_refused(files: Path, tmp_path: Path) -> None:
    data = make_data(files, "classification", policy="bert")
    with pytest.raises(ModelError, match=r"has 2 labels \(NEGATIVE, POSITIVE\), model.labels has 3"):
        make_trainer(tmp_path, steps=1).fit(RewardModelling(data.actors, labels=["A", "B", "C"]), data)


def test_no_adapters(files: Path) -> None:
    data = make_data(files, "classification")
    data.actors.policy = {"name": str(files / "llama"), "lora": {"r": 2}}  # type: ignore[assignment]
    with pytest.raises(ModelError, match="leave `lora` out"):
        RewardModelling(data.actors).configure_model()
