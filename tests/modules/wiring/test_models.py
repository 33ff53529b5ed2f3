"""Which models a module loads, of what, and how often."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from tests.modules.fake import FakeTrainer, attach
from tests.modules.offline import table_data
from tests.modules.setting import make_data, make_module
from vbon_lightning import ReferenceSampler, RewardModelling
from vbon_lightning.actors import Actors
from vbon_lightning.modules import (
    reward_modelling,
)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("vbon", {"seed": 7, "trainable": True, "reference": True, "value": False}),
        ("valuecritic", {"seed": 7, "trainable": True, "reference": True, "value": True}),
        ("klrl", {"seed": 7, "trainable": True, "reference": True, "value": False}),
        ("bonsft", {"seed": 7, "trainable": True, "reference": True, "value": False}),
        ("dpo", {"seed": 7, "trainable": True, "reference": True, "value": False}),
        ("distillation", {"seed": 7, "trainable": True, "reference": True, "value": True}),
        ("sft", {"seed": 7, "reference": False, "keep_dropout": True}),
    ],
)
def test_which_models_are_loaded_and_once(
    kind: str, expected: dict[str, Any], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    loaded = SimpleNamespace(policy=nn.Linear(1, 1))
    loaded.policy.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=3))
    monkeypatch.setattr(Actors, "load", lambda spec, **options: calls.append((spec, options)) or loaded)
    data = table_data(files, value_model=str(files / "value"))
    module: Any = make_module(kind, data, seed=7, **({"value_model": False} if kind in ("vbon", "klrl") else {}))
    module.configure_model()
    module.configure_model()
    assert calls == [(module.actor_spec, expected)]
    assert (module.actors, module.policy) == (loaded, loaded.policy)
    assert module.loaded is loaded


def test_a_table_is_sampled_by_the_reference_alone(files: Path, spy: Any) -> None:
    data = make_data(
        files, policy=str(files / "gpt2"), reference=str(files / "llama"), missing_eos_penalty=2.0,
        value_model=str(files / "value"),
    )  # fmt: skip
    load = spy(Actors, "load")
    sampler = ReferenceSampler(data.actors, samples=4, seed=7)
    sampler.configure_model()
    sampler.configure_model()
    (((only,), options),) = load.calls
    assert options == {"seed": 7, "trainable": False, "reference": False}
    assert (only.policy, only.reference) == (data.actors.reference_spec, None)
    assert (only.missing_eos_penalty, only.value_model) == (0.0, None)
    assert sampler.policy is sampler.loaded.policy
    assert not any(parameter.requires_grad for parameter in sampler.policy.parameters())
    attach(sampler, FakeTrainer(datamodule=data))
    assert sampler.configure_callbacks() == [sampler.writer]


def test_sft_without_dropout_is_loaded_so_and_trains(files: Path, spy: Any) -> None:
    load = spy(Actors, "load")
    module: Any = make_module("sft", make_data(files), dropout=False)
    module.configure_model()
    assert load.calls[0][1]["keep_dropout"] is False
    assert module.policy.training


@pytest.mark.parametrize("dropout", [True, False])
def test_a_classifier_is_made_of_the_labels_and_the_seed(dropout: bool, files: Path, spy: Any) -> None:
    load = spy(reward_modelling, "load_classifier")
    checked = spy(reward_modelling, "check_vocabulary_fits")
    data = make_data(files)
    module = RewardModelling(data.actors, labels=["a", "b", "c"], seed=7, dropout=dropout)
    module.configure_model()
    module.configure_model()
    assert load.calls == [((data.actors.policy_spec,), {"labels": ["a", "b", "c"], "seed": 7, "dropout": dropout})]
    assert checked.calls == [((module.policy, module.tokenizer), {})]
    assert module.tokenizer is module.tokenizer
    assert (module.batch_kind, RewardModelling(data.actors, objective="preference").batch_kind) == (
        "labelled",
        "comparisons",
    )


def test_ppos_critic_starts_at_nothing(files: Path) -> None:
    module: Any = make_module("ppo", make_data(files))
    module.configure_model()
    critic = module.critic
    module.configure_model()
    assert module.critic is critic
    assert tuple(critic.weight.shape) == (1, module.policy.config.hidden_size)
    assert not critic.weight.any()
    assert not critic.bias.any()
    for kind in ("vbon", "clipped"):
        other: Any = make_module(kind, make_data(files))
        other.configure_model()
        assert other.critic is None


@pytest.mark.parametrize(
    "kind", ["vbon", "klrl", "bonsft", "dpo", "distillation", "sft", "valuemodelling", "valuecritic"]
)
def test_every_module_takes_an_optimizer_and_a_scheduler(kind: str, files: Path) -> None:
    data = table_data(files, value_model=str(files / "value"))
    module: Any = make_module(kind, data, optimizer="optimizer", lr_scheduler="scheduler", seed=5)
    assert (module._optimizer, module._lr_scheduler, module.seed) == ("optimizer", "scheduler", 5)
    assert module.actor_spec is data.actors
    judge = RewardModelling(data.actors, optimizer="optimizer", lr_scheduler="scheduler", seed=5)
    assert (judge._optimizer, judge._lr_scheduler, judge.seed) == ("optimizer", "scheduler", 5)
