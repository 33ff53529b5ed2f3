"""Checkpoints to the letter: what they hold, bring back and refuse."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.modules.fake import FakeTrainer, attach
from tests.modules.offline import table_data
from tests.modules.setting import make_data, make_module, make_trainer
from tests.modules.wiring.setting import Spy, module_batch, moved
from tests.rollouts import make_rollout
from vbon_lightning import VBoN
from vbon_lightning.models import ModelSpec
from vbon_lightning.modules import base, experience
from vbon_lightning.types import Responses


def test_a_checkpoint_between_updates_holds_every_ranks_rollout(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = moved(files, "clipped")
    attach(module, FakeTrainer(world_size=1))
    module.training_step(module_batch(files), 0)
    gathered: list[Any] = []

    def gather(everyone: list[Any], mine: Any) -> None:
        gathered.append((list(everyone), mine))
        everyone[:] = ["other", mine]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    two = FakeTrainer(gradient_clip_val=None, precision="32-true", global_rank=1)
    for trainer, place in ((two, 1), (FakeTrainer(world_size=1, gradient_clip_val=None, precision="32-true"), 0)):
        attach(module, trainer)
        checkpoint: dict[str, Any] = {"state_dict": {}}
        module.on_save_checkpoint(checkpoint)
        everyone = checkpoint["vbon_lightning"]["experience"]
        assert len(everyone) == trainer.world_size
        kept = [experience.from_plain(part) for part in everyone[place]]
        for ours, theirs in zip(kept, module._experience, strict=True):
            assert torch.equal(ours.advantages, theirs.advantages)
            assert torch.equal(ours.rollout.completions.tokens, theirs.rollout.completions.tokens)
            assert ours.rollout.prompts.text == theirs.rollout.prompts.text
    assert len(gathered) == 1
    assert gathered[0][0] == [None, None]
    module.batches_seen = 4  # all updates of a rollout are done
    checkpoint = {"state_dict": {}}
    module.on_save_checkpoint(checkpoint)
    assert "experience" not in checkpoint["vbon_lightning"]


def test_a_critics_values_and_returns_are_in_the_checkpoint(files: Path) -> None:
    module, _ = moved(files, "ppo")
    torch.nn.init.normal_(module.critic.weight, generator=torch.Generator().manual_seed(0))
    attach(module, FakeTrainer(world_size=1, gradient_clip_val=None, precision="32-true"))
    module.training_step(module_batch(files), 0)
    checkpoint: dict[str, Any] = {"state_dict": {}}
    module.on_save_checkpoint(checkpoint)
    (mine,) = checkpoint["vbon_lightning"]["experience"]
    for ours, theirs in zip(map(experience.from_plain, mine), module._experience, strict=True):
        assert torch.equal(ours.values, theirs.values)
        assert torch.equal(ours.returns, theirs.returns)
        assert ours.values.any()
        assert ours.returns.any()


def test_what_a_checkpoint_holds(files: Path) -> None:
    module, data = moved(files, "vbon", seed=7)
    attach(
        module,
        FakeTrainer(accumulate_grad_batches=3, gradient_clip_val=0.5, precision="bf16-mixed"),
    )
    module.configure_optimizers()
    module.batches_seen, module.updates = 4, 2
    state = {"policy.a": 1, "value.b": 2}
    checkpoint: dict[str, Any] = {"state_dict": dict(state), "current_model_state": dict(state)}
    torch.manual_seed(3)
    module.on_save_checkpoint(checkpoint)
    kept = checkpoint["vbon_lightning"]
    assert set(kept) == {
        "module", "models", "trainer", "optimizer", "batches_seen", "updates", "random_state"
    }  # fmt: skip
    assert kept["module"] == {"class": "VBoN", **module._settings}
    assert kept["models"] == data.actors.identity(reward=True)
    assert kept["trainer"] == {
        "world_size": 2,
        "accumulate_grad_batches": 3,
        "gradient_clip_val": 0.5,
        "precision": "bf16-mixed",
    }
    assert kept["optimizer"] is module._optimizer_settings
    assert (kept["batches_seen"], kept["updates"]) == (4, 2)
    assert torch.equal(kept["random_state"], torch.Generator().manual_seed(3).get_state())
    assert checkpoint["state_dict"] == checkpoint["current_model_state"] == state
    # Where the base is frozen, what is trained is all there is to keep.
    module.actor_spec = SimpleNamespace(
        policy_spec=SimpleNamespace(trained_whole=False), identity=lambda reward: {"reward": reward}
    )
    module._trained_names = lambda: {"policy.a"}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["state_dict"] == checkpoint["current_model_state"] == {"policy.a": 1}
    assert checkpoint["vbon_lightning"]["models"] == {"reward": True}
    module.uses_reward = False
    module.on_save_checkpoint({"state_dict": {}})


def test_what_a_checkpoint_brings_back(files: Path) -> None:
    from lightning.pytorch.trainer.states import TrainerFn

    module, _ = moved(files, "vbon")
    fitting = {"state": SimpleNamespace(fn=TrainerFn.FITTING), "gradient_clip_val": None, "precision": "32-true"}
    attach(module, FakeTrainer(**fitting))
    module.configure_optimizers()
    module.batches_seen, module.updates = 4, 2
    torch.manual_seed(3)
    checkpoint: dict[str, Any] = {"state_dict": {}, "optimizer_states": []}
    module.on_save_checkpoint(checkpoint)
    fresh, _ = moved(files, "vbon")
    with pytest.raises(ValueError, match=r"^this checkpoint was not written by vbon_lightning: it cannot be loaded$"):
        fresh.on_load_checkpoint({})
    torch.manual_seed(9)
    before = torch.get_rng_state()
    attach(fresh, FakeTrainer(ckpt_path="a/last.ckpt", state=SimpleNamespace(fn=TrainerFn.VALIDATING)))
    with pytest.raises(ValueError, match=r"it cannot be loaded \(a/last\.ckpt\)$"):
        fresh.on_load_checkpoint({})
    attach(fresh, FakeTrainer(ckpt_path=None, state=SimpleNamespace(fn=TrainerFn.VALIDATING)))
    with pytest.raises(ValueError, match="it cannot be loaded$"):
        fresh.on_load_checkpoint({})
    fresh._trainer = None
    fresh.on_load_checkpoint(checkpoint)  # outside of a fit nothing is resumed
    attach(fresh, FakeTrainer(**{**fitting, "state": SimpleNamespace(fn=TrainerFn.VALIDATING)}))
    fresh.on_load_checkpoint(checkpoint)
    assert fresh.batches_seen == 0
    assert torch.equal(torch.get_rng_state(), before)
    attach(fresh, FakeTrainer(**fitting))
    assert fresh.resuming
    with pytest.raises(ValueError, match="^this checkpoint has weights only"):
        fresh.on_load_checkpoint({key: value for key, value in checkpoint.items() if key != "optimizer_states"})
    older = {name: value for name, value in checkpoint["vbon_lightning"].items() if name != "updates"}
    fresh.on_load_checkpoint({**checkpoint, "vbon_lightning": older, "global_step": 3})
    assert fresh.updates == 3, "as Lightning has it"
    fresh.on_load_checkpoint(checkpoint)
    assert (fresh.batches_seen, fresh.updates) == (4, 2)
    assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(3).get_state())
    assert fresh._resumed_optimizer_settings == module._optimizer_settings
    for part, what, name in (
        ("module", "module", "seed"),
        ("models", "model", "temperature"),
        ("trainer", "trainer", "world_size"),
    ):
        inside = checkpoint["vbon_lightning"]
        changed = {**inside, part: {**inside[part], name: 99}}
        message = rf"^the checkpoint's {what} settings disagree with this run's:\n  {name}: checkpoint has 99"
        with pytest.raises(ValueError, match=message):
            fresh.on_load_checkpoint({**checkpoint, "vbon_lightning": changed})
    # The optimizer may be built before the checkpoint is read, or after it.
    other = {**checkpoint["vbon_lightning"], "optimizer": {"optimizer": {"class": "SGD"}}}
    first, _ = moved(files, "vbon")
    attach(first, FakeTrainer(**fitting))
    first.on_load_checkpoint({**checkpoint, "vbon_lightning": other})
    with pytest.raises(ValueError, match="^the checkpoint's optimizer settings disagree with this run's:"):
        first.configure_optimizers()
    with pytest.raises(ValueError, match="^the checkpoint's optimizer settings disagree with this run's:"):
        module.on_load_checkpoint({**checkpoint, "vbon_lightning": other})


def test_what_goes_into_a_checkpoint_carries_no_graph() -> None:
    learnt = torch.ones(2, requires_grad=True)
    for value in (learnt, {"a": learnt}):
        found = experience.to_plain(value)
        kept = found["a"] if isinstance(found, dict) else found
        assert not kept.requires_grad
        assert torch.equal(kept, learnt)
    assert experience.to_plain((1, 2)) == (1, 2), "a tuple without names stays one"


def test_a_rollout_comes_back_whole_with_what_it_learns_beside_its_own() -> None:
    rollout = make_rollout()
    learnt = Responses(rollout.completions.tokens[:, :2], rollout.completions.mask[:, :2])
    one = torch.ones(3, 4, 5)
    for extra in (None, learnt):
        kept = experience.Experience(rollout._replace(extra=extra), one, None, 2 * one, one[..., 0])
        again = experience.from_plain(experience.to_plain(kept))
        assert type(again.rollout) is type(rollout) and type(again.rollout.prompts) is type(rollout.prompts)
        assert type(again.rollout.extra) is type(extra)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(leaves(again), leaves(kept), strict=True))


def leaves(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for part in value for leaf in leaves(part)] if isinstance(value, tuple) else []


@pytest.mark.parametrize("said", [None, False, True])
def test_a_checkpoint_is_read_once_before_the_module_is_made_of_it(
    said: bool | None, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data(files, val=None)
    module: Any = make_module("vbon", data)
    make_trainer(tmp_path, steps=1).fit(module, data)
    spy = Spy(base.read_checkpoint)
    monkeypatch.setattr(base, "read_checkpoint", spy)
    path = tmp_path / "last.ckpt"
    how: dict[str, Any] = {} if said is None else {"weights_only": said}
    placed: list[str] = []

    def place(storage: Any, location: str) -> Any:
        placed.append(location)
        return storage

    loaded = VBoN.load_from_checkpoint(path, place, actors=data.actors, **how)
    assert placed, "where the weights go is Lightning's own argument"
    assert spy.calls[0] == ((str(path),), {"weights_only": said})
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_a_checkpoint_with_other_bins_is_evaluated_by_its_own(files: Path) -> None:
    data = table_data(files)
    body = ModelSpec(name=str(files / "llama"))
    trained: Any = make_module("valuemodelling", data, body=body, bins=4)
    attach(trained, FakeTrainer(datamodule=data, gradient_clip_val=None, precision="32-true"))
    trained.setup("fit")
    trained.configure_model()
    trained.configure_optimizers()
    checkpoint: dict[str, Any] = {"state_dict": trained.state_dict()}
    trained.on_save_checkpoint(checkpoint)
    for start, same in ((str(files / "value"), False), (str(files / "llama"), True)):
        again: Any = make_module("valuemodelling", data, body=ModelSpec(name=start), bins=4)
        attach(again, FakeTrainer(datamodule=data, state=SimpleNamespace(fn="validate")))
        if same:
            again._bins, again._fingerprint = trained._bins, trained._fingerprint
        again.configure_model()
        before = again.policy
        again.on_load_checkpoint(checkpoint)
        assert (again.policy is before) == same
        assert torch.equal(again.scorer.bins.edges, trained._bins.edges)


@pytest.mark.parametrize("kind", ["vbon", "bond", "sft"])
def test_weights_are_loaded_into_the_parameters_that_are_there(kind: str, files: Path) -> None:
    module, _ = moved(files, kind)
    state = {name: value.clone() + 1 for name, value in module.state_dict().items()}
    held = list(module.policy.parameters())
    module.load_state_dict(state)
    assert all(a is b for a, b in zip(held, module.policy.parameters(), strict=True))
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    module.load_state_dict(state, assign=True)  # which is how Lightning loads what it has on no device yet
    assert all(value.data_ptr() == state[name].data_ptr() for name, value in module.state_dict().items())
    missing = {name: value for name, value in state.items() if name != next(iter(state))}
    with pytest.raises(ValueError, match=r"^the checkpoint does not hold this policy's weights: [\s\S]*Missing key"):
        module.load_state_dict(missing, strict=False)
