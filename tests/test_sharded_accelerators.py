"""A sharded policy on a GPU, in a group of one process: the CPU's steps; skipped where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from tests import sharded
from tests.modules.setting import as_made_in, make_data, make_trainer
from vbon_lightning import ReferenceSampler, ShardedStrategy, cli
from vbon_lightning.callbacks import BestOfNWinRate, BestPolicy, KLMonitor, PolicyExport, RewardMonitor
from vbon_lightning.reference_table import ReferenceTable
from vbon_lightning.sharding import is_part, whole

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

KINDS = ["vbon", "ppo", "sft", "dpo", "valuemodelling", "tilted", "lora", "recomputing"]


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """Leave no group of processes to the tests that follow."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sharded.make_sharding_files(tmp_path_factory.mktemp("files"))


def fit(
    kind: str, files: Path, directory: Path, *callbacks: Any, sharding: bool, **options: Any
) -> tuple[Trainer, LightningModule, Any]:
    made_in = str(options.get("precision", "32-true"))
    table = {} if made_in == "32-true" else {"reference_table": as_made_in(made_in, files / "table", directory)}
    data, module = sharded.setting(kind, files, ranks=1, **table)
    where: dict[str, Any] = {"accelerator": DEVICE, "strategy": ShardedStrategy()} if sharding else {}
    options = {"steps": 3, "limit_val_batches": 0, **sharded.CASES[kind].get("trainer", {}), **options}
    checkpoint = options.pop("ckpt_path", None)
    trainer = make_trainer(directory, **(options | where), callbacks=list(callbacks))
    trainer.fit(module, data, ckpt_path=checkpoint)
    return trainer, module, data


def whole_weights(module: LightningModule) -> dict[str, torch.Tensor]:
    return {name: value.cpu() for name, value in whole(dict(module.state_dict())).items()}


def near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Hold means against each other: AdamW makes a step of 0.01 of a gradient that is nothing but rounding."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert float((found[name] - value).abs().mean()) < 1e-3, name


@pytest.mark.parametrize("kind", KINDS)
def test_three_steps_are_those_of_the_cpu(kind: str, files: Path, tmp_path: Path) -> None:
    off: dict[str, Any] = {"enable_checkpointing": False}
    _, expected, _ = fit(kind, files, tmp_path, sharding=False, **off)
    _, found, _ = fit(kind, files, tmp_path, PolicyExport(str(tmp_path / "export")), sharding=True, **off)
    assert all(is_part(parameter) for parameter in found.parameters())
    assert {parameter.device.type for parameter in found.parameters()} == {DEVICE}
    near(whole_weights(found), whole_weights(expected))
    assert (tmp_path / "export" / "model.safetensors").exists()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("kind", KINDS)
def test_lower_precision_runs(kind: str, precision: str, files: Path, tmp_path: Path) -> None:
    export = PolicyExport(str(tmp_path / "export"))
    trainer, module, _ = fit(
        kind, files, tmp_path, export, sharding=True, precision=precision, enable_checkpointing=False
    )
    logged = torch.tensor([float(value) for value in trainer.callback_metrics.values()])
    assert len(logged)
    assert logged.isfinite().all()
    kept = torch.float32 if precision == "bf16-mixed" else torch.bfloat16
    assert {value.dtype for value in module.parameters() if value.requires_grad} == {kept}
    assert load_file(tmp_path / "export" / "model.safetensors")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_is_validated_kept_resumed_and_tested(precision: str, files: Path, tmp_path: Path) -> None:
    watching = [KLMonitor(), RewardMonitor(), BestOfNWinRate(n=[2, 4])]
    validated = {"limit_val_batches": None, "val_check_interval": 2, "num_sanity_val_steps": 1, "precision": precision}

    def callbacks(directory: Path) -> list[Any]:
        best = BestPolicy(monitor="val/reward", mode="min", dirpath=directory)
        every = ModelCheckpoint(directory, "{step}", every_n_train_steps=2, save_top_k=-1)
        return [*watching, best, every, PolicyExport(str(directory / "best"), best=True)]

    trainer, module, data = fit(
        "vbon", files, tmp_path, *callbacks(tmp_path / "a"), sharding=True, steps=4, **validated
    )
    assert {"val/kl", "val/reward", "val/win_rate"} <= set(trainer.callback_metrics)
    _, resumed, _ = fit(
        "vbon",
        files,
        tmp_path,
        *callbacks(tmp_path / "b"),
        sharding=True,
        steps=4,
        ckpt_path=tmp_path / "a" / "step=2.ckpt",
        **validated,
    )
    near(whole_weights(resumed), whole_weights(module))
    (before,) = trainer.validate(module, data, ckpt_path=str(tmp_path / "a" / "step=4.ckpt"), verbose=False)
    assert before["val/reward"] == pytest.approx(float(trainer.callback_metrics["val/reward"]))


def test_a_table_is_that_of_the_cpu(files: Path, tmp_path: Path) -> None:
    tables = []
    for where in ({}, {"accelerator": DEVICE, "strategy": ShardedStrategy()}):
        table = str(tmp_path / f"table{len(tables)}")
        data = make_data(files, policy=str(files / "two"), val=None, reference_table=table)
        trainer = make_trainer(tmp_path, callbacks=[], enable_checkpointing=False, **where)
        trainer.predict(ReferenceSampler(data.actors, samples=16), data, return_predictions=False)
        tables.append(ReferenceTable.open(table))
    theirs, ours = tables
    assert sorted(ours.keys()) == sorted(theirs.keys())
    for key in theirs.keys():  # noqa: SIM118 (a table is no mapping)
        torch.testing.assert_close(ours.rewards(key), theirs.rewards(key))
        torch.testing.assert_close(ours.log_probs(key), theirs.log_probs(key), atol=1e-4, rtol=1e-4)


def test_the_command(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["vbon"])
    words = ["fit", "--model", "SFT", f"--data.policy={files / 'two'}", f"--data.train.path={files / 'texts.txt'}"]
    trainer = {
        "accelerator": "cpu" if DEVICE == "cpu" else "gpu",
        "devices": "1",
        "strategy": "fsdp",
        "precision": "bf16-mixed",
        "max_steps": "2",
        "default_root_dir": str(tmp_path),
        "callbacks": "PolicyExport",
    }
    made = cli.run([*words, *(f"--trainer.{name}={value}" for name, value in trainer.items())])
    assert isinstance(made.trainer.strategy, ShardedStrategy)
    assert (tmp_path / "export" / "model.safetensors").exists()
