"""What is refused before anything is trained."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.modules.fake import FakeTrainer, attach
from tests.modules.offline import table_data
from tests.modules.setting import make_module
from tests.rollouts import make_rollout
from vbon_lightning.models import ModelSpec
from vbon_lightning.modules import (
    value_modelling,
)


def table_of(rewards: int, **attributes: Any) -> SimpleNamespace:
    """Stands for data with a table that brings so many rewards a prompt."""
    table = SimpleNamespace(knows_finished=True)
    return SimpleNamespace(
        reference_table="there", table=lambda: table, reference_rewards=rewards, table_samples=None, **attributes
    )


def test_tables_that_are_too_small_are_named_before_training(files: Path) -> None:
    data = table_data(files, value_model=str(files / "value"))
    module: Any = make_module("distillation", data, n=3.5, states="policy", responses_per_prompt=20)
    assert module.samples_needed == (4, "Best-of-3.5")  # what is sampled afresh needs no table
    attach(module, FakeTrainer(datamodule=table_of(3)))
    with pytest.raises(ValueError, match=r"brings M = 3 responses a prompt, fewer than the 4 that Best-of-3\.5 needs"):
        module.setup("fit")
    for fitting in (table_of(4), SimpleNamespace(reference_table=None), None):
        attach(module, FakeTrainer(datamodule=fitting))
        module.setup("fit")
    trainer = FakeTrainer()
    del trainer.datamodule
    attach(module, trainer)
    module.setup("fit")

    best: Any = make_module("vbon", table_data(files), reference_samples=2, n=4)
    attach(best, FakeTrainer(datamodule=None))
    with pytest.raises(ValueError, match=r"^model\.reference_samples has M = 2 reference rewards a prompt, fewer"):
        best.setup("fit")
    cached: Any = make_module("vbon", table_data(files), reference_samples=0, n=4)
    attach(cached, FakeTrainer(datamodule=table_of(3)))
    with pytest.raises(ValueError, match="^the reference table there has M = 3 reference rewards a prompt, fewer"):
        cached.setup("fit")


def test_accumulated_gradients_are_not_normalised(files: Path) -> None:
    module: Any = make_module("vbon", table_data(files), kl_estimator="sampled", normalise=True)
    attach(module, FakeTrainer(accumulate_grad_batches=2))
    with pytest.raises(ValueError, match=r"^model\.normalise divides by the spread of one batch"):
        module.setup("fit")
    module.setup("test")


def test_a_value_model_needs_a_table_of_enough_responses(files: Path, spy: Any) -> None:
    body = ModelSpec(name=str(files / "llama"))
    module: Any = make_module("valuemodelling", table_data(files), body=body, responses_per_prompt=16, seed=7)
    for data in (None, SimpleNamespace()):
        attach(module, FakeTrainer(datamodule=data))
        with pytest.raises(ValueError, match="^ValueModelling learns from a reference table: fit it with an Alignment"):
            module.setup("fit")
    attach(module, FakeTrainer(datamodule=SimpleNamespace(reference_table=None, table=None)))
    with pytest.raises(ValueError, match=r"^ValueModelling learns from cached responses: name a table"):
        module.setup("fit")
    attach(module, FakeTrainer(datamodule=table_data(files)))
    module.setup("fit")  # 16 of the table's 16
    more: Any = make_module("valuemodelling", table_data(files), body=body, responses_per_prompt=17)
    attach(more, FakeTrainer(datamodule=table_data(files)))
    with pytest.raises(ValueError, match=r"^model\.responses_per_prompt = 17, but the reference table .* brings 16"):
        more.setup("fit")

    checked = spy(value_modelling, "check_value_model")
    own: Any = make_module("valuemodelling", table_data(files), body=ModelSpec(name=str(files / "value")), seed=7)
    attach(own, FakeTrainer(datamodule=None, state=SimpleNamespace(fn="validate")))
    own.check_lengths(4)
    assert checked.calls == [((own.actor_spec, own.scorer, str(files / "value")), {"seed": 7})]


def test_responses_must_fit_whoever_makes_them(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cached ones are no longer than those that are sampled: the table's fingerprint says so."""
    for kind in ("bonsft", "vbon"):
        said: list[Any] = []
        module: Any = make_module(kind, table_data(files))
        module.actors = SimpleNamespace(max_new_tokens=5)
        attach(module, FakeTrainer(datamodule=table_of(16)))
        monkeypatch.setattr(module, "check_lengths", said.append)
        monkeypatch.setattr(module, "check_ends", lambda said=said: said.append("ends"))
        module.on_fit_start()
        assert said == [5, "ends"]


