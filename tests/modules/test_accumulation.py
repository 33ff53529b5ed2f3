"""Gradients accumulated over k batches are those of a batch k times as large, for every module."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule

from tests.models.setting import make_valued_files
from tests.modules.setting import Picky, make_data, make_files, make_module, make_table, make_trainer, weights
from vbon_lightning import RewardModelling, TextSource
from vbon_lightning.modules import value_modelling
from vbon_lightning.modules.offline import FromTable
from vbon_lightning.modules.policy_gradient import PolicyGradient
from vbon_lightning.rewards import RewardCalls

KINDS = (
    "vbon",
    "klrl",
    "sampled",
    "valuecritic",
    "bonsft",
    "dpo",
    "qrpo",
    "bonregression",
    "astarpo",
    "distillation",
    "valuemodelling",
    "sft",
    "pairs",
    "skipping",
    "astarpo, skipping",
    "infalign",
    "maxatk",
    "grpo",
    "rloo",
    "pfppo",
    "bond",
    "jbond",
    "forward",
    "wind",
)
KIND_OF = {"sampled": "klrl", "skipping": "klrl", "astarpo, skipping": "astarpo", "pairs": "sft"}
PICKY: dict[str, Any] = {"reward": Picky("fh"), "reward_calls": RewardCalls(on_missing="skip")}
JUDGED: dict[str, tuple[dict[str, Any], Any]] = {
    "labelled": ({"label_column": "label"}, "classification"),
    "preferred": ({"response_column": "response", "rejected_column": "worse"}, "preference"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_valued_files(tmp_path_factory.mktemp("files"))
    make_table(make_files(directory / "picky"), **PICKY)
    rows = [
        {"text": "ab"[i % 2] * (1 + i), "response": "c" * (1 + i * i % 5), "worse": "d", "label": i % 2}
        for i in range(10)
    ]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def setting(kind: str, files: Path, batch_size: int) -> tuple[Any, LightningModule]:
    options: dict[str, Any] = {"val": None, "batch_size": batch_size}
    model: dict[str, Any] = {
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        "lr_scheduler": None,
    }
    rows = {"path": str(files / "rows.jsonl")}
    if kind in JUDGED:
        columns, objective = JUDGED[kind]
        data = make_data(files, train=TextSource(**rows, **columns), **options)
        return data, RewardModelling(data.actors, objective=objective, dropout=False, **model)
    if kind == "sft":
        options["train"] = TextSource(**rows)
    elif kind == "pairs":
        options["train"] = TextSource(**rows, response_column="response")
    else:
        options |= {"reference_table": str(files / "table")}
        if kind != "valuemodelling":
            options |= {"value_model": str(files / "value")}
    if kind == "skipping":
        options = {"val": None, "batch_size": batch_size, **PICKY}
    if kind == "astarpo, skipping":
        files, options = files / "picky", {"val": None, "batch_size": batch_size, **PICKY}
        options["reference_table"] = str(files / "table")
    if kind in ("forward", "bond", "jbond"):  # all of the reference's responses: what is picked of them is noise
        model |= {"forward_responses": None, "reference_samples": 0 if kind == "forward" else 8}
    if kind == "jbond":  # one response a prompt is compared with those of its batch, and is not accumulated
        model |= {"samples_per_prompt": 3}
    if kind == "wind":
        model |= {"step_size": 30.0}
    if kind == "sampled":
        model |= {"kl_estimator": "sampled"}
    if kind in ("grpo", "pfppo"):
        model |= {"epochs_per_rollout": 1, "minibatches": 1}
    if kind == "infalign":
        model |= {"reference_samples": 0}
    if kind == "valuemodelling":
        model |= {"body": str(files / "llama"), "probe": 0}
    if kind in ("sft", "pairs"):
        model |= {"dropout": False}
    data = make_data(files, **options)
    return data, make_module(KIND_OF.get(kind, kind), data, **model)


def updated(
    kind: str, files: Path, directory: Path, *, batch_size: int, batches: int, steps: int = 1
) -> dict[str, Any]:
    """Return the weights after some updates, each of several batches."""
    torch.manual_seed(0)
    data, module = setting(kind, files, batch_size)
    make_trainer(directory, steps=steps, accumulate_grad_batches=batches).fit(module, data)
    return weights(module)


@pytest.fixture
def _one_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the same for a prompt in whichever batch it comes."""
    sample, next_step = PolicyGradient._sample, FromTable.next_step

    def of_no_batch(self: Any) -> int:
        next_step(self)
        return 0

    monkeypatch.setattr(PolicyGradient, "_sample", lambda self, batch, number, **more: sample(self, batch, 0, **more))
    monkeypatch.setattr(PolicyGradient, "rollout_number", 0)
    monkeypatch.setattr(FromTable, "next_step", of_no_batch)
    picked = value_modelling.pick_some
    monkeypatch.setattr(value_modelling, "pick_some", lambda *args, **named: picked(*args, **(named | {"step": 0})))


@pytest.mark.usefixtures("_one_noise")
@pytest.mark.parametrize("kind", [*KINDS, *JUDGED])
def test_k_batches_are_a_batch_of_k(kind: str, files: Path, tmp_path: Path) -> None:
    start = weights_before(kind, files)
    whole = updated(kind, files, tmp_path / "whole", batch_size=6, batches=1)
    parts = updated(kind, files, tmp_path / "parts", batch_size=2, batches=3)
    moved = max(float((whole[name] - start[name]).abs().max()) for name in whole)
    assert moved > 1e-3
    for name, value in whole.items():
        torch.testing.assert_close(
            parts[name], value, atol=1e-5 * moved, rtol=0, msg=lambda text, name=name: name + text
        )


def weights_before(kind: str, files: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    data, module = setting(kind, files, 2)
    if kind == "valuemodelling":  # its head is made when training starts
        trainer = make_trainer(files / "before", steps=1, limit_train_batches=0)
        trainer.fit(module, data)
    module.configure_model()
    return weights(module)


@pytest.mark.parametrize("kind", ["sft", "labelled"])
def test_what_an_epoch_leaves_counts_whole(kind: str, files: Path, tmp_path: Path) -> None:
    # Ten rows are five batches of two: an update of four, then one of a single batch.
    before = updated(kind, files, tmp_path / "one", batch_size=2, batches=4, steps=1)
    after = updated(kind, files, tmp_path / "two", batch_size=2, batches=4, steps=2)
    _, module = setting(kind, files, 2)
    module.configure_model()
    module.load_state_dict(before)
    last = epoch_of(files, kind)[4]
    module.zero_grad()
    if kind == "sft":
        total, count = module._negative_log_likelihood(last)
        (total / count).backward()
    else:
        module._losses(module.scores(last), last).mean().backward()
    for name, parameter in module.named_parameters():
        expected = before[name] if parameter.grad is None else before[name] - parameter.grad
        torch.testing.assert_close(after[name], expected, atol=1e-5, rtol=1e-4)


class Keep(Callback):
    """Keep the batches of training."""

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)


def epoch_of(files: Path, kind: str) -> list[Any]:
    """Return the batches of the first epoch."""
    keep = Keep()
    data, module = setting(kind, files, 2)
    make_trainer(files / "epoch", keep, steps=5).fit(module, data)
    return keep.batches
