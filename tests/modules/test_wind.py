"""WIND: a step's loss by hand, whose responses it learns from, and the equilibrium as where it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.functional.test_wind import by_hand as loss_by_hand
from tests.helpers import readable
from tests.modules.fake import FakeTrainer, attach
from tests.modules.setting import Picky, make_data, make_files, make_module, make_trainer, prepared
from tests.modules.test_convergence import adam, decay, divergence
from tests.modules.test_convergence import data as data  # a fixture
from tests.modules.test_forward_term import assert_same_gradient
from tests.modules.test_policy_gradient import TEMPERATURE, by_hand
from vbon_lightning import WIND
from vbon_lightning.functional import wind_loss
from vbon_lightning.rewards import RewardCalls


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


def stepped(files: Path, prompts: int = 3, **options: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Return a module whose policy and iterate have gone their own ways, a batch, and where its logs will stand."""
    named = (
        {"reward": options.pop("reward"), "reward_calls": RewardCalls(on_missing="skip")} if "reward" in options else {}
    )
    data = make_data(files, val=None, temperature=TEMPERATURE, **named)
    module = prepared("wind", data, **options)
    with torch.no_grad():
        for index, parameter in enumerate(module.anchor.parameters()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(50 + index))
    batch = data._collate_prompts([(i, True, row) for i, row in enumerate(data.prompts("train")[:prompts])])
    return module, batch, attach(module, FakeTrainer(world_size=1))


def log_ratios(module: Any, rollout: Any) -> list[Tensor]:
    """What is fitted, of each prompt ``[G]``, every row run by itself."""
    models = (module.policy, module.anchor, module.actors.reference)
    found = []
    for rows in zip(*(by_hand(module, model, rollout) for model in models), strict=True):
        ratios = []
        for (ours, tokens), (anchor, _), (reference, _) in zip(*rows, strict=True):
            log_p, log_a, log_r = (part.gather(-1, tokens[:, None]).sum() for part in (ours, anchor, reference))
            ratios.append(module.beta * (log_p - log_r) + (log_p - log_a.detach()) / module.step_size)
        found.append(torch.stack(ratios))
    return found


@pytest.mark.parametrize("fit", ["squared", "kl", "nce"])
def test_a_step_by_hand(fit: str, files: Path) -> None:
    module, batch, logged = stepped(files, fit=fit, beta=0.02, step_size=30.0)
    loss = module.training_step(batch, 0)["loss"]
    rollout = module.last_rollout
    ratios = log_ratios(module, rollout)
    each = [loss_by_hand(ratio.tolist(), row, fit) for ratio, row in zip(ratios, rollout.rewards.tolist(), strict=True)]
    assert loss.item() == pytest.approx(sum(each) / 3, rel=1e-3)
    assert logged["train/loss"][0] == pytest.approx(loss.item())
    assert logged["train/anchor_reward"][0] == pytest.approx(rollout.rewards.mean().item())
    if fit == "squared":
        assert_same_gradient(module, loss, wind_loss(torch.stack(ratios), rollout.rewards, fit="squared"))


def test_it_learns_from_the_iterates_responses_each_step_from_others(files: Path) -> None:
    module, batch, _ = stepped(files, seed=5)
    for step in range(3):
        module.training_step(batch, 0)
        rollout = module.last_rollout
        how = {"num_samples": 4, "seed": 5, "stream": "train", "step": step}
        theirs, ours = (module.loaded.sample(model, batch, **how) for model in (module.anchor, module.policy))
        assert torch.equal(rollout.completions.tokens, theirs.tokens)
        assert rollout.completions.tokens.tolist() != ours.tokens.tolist()
        # What is kept to name a response by is of the policy, and holds no graph.
        live = module.loaded.statistics(rollout)[0]
        for name in ("log_probs", "token_kl"):
            kept = getattr(rollout, name)
            assert not kept.requires_grad
            torch.testing.assert_close(kept, getattr(live, name).detach(), rtol=1e-4, atol=1e-5)
        assert rollout.reference_rewards is None, "win rates are among the iterate's own"