def test_minibatches_and_rewards_are_checked_before_a_fit(files: Path) -> None:
    module: Any = make_module("clipped", table_data(files), minibatches=3, reference_samples=16)
    attach(module, FakeTrainer(datamodule=SimpleNamespace(batch_size=4)))
    with pytest.raises(ValueError, match=r"^model\.minibatches=3 does not divide data\.batch_size=4: every minibatch"):
        module.setup("fit")
    module.setup("validate")
    for kind in ("infalign", "jbond", "maxatk", "grpo", "pfppo"):
        several = {"estimator": "clipped", "epochs_per_rollout": 1, "minibatches": 3}
        still = {"anchor_rate": 0.0} if kind == "jbond" else {}
        sibling: Any = make_module(kind, table_data(files), **several, **still)
        attach(sibling, FakeTrainer(datamodule=SimpleNamespace(batch_size=4)))
        with pytest.raises(ValueError, match=r"^model\.minibatches=3 does not divide data\.batch_size=4: every"):
            sibling.setup("fit")
        sibling.setup("validate")
    for data in (None, SimpleNamespace(), SimpleNamespace(batch_size=6)):
        attach(module, FakeTrainer(datamodule=data))
        module.setup("fit")
    with pytest.raises(ValueError, match=r"^model\.minibatches=3 does not divide data\.batch_size=4: every minibatch"):
        module.training_step(make_rollout(prompts=4).prompts, 0)  # before anything is sampled
    for cls in ("vbon", "bonsft", "dpo", "distillation", "valuemodelling"):
        bare: Any = make_module(cls, table_data(files, reward=None, value_model=str(files / "value")))
        attach(bare, FakeTrainer(datamodule=None))
        with pytest.raises(ValueError, match=rf"^{type(bare).__name__} needs a reward: set `data\.reward`$"):
            bare.setup("fit")


def test_cached_responses_must_be_there_and_may_not_tell_their_ends(files: Path) -> None:
    for kind, name in (("bonsft", "BoNSFT"), ("dpo", "DPO")):
        module: Any = make_module(kind, table_data(files))
        attach(module, FakeTrainer(datamodule=SimpleNamespace(reference_table=None, table=None)))
        with pytest.raises(ValueError, match=rf"^{name} learns from cached responses: name a table"):
            module.setup("fit")
        module.setup("validate")
        data = table_of(16)
        data.table().knows_finished = False
        attach(module, FakeTrainer(datamodule=data))
        with pytest.warns(UserWarning, match="the reference table there does not tell finished from truncated"):
            module.setup("fit")
        limited = table_of(3)
        limited.table_samples = 3
        attach(module, FakeTrainer(datamodule=limited))
        with pytest.raises(ValueError, match=r"brings M = 3 responses a prompt, as data\.table_samples says"):
            module.setup("fit")
    groups: Any = make_module("bonsft", table_data(files), n=4, responses_per_prompt=3, selection="groups")
    assert groups.samples_needed == (12, "model.responses_per_prompt = 3 in groups of model.n = 4")
    weights: Any = make_module("bonsft", table_data(files), n=4, responses_per_prompt=3)
    assert weights.samples_needed == (4, "model.n = 4")
    pairs: Any = make_module("dpo", table_data(files), n=4, pairs_per_prompt=3)
    assert pairs.samples_needed == (12, "model.pairs_per_prompt = 3 with groups of model.n = 4")
    for module in (groups, pairs):
        attach(module, FakeTrainer(datamodule=table_of(12)))
        module.setup("fit")
        attach(module, FakeTrainer(datamodule=table_of(11)))
        with pytest.raises(ValueError, match="fewer than the 12 that"):
            module.setup("fit")


def test_how_many_reference_rewards_vbon_asks_for(files: Path) -> None:
    def setup(rewards: int | None, **options: Any) -> None:
        named = {"value_model": str(files / "value")} if "prior_samples" in options else {}
        module: Any = make_module("vbon", table_data(files, **named), **({"reference_samples": 0, "n": 4} | options))
        attach(module, FakeTrainer(datamodule=SimpleNamespace() if rewards is None else table_of(rewards)))
        module.setup("fit")

    setup(None)  # data of somebody's own, which may bring what it likes
    for rewards in (4, 15):
        with pytest.warns(UserWarning, match=rf"the reference table there has M = {rewards} reference rewards"):
            setup(rewards)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        setup(16)
        setup(14, prior_samples=2.0)  # what is predicted counts as samples
    with pytest.warns(UserWarning, match="M = 3 reference rewards"):
        setup(3, prior_samples=2.0)
    with pytest.raises(ValueError, match="M = 3 reference rewards a prompt, fewer than n = 4"):
        setup(3, prior_samples=0.5)
