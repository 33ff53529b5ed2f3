"""What every module shares: schedulers that watch a metric, precisions, and a token without an embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from transformers import AutoTokenizer

from tests.helpers import save_tiny_classifier, save_tiny_model
from tests.models.setting import make_valued_files
from tests.modules.setting import ALPHABET, as_made_in, make_data, make_module, make_trainer
from vbon_lightning import ReferenceSampler, RewardModelling, TextSource
from vbon_lightning.callbacks import RewardMonitor
from vbon_lightning.models import ModelError
from vbon_lightning.modules.base import check_strategy
from vbon_lightning.rewards import ClassifierReward


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_valued_files(tmp_path_factory.mktemp("files"))


def test_a_scheduler_that_watches_a_metric(files: Path, tmp_path: Path) -> None:
    def plateau(optimizer: Any) -> Any:
        return ReduceLROnPlateau(optimizer, monitor="val/reward", mode="min", factor=0.5, patience=0, threshold=1e9)

    data = make_data(files)
    module = make_module("klrl", data, lr_scheduler=plateau)
    trainer = make_trainer(tmp_path, RewardMonitor(), max_epochs=3, steps=-1)
    trainer.fit(module, data)
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    assert rate < 0.01, "no validation was better than the first"
    again = make_module("klrl", make_data(files), lr_scheduler=plateau)
    make_trainer(tmp_path, RewardMonitor(), max_epochs=4, steps=-1).fit(
        again, make_data(files), ckpt_path=str(tmp_path / "last.ckpt")
    )


@pytest.mark.parametrize("kind", ["klrl", "sft", "table"])
def test_lightnings_own_sharding_is_refused(kind: str, files: Path, tmp_path: Path) -> None:
    """They would put weights together in ``forward`` alone, and a step also samples."""
    data = make_data(files, reference_table=str(tmp_path / "table") if kind == "table" else None)
    module = ReferenceSampler(data.actors, samples=2) if kind == "table" else make_module(kind, data)
    trainer = make_trainer(tmp_path)
    trainer.strategy.__class__ = ModelParallelStrategy  # it needs a GPU
    module.trainer = trainer
    with pytest.raises(ValueError, match="ModelParallelStrategy cannot shard .* set trainer.strategy to fsdp"):
        module.configure_callbacks()
    for strategy in (FSDPStrategy(), ModelParallelStrategy()):
        with pytest.raises(ValueError, match=f"{type(strategy).__name__} cannot shard"):
            check_strategy(strategy)
    check_strategy(DDPStrategy())


def test_a_scheduler_that_watches_nothing_is_refused(files: Path, tmp_path: Path) -> None:
    data = make_data(files)
    module = make_module("klrl", data, lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)
    with pytest.raises(ValueError, match="give lightning.pytorch.cli.ReduceLROnPlateau, which takes a `monitor`"):
        make_trainer(tmp_path, steps=1).fit(module, data)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize(
    "kind", ["vbon", "ppo", "valuecritic", "bonsft", "dpo", "distillation", "valuemodelling", "sft"]
)
def test_every_precision(kind: str, precision: Any, files: Path, tmp_path: Path) -> None:
    table = as_made_in(precision, files / "table", tmp_path)
    changes: dict[str, Any] = {"reference_table": table, "value_model": str(files / "value")}
    if kind == "sft":
        changes = {"train": TextSource(path=str(files / "texts.txt"))}
    elif kind == "valuemodelling":
        changes.pop("value_model")
    data = make_data(files, **(changes | {"val": None}))
    options = {"body": str(files / "llama")} if kind == "valuemodelling" else {}
    module = make_module(kind, data, **options)
    make_trainer(tmp_path, steps=2, precision=precision).fit(module, data)
    wanted = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
    assert next(module.parameters()).dtype == wanted
    assert torch.get_default_dtype() == torch.float32


def test_a_token_without_an_embedding_is_named_before_training(files: Path, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", alphabet=ALPHABET)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<|extra|>"])
    tokenizer.save_pretrained(model)
    data = make_data(files, policy=model)
    with pytest.raises(ModelError, match=r"1 token\(s\) .* first '<\|extra\|>' with the id 11 of 11: resize the model"):
        make_trainer(tmp_path, steps=1).fit(make_module("sft", data), data)
    source = TextSource(path=str(files / "rows.jsonl"), label_column="label")
    (files / "rows.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n' * 2)
    data = make_data(files, policy=model, train=source, val=None)
    with pytest.raises(ModelError, match="no embedding for"):
        make_trainer(tmp_path, steps=1).fit(RewardModelling(data.actors), data)
    classifier = save_tiny_classifier(tmp_path / "classifier")
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    tokenizer.add_tokens(["<|extra|>"])
    tokenizer.save_pretrained(classifier)
    with pytest.raises(ModelError, match="no embedding for"):
        ClassifierReward(classifier)(["a"], [["b"]])


@pytest.mark.parametrize(
    ("kind", "watching"),
    [
        ("klrl", ["BestOfNWinRate", "CollapseWarning", "KLMonitor", "RewardMonitor", "TensorBoardLayout"]),
        ("bonsft", ["BestOfNWinRate", "CollapseWarning", "KLMonitor", "RewardMonitor", "TensorBoardLayout"]),
        ("valuemodelling", ["TensorBoardLayout"]),
        ("sft", ["TensorBoardLayout"]),
    ],
)
def test_what_watches_comes_along(kind: str, watching: list[str], files: Path, tmp_path: Path) -> None:
    data = make_data(files, reference_table=None if kind == "sft" else str(files / "table"))
    trainer = make_trainer(tmp_path, callbacks=[], steps=1, enable_checkpointing=False)
    trainer.fit(make_module(kind, data), data)
    own = {type(part).__name__ for part in trainer.callbacks if "vbon_lightning" in type(part).__module__}
    assert sorted(own) == sorted([*watching, "FiniteCheck", "WholeCheckpoints"])
