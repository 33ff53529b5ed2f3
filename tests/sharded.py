"""What each of two processes runs for the tests of sharded training; the test starts it twice."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from tests.helpers import save_tiny_model
from tests.models.setting import make_valued_files
from tests.modules.setting import ALPHABET, make_data, make_module, make_trainer
from tests.ranks import leave
from vbon_lightning import ModelSpec, ReferenceSampler, ShardedStrategy, TextSource
from vbon_lightning.callbacks import BestOfNWinRate, BestPolicy, KLMonitor, PolicyExport, RewardMonitor
from vbon_lightning.models import load_causal_lm
from vbon_lightning.sampling import SamplingRequest, response_statistics, sample_completions
from vbon_lightning.sampling.scoring import try_out
from vbon_lightning.sharding import is_part, shard, whole
from vbon_lightning.types import PromptBatch, Responses


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Adam's steps do not shrink with the gradient: they would show its rounding."""
    return torch.optim.SGD(parameters, lr=0.003)


CASES: dict[str, dict[str, Any]] = {
    "vbon": {"trainer": {"gradient_clip_val": 0.5}},
    "ppo": {},
    "sft": {"trainer": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}},
    "grpo": {"model": {"optimizer": sgd}},  # a mean over tokens, and passes of the policy alone
    "dpo": {"table": True},
    "qrpo": {"table": True},
    "astarpo": {"table": True},
    "valuemodelling": {"table": True},
    "tilted": {"kind": "distillation", "model": {"states": "policy", "divergence": "reverse", "n_range": [2, 8]}},
    "lora": {"kind": "klrl", "policy": {"lora": {"r": 2, "target_modules": "all-linear"}}},
    "recomputing": {"kind": "klrl", "policy": {"gradient_checkpointing": True}, "directory": "tied"},
    "bf16-mixed": {"kind": "sft", "trainer": {"precision": "bf16-mixed"}},
    "replicated": {"kind": "klrl", "strategy": {"replicas": 2}},
}
"""Whose weights are compared with those of one process."""


def make_sharding_files(directory: Path) -> Path:
    """Write tiny models of two layers, one with tied embeddings, a table and a value model."""
    make_valued_files(directory)
    for name, tied in (("two", False), ("tied", True)):
        save_tiny_model(
            directory / name, alphabet=ALPHABET, seed=3, spread=2.0, num_hidden_layers=2, tie_word_embeddings=tied
        )
    return directory


class Remember(Callback):
    """Keep what is sampled and logged, and how much of the weights and the optimizer's state is held."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.texts: list[Any] = []
        self.logs: dict[str, float] = {}
        self.held: dict[str, int] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.logs |= {name: float(value) for name, value in trainer.callback_metrics.items()}
        if "rollout" in outputs:
            rollout = outputs["rollout"]
            self.lengths.append(int(rollout.completions.mask.sum(-1).max()))
            self.texts.append(rollout.responses)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        actors: Any = pl_module.actors
        reference = getattr(actors, "reference", None)
        moments = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
        self.held = {
            "policy": held(pl_module.parameters()),
            "reference": 0 if reference is None else held(reference.parameters()),
            "optimizer": held(value for value in moments if value.ndim),
        }


def held(tensors: Any) -> int:
    """Count the numbers that this process holds."""
    return sum((value.to_local() if is_part(value) else value).numel() for value in tensors)


def strategy(ranks: int, **options: Any) -> dict[str, Any]:
    """Return the trainer's arguments for a number of processes; one does without sharding."""
    return {"devices": ranks, "strategy": ShardedStrategy(**options) if ranks > 1 else "auto"}


