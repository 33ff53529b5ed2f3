"""What the regressions share: whose responses they learn, what they need, and what they leave out."""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import readable
from tests.models.setting import make_valued_files
from tests.modules.fake import FakeTrainer, attach
from tests.modules.offline import TEMPERATURE, table_batch, table_data
from tests.modules.setting import make_module, make_trainer, prepared, weights
from tests.modules.wiring.test_setup import table_of
from vbon_lightning.callbacks import BestOfNWinRate, KLMonitor, PolicyExport, RewardMonitor, SampleTable
from vbon_lightning.models import ModelSpec
from vbon_lightning.modules.log_ratio_regression import LogRatioRegression
from vbon_lightning.modules.offline import FromTable
from vbon_lightning.rewards import RewardCalls
from vbon_lightning.types import Rollout, ScoredResponses, select_prompts

ON_POLICY = ["astarpo", "qrpo2", "bonregression2"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_valued_files(tmp_path_factory.mktemp("files"), temperature=TEMPERATURE)


# -- whose responses --


@torch.no_grad()
def test_a_table_whose_size_is_asked_for_is_learnt_whole(files: Path) -> None:
    data = table_data(files)
    batch = table_batch(data)
    rewards = batch.prompts.reference_rewards
    module = prepared("qrpo", data, responses_per_prompt=16)
    losses = [module.learn(batch, rewards, step)[0].item() for step in (0, 1)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    some = prepared("qrpo", data, responses_per_prompt=4)
    picked = torch.tensor([some.learn(batch, rewards, step)[0].item() for step in range(60)])
    assert picked.std() > 0.01
    assert picked.mean().item() == pytest.approx(losses[0], abs=4 * picked.std().item() / 60**0.5)
    assert some.learn(batch, rewards, 5)[0].item() == picked[5].item()
    other = prepared("qrpo", data, responses_per_prompt=4, seed=7)
    assert other.learn(batch, rewards, 5)[0].item() != picked[5].item()


@pytest.mark.parametrize("kind", ON_POLICY)
def test_the_policys_responses_come_as_a_rollout(kind: str, files: Path) -> None:
    data = table_data(files)
    module = prepared(kind, data)
    prompts = table_batch(data).prompts
    logged = attach(module, FakeTrainer())
    first, second = (module.training_step(prompts, 0) for _ in range(2))
    rollout = first["rollout"]
    assert isinstance(rollout, Rollout) and rollout.rewards.shape == (4, 3)
    assert not rollout.log_probs.requires_grad and not rollout.token_kl.requires_grad and first["loss"].requires_grad
    assert rollout.responses != second["rollout"].responses, "every step samples anew"
    assert module.last_rollout is second["rollout"] and module.batches_seen == 2
    given = {"num_samples": 3, "seed": 0, "stream": "train", "step": 0}
    assert torch.equal(module.loaded.rollout(prompts, **given).completions.tokens, rollout.completions.tokens)
    assert set(logged) == {"train/loss", "train/log_ratio", "train/goal"}


def test_the_table_is_learnt_without_a_reward_or_a_sample(files: Path) -> None:
    data = table_data(files)
    module = prepared("bonregression", data)
    module.actors.sampler = module.actors.reward = None
    attach(module, FakeTrainer())
    outputs = module.training_step(table_batch(data), 0)
    assert set(outputs) == {"loss"} and module.last_rollout is None


@pytest.mark.parametrize("kind", ["qrpo", "astarpo", "bonregression2"])
def test_every_callback_works(kind: str, files: Path, tmp_path: Path) -> None:
    data = table_data(files)
    callbacks = [KLMonitor(), RewardMonitor(), BestOfNWinRate(), SampleTable(directory=str(tmp_path / "samples"))]
    trainer = make_trainer(
        tmp_path, *callbacks, PolicyExport(directory=str(tmp_path / "export")), steps=2, log_every_n_steps=1
    )
    trainer.fit(make_module(kind, data), data)
    metrics = set(trainer.callback_metrics)
    assert {"train/loss", "train/log_ratio", "train/goal", "val/kl", "val/reward", "val/win_rate"} <= metrics
    assert ("train/kl" in metrics) == ("train/win_rate" in metrics) == (kind in ON_POLICY)
    assert ("val/win_rate_vs_bon4" in metrics) == kind.startswith("bonregression")
    assert (tmp_path / "export" / "model.safetensors").exists()


@pytest.mark.parametrize("kind", ["qrpo", "astarpo"])
@pytest.mark.parametrize("policy", [{"lora": {"r": 2, "lora_alpha": 8}}, {"tilt": "value"}], ids=readable)
def test_adapters_and_tilts_are_regressed_against_what_they_stand_on(
    policy: dict[str, Any], kind: str, files: Path, tmp_path: Path
) -> None:
    options = {name: str(files / value) if name == "tilt" else value for name, value in policy.items()}
    data = table_data(files, policy=ModelSpec(str(files / "llama"), **options), val=None)
    module: Any = make_module(kind, data)
    trainer = make_trainer(tmp_path, steps=1)
    module.configure_model()
    before = weights(module)
    trainer.fit(module, data)
    assert trainer.callback_metrics["train/log_ratio"].item() == pytest.approx(0.0, abs=1e-6), "they start as one"
    assert any(not torch.equal(value, before[name]) for name, value in weights(module).items())


# -- what is refused --


@pytest.mark.parametrize(
    ("kind", "model", "data", "message"),
    [
        ("qrpo", {}, {"reference_table": None}, "QRPO learns from cached responses: name a table"),
        ("qrpo2", {}, {"reference_table": None}, "QRPO needs the rewards of cached responses: name a table"),
        ("astarpo", {}, {"reference_table": None}, "AStarPO needs the rewards of cached responses: name a table"),
        ("bonregression", {}, {"reward": None}, "needs a reward: set `data.reward`"),
        (
            "qrpo",
            {"responses_per_prompt": 17},
            {},
            "M = 16 responses a prompt, fewer than the 17 that model.responses_per_prompt = 17 needs",
        ),
        (
            "qrpo",
            {"responses_per_prompt": 1},
            {"table_samples": 1},
            "M = 1 responses a prompt, as data.table_samples says, fewer than the 2 that model.responses_per_prompt",
        ),
    ],
    ids=readable,
)
def test_a_table_that_will_not_do(
    kind: str, model: dict[str, Any], data: dict[str, Any], message: str, files: Path, tmp_path: Path
) -> None:
    brought = table_data(files, **data)
    module = make_module(kind, brought, **model)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path).fit(module, brought)
    assert module.actors is None, "no model was loaded"


def test_how_much_of_a_table_is_enough(files: Path) -> None:
    for kind, model, enough in (("qrpo", {"responses_per_prompt": 16}, 16), ("astarpo", {}, 1), ("qrpo2", {}, 1)):
        module = make_module(kind, table_data(files), **model)
        attach(module, FakeTrainer(datamodule=table_of(enough)))
        module.setup("fit")


def test_only_cached_responses_must_tell_their_ends(files: Path) -> None:
    data = table_of(16)
    data.table().knows_finished = False
    module = make_module("astarpo", table_data(files))
    attach(module, FakeTrainer(datamodule=data))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.setup("fit")
    learns = make_module("qrpo", table_data(files))
    attach(learns, FakeTrainer(datamodule=data))
    with pytest.warns(UserWarning, match="does not tell finished from truncated"):
        learns.setup("fit")


def test_a_batch_without_reference_rewards_is_refused(files: Path) -> None:
    data = table_data(files)
    module = prepared("astarpo", data)
    attach(module, FakeTrainer())
    prompts = table_batch(data).prompts._replace(reference_rewards=None)
    with pytest.raises(ValueError, match="AStarPO needs reference rewards, and the batch brings none"):
        module.training_step(prompts, 0)


def test_a_method_must_say_what_it_learns(files: Path) -> None:
    actors = table_data(files).actors
    with pytest.raises(NotImplementedError, match="LogRatioRegression must say what it regresses on"):
        LogRatioRegression(actors).regress(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 2), None)
    with pytest.raises(NotImplementedError, match="FromTable must say how many of the table's responses it needs"):
        _ = FromTable(actors).samples_needed
    module = make_module("qrpo", table_data(files))
    attach(module, FakeTrainer())
    batch = table_batch(table_data(files))
    bare = batch._replace(prompts=batch.prompts._replace(reference_rewards=None))
    with pytest.raises(ValueError, match=re.escape("QRPO learns from cached responses, and the batch brings no rew")):
        module.training_step(bare, 0)


