"""A run that is killed and resumed ends with the same weights, bit for bit, as one that never was."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.crashes import count_calls, killed_at
from tests.helpers import readable, save_tiny_model
from tests.modules.setting import (
    ALPHABET,
    REGRESSIONS,
    KillAt,
    Killed,
    VowelReward,
    make_data,
    make_files,
    make_module,
    make_table,
    make_trainer,
    weights,
)
from vbon_lightning import KLRL, TextSource
from vbon_lightning.checkpoints import CheckpointError
from vbon_lightning.checks import ConfigMismatchError
from vbon_lightning.cli import run
from vbon_lightning.models import ModelSpec
from vbon_lightning.modules import NSchedule

ROOT = Path(__file__).parents[1]
STEPS = {"vbon": 5, "sft": 5, "bonsft": 5, "dpo": 5, **dict.fromkeys(REGRESSIONS, 5), "clipped": 13, "ppo": 15}
STEPS |= {"annealed": 5, "maxatk": 3, "grpo": 9, "pfppo": 5, "bond": 5, "jbond": 4, "wind": 5}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_files(tmp_path_factory.mktemp("files"))
    make_table(directory)
    return directory


def fit(
    kind: str,
    files: Path,
    directory: Path,
    *,
    kill: KillAt | None = None,
    resume: bool = False,
    checkpoint: Path | None = None,
    steps: int | None = None,
    data: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    **trainer_arguments: Any,
) -> Any:
    """Train a new module on new data with a new trainer, as a new process would."""
    changes = dict(data or {})
    if kind == "sft":  # GPT-2 has dropout
        changes = {"policy": str(files / "gpt2"), "train": TextSource(path=str(files / "texts.txt"))} | changes
    if kind in ("bonsft", "dpo") or kind in REGRESSIONS:
        changes = {"reference_table": str(files / "table")} | changes
    brought = make_data(files, **changes)
    module = make_module(kind, brought, **(model or {}))
    callbacks = [] if kill is None else [kill]
    trainer = make_trainer(directory, *callbacks, steps=steps or STEPS[kind], **trainer_arguments)
    checkpoint = directory / "last.ckpt" if resume else checkpoint
    if kill is None:
        trainer.fit(module, brought, ckpt_path=checkpoint)
    else:
        with pytest.raises(Killed):
            trainer.fit(module, brought, ckpt_path=checkpoint)
    return module


@pytest.fixture(scope="module")
def uninterrupted(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, dict[str, Tensor]] = {}

    def get(kind: str) -> dict[str, Tensor]:
        if kind not in made:
            made[kind] = weights(fit(kind, files, tmp_path_factory.mktemp("whole")))
        return made[kind]

    return get


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different


# Two batches of prompts an epoch; four updates on each for "clipped", "ppo" and "grpo", two for "pfppo", else one.
@pytest.mark.parametrize(
    ("kind", "kill"),
    [
        *(("vbon", kill) for kill in (1, 2, 3)),
        *(("sft", kill) for kill in (1, 2, 3)),
        *((kind, kill) for kind in ("bonsft", "dpo", *REGRESSIONS) for kill in (1, 3)),
        *(("clipped", kill) for kill in (2, 8, 9)),
        *(("ppo", kill) for kill in (3, 8, 13)),
        *(("annealed", 2), ("maxatk", 2), ("grpo", 6), ("pfppo", 3)),
        # The anchor is replaced by the second update and the fourth, or averaged at each.
        *(("bond", kill) for kill in (1, 3)),
        *(("jbond", 2), ("wind", 3)),
    ],
)
def test_killed_and_resumed(kind: str, kill: int, files: Path, tmp_path: Path, uninterrupted: Any) -> None:
    fit(kind, files, tmp_path, kill=KillAt(kill))
    resumed = fit(kind, files, tmp_path, resume=True)
    assert_same(weights(resumed), uninterrupted(kind))


@pytest.mark.parametrize(("kind", "kill"), [("vbon", 1), ("vbon", 3), ("clipped", 9), ("sft", 2)])
def test_killed_while_rows_are_streamed(kind: str, kill: int, files: Path, tmp_path: Path) -> None:
    name = "texts" if kind == "sft" else "train"
    rows = TextSource(path=str(files / f"{name}.txt"), streaming=True, buffer_size=4)
    data = {"train": rows, "max_text_tokens": 16}
    whole = weights(fit(kind, files, tmp_path / "whole", data=data))
    fit(kind, files, tmp_path, kill=KillAt(kill), data=data)
    assert_same(weights(fit(kind, files, tmp_path, resume=True, data=data)), whole)


@pytest.mark.parametrize(("kind", "kill"), [("vbon", 2), ("clipped", 8), ("sft", 4), ("bonsft", 2)])
def test_killed_in_the_validation_after_an_epoch(
    kind: str, kill: int, files: Path, tmp_path: Path, uninterrupted: Any
) -> None:
    fit(kind, files, tmp_path, kill=KillAt(kill, validation=True))
    resumed = fit(kind, files, tmp_path, resume=True)
    assert_same(weights(resumed), uninterrupted(kind))


def test_killed_amid_an_accumulated_step(files: Path, tmp_path: Path) -> None:
    run: dict[str, Any] = {"steps": 5, "accumulate_grad_batches": 2, "data": {"batch_size": 2}}
    whole = fit("vbon", files, tmp_path / "whole", **run)
    fit("vbon", files, tmp_path / "run", kill=KillAt(5), **run)
    assert_same(weights(fit("vbon", files, tmp_path / "run", resume=True, **run)), weights(whole))


def test_killed_between_validations_within_an_epoch(files: Path, tmp_path: Path) -> None:
    run: dict[str, Any] = {"steps": 12, "val_check_interval": 2, "data": {"batch_size": 2}}
    whole = fit("vbon", files, tmp_path / "whole", **run)
    fit("vbon", files, tmp_path / "run", kill=KillAt(8, validation=True), **run)
    assert_same(weights(fit("vbon", files, tmp_path / "run", resume=True, **run)), weights(whole))


@pytest.mark.parametrize("kind", ["sft", "vbon", "bonsft", "dpo"])
def test_killed_as_it_writes_its_checkpoints(kind: str, files: Path, tmp_path: Path) -> None:
    # Every call of one checkpoint: tests/checkpoints/test_io.py. Here those between the files of a step.
    whole = weights(fit(kind, files, tmp_path / "whole", steps=2))
    run = tmp_path / "run"

    def train(resume: bool = False) -> Any:
        return fit(kind, files, run, steps=2, resume=resume)

    calls = count_calls(train, run)
    assert calls >= 15, "two steps, each with a checkpoint of its own and a last one"
    for call in (calls // 2, calls // 2 + 4, calls) if kind == "sft" else (calls // 2 + 4,):
        shutil.rmtree(run, ignore_errors=True)
        assert killed_at(call, train, run) == "died"
        kept = run / "last.ckpt"
        assert_same(weights(train(resume=kept.exists())), whole)
        assert not [path.name for path in run.iterdir() if path.name.startswith(".")], "what the dead run left is gone"


@pytest.mark.parametrize(
    ("model", "data"),
    [
        ({"n": 4, "divergence": "jeffreys", "reference_samples": 0}, {"reference_table": "table"}),
        ({"n": 4, "divergence": "jeffreys", "anchor_every": 4}, {}),
        ({"n": 4, "n_schedule": NSchedule(1.5, 6)}, {}),
    ],
    ids=["table", "anchor", "annealed"],
)
def test_killed_amid_a_rollout_that_keeps_the_references_responses_or_its_n(
    model: dict[str, Any], data: dict[str, Any], files: Path, tmp_path: Path
) -> None:
    brought = {name: str(files / value) for name, value in data.items()}
    whole = weights(fit("clipped", files, tmp_path / "whole", steps=8, model=model, data=brought))
    fit("clipped", files, tmp_path, steps=8, kill=KillAt(6), model=model, data=brought)
    assert_same(weights(fit("clipped", files, tmp_path, steps=8, resume=True, model=model, data=brought)), whole)


def test_killed_with_adapters_amid_a_stage(files: Path, tmp_path: Path) -> None:
    data = {"policy": ModelSpec(str(files / "llama"), lora={"r": 2, "lora_alpha": 8})}
    whole = weights(fit("bond", files, tmp_path / "whole", data=data))
    fit("bond", files, tmp_path, kill=KillAt(3), data=data)
    assert_same(weights(fit("bond", files, tmp_path, resume=True, data=data)), whole)


def test_killed_twice(files: Path, tmp_path: Path, uninterrupted: Any) -> None:
    fit("ppo", files, tmp_path, kill=KillAt(6))
    fit("ppo", files, tmp_path, kill=KillAt(4), resume=True)
    assert_same(weights(fit("ppo", files, tmp_path, resume=True)), uninterrupted("ppo"))


CONFIG = """
seed_everything: 3
model:
  class_path: {model}
  init_args:
    optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.01}}}}
    lr_scheduler: {{class_path: torch.optim.lr_scheduler.CosineAnnealingLR, init_args: {{T_max: 20}}}}
    {arguments}
