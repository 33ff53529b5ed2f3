"""What each of two processes runs for the tests of data-parallel training; the test starts it twice."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from tests.modules.setting import Picky, make_data, make_module, make_trainer, weights
from tests.ranks import leave
from vbon_lightning import AlignmentDataModule, ReferenceSampler, TextSource
from vbon_lightning.callbacks import BestOfNWinRate, KLMonitor, RewardMonitor
from vbon_lightning.models import ModelSpec
from vbon_lightning.rewards import RewardCalls

CASES: dict[str, dict[str, Any]] = {
    "vbon": {},
    "ppo": {},
    "clipped": {"model": {"kl_estimator": "prefix_baseline"}},
    "sft": {"data": {"train": "texts.txt"}, "model": {"dropout": False}},
    "bonsft": {"table": True},
    "dpo": {"table": True},
    "qrpo": {"table": True},
    "bonregression2": {"table": True},
    "value": {"kind": "valuemodelling", "table": True, "model": {"probe": 0}},
    "distilled": {"kind": "distillation", "table": True, "data": {"value_model": "value"}},
    "tilted": {
        "kind": "distillation",
        "tilt": "value",
        "data": {"value_model": "value"},
        "model": {"states": "policy", "divergence": "reverse", "n_range": [2, 8]},
    },
    "normalised": {"kind": "klrl", "model": {"kl_estimator": "sampled", "normalise": True}},
    "accumulated": {
        "kind": "sft",
        "data": {"train": "texts.txt"},
        "model": {"dropout": False},
        "trainer": {"accumulate_grad_batches": 2},
    },
    "annealed": {},
    "maxatk": {},
    "pfppo": {},
    "skipping tokens": {"kind": "grpo", "skip": True},
    "skipping": {"kind": "klrl", "skip": True},
    "bond": {"model": {"forward_responses": 2}},
    "jbond": {},
    "wind": {},
    "forward": {"table": True, "model": {"reference_samples": 0}},
    "iterated": {"kind": "clipped", "model": {"anchor_every": 4, "divergence": "jeffreys"}},
    "bonbon": {"kind": "dpo", "table": True, "model": {"loss": "bonbon"}},
}
"""Whose weights are compared."""


class Remember(Callback):
    """Keep the sampled tokens of the first training batch."""

    def __init__(self) -> None:
        self.tokens: list[Any] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.tokens and "rollout" in outputs:
            self.tokens = outputs["rollout"].completions.tokens.tolist()


def fit(kind: str, files: Path, directory: Path, *, ranks: int) -> dict[str, Any]:
    """Train and return the weights, the metrics of the validation and what was sampled first."""
    changes = CASES[kind]
    options: dict[str, Any] = {key: TextSource(path=str(files / name)) for key, name in changes.get("data", {}).items()}
    if "value_model" in options:
        options["value_model"] = str(files / "value")
    if "tilt" in changes:
        options["policy"] = ModelSpec(str(files / "llama"), tilt=str(files / changes["tilt"]))
    if changes.get("table"):
        options["reference_table"] = str(files / "table")
    if changes.get("skip"):
        options |= {"reward": Picky("fgh"), "reward_calls": RewardCalls(on_missing="skip")}
    # The batch is the same in all; three validation rows fill no two ranks evenly.
    data = make_data(files, batch_size=4 // ranks, eval_batch_size=1, **options)
    module = make_module(changes.get("kind", kind), data, **changes.get("model", {}))
    remember = Remember()
    callbacks: list[Callback] = [remember]
    if kind in ("vbon", "bonsft"):
        callbacks += [KLMonitor(), RewardMonitor(), BestOfNWinRate()]
    trainer = make_trainer(directory, *callbacks, steps=9, **strategy(ranks), **changes.get("trainer", {}))
    trainer.fit(module, data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    return {"weights": weights(module), "metrics": metrics, "tokens": remember.tokens}


def table_data(files: Path, table: Path) -> AlignmentDataModule:
    """Make the data of the reference table's test: seven prompts."""
    train = TextSource(path=str(files / "train.txt"), stop=7)
    return make_data(files, train=train, val=None, reference_table=str(table), eval_batch_size=2)


def predict(files: Path, directory: Path, *, ranks: int) -> None:
    """Fill a reference table."""
    data = table_data(files, directory / "table")
    trainer = make_trainer(directory, **strategy(ranks))
    trainer.predict(ReferenceSampler(data.actors, samples=5, rows_per_pass=7), data, return_predictions=False)


def strategy(ranks: int) -> dict[str, Any]:
    """Return the trainer's arguments for a number of processes."""
    return {"devices": ranks, "strategy": "ddp" if ranks > 1 else "auto"}


if __name__ == "__main__":
    files, directory, rank = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    results = {kind: fit(kind, files, directory / kind, ranks=2) for kind in CASES}
    torch.save(results, directory / f"rank{rank}.pt")
    predict(files, directory, ranks=2)
    leave()
