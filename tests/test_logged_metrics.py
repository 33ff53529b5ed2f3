"""docs/metrics.md names every metric that a method logs, and no other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningModule

from tests.models.setting import make_valued_files
from tests.modules import test_reward_modelling as judged
from tests.modules.setting import REGRESSIONS, VowelReward, make_data, make_module, make_trainer
from vbon_lightning import InfAlignCTRL, RewardModelling, TextSource, VBoN
from vbon_lightning.rewards import WeightedReward

ROOT = Path(__file__).parents[1]
Logged = set[tuple[str, str, str]]
"""Method, stage and name."""


ON_POLICY = "VBoN, InfAlignCTRL, KLRL, MaxAtK, GRPO, RLOO, PFPPO"
SAMPLING = f"{ON_POLICY}, AStarPO"
ANCHORED = "BOND, JBOND"
GROUPS = {
    "on-policy": ON_POLICY,
    "sampling": SAMPLING,
    "anchored": ANCHORED,
    "policies": f"{SAMPLING}, {ANCHORED}, WIND, QRPO, BoNRegression, BoNSFT, DPO, BoNDistillation",
    "-": "",
}


def documented() -> Logged:
    """Read the page's tables: a line may name several metrics, and the methods in training and at evaluation."""
    found: Logged = set()
    for line in (ROOT / "docs/metrics.md").read_text().splitlines():
        if not line.startswith("| `"):
            continue
        names, _, _, training, evaluation = [cell.strip() for cell in line.strip("|").split(" | ")]
        for stage, methods in (("train", training), ("val", evaluation), ("test", evaluation)):
            for group, members in GROUPS.items():
                methods = methods.replace(group, members)
            for method in re.findall(r"\w+", methods):
                found |= {(method, stage, name) for name in re.findall(r"`([^`]+)`", names)}
    return found


def logged_by(module: LightningModule, data: Any, directory: Path) -> Logged:
    """Fit, with validation, and test; read what was logged."""
    trainer = make_trainer(directory, steps=2, callbacks=[], enable_checkpointing=False, log_every_n_steps=1)
    trainer.fit(module, data)
    names = set(trainer.callback_metrics)
    names |= trainer.test(module, data, verbose=False)[0].keys()
    method = type(module).__name__
    parts = [name.split("/", 1) for name in names]
    return {(method, stage, re.sub(r"(?<=bon)\d+$", "N", name)) for stage, name in parts}


REWARD = WeightedReward({"NAME": VowelReward()})
SETTING: dict[str, Any] = {"reward": REWARD, "max_new_tokens": 7}
"""Long enough for each third of a response."""

OF_THE_TABLE = ("vbon", "clipped", "annealed", "infalign", "jeffreys")
SIBLINGS = ["infalign", "maxatk", "grpo", "rloo", "pfppo"]
OFFLINE = ["bonsft", "dpo", *REGRESSIONS]
KINDS = ["vbon", "clipped", "annealed", *SIBLINGS, "klrl", "ppo", *OFFLINE, "distillation", "valuemodelling"]
KINDS += ["jeffreys", "bond", "jbond", "wind"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_valued_files(tmp_path_factory.mktemp("files"), **SETTING)


def of_policies(files: Path, directory: Path) -> Iterator[Logged]:
    test = TextSource(path=str(files / "val.txt"))
    given = {**SETTING, "reference_table": str(files / "table"), "test": test}
    for kind in KINDS:
        data = make_data(files, **given, **({"value_model": str(files / "value")} if kind == "distillation" else {}))
        options: dict[str, Any] = {"reference_samples": 0} if kind in OF_THE_TABLE else {}
        if kind in SIBLINGS:  # an epoch and its validation within the steps
            options |= {"estimator": "clipped", "epochs_per_rollout": 1, "minibatches": 1}
        if kind == "jbond":
            options |= {"samples_per_prompt": 2}
        module: Any = make_module(kind, data, **options)
        if kind in ("vbon", "klrl", "astarpo", *SIBLINGS):  # what is logged only where there is something to say
            module.configure_model()
            module.loaded.reward.cut_prompts = module.loaded.reward.cut_responses = 1
            module.loaded.sampler.mismatch = 0.1
        yield logged_by(module, data, directory / kind)
    data = make_data(files, **given)
    for cls in (VBoN, InfAlignCTRL):
        critic = cls(data.actors, n=4, estimator="ppo", epochs_per_rollout=2, samples_per_prompt=2)
        yield logged_by(critic, data, directory / f"critic of {cls.__name__}")


def of_supervised(files: Path, directory: Path) -> Iterator[Logged]:
    data = make_data(files, test=TextSource(path=str(files / "val.txt")))
    yield logged_by(make_module("sft", data), data, directory / "sft")
    words = judged.make_files(directory / "judged")
    for objective in ("classification", "preference"):
        data = judged.make_data(words, objective)
        data.sources["test"] = data.sources["val"]
        yield logged_by(RewardModelling(data.actors, objective=objective), data, directory / objective)


@pytest.mark.slow
def test_the_page_and_the_runs_agree(files: Path, tmp_path: Path) -> None:
    found = set().union(*of_policies(files, tmp_path), *of_supervised(files, tmp_path))
    assert found - documented() == set()
    assert documented() - found == set()