def setting(kind: str, files: Path, *, ranks: int, **changes: Any) -> tuple[Any, LightningModule]:
    """Return the data of a case, with some of its options changed, and its module."""
    case = CASES[kind]
    method = case.get("kind", kind)
    name = str(files / case.get("directory", "two"))
    options: dict[str, Any] = {"policy": ModelSpec(name, **case.get("policy", {})), "max_new_tokens": 4}
    if method == "sft":
        options["train"] = TextSource(path=str(files / "texts.txt"))
    if case.get("table"):
        options |= {"reference_table": str(files / "table"), "policy": str(files / "llama")} | changes
    elif kind == "tilted":
        value = str(files / "value")
        options |= {"policy": ModelSpec(str(files / "llama"), tilt=value), "value_model": value}
    else:
        options |= {"end_tokens": list("abcde"), "max_new_tokens": 8}  # many responses are short
    # The batch is the same in all; three validation rows fill no two ranks evenly.
    data = make_data(files, batch_size=4 // ranks, eval_batch_size=1, **options)
    model = case.get("model", {}) | ({"dropout": False} if method == "sft" else {})
    return data, make_module(method, data, **model)


def fit(
    kind: str, files: Path, directory: Path, *, ranks: int, resume: str | None = None, **changes: Any
) -> dict[str, Any]:
    """Train and return the weights and what was seen; ``vbon`` is validated, checkpointed and exported on the way."""
    data, module = setting(kind, files, ranks=ranks)
    remember = Remember()
    callbacks: list[Callback] = [remember]
    options: dict[str, Any] = {"steps": 2, "enable_checkpointing": False, "limit_val_batches": 0}
    if kind == "vbon":
        best = BestPolicy(monitor="val/reward", mode="min", dirpath=directory)
        callbacks += [KLMonitor(), RewardMonitor(), BestOfNWinRate(), best]
        callbacks += [
            PolicyExport(str(directory / "best"), best=True),
            ModelCheckpoint(directory, "{step}", every_n_train_steps=2, save_top_k=-1),
        ]
        options = {"steps": 4, "val_check_interval": 2}
    if kind in ("vbon", "tilted", "lora", "recomputing"):
        callbacks.append(PolicyExport(str(directory / "export")))
    options |= strategy(ranks, **CASES[kind].get("strategy", {})) | CASES[kind].get("trainer", {}) | changes
    trainer = make_trainer(directory, **options, callbacks=callbacks)
    trainer.fit(module, data, ckpt_path=None if resume is None else directory / resume)
    weights: dict[str, Tensor] = whole(dict(module.state_dict()))
    seen = {name: getattr(remember, name) for name in ("lengths", "texts", "logs", "held")}
    return {"weights": {name: value.clone() for name, value in weights.items()}, **seen}


def predict(files: Path, directory: Path, *, ranks: int) -> None:
    """Fill a reference table, and top it up with two ranks: their last batches, and so their passes, are uneven."""
    data = make_data(
        files,
        policy=str(files / "two"),
        max_new_tokens=8,
        train=TextSource(path=str(files / "train.txt"), stop=7),
        val=None,
        reference_table=str(directory / "table"),
        eval_batch_size=2,
    )
    for samples in (3, 5) if ranks > 1 else (5,):
        trainer = make_trainer(directory, **strategy(ranks))
        sampler = ReferenceSampler(data.actors, samples=samples, rows_per_pass=7)
        trainer.predict(sampler, data, return_predictions=False)


class Around(nn.Module):
    """Runs something with a model that is sharded within it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, do: Any) -> Any:
        return do(self.model)


def passes(files: Path, rank: int, *, sharded: bool) -> dict[str, Any]:
    """Sample and score where the ranks' responses are as different in length as can be, and take the gradient."""
    model = load_causal_lm(str(files / "two"), trainable=True)
    around = Around(model)
    if sharded:
        try_out(model)
        shard(around, init_device_mesh("cpu", (2,)))
    tokens = torch.tensor([[3, 4, 5], [6, 7, 8]])
    everything = torch.ones_like(tokens, dtype=torch.bool)
    prompts = PromptBatch(torch.arange(2), everything[:, 0], tokens, everything, ["a", "b"])
    # Every token ends the responses of rank 0; none does those of rank 1, up to the limit.
    noise = torch.rand(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    ends = list(range(11)) if rank == 0 else [99]
    request = SamplingRequest(tokens, prompts.mask, noise, ends, 0)
    found: Any = around(lambda inner: sample_completions(inner, request))
    length = 1 if rank == 0 else 4
    responses = Responses(found.tokens[..., :length], found.mask[..., :length])

    def score(inner: Any) -> Tensor:
        return response_statistics(inner, inner, prompts, responses).log_probs.sum()

    loss: Tensor = around(score)
    loss.backward()
    gradients = {name: whole(parameter.grad).clone() for name, parameter in model.named_parameters()}
    return {"tokens": found.tokens, "mask": found.mask, "loss": loss.detach(), "gradients": gradients}


if __name__ == "__main__":
    files, directory, rank = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    results: dict[str, Any] = {kind: fit(kind, files, directory / kind, ranks=2) for kind in CASES}
    results["resumed"] = fit("vbon", files, directory / "vbon", ranks=2, resume="step=2.ckpt")
    results["resumed by ddp"] = fit("vbon", files, directory / "vbon", ranks=2, resume="step=2.ckpt", strategy="ddp")
    predict(files, directory, ranks=2)
    results["passes"] = passes(files, rank, sharded=True)
    torch.save(results, directory / f"rank{rank}.pt")
    leave()
