"""Modules whose anchor moves: when it does, what is compared with it and what is not, and what a checkpoint keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging

from tests.helpers import readable, save_tiny_model
from tests.models.setting import make_valued_files
from tests.modules.fake import FakeTrainer, attach
from tests.modules.setting import (
    ALPHABET,
    make_data,
    make_module,
    make_trainer,
    prepared,
    weights,
)
from vbon_lightning.callbacks import PolicyExport
from vbon_lightning.models import ModelSpec, load_causal_lm
from vbon_lightning.modules.anchored import Anchored
from vbon_lightning.types import Rollout

MOVING = ("bond", "jbond", "wind")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_valued_files(tmp_path_factory.mktemp("files"))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


class Watch(Callback):
    """Keep policy and anchor after each batch."""

    def __init__(self) -> None:
        self.updates: list[int] = []
        self.policy: list[torch.Tensor] = []
        self.anchor: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.updates.append(trainer.global_step)
        for kept, model in ((self.policy, pl_module.policy), (self.anchor, pl_module.anchor)):
            kept.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))


def watched(kind: str, files: Path, directory: Path, steps: int, trainer: dict[str, Any], **options: Any) -> Watch:
    watch, data = Watch(), make_data(files, val=None, batch_size=2)
    module: Any = make_module(kind, data, **({"optimizer": sgd, "lr_scheduler": None} | options))
    module.configure_model()
    watch.start = torch.cat([p.detach().flatten().clone() for p in module.anchor.parameters()])  # type: ignore[attr-defined]
    make_trainer(directory, steps=steps, callbacks=[watch], enable_checkpointing=False, **trainer).fit(module, data)
    assert module.updates == steps
    return watch


def test_it_is_replaced_every_k_updates_and_no_batch(files: Path, tmp_path: Path) -> None:
    watch: Any = watched("bond", files, tmp_path, 5, {"accumulate_grad_batches": 2}, anchor_every=2)
    assert watch.updates == [0, 1, 1, 2, 3, 3, 4, 4, 5], "five batches are an epoch, whose last makes an update alone"
    expected = watch.start
    for batch, anchor in enumerate(watch.anchor):
        if batch in (3, 6):
            expected = watch.policy[batch]
        assert torch.equal(anchor, expected)
    assert not torch.equal(watch.policy[3], watch.policy[6])


def test_it_is_averaged_at_every_update(files: Path, tmp_path: Path) -> None:
    several = {"accumulate_grad_batches": 2}
    watch: Any = watched("jbond", files, tmp_path, 3, several, anchor_rate=0.25, samples_per_prompt=2)
    expected = watch.start
    for batch, anchor in enumerate(watch.anchor):
        if watch.updates[batch] > (watch.updates[batch - 1] if batch else 0):
            expected = 0.75 * expected + 0.25 * watch.policy[batch]
        torch.testing.assert_close(anchor, expected)
    assert (watch.anchor[-1] - watch.start).abs().max() > 1e-3


@pytest.mark.parametrize("kind", MOVING)
def test_training_compares_with_it_and_evaluation_with_the_reference(kind: str, files: Path) -> None:
    data = make_data(files, val=None)
    module = prepared(kind, data)
    with torch.no_grad():
        for index, parameter in enumerate(module.anchor.parameters()):
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9 + index))
    batch = data._collate_prompts([(i, True, row) for i, row in enumerate(data.prompts("train")[:3])])
    actors = module.loaded
    seen: dict[str, Rollout] = {}
    module.log_dict = lambda values, **_: None
    trained: Any = module.training_step(batch, 0)
    seen["train"] = module.last_rollout
    seen["val"] = module._evaluate(batch, "val")
    with torch.no_grad():
        for stage, rollout in seen.items():
            anchored = stage == "train" and kind != "wind"  # which regularises by the reference, in training too
            expected, _ = actors.statistics(rollout, anchored=anchored)
            other, _ = actors.statistics(rollout, anchored=not anchored)
            torch.testing.assert_close(rollout.token_kl, expected.token_kl)
            assert (expected.token_kl - other.token_kl).abs().max() > 1e-2
            torch.testing.assert_close(rollout.reference_log_probs, expected.reference_log_probs)
    assert trained["loss"].requires_grad
    # Whose responses are the reference's in training, and whose in evaluation.
    how = {"seed": 0, "step": 0, "num_samples": module.reference_samples}
    ours = actors.reference_rewards(batch, stream="train/reference", anchored=True, **how)
    theirs = actors.reference_rewards(batch, stream="val/reference", **how)
    assert torch.equal(seen["val"].reference_rewards, theirs)  # type: ignore[arg-type]
    if kind != "wind":
        assert torch.equal(seen["train"].reference_rewards, ours)  # type: ignore[arg-type]
    assert not torch.equal(ours, actors.reference_rewards(batch, stream="train/reference", **how))


def test_a_tables_rewards_are_not_the_anchors(files: Path) -> None:
    data = make_data(files, reference_table=str(files / "table"))
    batch = data.table_batch(data.prompts("train")[:4]).prompts
    assert batch.reference_rewards is not None
    moving, still = (make_module("klrl", data, anchor_rate=rate) for rate in (0.1, 0.0))
    assert moving.of_the_anchor(batch).reference_rewards is None  # type: ignore[operator]
    assert still.of_the_anchor(batch) is batch  # type: ignore[operator]


@pytest.mark.parametrize("kind", MOVING)
def test_its_weights_are_in_checkpoints_and_in_no_optimizer(kind: str, files: Path) -> None:
    module = prepared(kind, make_data(files))
    policy = {name for name in module.state_dict() if name.startswith("policy.")}
    anchor = {name for name in module.state_dict() if name.startswith("anchor.")}
    assert {name.removeprefix("anchor.") for name in anchor} == {name.removeprefix("policy.") for name in policy}
    optimizer = module.configure_optimizers()["optimizer"]
    learnt = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert learnt == {id(parameter) for parameter in module.policy.parameters()}


def test_the_frozen_reference_is_the_simplest_case(files: Path) -> None:
    data = make_data(files, val=None)
    still = prepared("bond", data, anchor_every=0, divergence="backward")
    plain = prepared("vbon", data, n=2)
    assert still.anchor is None
    assert still.state_dict().keys() == plain.state_dict().keys()
    batch = data._collate_prompts([(i, True, row) for i, row in enumerate(data.prompts("train")[:3])])
    losses = [module._on_policy_update(module._sample(batch, 0))[0] for module in (still, plain)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("kind", ["bond", "jbond"])
def test_a_checkpoint_of_adapters_holds_two_sets_of_them(kind: str, files: Path, tmp_path: Path) -> None:
    spec = ModelSpec(str(files / "llama"), lora={"r": 2, "lora_alpha": 8})
    data = make_data(files, policy=spec, val=None)
    module: Any = make_module(kind, data)
    make_trainer(tmp_path, steps=3).fit(module, data)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    names = {name.split(".", 1)[1] for name in checkpoint["state_dict"]}
    assert all("lora_" in name for name in names)
    assert len(checkpoint["state_dict"]) == 2 * len(names)
    assert checkpoint["vbon_lightning"]["updates"] == 3
    again: Any = make_module(kind, make_data(files, policy=spec, val=None))
    again.load_state_dict(checkpoint["state_dict"])
    trained = weights(module)
    assert all(torch.equal(value, trained[name]) for name, value in again.state_dict().items())


def test_a_checkpoint_may_be_evaluated_without_its_anchor_and_one_without_with_it(files: Path, tmp_path: Path) -> None:
    data = make_data(files)
    for kind, other in (("bond", {"anchor_every": 0}), ("vbon", {"anchor_rate": 0.1})):
        module: Any = make_module(kind, data)
        make_trainer(tmp_path / kind, steps=2).fit(module, data)
        again: Any = make_module(kind, data, **other)
        make_trainer(tmp_path / "other").validate(again, data, ckpt_path=tmp_path / kind / "last.ckpt", verbose=False)
        for name, value in module.policy.state_dict().items():
            assert torch.equal(again.policy.state_dict()[name], value)


@pytest.mark.parametrize("policy", ["lora", "tilted", "averaged"])
def test_what_is_exported_is_the_policy(policy: str, files: Path, tmp_path: Path) -> None:
    options = {"lora": {"lora": {"r": 2}}, "tilted": {"tilt": str(files / "value")}, "averaged": {}}[policy]
    data = make_data(files, policy=ModelSpec(str(files / "llama"), **options), val=None)  # type: ignore[arg-type]
    module: Any = make_module("bond", data)
    more = [EMAWeightAveraging(decay=0.5)] if policy == "averaged" else []  # Lightning's, of all that the module holds
    callbacks = [*more, PolicyExport(str(tmp_path / "export"))]
    make_trainer(tmp_path, steps=3, callbacks=callbacks, enable_checkpointing=False).fit(module, data)
    exported = load_causal_lm(str(tmp_path / "export"), trainable=False)
    tokens = torch.tensor([[1, 4, 5, 6, 7]])
    with torch.no_grad():
        ours, anchor, theirs = (model(input_ids=tokens).logits for model in (module.policy, module.anchor, exported))
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    assert (anchor - ours).abs().max() > 1e-4


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], str]] = [
    ("klrl", {"anchor_every": -1}, {}, {}, "model.anchor_every must be an integer >= 0, got -1"),
    ("klrl", {"anchor_every": 2.0}, {}, {}, "model.anchor_every must be an integer >= 0, got 2.0"),
    ("klrl", {"anchor_rate": 1.5}, {}, {}, "model.anchor_rate must be in .0, 1., got 1.5"),
    (
        "klrl",
        {"anchor_rate": 0.5, "anchor_every": 2},
        {},
        {},
        "model.anchor_every=2 replaces the anchor and model.anchor_rate=0.5 av",
    ),
    (
        "jbond",
        {"anchor_every": 10},
        {},
        {},
        "model.anchor_rate=0.3 averages it, .* set model.anchor_rate to 0 to repl",
    ),
    ("bond", {"anchor_rate": 0.02}, {}, {}, "model.anchor_every=.* or model.anchor_every to 0 to average it"),
    (
        "vbon",
        {"anchor_rate": 0.1, "reference_samples": 0},
        {"reference_table": "table"},
        {},
        r"^model\.anchor_rate moves the anchor away",
    ),
    (
        "vbon",
        {"anchor_every": 3, "reference_samples": 0},
        {"reference_table": "table"},
        {},
        r"^model\.anchor_every moves the anchor away",
    ),
    (
        "klrl",
        {"anchor_every": 3, "value_model": True},
        {"value_model": "value"},
        {},
        r"a value model knows the rewards.* or model\.anchor_every to 0$",
    ),
    ("clipped", {"anchor_every": 6}, {}, {}, "must not move amid the 4 updates of a rollout: set model.anchor_every"),
    ("ppo", {"anchor_rate": 0.5}, {}, {}, "must not move amid the 4 updates of a rollout"),
    ("ppo", {"anchor_rate": 0.5, "minibatches": 1}, {}, {}, "must not move amid the 2 updates of a rollout"),
    ("klrl", {"anchor_rate": 0.5}, {}, {"precision": "bf16-true"}, "rounds an average away that moves by 0.5 a step"),
    ("klrl", {"anchor_rate": 0.5}, {}, {"precision": "16-true"}, "rounds an average away that moves by 0.5 a step"),
]


@pytest.mark.parametrize(("kind", "model", "data", "trainer", "message"), REFUSED, ids=readable)
def test_what_does_not_go_together_is_refused(
    kind: str,
    model: dict[str, Any],
    data: dict[str, Any],
    trainer: dict[str, Any],
    message: str,
    files: Path,
    tmp_path: Path,
) -> None:
    brought = make_data(files, val=None, **{name: str(files / value) for name, value in data.items()})
    run = make_trainer(tmp_path, steps=1, **trainer)
    with pytest.raises(ValueError, match=message):
        run.fit(make_module(kind, brought, **model), brought)


def test_half_precision_weights_are_not_averaged(files: Path) -> None:
    data = make_data(files, policy=ModelSpec(str(files / "llama"), dtype="bfloat16"))
    with pytest.raises(ValueError, match=r"weights of torch.bfloat16 round an average away that moves by 0.5 a step"):
        make_module("klrl", data, anchor_rate=0.5).configure_model()
    make_module("klrl", data, anchor_every=2).configure_model()


def test_a_value_model_that_is_named_is_left_alone(files: Path) -> None:
    data = make_data(files, value_model=str(files / "value"))
    assert make_module("klrl", data).uses_value_model  # type: ignore[attr-defined]
    assert not make_module("klrl", data, anchor_every=2).uses_value_model  # type: ignore[attr-defined]


def test_several_updates_a_rollout_may_end_a_stage(files: Path, tmp_path: Path) -> None:
    data = make_data(files, val=None)
    module: Any = make_module("clipped", data, anchor_every=4)
    make_trainer(tmp_path, steps=5).fit(module, data)
    assert module.updates == 5


def test_a_reference_of_its_own_may_be_followed(files: Path, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", alphabet=ALPHABET, seed=8)
    module: Any = make_module("bond", make_data(files, reference=other))
    module.configure_model()
    for ours, theirs in zip(module.anchor.parameters(), module.actors.reference.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours is not theirs


def test_what_says_nothing_of_its_rollouts_makes_one_update_on_each(files: Path) -> None:
    """A method of one's own: its anchor may then follow at every update."""
    module = Anchored(make_data(files).actors, anchor_rate=0.5)
    attach(module, FakeTrainer(precision="32-true"))
    module.setup("fit")


def test_a_method_of_ones_own_has_an_anchor_only_where_it_asks_for_one(files: Path) -> None:
    actors = make_data(files).actors
    module = Anchored(actors)
    assert (module.anchor_every, module.anchor_rate, module.anchor_moves, module.seed) == (0, 0.0, False, 0)
    assert Anchored(actors, anchor_rate=1).anchor_moves, "at a rate of 1 it is the policy"
