"""Turn what `vbon` left in a run's directory into the small JSON files that are kept.

python experiments/sentiment/record.py table main            # makes the table, and times it
python experiments/sentiment/record.py bon main
python experiments/sentiment/record.py training vbon-n4-s0
python experiments/sentiment/record.py run vbon-n4-s0
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from sweep import Run, Setting, Training, read_sweep

from vbon_lightning.reference_table import ReferenceTable

_DATA = ("policy", "reward", "table_samples", "max_new_tokens", "temperature", "batch_size")


def make_table(setting: Setting) -> None:
    """Run ``vbon predict`` and record how long a response took, the start of the command included.

    Where the command goes on with a table that was begun before, the time a response is that of the new ones.
    """
    from vbon_lightning.cli import quiet, run

    quiet()
    began = time.perf_counter()
    cli = run(setting.table)
    seconds, before = time.perf_counter() - began, len(cli.model.finished_keys())
    table = ReferenceTable.open(cli.datamodule.reference_table)
    new = (len(table) - before) * table.samples
    train = {prompt.key for prompt in cli.datamodule.prompts("train")}
    plain = {
        "command": _command(setting.table),
        "device": _device(),
        "samples": table.samples,
        "responses": len(table) * table.samples,
        "training_responses": len(train) * table.samples,
        "seconds_per_response": seconds / new if new else None,
    }
    _write(setting.directory / "table.json", plain)


def record_bon(setting: Setting) -> None:
    """Write the reports on the reference and on Best-of-N, with the table's costs."""
    comparison = _read(setting.directory / "comparison" / "comparison.json")
    _write(
        setting.result,
        {"setting": setting.name, "table": _read(setting.directory / "table.json"), **comparison},
    )


def record_training(training: Training) -> None:
    """Write a finished training's costs and settings from its last checkpoint, and remove the checkpoints.

    Raises:
        ValueError: If the last checkpoint is not of the last step.
    """
    folder = training.directory / "checkpoints"
    config = yaml.safe_load((training.directory / "config.yaml").read_text())
    checkpoint = torch.load(folder / "last.ckpt", map_location="cpu", weights_only=True, mmap=True)
    steps, planned = checkpoint["global_step"], config["trainer"]["max_steps"]
    if steps != planned:
        raise ValueError(
            f"{folder}/last.ckpt is of step {steps} of {planned}: ModelCheckpoint's every_n_train_steps must divide "
            "trainer.max_steps"
        )
    state, data = checkpoint["vbon_lightning"], config["data"]
    module = state["module"]
    rollouts = state["batches_seen"] // (module.get("epochs_per_rollout", 1) * module.get("minibatches", 1))
    prompts = rollouts * data["batch_size"] * state["trainer"]["world_size"]
    plain = {
        "command": _command(training.fit),
        "device": _device(),
        "seconds": checkpoint["callbacks"]["Timer"]["time_elapsed"]["train"],
        "optimizer_steps": steps,
        "prompts": prompts,
        "sampled_responses": prompts * _samples(state["module"]),
        "table_responses": _table_responses(data) if training.table else 0,
        "settings": {
            "module": module,
            "optimizer": {name: _short(values) for name, values in state["optimizer"].items()},
            "trainer": state["trainer"],
            "data": {key: data[key] for key in _DATA},
        },
        # The training it starts from: what a policy cost is their sum.
        "after": None if training.first is None else _read(training.first.record),
    }
    _write(training.record, plain)
    shutil.rmtree(folder)


def _samples(module: dict[str, Any]) -> int:
    """Return how many responses a prompt and step a training samples, of the policy and of its anchor or reference."""
    if module["class"] == "AStarPO" or module.get("responses") == "policy":
        return int(module["responses_per_prompt"])
    # The forward KL alone, and what learns from the table otherwise, sample nothing of the policy.
    own = 0 if module.get("divergence") == "forward" else module.get("samples_per_prompt", 0)
    return int(own + (0 if module["class"] == "WIND" else module.get("reference_samples", 0)))


def _table_responses(data: dict[str, Any]) -> int:
    """Return how many responses of the reference table the prompts of training and validation have."""
    prompts = sum(data[split]["stop"] - data[split]["start"] for split in ("train", "val") if data[split])
    return prompts * (data["table_samples"] or ReferenceTable.open(data["reference_table"]).samples)


def record_run(run: Run) -> None:
    """Write the result of a run: what it was, what it cost and what it is worth."""
    comparison = _read(run.comparison / "comparison.json")
    (report,) = [report for report in comparison["reports"] if report["method"] == run.title]
    plain = {
        "run": run.name,
        "method": run.method,
        "title": run.title,
        "setting": run.training.setting,
        "group": run.group,
        "table": run.training.table,
        "strength": {"option": run.option, "short": run.short, "value": run.value},
        "seed": run.training.seed,
        "training": _read(run.training.record),
        "compare": comparison["command"],
        "report": report,
    }
    _write(run.result, plain)


def _short(settings: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is off and what is a scheduler's state."""
    # By identity: 0.0 equals False, and is a setting.
    on = {key: value for key, value in settings.items() if value is not None and value is not False}
    return {key: value for key, value in on.items() if not key.startswith("_")}


def _command(words: list[str]) -> str:
    return "vbon " + shlex.join(words)


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, plain: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.staged")
    staged.write_text(json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    staged.replace(path)


def main() -> None:
    """Record one thing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", default=str(Path(__file__).with_name("sweep.yaml")))
    parser.add_argument("what", choices=["table", "bon", "training", "run"])
    parser.add_argument("name", help="of the setting, the training or the run")
    args = parser.parse_args()
    sweep = read_sweep(args.sweep)
    if args.what in ("table", "bon"):
        setting = sweep.settings[args.name]
        make_table(setting) if args.what == "table" else record_bon(setting)
    elif args.what == "training":
        record_training(*[training for training in sweep.trainings if training.name == args.name])
    else:
        record_run(*[run for run in sweep.runs if run.name == args.name])


if __name__ == "__main__":
    main()