def test_what_is_not_said(files: Path) -> None:
    data = make_data(files, value_model=str(files / "llama"))
    module: Any = WIND(data.actors)
    assert (module.samples_per_prompt, module.eval_samples) == (8, 8)
    assert not module.uses_value_model, "which it has no use for"
    assert (WIND(data.actors, eval_samples=3).eval_samples, WIND(data.actors, seed=4).seed) == (3, 4)


def test_a_prompt_that_keeps_fewer_than_three_is_left_out(files: Path) -> None:
    module, batch, logged = stepped(files, prompts=4, reward=Picky("abcd"), samples_per_prompt=4)
    module.on_train_batch_start(batch, 0)
    loss = module.training_step(batch, 0)["loss"]
    rollout = module.last_rollout
    counts = rollout.judged.sum(1).tolist()
    assert min(counts) < 3 <= max(counts), counts
    each = []
    for ratio, row, kept in zip(log_ratios(module, rollout), rollout.rewards, rollout.judged, strict=True):
        if kept.sum() > 2:
            each.append(loss_by_hand(ratio[kept].tolist(), row[kept].tolist(), "squared"))
    assert loss.item() == pytest.approx(sum(each) / len(each), rel=1e-3)
    assert logged["train/reward/missing"][0] == sum(4 - count for count in counts)


def test_a_rank_counts_for_the_prompts_that_it_learns_from(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, batch, _ = stepped(files, prompts=6, reward=Picky("abcd"), samples_per_prompt=4)
    learnt: list[list[bool]] = []

    def share(mask: Tensor) -> Tensor:
        learnt.append(mask.flatten().tolist())
        return torch.tensor(0.25)

    module.on_train_batch_start(batch, 0)
    alone = module.training_step(batch, 0)["loss"]
    module.batches_seen = 0
    monkeypatch.setattr(module, "_share", share)
    loss = module.training_step(batch, 0)["loss"]
    counts = module.last_rollout.judged.sum(1).tolist()
    assert 2 in counts and max(counts) > 2, "a pair without a third to judge it says nothing"
    assert learnt == [[count > 2 for count in counts]]
    torch.testing.assert_close(loss, alone * 0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "model.beta must be a number > 0, got 0.0"),
        ({"step_size": float("inf")}, "model.step_size must be a number > 0, got inf"),
        ({"fit": "x"}, "model.fit must be one of squared, kl, nce; got 'x'"),
        ({"samples_per_prompt": 1}, "model.samples_per_prompt must be >= 3, got 1"),
        ({"anchor_every": 0}, "model.anchor_every is how long an iteration is, and must be >= 1, got 0"),
    ],
    ids=readable,
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str, files: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_module("wind", make_data(files), **options)


BETA = 0.2


def equilibrium(log_p: Tensor, rewards: Tensor) -> Tensor:
    """Return log of the policy that is ``ref exp(P / beta)`` of its own win rates P."""
    policy = log_p.exp()
    beats = (rewards[:, None] > rewards).double() + 0.5 * (rewards[:, None] == rewards).double()
    for _ in range(400):
        policy = (0.5 * policy.log() + 0.5 * (log_p + beats @ policy / BETA)).softmax(-1)
    return policy.log()


def test_it_ends_at_the_equilibrium(data: Any, tmp_path: Path) -> None:
    module = WIND(
        data.actors,
        beta=BETA,
        step_size=10.0,
        samples_per_prompt=32,
        anchor_every=6,
        optimizer=adam,
        lr_scheduler=decay,
    )
    module.configure_model()
    before = divergence(module, data, equilibrium)
    make_trainer(tmp_path, steps=60, callbacks=[], enable_checkpointing=False).fit(module, data)
    after = divergence(module, data, equilibrium)
    assert before > 0.5
    assert after < 0.2 * before
