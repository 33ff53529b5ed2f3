"""Training with each sampler: the same weights with the same samples, and what is logged of another program's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from tests.modules.setting import make_data, make_files, make_module, make_trainer, weights
from vbon_lightning.actors import Actors
from vbon_lightning.sampling import SamplerError, SamplingRequest, sample_completions
from vbon_lightning.sampling.static import GraphSampler
from vbon_lightning.types import Completions


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


class Metrics(Callback):
    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.seen.append({name: float(value) for name, value in trainer.logged_metrics.items()})


def fit(files: Path, directory: Path, kind: str = "vbon", callback: Any = None, **settings: Any) -> Any:
    data = make_data(files, **settings)
    module = make_module(kind, data)
    make_trainer(directory, *([callback] if callback else []), steps=4).fit(module, data)
    return module


@pytest.mark.parametrize("kind", ["vbon", "ppo"])
@pytest.mark.parametrize("settings", [{"sampler": "graph"}, {"max_rows": 5}, {"sampler": "graph", "max_rows": 6}])
def test_training_is_the_same(kind: str, settings: dict[str, Any], files: Path, tmp_path: Path) -> None:
    plain = fit(files, tmp_path / "plain", kind)
    assert plain.loaded.sampler is sample_completions
    other = fit(files, tmp_path / "other", kind, **settings)
    for name, value in weights(plain).items():
        assert torch.allclose(value, weights(other)[name], atol=1e-5), name


def test_states_stay_with_the_policy_while_it_learns(files: Path, tmp_path: Path) -> None:
    module = fit(files, tmp_path, sampler="graph")
    sampler = module.loaded.sampler
    assert isinstance(sampler, GraphSampler)
    rows = [decoder.rows for decoder in sampler._decoders[module.policy].values()]
    assert sorted(rows) == [4, 8, 16], "a training batch, a validation batch, and what is left for the last of these"


class Elsewhere:
    """A sampler that knows its mismatch, as one that samples with another program does."""

    def __init__(self) -> None:
        self.mismatch = 0.0
        self.calls = 0

    def __call__(self, model: Any, request: SamplingRequest) -> Completions:
        self.calls += 1
        self.mismatch = 0.125 * self.calls
        return sample_completions(model, request)


@pytest.mark.parametrize(
    ("kind", "expected"),
    # vBoN samples the reference after the policy; four updates of PPO share a rollout.
    [("vbon", [0.125, 0.375, 0.625, 0.875]), ("ppo", [0.125] * 4), ("klrl", [0.125, 0.25, 0.375, 0.5])],
)
def test_the_mismatch_of_the_policys_samples_is_logged(
    kind: str, expected: list[float], files: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("vbon_lightning.actors.loaded.make_sampler", lambda *_, **__: Elsewhere())
    metrics = Metrics()
    fit(files, tmp_path, kind, metrics, val=None)
    assert [seen["train/sampler_mismatch"] for seen in metrics.seen] == expected


def test_nothing_is_logged_where_the_policy_samples_itself(files: Path, tmp_path: Path) -> None:
    metrics = Metrics()
    fit(files, tmp_path, "klrl", metrics)
    assert all("train/sampler_mismatch" not in seen for seen in metrics.seen)


def test_the_sampler_is_checked_before_anything_is_loaded(files: Path, monkeypatch: Any) -> None:
    with pytest.raises(SamplerError, match="data.sampler must be one of eager, graph, vllm"):
        make_data(files, sampler="fast")
    with pytest.raises(SamplerError, match="data.max_rows must be at least 1"):
        make_data(files, max_rows=0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    data = make_data(files, policy=str(files / "nowhere"), sampler="vllm")
    with pytest.raises(SamplerError, match=r"pip install 'vbon_lightning\[vllm\]'"):
        Actors.load(data.actors)


def test_a_checkpoint_names_the_sampler_where_samples_depend_on_it(files: Path) -> None:
    plain = make_data(files).actors.identity()
    assert make_data(files, sampler="graph", max_rows=4).actors.identity() == plain, "old checkpoints go on"
    assert make_data(files, sampler="vllm").actors.identity() == plain | {"sampler": "vllm"}
    assert make_data(files, sampler="vllm").fingerprint() == make_data(files).fingerprint()
