"""What all modules do around their steps: optimizers, weights of batches, lengths and ends."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.modules.fake import FakeTrainer, attach
from tests.modules.setting import make_data, make_module
from vbon_lightning.modules import (
    base,
)
from vbon_lightning.rewards import RewardCalls


def test_the_optimizer_gets_what_is_trained_and_no_more(files: Path) -> None:
    module: Any = make_module("vbon", make_data(files), optimizer=None, lr_scheduler=None)
    module.configure_model()
    frozen = next(module.policy.parameters()).requires_grad_(False)
    found = module.configure_optimizers()
    assert type(found) is torch.optim.AdamW
    assert found.defaults["lr"] == 1e-4
    held = found.param_groups[0]["params"]
    assert len(held) == sum(1 for _ in module.parameters() if _.requires_grad)
    assert all(parameter is not frozen for parameter in held)
    assert module._optimizer_settings["optimizer"]["class"] == "AdamW"
    assert module._optimizer_settings["optimizer"]["lr"] == 1e-4
    assert "lr_scheduler" not in module._optimizer_settings
    module.policy.requires_grad_(False)
    with pytest.raises(ValueError, match="^the policy has no trainable parameters$"):
        module.configure_optimizers()


def test_before_the_first_batch_nothing_was_seen(files: Path) -> None:
    module: Any = make_module("vbon", make_data(files))
    assert (module.batches_seen, module.updates, module.last_rollout) == (0, 0, None)


def test_schedulers_go_by_steps_and_those_that_watch_by_validations(files: Path) -> None:
    from lightning.pytorch.cli import ReduceLROnPlateau

    module: Any = make_module("vbon", make_data(files))
    module.configure_model()
    found = module.configure_optimizers()
    scheduler = found["lr_scheduler"]["scheduler"]
    assert found == {"optimizer": scheduler.optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
    assert module._optimizer_settings["lr_scheduler"]["class"] == "CosineAnnealingLR"
    assert module._optimizer_settings["lr_scheduler"]["T_max"] == 20
    module._lr_scheduler = lambda optimizer: ReduceLROnPlateau(optimizer, monitor="val/reward")
    found = module.configure_optimizers()
    scheduler = found["lr_scheduler"]["scheduler"]
    assert found == {
        "optimizer": scheduler.optimizer,
        "lr_scheduler": {
            "scheduler": scheduler,
            "interval": "epoch",
            "monitor": "val/reward",
            "reduce_on_plateau": True,
        },
    }


def test_gradients_are_brought_to_the_mean_over_what_was_weighed(files: Path) -> None:
    module: Any = make_module("vbon", make_data(files))
    parameter, without = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [without]}, {"params": [parameter]}], lr=1.0)
    for planned, factor in ((3, 3 * 2.0 / (2.0 + 5.0 + 1.0)), (1, 1.0)):
        attach(module, FakeTrainer(accumulate_grad_batches=planned))
        for weight in (2.0, 5.0):
            module.on_train_batch_start(None, 0)
            assert module.weigh_batch(torch.tensor(weight)).item() == weight / 2.0
        module.on_train_batch_start(None, 0)  # a batch that is not weighed counts for one
        parameter.grad = torch.tensor([1.0, -4.0])
        module.on_before_optimizer_step(optimizer)
        torch.testing.assert_close(parameter.grad, factor * torch.tensor([1.0, -4.0]))
        assert (without.grad, module._weights) == (None, [])
    module.on_before_optimizer_step(optimizer)  # a step without a batch
    torch.testing.assert_close(parameter.grad, torch.tensor([1.0, -4.0]))


@pytest.mark.parametrize("ends", [(2,), (2, 5)])
def test_what_generate_is_told(ends: tuple[int, ...], files: Path) -> None:
    module: Any = make_module("vbon", make_data(files))
    module.actors = SimpleNamespace(end_ids=ends, temperature=0.7, max_new_tokens=9)
    assert module.generation_settings() == {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": 9,
        "eos_token_id": 2 if ends == (2,) else [2, 5],
    }
    assert module.response_room == 9


def test_prompts_and_responses_are_held_against_both_models(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(base, "check_context", lambda *given: calls.append(given))
    module: Any = make_module("vbon", make_data(files))
    module.actors = SimpleNamespace(reference="reference", max_new_tokens=9, tokenizer=None, end_ids=())
    module.policy = None
    attach(module, FakeTrainer(datamodule=None))
    module.check_lengths(3)
    assert calls == []
    attach(module, FakeTrainer(datamodule=SimpleNamespace(longest=lambda: 17)))
    module.check_lengths(3)
    assert calls == [("reference", 17, 3)]
    object.__setattr__(module, "policy", "policy")
    module.actors.reference = None
    for hook in (module.on_validation_start, module.on_test_start):
        calls.clear()
        hook()
        assert calls == [("policy", 17, 9)]
    module.actors = None
    calls.clear()
    module.check_lengths(2)
    assert calls == [("policy", 17, 2)]


def test_the_table_must_end_where_the_policy_does(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(base, "rank_zero_info", said.append)
    monkeypatch.setattr(base, "describe_ends", lambda tokenizer, ends: f"{tokenizer} {ends}")
    checked: list[Any] = []
    table = SimpleNamespace(check_tokens=lambda *given: checked.append(given))
    monkeypatch.setattr(base, "vocabulary_size", lambda policy: f"size of {policy}")
    data = SimpleNamespace(reference_table="there", table=lambda: table)
    module: Any = make_module("vbon", make_data(files))
    module.actors = SimpleNamespace(tokenizer="tokenizer", end_ids=(2,), policy="policy")
    attach(module, FakeTrainer(datamodule=data))
    module.check_ends()
    assert said == ["A response ends at tokenizer (2,)"]
    assert checked == [("size of policy", (2,))]
    for trainer in (FakeTrainer(datamodule=None), FakeTrainer(datamodule=SimpleNamespace(reference_table=None))):
        attach(module, trainer)
        module.check_ends()
    attach(module, FakeTrainer(datamodule=data))
    module.needs_reference = False
    module.check_ends()
    assert checked == [("size of policy", (2,))]


def test_what_calling_the_reward_came_to_is_logged_once_a_rollout(files: Path) -> None:
    """Not again at each further update on the same rollout."""
    module: Any = make_module("ppo", make_data(files, reward_calls=RewardCalls(retries=2)))
    module.configure_model()
    module.loaded.record.retries, module.loaded.sampler_mismatch = 3, 0.5
    told = module._sampling_logs(None, new=True)
    assert {name: float(value) for name, value in told.items()} == {"reward/retries": 3.0, "sampler_mismatch": 0.5}
    assert module._sampling_logs(None, new=False) == {}
