"""Policy gradients: what is sampled, what advantages are made of, what is logged."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.modules.fake import FakeTrainer, attach
from tests.modules.setting import make_data, make_module, make_trainer
from tests.modules.wiring.setting import Spy, module_batch, moved
from vbon_lightning.functional import (
    Target,
    generalized_advantage_estimation,
    normalise_advantages,
    sampled_kl_advantages,
    value_advantages,
)
from vbon_lightning.modules import policy_gradient
from vbon_lightning.modules.policy_gradient import PolicyGradient
from vbon_lightning.sampling import noise_seed


class StubActors:
    """Stands for the models: says what it was asked for."""

    sampler_mismatch = None
    reward = None
    policy = None

    def rollout(self, batch: Any, **options: Any) -> Any:
        return ("rollout", batch, options)

    def scored_responses(self, batch: Any, **options: Any) -> Any:
        return ("responses", batch, options)


def test_what_is_sampled_to_learn_from(files: Path) -> None:
    data = make_data(files, value_model=str(files / "value"))
    for kind, options, predicts in (
        ("vbon", {"reference_samples": 16, "value_model": False}, False),
        ("valuecritic", {"prior_samples": 2.0}, True),
        ("klrl", {"value_model": False}, False),
    ):
        module: Any = make_module(kind, data, seed=7, **options)
        module.actors = StubActors()
        batch = SimpleNamespace(text=["a", "b"])
        assert module._sample(batch, 5) == (
            "responses",
            batch,
            {
                "num_samples": 4,
                "seed": 7,
                "stream": "train",
                "step": 5,
                "reference_samples": options.get("reference_samples", 0),
                "predict_rewards": predicts,
                "anchored": False,
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


def test_advantages_of_a_value_model(files: Path, spy: Any) -> None:
    for samples, siblings in ((4, True), (2, True), (1, False)):
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


@pytest.mark.parametrize(
    ("kind", "options", "name"),
    [
        (
            "grpo",
            {"kl_estimator": "rao_blackwell", "scale_rewards": False, "length_norm": "dr_grpo", "minibatches": 1},
            "penalised_score",
        ),
        ("pfppo", {}, "penalised_score"),
        ("klrl", {"kl_estimator": "k3"}, "penalised_score"),
        ("klrl", {"kl_estimator": "sampled", "normalise": True}, "penalised_score"),
        ("klrl", {"kl_estimator": "sampled"}, "objective"),
        ("rloo", {}, "objective"),
        ("maxatk", {}, "objective"),
    ],
)
def test_what_is_not_maximised_is_not_called_the_objective(
    kind: str, options: dict[str, Any], name: str, files: Path
) -> None:
    module, _ = moved(files, kind, **options)
    logged = attach(module, FakeTrainer(world_size=1))
    module.training_step(module_batch(files), 0)
    assert {"train/objective", "train/penalised_score"} & set(logged) == {f"train/{name}"}


@pytest.mark.parametrize("kind", ["vbon", "clipped", "ppo"])
@pytest.mark.parametrize("kl", ["rao_blackwell", "sampled"])
def test_what_a_step_of_learning_logs(kind: str, kl: str, files: Path) -> None:
    module, _ = moved(files, kind, kl_estimator=kl)
    logged = attach(module, FakeTrainer(world_size=1))
    found = module.training_step(module_batch(files), 0)
    assert set(found) == {"loss", "rollout"}
    rollout = found["rollout"]
    assert not rollout.log_probs.requires_grad
    assert not rollout.token_kl.requires_grad
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
    assert not hasattr(module.loaded.reward, "cut_elsewhere")
    batch = module_batch(files)
    module.training_step(batch, 0)
    assert logged["train/sampler_mismatch"][0] == 0.25
    assert logged["train/reward_cut_prompts"][0] == 3.0
    assert "train/reward_cut_responses" not in logged
    logged.clear()
    module.training_step(batch, 1)
    assert "train/sampler_mismatch" not in logged, "the same rollout: nothing was sampled"
    module.loaded.reward.cut_responses = 2
    module.training_step(batch, 2)
    assert logged["train/reward_cut_responses"][0] == 2.0


def test_minibatches_come_in_an_order_of_their_own_each_pass(files: Path) -> None:
    module: Any = make_module("clipped", make_data(files), seed=7, minibatches=4, epochs_per_rollout=3)
    module._experience = ["a", "b", "c", "d"]
    order = [[module._next_minibatch(5, 4 * epoch + part) for part in range(4)] for epoch in range(3)]
    for epoch, found in enumerate(order):
        generator = torch.Generator().manual_seed(noise_seed(7, "minibatch", 5, epoch))
        assert found == [["a", "b", "c", "d"][place] for place in torch.randperm(4, generator=generator)]
    assert module.updates_per_rollout == 12


def test_the_number_of_a_rollout_is_that_of_all_updates_on_it(files: Path) -> None:
    module, _ = moved(files, "clipped", minibatches=2, epochs_per_rollout=1)
    numbers = []
    for module.batches_seen in range(6):  # before the first, and after each, of which a step has counted its own
        numbers.append(module.rollout_number)
    assert numbers == [0, 0, 0, 1, 1, 2] and all(isinstance(number, int) for number in numbers)


def test_how_many_responses_a_prompt_must_keep(files: Path) -> None:
    data = make_data(files)
    for kind, options, fewest in (
        ("klrl", {}, 2),
        ("klrl", {"samples_per_prompt": 2}, 2),
        ("ppo", {}, 1),
        ("jbond", {}, 1),  # the rest of the batch is its baseline
        ("jbond", {"samples_per_prompt": 2}, 2),
    ):
        assert make_module(kind, data, **options).fewest_judged == fewest, (kind, options)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("minibatches", "epochs"), [(2, 2), (2, 1), (1, 2)])
def test_every_rollout_has_its_own_number(
    minibatches: int, epochs: int, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _ = moved(files, "clipped", minibatches=minibatches, epochs_per_rollout=epochs)
    attach(module, FakeTrainer(world_size=1))
    numbers: list[int] = []
    sample = type(module)._sample
    monkeypatch.setattr(type(module), "_sample", lambda self, batch, n: numbers.append(n) or sample(self, batch, n))
    chosen = Spy(module._next_minibatch)
    monkeypatch.setattr(module, "_next_minibatch", chosen)
    batch, updates = module_batch(files), minibatches * epochs
    for number in range(2 * updates + 1):
        module.training_step(batch, number)
    assert (numbers, module.batches_seen) == ([0, 1, 2], 2 * updates + 1)
    assert [given for given, _ in chosen.calls] == [divmod(number, updates) for number in range(2 * updates + 1)]


def test_a_critic_learns_from_one_update_a_rollout_too(files: Path) -> None:
    module, _ = moved(files, "ppo", minibatches=1, epochs_per_rollout=1, value_coef=0.5)
    torch.nn.init.normal_(module.critic.weight, generator=torch.Generator().manual_seed(0))
    logged = attach(module, FakeTrainer(world_size=1))
    loss = module.training_step(module_batch(files), 0)["loss"]
    assert logged["train/value_loss"][0] > 0
    loss.backward()
    assert module.critic.weight.grad.abs().max() > 0


def test_an_update_without_a_rollout_is_an_error(files: Path) -> None:
    module, _ = moved(files, "clipped")
    attach(module, FakeTrainer(world_size=1))
    module.batches_seen = 1
    with pytest.raises(RuntimeError, match="^an update is due on a rollout that is not there$"):
        module.training_step(module_batch(files), 0)


def test_a_tables_rewards_say_what_the_bins_are_worth(files: Path, spy: Any) -> None:
    module, _ = moved(files, "valuecritic")
    rollout = module.loaded.rollout(module_batch(files), num_samples=4, seed=1, stream="a", step=0)
    asked = spy(module.loaded.value, "log_cdf")
    module.bin_log_weights(rollout)
    assert asked.calls == [((rollout.prompts, rollout.reference_rewards), {})]


@pytest.mark.parametrize("kl", ["rao_blackwell", "sampled"])
def test_what_a_critics_advantages_are_made_of(kl: str, files: Path) -> None:
    module, _ = moved(files, "ppo", kl_estimator=kl, gae_lambda=0.5)
    rollout = module.loaded.rollout(module_batch(files), num_samples=4, seed=1, stream="a", step=0)
    target, mask = module.target(rollout), rollout.completions.mask
    values = torch.where(mask, torch.randn(mask.shape, generator=torch.Generator().manual_seed(0)), 0.0)
    got, returns = module._advantages(target, rollout, values)
    rewards = torch.zeros(mask.shape)
    for row, sample in ((row, sample) for row in range(4) for sample in range(4)):
        length = int(mask[row, sample].sum())
        for place in range(length):
            # As it is sampled a token pays for itself; exactly, for the one that comes after it.
            paid = (rollout.log_probs - rollout.reference_log_probs)[row, sample, place]
            if kl != "sampled":
                paid = rollout.token_kl[row, sample, place + 1] if place + 1 < length else torch.zeros(())
            rewards[row, sample, place] = -target.kl_coef * paid
        rewards[row, sample, length - 1] += target.score[row, sample]
    expected = generalized_advantage_estimation(rewards, values, mask, lam=0.5)
    torch.testing.assert_close(got, expected.advantages, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(returns, expected.returns, rtol=1e-5, atol=1e-5)


class Own(PolicyGradient):
    """A method as somebody else might write it."""

    def __init__(self, actors: Any, *, said: Any = None, recorded: bool = True, **kwargs: Any) -> None:
        super().__init__(actors, **{"samples_per_prompt": 4, **kwargs})
        self.said = said
        if recorded:
            self.record_settings()

    def target(self, rollout: Any) -> Any:
        return self.said(rollout.rewards) if callable(self.said) else Target(rollout.rewards, 0.1)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (lambda rewards: rewards, r"^Own\.target must return Target\(score, kl_coef\), got Tensor$"),
        (lambda rewards: Target(rewards, -0.1), r"^Own\.target must give its kl_coef as a number >= 0, .*, got -0\.1$"),
        (lambda rewards: Target(rewards, float("nan")), r"^Own\.target must give its kl_coef .*, got nan$"),
        (lambda rewards: Target(rewards, float("inf")), r"^Own\.target must give its kl_coef .*, got inf$"),
        (lambda rewards: Target(rewards, True), r"^Own\.target must give its kl_coef .*, got True$"),
        (lambda rewards: Target(rewards, rewards), r"^Own\.target must give its kl_coef .*, got a Tensor$"),
    ],
)
def test_a_target_that_is_none_is_refused(said: Any, message: str, files: Path) -> None:
    module = Own(make_data(files).actors, said=said)
    module.configure_model()
    with pytest.raises((TypeError, ValueError), match=message):
        module._on_policy_update(module._sample(module_batch(files), 0))
    for weight in (0, 0.5):
        module.said = lambda rewards, weight=weight: Target(rewards, weight)
        module._on_policy_update(module._sample(module_batch(files), 0))


@pytest.mark.parametrize("what", ["group_advantages", "response_weights"])
def test_numbers_that_are_not_one_a_response_are_refused(
    what: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Own(make_data(files).actors)
    module.configure_model()
    monkeypatch.setattr(module, what, lambda *_: torch.ones(4))
    scored = module._sample(module_batch(files), 0)
    with pytest.raises(ValueError, match=rf"^Own\.{what} must return a number a response, \[B, G\] = .*, got \[4\]$"):
        module._on_policy_update(scored)
    monkeypatch.setattr(module, what, lambda *_: torch.ones(scored.rewards.shape))
    module._on_policy_update(scored)


def test_a_method_that_says_nothing_of_a_value_model_leaves_it_alone(files: Path) -> None:
    data = make_data(files, value_model=str(files / "value"))
    assert not Own(data.actors).uses_value_model
    with pytest.raises(ValueError, match="^Own has no use for a value model: set model.value_model to false$"):
        Own(data.actors, value_model=True)


def test_a_method_that_records_no_settings_is_refused(files: Path, tmp_path: Path) -> None:
    data = make_data(files, val=None)
    with pytest.raises(ValueError, match=r"^Own records no settings: call self\.record_settings\(\.\.\.\)"):
        make_trainer(tmp_path, steps=1).fit(Own(data.actors, recorded=False), data)
    make_trainer(tmp_path, steps=1).fit(Own(data.actors), data)