data:
  policy: {files}/{policy}
  reward: {{class_path: tests.modules.setting.VowelReward}}
  train: {{path: {files}/texts.txt}}
  val: {{path: {files}/val.txt}}
  max_new_tokens: 4
  batch_size: 4
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 7
  logger: false
  enable_progress_bar: false
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{dirpath: {run}, every_n_train_steps: 1, save_last: true}}
    - class_path: tests.modules.setting.KillAt
      init_args: {{batch: {kill}, sigkill: true}}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "policy", "kill", "arguments"),
    [
        ("VBoN", "llama", 3, "{n: 4, samples_per_prompt: 4, reference_samples: 16, OPTIONS}"),
        ("KLRL", "llama", 6, "{estimator: ppo, epochs_per_rollout: 2, minibatches: 2, OPTIONS}"),
        ("SFT", "gpt2", 3, "{dropout: true, OPTIONS}"),
    ],
)
def test_a_killed_process(
    model: str, policy: str, kill: int, arguments: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(name: str, kill: int) -> list[str]:
        path = tmp_path / f"{name}-{kill}.yaml"
        options = arguments.strip("{}").replace(", OPTIONS", "").split(", ")
        lines = "\n    ".join(options)
        path.write_text(
            CONFIG.format(model=model, arguments=lines, files=files, policy=policy, run=tmp_path / name, kill=kill)
        )
        return ["fit", "--config", str(path)]

    monkeypatch.setattr("sys.argv", ["vbon"])
    whole = run(config("whole", -1)).model
    killed = subprocess.run(
        [sys.executable, "-m", "vbon_lightning", *config("killed", kill)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    last = str(tmp_path / "killed" / "last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == kill
    resumed = run([*config("killed", -1), "--ckpt_path", last]).model
    assert_same(weights(resumed), weights(whole))


# -- what a checkpoint holds ----------------------------------------------------------------------------


def test_a_checkpoint_holds_policy_optimizer_and_random_state_only(files: Path, tmp_path: Path) -> None:
    module = fit("vbon", files, tmp_path, steps=2)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == {f"policy.{name}" for name in module.policy.state_dict()}
    state = checkpoint["vbon_lightning"]
    assert (state["batches_seen"], state["updates"]) == (2, 2)
    assert state["random_state"].dtype == torch.uint8
    assert "experience" not in state
    parameters = sum(value.numel() * 4 for value in checkpoint["state_dict"].values())
    # Weights and AdamW's two moments, and room for the settings; a reference would add one more.
    assert (tmp_path / "last.ckpt").stat().st_size < 3 * parameters + 50_000


def test_a_checkpoint_size_does_not_grow_with_the_reference(files: Path, tmp_path: Path) -> None:
    large = save_tiny_model(tmp_path / "large", alphabet=ALPHABET, hidden_size=256, intermediate_size=512)
    fit("vbon", files, tmp_path / "small", steps=1)
    fit("vbon", files, tmp_path / "big", steps=1, data={"reference": large})
    sizes = [(tmp_path / name / "last.ckpt").stat().st_size for name in ("small", "big")]
    assert abs(sizes[0] - sizes[1]) < 5_000


def test_a_checkpoint_amid_a_rollout_keeps_it(files: Path, tmp_path: Path) -> None:
    module = fit("ppo", files, tmp_path, steps=2)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert {"critic.weight", "critic.bias"} < set(checkpoint["state_dict"])
    (parts,) = checkpoint["vbon_lightning"]["experience"]
    assert len(parts) == module.minibatches
    assert torch.equal(parts[0]["advantages"], module._experience[0].advantages)


@pytest.mark.parametrize("lost", ["all", "one", "renamed"])
def test_a_checkpoint_without_the_policy_is_refused(lost: str, files: Path, tmp_path: Path) -> None:
    fit("vbon", files, tmp_path, steps=1)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    state = checkpoint["state_dict"]
    name = next(iter(state))
    checkpoint["state_dict"] = {} if lost == "all" else {key: state[key] for key in state if key != name}
    if lost == "renamed":
        checkpoint["state_dict"]["reference.weight"] = state[name]
    torch.save(checkpoint, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=f"does not hold this policy's weights(?s:.*){re.escape(name)}"):
        fit("vbon", files, tmp_path, resume=True)


def test_a_checkpoint_of_another_program_is_refused(files: Path, tmp_path: Path) -> None:
    fit("vbon", files, tmp_path, steps=1)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    del checkpoint["vbon_lightning"]
    torch.save(checkpoint, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="not written by vbon_lightning"):
        fit("vbon", files, tmp_path, resume=True)


def test_load_from_checkpoint(files: Path, tmp_path: Path) -> None:
    trained = fit("ppo", files, tmp_path, steps=3)
    torch.manual_seed(5)
    loaded = KLRL.load_from_checkpoint(tmp_path / "last.ckpt", actors=make_data(files).actors)
    assert (loaded.beta, loaded.estimator, loaded.minibatches) == (0.2, "ppo", 2)  # from the checkpoint
    assert_same(weights(loaded), weights(trained))
    assert torch.initial_seed() == 5  # the random state is for resuming
    other = KLRL.load_from_checkpoint(tmp_path / "last.ckpt", actors=make_data(files).actors, beta=0.5)
    assert other.beta == 0.5
    with pytest.raises(TypeError, match="actors"):
        KLRL.load_from_checkpoint(tmp_path / "last.ckpt")
    with (tmp_path / "last.ckpt").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(CheckpointError, match=r"last\.ckpt is cut short or damaged at its end"):
        KLRL.load_from_checkpoint(tmp_path / "last.ckpt", actors=make_data(files).actors)


def test_a_checkpoint_can_be_evaluated_under_other_settings(files: Path, tmp_path: Path) -> None:
    trained = fit("vbon", files, tmp_path, steps=2)
    data = make_data(files, temperature=0.7, batch_size=3, seed=9)
    module = make_module("vbon", data, n=2)
    trainer = make_trainer(tmp_path / "evaluation")
    trainer.validate(module, data, ckpt_path=tmp_path / "last.ckpt")
    assert_same(weights(module), weights(trained))
    assert module.batches_seen == 0


# -- what a resumed run must agree with -----------------------------------------------------------------


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01)


def faster(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02)


def longer(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30)


@pytest.fixture(scope="module")
def checkpoint(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    fit("vbon", files, directory, steps=2)
    return directory / "last.ckpt"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": {"n": 5}}, "n: checkpoint has 4, this run has 5"),
        ({"model": {"bound": "lower"}}, "bound: checkpoint has 'exact', this run has 'lower'"),
        ({"model": {"cdf_estimator": "add_one"}}, "cdf_estimator"),
        ({"model": {"seed": 7}}, "seed: checkpoint has 0, this run has 7"),
        ({"model": {"samples_per_prompt": 6}}, "samples_per_prompt"),
        ({"model": {"reference_samples": 32}}, "reference_samples"),
        ({"model": {"kl_estimator": "sampled"}}, "kl_estimator"),
        ({"model": {"anchor_every": 2}}, "anchor_every"),
        ({"model": {"divergence": "jeffreys"}}, "divergence"),
        ({"model": {"optimizer": faster}}, "optimizer.lr: checkpoint has 0.01, this run has 0.02"),
        ({"model": {"optimizer": sgd}}, "optimizer.class: checkpoint has 'AdamW', this run has 'SGD'"),
        ({"model": {"lr_scheduler": longer}}, "lr_scheduler.T_max: checkpoint has 20, this run has 30"),
        ({"model": {"lr_scheduler": None}}, "lr_scheduler"),
        ({"kind": "klrl"}, "class: checkpoint has 'VBoN', this run has 'KLRL'"),
        ({"data": {"temperature": 0.5}}, "temperature: checkpoint has 1.0, this run has 0.5"),
        ({"data": {"max_new_tokens": 5}}, "max_new_tokens"),
        ({"data": {"missing_eos_penalty": 0.5}}, "missing_eos_penalty"),
        ({"data": {"reward": VowelReward(2.0)}}, "reward.scale: checkpoint has '1.0', this run has '2.0'"),
        ({"data": {"batch_size": 2}}, "batch_size: checkpoint has 4, this run has 2"),
        ({"data": {"seed": 4}}, "seed: checkpoint has 0, this run has 4"),
        ({"data": {"train": "texts.txt"}}, "train.path"),
        ({"data": {"train": "changed.txt"}}, "train_content"),
        ({"data": {"policy": "other"}}, "policy"),
        ({"data": {"reference": "other"}}, "reference"),
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches: checkpoint has 1, this run has 2"),
        ({"gradient_clip_val": 0.5}, "gradient_clip_val"),
    ],
    ids=readable,
)
def test_a_resume_that_disagrees_is_refused(
    change: dict[str, Any], named: str, files: Path, checkpoint: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"steps": 3} | change
    data = dict(options.pop("data", {}))
    if data.get("train") == "changed.txt":
        moved = make_files(tmp_path / "files")
        (files / "train.txt").rename(files / "kept.txt")
        (files / "train.txt").write_text((moved / "train.txt").read_text().replace("ef", "fe"))
        del data["train"]
    elif "train" in data:
        data["train"] = TextSource(path=str(files / data["train"]))
    for role in ("policy", "reference"):
        if role in data:
            data[role] = save_tiny_model(tmp_path / "other", alphabet=ALPHABET, seed=8)
    try:
        with pytest.raises(ConfigMismatchError, match=re.escape(named)):
            fit(options.pop("kind", "vbon"), files, tmp_path / "run", checkpoint=checkpoint, data=data, **options)
    finally:
        if (files / "kept.txt").exists():
            (files / "kept.txt").rename(files / "train.txt")


def test_a_resume_that_agrees_is_not_refused(files: Path, checkpoint: Path, tmp_path: Path) -> None:
    # Another place and other samples in validation change nothing that is learnt.
    other = shutil.copytree(files / "llama", tmp_path / "elsewhere")
    changes: dict[str, Any] = {"data": {"policy": str(other)}, "model": {"eval_samples": 2}}
    assert fit("vbon", files, tmp_path, checkpoint=checkpoint, steps=3, **changes).batches_seen == 3