# -- responses without a reward --

LEFT = [[0, 2], [0, 1, 2], [], [1]]
"""Which responses of each prompt have a reward."""


def scored_by(kind: str, files: Path, monkeypatch: pytest.MonkeyPatch, missing: bool = True) -> tuple[Any, Any, Any]:
    """Return a module that skips, four prompts, and their responses; the module gets these, some without a reward."""
    data = table_data(files, reward_calls=RewardCalls(on_missing="skip"))
    module = prepared(kind, data)
    prompts = table_batch(data).prompts
    scored = module.loaded.scored_responses(prompts, num_samples=3, seed=0, stream="train", step=0)
    rewards = torch.full_like(scored.rewards, math.nan)
    for row, places in enumerate(LEFT):
        rewards[row, places] = scored.rewards[row, places]
    given = scored._replace(rewards=rewards) if missing else scored
    monkeypatch.setattr(module.loaded, "scored_responses", lambda *_, **__: given)
    return module, prompts, scored


def gradient(module: Any, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(module.policy.parameters())))


@pytest.mark.parametrize("kind", ON_POLICY)
def test_a_response_without_a_reward_is_left_out(kind: str, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, prompts, scored = scored_by(kind, files, monkeypatch)
    loss, logs, _ = module._on_policy(prompts, 0)
    ours = gradient(module, loss)
    losses, theirs, goals = [], [], []
    for row, left in enumerate(LEFT):
        for place in left:
            one: ScoredResponses = select_prompts(scored, [row])
            one = one._replace(
                completions=type(one.completions)(*(part[:, [place]] for part in one.completions)),
                responses=[[one.responses[0][place]]],
                rewards=one.rewards[:, [place]],
            )
            monkeypatch.setattr(module.loaded, "scored_responses", lambda *_, one=one, **__: one)
            part, own, _ = module._on_policy(select_prompts(prompts, [row]), 0)
            losses.append(part)
            goals.append(own["goal"])
            theirs.append(gradient(module, part))
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logs["goal"], torch.stack(goals).mean(), rtol=1e-4, atol=1e-6)
    for own_part, parts in zip(ours, zip(*theirs, strict=True), strict=True):
        torch.testing.assert_close(own_part, torch.stack(parts).mean(0), rtol=1e-3, atol=1e-5)


def test_with_all_rewards_there_is_no_difference(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, prompts, _ = scored_by("astarpo", files, monkeypatch, missing=False)
    skipping = module._on_policy(prompts, 0)[0]
    module.actor_spec = module.actor_spec.replaced(reward_calls=RewardCalls())
    assert torch.equal(skipping, module._on_policy(prompts, 0)[0])


@pytest.mark.parametrize(("others", "share"), [(6.0, 1.0), (0.0, 2.0), (18.0, 0.5)])
def test_a_rank_counts_for_the_responses_that_it_keeps(
    others: float, share: float, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, prompts, _ = scored_by("astarpo", files, monkeypatch)
    alone = module._on_policy(prompts, 0)[0]
    logged = attach(module, FakeTrainer(other=others))
    module._weights = [6 + others, 1.0]
    torch.testing.assert_close(module._on_policy(prompts, 0)[0], alone * share)
    attach(module, FakeTrainer())
    module._weights = [1.0]
    logged = attach(module, FakeTrainer())
    module.training_step(prompts, 0)
    assert logged["train/reward/missing"][0] == 6
