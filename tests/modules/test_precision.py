"""A policy that is trained in half precision throughout: what is sampled, scored and learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from tests.models.setting import make_valued_files
from tests.modules.setting import as_made_in, make_data, make_module, make_trainer
from vbon_lightning.models import ModelSpec


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_valued_files(tmp_path_factory.mktemp("files"))


class Rewards(Callback):
    """Keep the rewards of training batches."""

    def __init__(self) -> None:
        self.found: list[Any] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if "rollout" in outputs:
            self.found.append(outputs["rollout"].rewards)


@pytest.mark.parametrize(
    "kind",
    [
        *("vbon", "klrl", "infalign", "maxatk", "grpo", "pfppo", "distillation", "tilted", "bonsft"),
        *("qrpo", "astarpo", "bond", "wind", "forward"),
    ],
)
def test_a_run_in_bfloat16(kind: str, files: Path, tmp_path: Path) -> None:
    table = as_made_in("bf16-true", files / "table", tmp_path)
    changes: dict[str, Any] = {"reference_table": table, "value_model": str(files / "value")}
    if kind == "tilted":
        changes["policy"] = ModelSpec(str(files / "llama"), tilt=str(files / "value"))
    data, rewards = make_data(files, **changes), Rewards()
    options: dict[str, Any] = {"states": "policy", "divergence": "reverse"} if kind == "tilted" else {}
    module = make_module("distillation" if kind == "tilted" else kind, data, **options)
    make_trainer(tmp_path, rewards, steps=2, precision="bf16-true").fit(module, data)
    assert next(module.parameters()).dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32
    for found in rewards.found:
        # A tenth is none of bfloat16's numbers, and rewards are multiples of it.
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, (found * 10).round() / 10, atol=1e-6, rtol=0)
    assert bool(rewards.found) == (kind not in ("distillation", "tilted", "bonsft", "qrpo", "wind", "forward"))
