"""What a module passes on, to the letter: options, seeds, streams and steps reach what they are meant for."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.models.setting import last_state, make_valued_files
from tests.modules.fake import FakeTrainer, attach
from tests.modules.offline import TEMPERATURE, table_batch, table_data
from tests.modules.setting import make_data, make_module
from vbon_lightning import ReferenceSampler, RewardModelling, TextSource
from vbon_lightning.actors import Actors
from vbon_lightning.functional import (
    bon_log_ratio,
    bonbon_gap,
    bonbon_loss,
    dpo_loss,
    normalise_advantages,
    reward_cdf,
    sampled_kl_advantages,
    sequence_log_prob,
    value_advantages,
)
from vbon_lightning.metrics import PREFIX_PLACES, ForecastSummary
from vbon_lightning.models import ModelSpec
from vbon_lightning.modules import (
    base,
    bon_distillation,
    bon_sft,
    dpo,
    policy_gradient,
    reference_sampler,
    reward_modelling,
    supervised,
    value_modelling,
)
from vbon_lightning.sampling import noise_seed, prompt_noise


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_valued_files(tmp_path_factory.mktemp("files"), temperature=TEMPERATURE)


class Spy:
    """Calls what it stands for, and keeps the arguments of each call."""

    def __init__(self, real: Callable[..., Any]) -> None:
        self.real, self.calls = real, list[tuple[tuple[Any, ...], dict[str, Any]]]()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return self.real(*args, **kwargs)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], Spy]:
    def replace(owner: Any, name: str) -> Spy:
        watched = Spy(getattr(owner, name))
        monkeypatch.setattr(owner, name, watched)
        return watched

    return replace


def moved(files: Path, kind: str, **options: Any) -> tuple[Any, Any]:
    """A module whose policy is no longer its reference, and its data."""
    data = table_data(
        files, **({"value_model": str(files / "value")} if kind in ("valuecritic", "distillation") else {})
    )
    module: Any = make_module(kind, data, **options)
    module.configure_model()
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.policy.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=noise))
    return module, data


# -- models ----------------------------------------------------------------------------------------


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


# -- what all modules do ---------------------------------------------------------------------------


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
    table = SimpleNamespace(check_ends=checked.append)
    data = SimpleNamespace(reference_table="there", table=lambda: table)
    module: Any = make_module("vbon", make_data(files))
    module.actors = SimpleNamespace(tokenizer="tokenizer", end_ids=(2,))
    attach(module, FakeTrainer(datamodule=data))
    module.check_ends()
    assert said == ["A response ends at tokenizer (2,)"]
    assert checked == [(2,)]
    for trainer in (FakeTrainer(datamodule=None), FakeTrainer(datamodule=SimpleNamespace(reference_table=None))):
        attach(module, trainer)
        module.check_ends()
    attach(module, FakeTrainer(datamodule=data))
    module.needs_reference = False
    module.check_ends()
    assert checked == [(2,)]


# -- supervised ------------------------------------------------------------------------------------


def test_each_batch_and_rank_has_its_own_dropout(files: Path, spy: Any) -> None:
    seeded = spy(supervised.torch, "manual_seed")
    module: Any = make_module("sft", make_data(files), seed=7)
    attach(module, FakeTrainer(global_rank=1))
    for number in range(3):
        module.begin_batch()
        assert seeded.calls[-1] == ((noise_seed(7, "dropout", 1, number),), {})
        assert module.batches_seen == number + 1
    assert (module.response_room, module.needs_reference, module.uses_reward) == (0, False, False)


@pytest.mark.parametrize("objective", ["classification", "preference"])
def test_rewards_are_learnt_and_counted_by_hand(objective: str, files: Path, tmp_path: Path) -> None:
    rows = [
        {"text": "ab" * (i % 3 + 1), "response": "cdefgh"[: i + 1], "worse": "hgf"[: 1 + i % 3], "label": i % 3}
        for i in range(5)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    compares = objective == "preference"
    columns = {"response_column": "response", "rejected_column": "worse"} if compares else {"label_column": "label"}
    source = TextSource(path=str(path), **columns)
    data = make_data(files, train=source, val=source, test=source)
    labels = {} if compares else {"labels": ["x", "y", "z"]}
    module = RewardModelling(data.actors, objective=objective, dropout=False, centre=0.5 if compares else 0.0, **labels)
    module.configure_model()
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.policy.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise))
    data.trainer = SimpleNamespace(lightning_module=module, world_size=1, global_rank=0)
    kind = module.batch_kind
    batch = data._collate_judged([(i, True, row) for i, row in enumerate(data._split("train", kind).rows)])

    def logits(tokens: Any, mask: Any) -> Any:
        with torch.no_grad():
            return module.policy(tokens[mask][None]).logits[0].double()

    losses, right = [], []
    for row in range(len(rows)):
        found = [logits(t, m) for t, m in zip(batch.tokens[row], batch.mask[row], strict=True)]
        if compares:
            gap = (found[0] - found[1]).item()
            middle = (found[0] + found[1]).item()
            losses.append(math.log1p(math.exp(-gap)) + 0.5 * middle**2)
            right.append(gap > 0)
        else:
            label = rows[row]["label"]
            losses.append((found[0].logsumexp(-1) - found[0][label]).item())
            right.append(int(found[0].argmax()) == label)
    assert 0 < sum(right) < len(right)
    logged = attach(module, FakeTrainer())
    loss = module.training_step(batch, 0)["loss"]
    assert loss.requires_grad
    assert loss.item() == pytest.approx(sum(losses) / 5, rel=1e-4)
    assert logged == {
        "train/loss": (pytest.approx(sum(losses) / 5, rel=1e-4), {"prog_bar": True}),
        "train/accuracy": (pytest.approx(sum(right) / 5), {"prog_bar": True}),
    }
    # Rows that pad a rank's share are no part of what is counted.
    module._start_counting()
    module.count(batch._replace(valid=torch.tensor([True, True, True, False, False])))
    module.count(batch._replace(valid=torch.tensor([False, False, False, True, False])))
    counted = {name: value.item() for name, value in module.counted().items()}
    assert counted == {
        "loss": pytest.approx(sum(losses[:4]) / 4, rel=1e-4),
        "accuracy": pytest.approx(sum(right[:4]) / 4),
    }


# -- policy gradients ------------------------------------------------------------------------------


class StubActors:
    """Stands for the models: says what it was asked for."""

    sampler_mismatch = None
    reward = None
    policy = None

    def rollout(self, batch: Any, **options: Any) -> Any:
        return ("rollout", batch, options)

    def scored_responses(self, batch: Any, **options: Any) -> Any:
        return ("responses", batch, options)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_what_is_sampled_to_evaluate(stage: str, files: Path) -> None:
    data = make_data(files, reference_table=str(files / "table"))
    online: Any = make_module("vbon", data, seed=7, eval_samples=3, reference_samples=16)
    offline: Any = make_module("bonsft", data, seed=7, eval_samples=3)
    common = {"num_samples": 3, "seed": 7, "stream": stage, "step": 0}
    for module, options in ((online, {**common, "reference_samples": 16}), (offline, common)):
        module.actors = StubActors()
        step = module.validation_step if stage == "val" else module.test_step
        assert step("batch", 5) == {"rollout": ("rollout", "batch", options)}


def test_what_is_sampled_to_learn_from(files: Path) -> None:
    data = make_data(files, value_model=str(files / "value"))
    for kind, options, predicts in (
        ("vbon", {"reference_samples": 16, "value_model": False}, False),
        ("valuecritic", {"prior_samples": 2.0}, True),
        ("klrl", {"value_model": False}, False),
    ):
        module: Any = make_module(kind, data, seed=7, **options)
        module.actors = StubActors()
        assert module._sample("batch", 5) == (
            "responses",
            "batch",
            {
                "num_samples": 4,
                "seed": 7,
                "stream": "train",
                "step": 5,
                "reference_samples": options.get("reference_samples", 0),
                "predict_rewards": predicts,
            },
        )


def test_advantages_are_normalised_over_all_ranks(files: Path) -> None:
    module, _ = moved(files, "klrl", kl_estimator="sampled", normalise=True)
    batch = module_batch(files)
    rollout = module.loaded.rollout(batch, num_samples=4, seed=1, stream="a", step=0)
    target, mask = module.target(rollout), rollout.completions.mask
    plain = sampled_kl_advantages(target, rollout.log_probs, rollout.reference_log_probs, mask)
    got, returns = module._advantages(target, rollout, None)
    assert returns is None
    torch.testing.assert_close(got, normalise_advantages(plain, mask))
    trainer = FakeTrainer(other=3.0)
    attach(module, trainer)
    got, _ = module._advantages(target, rollout, None)
    total, count = plain[mask].sum() + 3, mask.sum() + 3
    centred = torch.where(mask, plain - total / count, 0.0)
    spread = ((centred.square().sum() + 3) / count).sqrt()
    torch.testing.assert_close(got, centred / spread, rtol=1e-5, atol=1e-6)
    assert trainer.reductions == ["sum", "sum"]


def module_batch(files: Path) -> Any:
    return table_batch(table_data(files)).prompts


def test_advantages_of_a_value_model(files: Path, spy: Any) -> None:
    for samples, siblings in ((4, True), (1, False)):
        module, _ = moved(files, "valuecritic", samples_per_prompt=samples, value_lambda=0.5)
        rollout = module.loaded.rollout(module_batch(files), num_samples=samples, seed=1, stream="a", step=0)
        target = module.target(rollout)
        scorer = module.loaded.value
        values = scorer.log_values(
            rollout.prompts, rollout.completions, module.bin_log_weights(rollout), normalised=True
        )
        expected = value_advantages(
            target, values, rollout.token_kl, rollout.completions.mask, lam=0.5, siblings=siblings
        )
        asked = spy(policy_gradient, "value_advantages")
        got, returns = module._advantages(target, rollout, None)
        torch.testing.assert_close(got, expected)
        assert returns is None
        assert {name: asked.calls[-1][1][name] for name in ("lam", "siblings")} == {"lam": 0.5, "siblings": siblings}


@pytest.mark.parametrize("kind", ["vbon", "clipped", "ppo"])
@pytest.mark.parametrize("kl", ["rao_blackwell", "sampled"])
def test_what_a_step_of_learning_logs(kind: str, kl: str, files: Path) -> None:
    module, _ = moved(files, kind, kl_estimator=kl)
    logged = attach(module, FakeTrainer(world_size=1))
    found = module.training_step(module_batch(files), 0)
    assert set(found) == {"loss", "rollout"}
    rollout = found["rollout"]
    assert not rollout.log_probs.requires_grad
    target = module.target(rollout)
    objective = (target.score - target.kl_coef * rollout.token_kl.sum(-1)).mean().item()
    names = {
        "vbon": {"objective"},
        "clipped": {"objective", "clip_fraction", "ratio", "update_kl"},
        "ppo": {"objective", "clip_fraction", "ratio", "update_kl", "value_loss"},
    }[kind]
    assert set(logged) == {f"train/{name}" for name in names}
    assert logged["train/objective"] == (pytest.approx(objective, rel=1e-5), {"prog_bar": False})
    if kind != "vbon":
        # Nothing has been updated yet: the policy is the one that sampled.
        assert logged["train/ratio"][0] == pytest.approx(1.0, abs=1e-6)
        assert logged["train/update_kl"][0] == pytest.approx(0.0, abs=1e-6)
        assert logged["train/clip_fraction"][0] == 0.0
    if kind == "ppo":
        assert logged["train/value_loss"][0] > 0


def test_what_else_a_step_logs(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = moved(files, "clipped")
    logged = attach(module, FakeTrainer(world_size=1))
    sample = type(module)._sample

    def sampled_elsewhere(self: Any, batch: Any, number: int) -> Any:
        found = sample(self, batch, number)
        self.loaded.sampler_mismatch = 0.25
        return found

    monkeypatch.setattr(type(module), "_sample", sampled_elsewhere)
    module.loaded.reward.cut_prompts, module.loaded.reward.cut_responses = 3, 0
    batch = module_batch(files)
    module.training_step(batch, 0)
    assert logged["train/sampler_mismatch"][0] == 0.25
    assert logged["train/reward_cut_prompts"][0] == 3.0
    assert "train/reward_cut_responses" not in logged
    logged.clear()
    module.training_step(batch, 1)
    assert "train/sampler_mismatch" not in logged, "the same rollout: nothing was sampled"


def test_minibatches_come_in_an_order_of_their_own_each_pass(files: Path) -> None:
    module: Any = make_module("clipped", make_data(files), seed=7, minibatches=4, epochs_per_rollout=3)
    module._experience = ["a", "b", "c", "d"]
    order = [[module._next_minibatch(5, 4 * epoch + part) for part in range(4)] for epoch in range(3)]
    for epoch, found in enumerate(order):
        generator = torch.Generator().manual_seed(noise_seed(7, "minibatch", 5, epoch))
        assert found == [["a", "b", "c", "d"][place] for place in torch.randperm(4, generator=generator)]
    assert module.updates_per_rollout == 12


def test_every_rollout_has_its_own_number(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = moved(files, "clipped", minibatches=2, epochs_per_rollout=2)
    attach(module, FakeTrainer(world_size=1))
    numbers: list[int] = []
    sample = type(module)._sample
    monkeypatch.setattr(type(module), "_sample", lambda self, batch, n: numbers.append(n) or sample(self, batch, n))
    batch = module_batch(files)
    for number in range(9):
        module.training_step(batch, number)
    assert (numbers, module.batches_seen) == ([0, 1, 2], 9)


def test_an_update_without_a_rollout_is_an_error(files: Path) -> None:
    module, _ = moved(files, "clipped")
    attach(module, FakeTrainer(world_size=1))
    module.batches_seen = 1
    with pytest.raises(RuntimeError, match="^an update is due on a rollout that is not there$"):
        module.training_step(module_batch(files), 0)


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
        kept = [policy_gradient._from_plain(part) for part in everyone[place]]
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


# -- cached responses ------------------------------------------------------------------------------


@pytest.mark.parametrize("selection", ["weights", "groups"])
def test_what_bonsft_picks_by(selection: str, files: Path, spy: Any) -> None:
    module, data = moved(files, "bonsft", n=3, responses_per_prompt=2, selection=selection, seed=7)
    batch = table_batch(data)
    picked = spy(bon_sft, "pick_best" if selection == "weights" else "pick_groups")
    logged = attach(module, FakeTrainer())
    for step in range(2):
        assert set(module.training_step(batch, 9)) == {"loss"}
        count = {"count": 2} if selection == "weights" else {"groups": 2}
        rewards = batch.prompts.reference_rewards
        assert picked.calls[step][1] == {"n": 3, **count, "seed": 7, "stream": "pick", "step": step}
        assert torch.equal(picked.calls[step][0][0], rewards)
        assert picked.calls[step][0][1] == batch.prompts.index.tolist()
    index = picked.real(*picked.calls[-1][0], **picked.calls[-1][1])
    index = index if selection == "weights" else index.best
    assert logged["train/picked_reward"][0] == pytest.approx(rewards.gather(1, index).mean().item(), rel=1e-6)
    assert set(logged) == {"train/loss", "train/picked_reward"}
    assert module.batches_seen == 2


@pytest.mark.parametrize("loss", ["dpo", "bonbon"])
def test_what_dpo_compares(loss: str, files: Path, spy: Any) -> None:
    module, data = moved(files, "dpo", n=3, pairs_per_prompt=2, loss=loss, beta=0.3, alpha=0.2, seed=7)
    batch = table_batch(data)
    rewards = batch.prompts.reference_rewards.clone()
    rewards[0] = 1.0  # a prompt whose pairs all tie
    batch = batch._replace(prompts=batch.prompts._replace(reference_rewards=rewards))
    picked, scored = spy(dpo, "pick_groups"), spy(dpo, "response_statistics")
    logged = attach(module, FakeTrainer())
    got = module.training_step(batch, 0)["loss"]
    ((given, options),) = picked.calls
    assert options == {"n": 3, "groups": 2, "seed": 7, "stream": "pick", "step": 0}
    assert given[1] == batch.prompts.index.tolist()
    pairs = picked.real(*given, **options)
    assert scored.calls[0][1] == {"temperature": 0.7}
    found = scored.real(*scored.calls[0][0], **scored.calls[0][1])
    mask = scored.calls[0][0][3].mask
    log_probs = sequence_log_prob(found.log_probs, mask)
    ratios = log_probs - sequence_log_prob(found.reference_log_probs, mask)
    apart = rewards.gather(1, pairs.best) > rewards.gather(1, pairs.worst)
    assert not apart.all()
    if loss == "dpo":
        want = dpo_loss(ratios[:, :2], ratios[:, 2:], beta=0.3, told_apart=apart)
    else:
        goal = bonbon_gap(rewards, n=3).told_apart[:, None].to(ratios.dtype)
        want = bonbon_loss(log_probs[:, :2], ratios[:, :2], ratios[:, 2:], n=3, alpha=0.2, goal=goal, told_apart=apart)
    assert got.item() == pytest.approx(want.loss.item(), rel=1e-5)
    assert got.dtype == torch.float32
    values = {name: value for name, (value, _) in logged.items()}
    assert values == {
        "train/loss": pytest.approx(want.loss.item(), rel=1e-5),
        "train/accuracy": pytest.approx(want.accuracy.item()),
        "train/margin": pytest.approx(want.margin.item(), rel=1e-5),
        "train/tied_pairs": pytest.approx((~apart).float().mean().item()),
    }


@pytest.mark.parametrize("states", ["best_of_n", "reference", "policy"])
@pytest.mark.parametrize("draws", [4, 0])
def test_what_is_distilled(states: str, draws: int, files: Path, spy: Any) -> None:
    module, data = moved(
        files, "distillation", states=states, draws=draws, top=3, seed=7, n=3.0, divergence="reverse",
        log_ratio_floor=-1.0,
    )  # fmt: skip
    batch = table_batch(data)
    given = batch.prompts if states == "policy" else batch
    distilled = spy(bon_distillation, "distil")
    noise = spy(bon_distillation, "prompt_noise")
    picked = spy(bon_distillation, "pick_weighted" if states == "best_of_n" else "pick_some")
    sampled = spy(module.loaded, "sample")
    logged = attach(module, FakeTrainer())
    loss = module.training_step(given, 0)["loss"]
    assert (module.batch_kind, module.batches_seen) == ("prompts" if states == "policy" else "responses", 1)
    ((args, options),) = distilled.calls
    policy, _, scorer, prompts, responses, log_weights, log_values, request = args
    actors = module.loaded
    assert (policy, scorer, prompts) == (actors.policy, actors.value, batch.prompts)
    assert (request.top, request.draws) == (3, draws)
    rewards = batch.prompts.reference_rewards
    cdf = scorer.log_cdf(batch.prompts, rewards)
    assert torch.equal(log_weights, scorer.bon_log_weights(cdf, n=3.0).clamp(min=-1.0))
    assert float(log_weights.min()) == -1.0
    expected = scorer.log_values(prompts, responses, log_weights, normalised=False)
    torch.testing.assert_close(log_values, expected)
    assert (options["temperature"], options["reverse"]) == (0.7, True)
    uniforms = options["uniforms"]
    b, g, t = responses.mask.shape
    if draws:
        assert noise.calls[-1] == (
            (prompts.index.tolist(),),
            {
                "num_samples": g,
                "length": t * draws,
                "seed": noise_seed(7, "candidates"),
                "stream": "candidates",
                "step": 0,
            },
        )
        assert tuple(uniforms.shape) == (b, g, t, draws)
    else:
        assert uniforms is None
    if states == "policy":
        assert sampled.calls == [
            ((actors.policy, prompts), {"num_samples": 3, "seed": 7, "stream": "train", "step": 0})
        ]
        assert options["ends"] is None
        assert picked.calls == []
    else:
        place = {"count": 3, "seed": 7, "stream": "pick", "step": 0}
        exact = reward_cdf(rewards.double(), rewards.double())
        ratio = bon_log_ratio(
            torch.full_like(exact.log_below, -torch.inf), exact.log_below, n=3.0, log_at_or_below=exact.log_at_or_below
        )
        if states == "best_of_n":
            assert picked.calls[0][1] == place
            torch.testing.assert_close(picked.calls[0][0][1], ratio.softmax(-1))
        else:
            assert picked.calls[0] == ((prompts.index.tolist(),), {"among": rewards.shape[1], **place})
        index = picked.real(*picked.calls[0][0], **picked.calls[0][1])
        torch.testing.assert_close(options["ends"], ratio.gather(1, index).float() + log_values[..., 0])
    result = distilled.real(*args, **options)
    assert loss.item() == pytest.approx(result.divergence.sum(-1).mean().item(), rel=1e-5)
    assert set(logged) == {"train/loss", "train/teacher_kl"}
    assert logged["train/teacher_kl"][0] == pytest.approx(result.teacher_kl.sum(-1).mean().item(), rel=1e-5)


def test_the_dial_goes_through_its_range(files: Path) -> None:
    data = table_data(files, value_model=str(files / "value"))
    module: Any = make_module("distillation", data, n=3.0, n_range=[2.0, 16.0], seed=7)
    drawn = [module.drawn_n(step) for step in range(200)]
    assert all(2.0 <= n <= 16.0 for n in drawn)
    shares = torch.tensor([math.log(n / 2) / math.log(8) for n in drawn]).sort().values
    # A sequence of the golden ratio fills the range evenly: no gap is twice the mean of 1/200.
    assert float(shares.diff().max()) < 2.1 / 200
    start = noise_seed(7, "dial") / 2**63
    assert shares.tolist() == pytest.approx(sorted((start + k * (5**0.5 - 1) / 2) % 1 for k in range(200)), abs=1e-6)
    assert module.largest_n == 16.0
    assert module.samples_needed == (16, "model.responses_per_prompt = 3 and Best-of-16")
    fixed: Any = make_module("distillation", data, n=3.5)
    assert (fixed.drawn_n(3), fixed.largest_n) == (3.5, 3.5)
    assert fixed.samples_needed == (4, "model.responses_per_prompt = 3 and Best-of-3.5")
    alone: Any = make_module("distillation", data, n=3.5, states="policy")
    assert alone.samples_needed == (4, "Best-of-3.5")
    wide: Any = make_module("distillation", data, n=20.0, n_range=[2.0, 16.0])
    assert wide.largest_n == 20.0


def test_what_a_value_model_learns_from(files: Path, spy: Any) -> None:
    data = table_data(files)
    module: Any = make_module("valuemodelling", data, body=ModelSpec(name=str(files / "llama")), seed=7)
    attach(module, FakeTrainer(datamodule=data))
    module.setup("fit")
    made = spy(value_modelling, "new_value_model")
    module.configure_model()
    ((args, options),) = made.calls
    assert args == (module.body, module._bins)
    assert options == {
        "longest": data.actors.max_new_tokens,
        "fingerprint": data.fingerprint() | {"missing_eos_penalty": 0.0},
        "seed": 7,
        "dropout": False,
    }
    module.configure_model()
    assert len(made.calls) == 1
    picked = spy(value_modelling, "pick_some")
    batch = table_batch(data)
    logged = attach(module, FakeTrainer(datamodule=data))
    loss = module.training_step(batch, 0)["loss"]
    module.training_step(batch, 1)
    for step in range(2):
        assert picked.calls[step] == (
            (batch.prompts.index.tolist(),),
            {"among": 16, "count": 3, "seed": 7, "stream": "pick", "step": step},
        )
    assert set(logged) == {"train/loss"}
    assert logged["train/loss"][1] == {"prog_bar": True}
    # Each response counts for one, whatever its length, and the loss is that of its prefixes' forecasts.
    index = picked.real(*picked.calls[0][0], **picked.calls[0][1])
    total, scorer = [], module.scorer
    rewards = batch.prompts.reference_rewards
    for row in range(4):
        for sample in index[row].tolist():
            kept = batch.responses.mask[row, sample]
            alone = batch.responses._replace(
                tokens=batch.responses.tokens[row : row + 1, sample : sample + 1, : int(kept.sum())],
                mask=kept[kept][None, None],
            )
            prompts = batch.prompts._replace(
                tokens=batch.prompts.tokens[row : row + 1], mask=batch.prompts.mask[row : row + 1]
            )
            label = int(torch.searchsorted(scorer.bins.edges, rewards[row, sample].double()))
            with torch.no_grad():
                total.append(-scorer.bin_log_probs(prompts, alone)[0, 0, :, label].mean().item())
    assert loss.item() == pytest.approx(sum(total) / len(total), rel=1e-4)


# -- reference samples -----------------------------------------------------------------------------


def test_what_a_table_is_sampled_with(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_data(files, temperature=0.7)
    module = ReferenceSampler(data.actors, samples=5, rows_per_pass=2)
    module.configure_model()
    attach(module, FakeTrainer(datamodule=SimpleNamespace(table_seed=11)))
    actors, calls = module.loaded, []
    real = actors.sampler

    def sampler(*args: Any, **options: Any) -> Any:
        calls.append((args, options))
        return real(*args, **options)

    monkeypatch.setattr(actors, "sampler", sampler)
    prompts = data.prompt_batch(data.prompts("train")[:3])
    sampled = module._sample(prompts)
    noise = prompt_noise(sampled.keys, num_samples=5, length=4, seed=11, stream="table", step=0)
    assert [int(args[3].shape[1]) for args, _ in calls] == [2, 2, 1]
    assert torch.equal(torch.cat([args[3] for args, _ in calls], 1), noise)
    for args, options in calls:
        assert args[0] is actors.policy
        assert torch.equal(args[1], prompts.tokens)
        assert torch.equal(args[2], prompts.mask)
        assert options == {"end_ids": actors.end_ids, "pad_id": actors.end_ids[0], "temperature": 0.7}
    whole = real(actors.policy, prompts.tokens, prompts.mask, noise, **calls[0][1])
    assert sampled.token_ids == actors.token_ids(whole)
    assert torch.equal(sampled.finished, whole.finished)
    torch.testing.assert_close(torch.tensor(sampled.log_probs), whole.log_probs.sum(-1))
    assert sampled.prompt_ids == [row[keep].tolist() for row, keep in zip(prompts.tokens, prompts.mask, strict=True)]
    for trainer in (FakeTrainer(datamodule=None), FakeTrainer(datamodule=SimpleNamespace())):
        attach(module, trainer)
        assert module._table_seed == 0


def test_prompts_in_groups_without_those_that_are_done(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_data(files)
    module = ReferenceSampler(data.actors, samples=4, rows_per_pass=9)
    rows = data.prompts("train")
    batch = data.prompt_batch(rows)
    batch = batch._replace(valid=torch.tensor([True] * 9 + [False]))
    monkeypatch.setattr(module, "finished_keys", lambda: {rows[2].key})
    groups = list(module._groups(batch))
    assert [group.index.tolist() for group in groups] == [[0, 1], [3, 4], [5, 6], [7, 8]]
    for group in groups:
        for place, number in enumerate(group.index.tolist()):
            assert group.tokens[place][group.mask[place]].tolist() == list(rows[number].tokens)
            assert group.text[place] == rows[number].text
        assert group.valid.all()
        assert bool(group.mask.any(0)[0]), "no wider than its longest prompt"
    module.rows_per_pass = 1
    assert [len(group.text) for group in module._groups(batch)] == [1] * 8
    monkeypatch.setattr(module, "finished_keys", lambda: {row.key for row in rows})
    assert list(module._groups(batch)) == []


def test_cached_responses_are_scored_anew(files: Path) -> None:
    data = table_data(files)
    table = data.table()
    module = ReferenceSampler(data.actors, samples=16, responses_from=str(files / "table"))
    module.configure_model()
    attach(module, FakeTrainer(datamodule=data))
    module.on_predict_start()  # 16 of the table's 16
    rows = data.prompts("train")[:3]
    prompts = data.prompt_batch(rows)
    for samples in (16, 5):
        module.samples = samples
        found = module._sample(prompts)
        keys = [row.key for row in rows]
        assert found.keys == keys
        assert found.prompt_ids == [list(row.tokens) for row in rows]
        for key, text, tokens in zip(keys, prompts.text, found.token_ids, strict=True):
            cached = table.response_tokens(key, text)
            assert tokens == [part.tolist() for part in cached.tokens.split(cached.lengths.tolist())[:samples]]
        assert torch.equal(found.finished, table.finished_matrix(keys, prompts.text)[:, :samples])
        assert found.log_probs == table.log_probs_matrix(keys, prompts.text)[:, :samples].tolist()
        assert torch.equal(found.prompts.tokens, prompts.tokens)
        assert torch.equal(found.prompts.mask, prompts.mask)
        assert found.prompts.text == prompts.text
    # A row whose text is another's is refused, whichever part of it is read.
    for name in ("response_tokens", "finished_matrix", "log_probs_matrix"):
        asked: list[Any] = []
        real = getattr(table, name)
        stub = SimpleNamespace(
            response_tokens=table.response_tokens,
            finished_matrix=table.finished_matrix,
            log_probs_matrix=table.log_probs_matrix,
        )
        setattr(stub, name, lambda *given, real=real, asked=asked: asked.append(given) or real(*given))
        module._source = stub  # type: ignore[assignment]
        module._sample(prompts)
        texts = [text for _, text in asked] if name == "response_tokens" else asked[0][1]
        assert list(texts) == list(prompts.text)
    module.samples = 17
    with pytest.raises(ValueError, match=r"has 16 responses a prompt, fewer than model\.samples=17: lower"):
        module._open_source(str(files / "table"))
    other = ReferenceSampler(make_data(files, temperature=0.5).actors, samples=4)
    attach(other, FakeTrainer(datamodule=make_data(files, temperature=0.5)))
    with pytest.raises(ValueError, match="temperature: the table has 0.7, this run has 0.5"):
        other._open_source(str(files / "table"))
    trainer = FakeTrainer()
    del trainer.datamodule
    attach(other, trainer)
    assert other._open_source(str(files / "table")).samples == 16


def test_a_table_is_never_resumed_by_checkpoint(files: Path) -> None:
    module = ReferenceSampler(make_data(files).actors)
    with pytest.raises(ValueError, match="^`vbon predict` samples from data.reference and takes no --ckpt_path$"):
        module.on_load_checkpoint({})


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


def test_a_critics_values_and_returns_are_in_the_checkpoint(files: Path) -> None:
    module, _ = moved(files, "ppo")
    torch.nn.init.normal_(module.critic.weight, generator=torch.Generator().manual_seed(0))
    attach(module, FakeTrainer(world_size=1, gradient_clip_val=None, precision="32-true"))
    module.training_step(module_batch(files), 0)
    checkpoint: dict[str, Any] = {"state_dict": {}}
    module.on_save_checkpoint(checkpoint)
    (mine,) = checkpoint["vbon_lightning"]["experience"]
    for ours, theirs in zip(map(policy_gradient._from_plain, mine), module._experience, strict=True):
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
    module.batches_seen = 4
    state = {"policy.a": 1, "value.b": 2}
    checkpoint: dict[str, Any] = {"state_dict": dict(state), "current_model_state": dict(state)}
    torch.manual_seed(3)
    module.on_save_checkpoint(checkpoint)
    kept = checkpoint["vbon_lightning"]
    assert set(kept) == {
        "module", "models", "trainer", "optimizer", "batches_seen", "random_state"
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
    assert kept["batches_seen"] == 4
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
    module.batches_seen = 4
    torch.manual_seed(3)
    checkpoint: dict[str, Any] = {"state_dict": {}, "optimizer_states": []}
    module.on_save_checkpoint(checkpoint)
    fresh, _ = moved(files, "vbon")
    with pytest.raises(ValueError, match=r"^this checkpoint was not written by vbon_lightning: it cannot be loaded$"):
        fresh.on_load_checkpoint({})
    torch.manual_seed(9)
    before = torch.get_rng_state()
    fresh.on_load_checkpoint(checkpoint)  # outside of a fit nothing is resumed
    attach(fresh, FakeTrainer(**{**fitting, "state": SimpleNamespace(fn=TrainerFn.VALIDATING)}))
    fresh.on_load_checkpoint(checkpoint)
    assert fresh.batches_seen == 0
    assert torch.equal(torch.get_rng_state(), before)
    attach(fresh, FakeTrainer(**fitting))
    assert fresh.resuming
    with pytest.raises(ValueError, match="^this checkpoint has weights only"):
        fresh.on_load_checkpoint({key: value for key, value in checkpoint.items() if key != "optimizer_states"})
    fresh.on_load_checkpoint(checkpoint)
    assert fresh.batches_seen == 4
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


# -- odds and ends ---------------------------------------------------------------------------------


def test_what_goes_into_a_checkpoint_carries_no_graph() -> None:
    learnt = torch.ones(2, requires_grad=True)
    for value in (learnt, {"a": learnt}):
        found = policy_gradient._to_plain(value)
        kept = found["a"] if isinstance(found, dict) else found
        assert not kept.requires_grad
        assert torch.equal(kept, learnt)


def test_scoring_elsewhere_has_the_modes_of_here() -> None:
    def modes(_: Any) -> Any:
        return torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    cpu = torch.device("cpu")
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.float16):
        there = reference_sampler._as_here(modes, cpu)
    plain = reference_sampler._as_here(modes, cpu)
    assert there(None) == (True, True, torch.float16)  # type: ignore[arg-type]
    assert plain(None)[:2] == (False, False)  # type: ignore[arg-type]


def test_places_that_one_prefix_was_seen_at_are_counted(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = make_module("valuemodelling", table_data(files), body=ModelSpec(name=str(files / "llama")))
    places = len(PREFIX_PLACES)
    numbers = torch.arange(1.0, places + 1)
    prefixes = torch.zeros(places)
    summary = ForecastSummary(nll=numbers, crps=10 * numbers, calibration_error=100 * numbers, prefixes=prefixes)
    monkeypatch.setattr(module.forecast, "compute", lambda: summary)
    assert module.counted() == {}
    prefixes[1], prefixes[2] = 1, 5
    found = {name: value.item() for name, value in module.counted().items()}
    expected = {"loss": 2.5}
    for number in (1, 2):
        for scale, name in ((1, "nll"), (10, "crps"), (100, "calibration_error")):
            expected[f"{name}/{PREFIX_PLACES[number]}"] = scale * (number + 1.0)
    assert found == expected


# -- before training -------------------------------------------------------------------------------


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


@pytest.mark.parametrize("probe", [4096, 40])
def test_what_a_new_head_is_fitted_to(probe: int, files: Path, spy: Any) -> None:
    data = table_data(files)
    body = ModelSpec(name=str(files / "llama"))
    module: Any = make_module("valuemodelling", data, body=body, probe=probe)
    broadcast: list[Any] = []
    trainer = FakeTrainer(datamodule=data)
    trainer.strategy.broadcast = lambda found: broadcast.append(found) or found
    attach(module, trainer)
    module.setup("fit")
    module.configure_model()
    fitted = spy(value_modelling, "forecast_head")
    module._start_head()
    (((features, rewards, bins), options),) = fitted.calls
    assert bins is module._bins
    prompts = data.prompts("train")
    step = max(1, len(prompts) * 16 // probe)
    assert step == (1 if probe > 1000 else 4)
    table, expected = data.table(), []
    for prompt in prompts[::step]:
        row = table.row(prompt.key, prompt.text)
        for tokens, reward in zip(row.response_tokens, row.rewards, strict=True):
            for length in range(len(tokens) + 1):
                state = last_state(module.policy.body, [*prompt.tokens, *tokens[:length]])
                expected.append((state, reward, length == len(tokens)))
    assert len(features) == len(rewards) == len(options["fit"]) == len(expected)
    torch.testing.assert_close(features, torch.stack([state for state, _, _ in expected]), rtol=1e-4, atol=1e-5)
    assert rewards.tolist() == pytest.approx([reward for _, reward, _ in expected])
    assert options["fit"].tolist() == [whole for _, _, whole in expected]
    weight, bias = broadcast[0]
    torch.testing.assert_close(module.policy.head.weight.double(), weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(module.policy.head.bias.double(), bias, rtol=1e-6, atol=1e-6)
    assert module.policy.training


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


# -- scoring beside sampling -----------------------------------------------------------------------


def test_scoring_that_hangs_holds_nobody_up(files: Path) -> None:
    module = ReferenceSampler(make_data(files).actors)
    release, begun = threading.Event(), threading.Event()
    module._scorer = ThreadPoolExecutor(1)
    running = module._scorer.submit(lambda: begun.set() or release.wait(30))
    waiting = module._scorer.submit(lambda: None)
    assert begun.wait(30)
    started = time.monotonic()
    module._stop_scoring()
    assert time.monotonic() - started < 10
    assert waiting.cancelled()
    assert (module._scorer, module._pending) == (None, None)
    release.set()
    assert running.result(30)


def test_responses_are_decoded_behind_their_prompts(files: Path, spy: Any) -> None:
    data = make_data(files)
    module = ReferenceSampler(data.actors, samples=3)
    module.configure_model()
    attach(module, FakeTrainer(datamodule=data))
    prompts = data.prompt_batch(data.prompts("train")[:2])
    sampled = module._sample(prompts)
    assert torch.equal(sampled.prompts.mask, prompts.mask)
    decoded, scored = spy(module.loaded, "decode"), spy(module.loaded, "score")
    rows = module._score(sampled)
    assert decoded.calls == [((sampled.token_ids, sampled.prompts), {})]
    assert [row.key for row in rows] == sampled.keys
    (given, texts, ids, finished), _ = scored.calls[0]
    assert (given, texts, ids) == (sampled.prompts, [row.responses for row in rows], sampled.token_ids)
    assert torch.equal(finished, sampled.finished)
    assert [list(row.finished) for row in rows] == sampled.finished.tolist()


def test_weights_are_loaded_into_the_parameters_that_are_there(files: Path) -> None:
    module, _ = moved(files, "vbon")
    state = {name: value.clone() + 1 for name, value in module.state_dict().items()}
    held = list(module.policy.parameters())
    module.load_state_dict(state)
    assert all(a is b for a, b in zip(held, module.policy.parameters(), strict=True))
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    missing = {name: value for name, value in state.items() if name != next(iter(state))}
    with pytest.raises(ValueError, match=r"^the checkpoint does not hold this policy's weights: [\s\S]*Missing key"):
        module.load_state_dict(missing, strict=False)


def test_two_texts_of_one_score_are_not_told_apart(files: Path) -> None:
    module = RewardModelling(make_data(files).actors, objective="preference")
    batch: Any = SimpleNamespace(labels=None)
    scores = torch.tensor([[[1.0], [1.0]], [[2.0], [1.0]], [[1.0], [2.0]]])
    assert module._right(scores, batch).tolist() == [False, True, False]


def test_a_tables_rewards_say_what_the_bins_are_worth(files: Path, spy: Any) -> None:
    module, _ = moved(files, "valuecritic")
    rollout = module.loaded.rollout(module_batch(files), num_samples=4, seed=1, stream="a", step=0)
    asked = spy(module.loaded.value, "log_cdf")
    module.bin_log_weights(rollout)
    assert asked.calls == [((rollout.prompts, rollout.reference_rewards), {})]
