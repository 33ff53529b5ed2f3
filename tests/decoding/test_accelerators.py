"""Every decoder on a GPU: the responses that it gives on the CPU; skipped where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.decoding import test_base
from tests.decoding.setting import save_models
from tests.decoding.test_base import DECODERS, NEEDS_ONE, PROMPTS, load_valued, prompts_of
from tests.helpers import save_tiny_classifier
from vbon_lightning.actors import Actors
from vbon_lightning.decoding import Decoded
from vbon_lightning.decoding.drawing import on_device
from vbon_lightning.models import ModelSpec
from vbon_lightning.rewards import ClassifierReward

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


def load_at(files: Path, device: str, dtype: torch.dtype | None = None, **changes: Any) -> Actors:
    """Load the policy and a value model to a device: the reference, the reward and the value follow the policy."""
    actors = load_valued(files, **changes)
    torch.nn.Module.to(actors.policy, device=device, dtype=dtype)
    actors.place()
    return actors


def decode(name: str, files: Path, actors: Actors) -> Decoded:
    return test_base.decode(DECODERS[name](files), actors, on_device(prompts_of(PROMPTS), actors.policy.device))


@pytest.mark.parametrize("sampler", ["eager", "graph"])
@pytest.mark.parametrize("name", DECODERS)
def test_responses_are_those_of_the_cpu(name: str, sampler: Any, files: Path) -> None:
    theirs = load_at(files, "cpu")
    ours = load_at(files, DEVICE, sampler=sampler)
    expected, found = decode(name, files, theirs), decode(name, files, ours)
    assert ours.token_ids(found) == theirs.token_ids(expected)
    assert torch.equal(found.finished.cpu(), expected.finished)
    if expected.rewards is None:
        assert found.rewards is None
    else:
        assert found.rewards is not None
        torch.testing.assert_close(found.rewards.cpu(), expected.rewards)
    assert found.cost[:3] == expected.cost[:3]
    assert found.cost.peak_cuda_bytes > 0


@pytest.mark.parametrize("name", DECODERS)
def test_lower_precision_runs(name: str, files: Path) -> None:
    actors = load_at(files, DEVICE, torch.bfloat16)
    found = decode(name, files, actors)
    assert found.tokens.shape[:2] == (len(PROMPTS), 3)
    if found.rewards is not None:
        assert bool(found.rewards.isfinite().all())


@pytest.mark.parametrize("name", DECODERS)
def test_a_policy_with_adapters(name: str, files: Path) -> None:
    policy = ModelSpec(str(files / "policy"), lora={"r": 2, "target_modules": "all-linear"})
    theirs, ours = load_at(files, "cpu", policy=policy), load_at(files, DEVICE, policy=policy)
    assert ours.token_ids(decode(name, files, ours)) == theirs.token_ids(decode(name, files, theirs))


@pytest.mark.parametrize("name", NEEDS_ONE)
def test_a_classifier_as_the_reward(name: str, files: Path, tmp_path: Path) -> None:
    classifier = str(save_tiny_classifier(tmp_path / "reward"))
    rewards = []
    for device in ("cpu", DEVICE):
        actors = load_at(files, device, reward=ClassifierReward(classifier, label="POSITIVE"))
        found = decode(name, files, actors)
        assert found.rewards is not None
        rewards.append(found.rewards.cpu())
    torch.testing.assert_close(*rewards, atol=1e-4, rtol=1e-4)
