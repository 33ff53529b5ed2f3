"""What is refused before anything is trained."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.modules.fake import FakeTrainer, attach
from tests.modules.offline import table_data
from tests.modules.setting import make_module
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
