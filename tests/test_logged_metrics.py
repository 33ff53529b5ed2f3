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
from tests.modules.setting import VowelReward, make_data, make_module, make_trainer
from vbon_lightning import RewardModelling, TextSource, VBoN
from vbon_lightning.rewards import WeightedReward

ROOT = Path(__file__).parents[1]
Logged = set[tuple[str, str, str]]
"""Method, stage and name."""


GROUPS = {
    "on-policy": "VBoN, KLRL",
    "anchored": "BOND, JBOND",
    "policies": "VBoN, KLRL, BOND, JBOND, WIND, BoNSFT, DPO, BoNDistillation",
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

KINDS = ["vbon", "clipped", "jeffreys", "klrl", "ppo", "bonsft", "dpo", "distillation", "valuemodelling"]
KINDS += ["bond", "jbond", "wind"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_valued_files(tmp_path_factory.mktemp("files"), **SETTING)


def of_policies(files: Path, directory: Path) -> Iterator[Logged]:
    test = TextSource(path=str(files / "val.txt"))
    given = {**SETTING, "reference_table": str(files / "table"), "test": test}
    for kind in KINDS:
        data = make_data(files, **given, **({"value_model": str(files / "value")} if kind == "distillation" else {}))
        reading = {"reference_samples": 0} if kind in ("vbon", "clipped", "jeffreys") else {}
        module: Any = make_module(kind, data, **(reading | ({"samples_per_prompt": 2} if kind == "jbond" else {})))
        if kind in ("vbon", "klrl"):  # what is logged only where there is something to say
            module.configure_model()
            module.loaded.reward.cut_prompts = module.loaded.reward.cut_responses = 1
            module.loaded.sampler.mismatch = 0.1
        yield logged_by(module, data, directory / kind)
    data = make_data(files, **given)
    yield logged_by(
        VBoN(data.actors, n=4, estimator="ppo", epochs_per_rollout=2, samples_per_prompt=2), data, directory / "v"
    )


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
