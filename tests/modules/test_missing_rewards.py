"""A response without a reward is left out: the update is that of its group without it, and so are all numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import readable
from tests.models.setting import make_valued_files
from tests.modules.fake import FakeTrainer, attach
from tests.modules.setting import Picky, make_data, make_trainer, prepared, weights
from vbon_lightning.callbacks import BestOfNWinRate, KLMonitor, RewardMonitor, SampleTable
from vbon_lightning.rewards import RewardCalls, RewardError
from vbon_lightning.types import ScoredResponses, select_prompts

SKIP = RewardCalls(on_missing="skip")
LEFT = [[0, 2, 3], [0, 1, 2, 3], [1]]
"""Which responses of each prompt have a reward."""
CASES: list[dict[str, Any]] = [
    {"kind": "vbon"},
    {"kind": "klrl"},
    {"kind": "vbon", "bound": "lower", "kl_estimator": "sampled"},
    {"kind": "klrl", "kl_estimator": "prefix_baseline"},
    {"kind": "klrl", "kl_estimator": "sampled", "normalise": True},
    {"kind": "klrl", "estimator": "clipped"},
    {"kind": "vbon", "estimator": "clipped", "kl_estimator": "sampled"},
    {"kind": "klrl", "estimator": "ppo"},
    {"kind": "klrl", "estimator": "ppo", "kl_estimator": "sampled"},
    {"kind": "klrl", "kl_estimator": "k3"},
    {"kind": "annealed"},
    {"kind": "infalign"},
    {"kind": "maxatk"},
    {"kind": "maxatk", "form": "marginal", "estimator": "clipped", "beta": 0.0},
    {"kind": "grpo", "length_norm": "grpo"},
    {"kind": "grpo", "length_norm": "dr_grpo", "kl_estimator": "rao_blackwell"},
    {"kind": "pfppo", "draws": 3},
    {"kind": "valuecritic", "reference_samples": 16},
    {"kind": "valuecritic", "reference_samples": 16, "value_lambda": 0.7},
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_valued_files(tmp_path_factory.mktemp("files"))


def scored_by(files: Path, kind: str = "klrl", **changes: Any) -> tuple[Any, ScoredResponses]:
    """Return a module that skips, away from its reference, and three prompts with four scored responses each."""
    named = {"value_model": str(files / "value")} if kind == "valuecritic" else {}
    data = make_data(files, reward_calls=SKIP, **named)
    module = prepared(kind, data, **({"epochs_per_rollout": 1, "minibatches": 1} | changes))
    if module.critic is not None:
        torch.nn.init.normal_(module.critic.weight, generator=torch.Generator().manual_seed(1))
    batch = data._collate_prompts([(i, True, row) for i, row in enumerate(data.prompts("train")[:3])])
    return module, module._sample(batch, 0)


def without(scored: ScoredResponses, row: int, left: list[int]) -> ScoredResponses:
    """Return a prompt with some of its responses only."""
    one = select_prompts(scored, [row])
    return one._replace(
        completions=type(one.completions)(*(part[:, left] for part in one.completions)),
        responses=[[one.responses[0][place] for place in left]],
        rewards=one.rewards[:, left],
    )


def forget(scored: ScoredResponses, left: list[list[int]]) -> ScoredResponses:
    """Take all other responses' rewards."""
    rewards = torch.full_like(scored.rewards, math.nan)
    for row, places in enumerate(left):
        rewards[row, places] = scored.rewards[row, places]
    return scored._replace(rewards=rewards)


def updates(module: Any, parts: list[ScoredResponses], shares: list[float]) -> tuple[Tensor, list[Tensor], list[Any]]:
    """Return the weighted sum of the losses of one update on each, its gradient, and what each logs.

    Where several updates are made on a rollout the policy has moved since it was sampled.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in parameters]
    if module.estimator == "reinforce":
        found = [module._on_policy_update(part) for part in parts]
    else:
        experience = [module._collect(part)[0] for part in parts]
        with torch.no_grad():
            for number, parameter in enumerate(parameters):
                generator = torch.Generator().manual_seed(number)
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        found = [module._minibatch_update(part) for part in experience]
    loss = sum(share * one[0] for share, one in zip(shares, found, strict=True))
    gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
    with torch.no_grad():
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
    return loss.detach(), [part for part in gradient if part is not None], [one[2] for one in found]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert max(float(part.abs().max()) for part in theirs) > 1e-3
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("case", [case for case in CASES if not case.get("normalise")], ids=readable)
def test_the_update_is_that_of_the_groups_without_it(case: dict[str, Any], files: Path) -> None:
    module, scored = scored_by(files, **case)
    needed = 1 if case.get("estimator") == "ppo" or case["kind"] == "valuecritic" else 2
    groups = [(row, left) for row, left in enumerate(LEFT) if len(left) >= needed]
    count = sum(len(left) for _, left in groups)
    loss, gradient, (logs,) = updates(module, [forget(scored, LEFT)], [1.0])
    losses, gradients, objective = [], [], 0.0
    name = "objective" if module.follows_objective else "penalised_score"
    for row, left in groups:
        module.samples_per_prompt = len(left)
        one, part, (own,) = updates(module, [without(scored, row, left)], [len(left) / count])
        losses.append(one)
        gradients.append(part)
        objective += float(own[name]) * len(left) / count
    torch.testing.assert_close(loss, torch.stack(losses).sum(), rtol=1e-4, atol=1e-6)
    assert_same(gradient, [torch.stack(parts).sum(0) for parts in zip(*gradients, strict=True)])
    assert float(logs[name]) == pytest.approx(objective, rel=1e-4)


@pytest.mark.parametrize("case", CASES, ids=readable)
def test_the_update_is_that_of_the_batch_without_it(case: dict[str, Any], files: Path) -> None:
    """The same response of every prompt: what is over the whole batch, such as normalised advantages."""
    module, scored = scored_by(files, **case)
    left = [0, 1, 3]
    loss, gradient, (logs,) = updates(module, [forget(scored, [left] * 3)], [1.0])
    parts = [without(scored, row, left) for row in range(3)]
    whole = scored._replace(
        completions=type(scored.completions)(*(part[:, left] for part in scored.completions)),
        responses=[part.responses[0] for part in parts],
        rewards=scored.rewards[:, left],
    )
    expected, theirs, (others,) = updates(module, [whole], [1.0])
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    assert_same(gradient, theirs)
    for name, value in others.items():
        torch.testing.assert_close(logs[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("case", CASES, ids=readable)
def test_a_batch_that_keeps_none_moves_nothing(case: dict[str, Any], files: Path) -> None:
    module, scored = scored_by(files, **case)
    loss, gradient, _ = updates(module, [forget(scored, [[], [], []])], [1.0])
    assert float(loss) == 0
    assert gradient, "there is a gradient for DDP to reduce"
    assert not any(float(part.abs().max()) for part in gradient)


def test_with_all_rewards_there_is_no_difference(files: Path) -> None:
    module, scored = scored_by(files)
    skipping = updates(module, [scored], [1.0])
    module.actor_spec = module.actor_spec.replaced(reward_calls=RewardCalls())
    stopping = updates(module, [scored], [1.0])
    assert torch.equal(skipping[0], stopping[0])
    assert all(torch.equal(one, other) for one, other in zip(skipping[1], stopping[1], strict=True))


@pytest.mark.parametrize(("others", "share"), [(7.0, 1.0), (0.0, 2.0), (21.0, 0.5)])
def test_a_rank_counts_for_the_responses_that_it_keeps(others: float, share: float, files: Path) -> None:
    """Lightning averages over the two ranks: 7 of 14 are half of the mean, 7 of 7 all of it, 7 of 28 a quarter."""
    module, scored = scored_by(files)
    alone = updates(module, [forget(scored, LEFT)], [1.0])[0]
    attach(module, FakeTrainer(other=others))
    module._weights = [1.0, 1.0]
    module._weights[0] = 7 + others
    torch.testing.assert_close(updates(module, [forget(scored, LEFT)], [1.0])[0], alone * share)


def test_what_an_evaluation_lacks_is_a_sum_over_it(files: Path) -> None:
    module, scored = scored_by(files)
    logged = attach(module, FakeTrainer())
    rollout, _ = module._evaluate_responses(forget(scored, LEFT))
    module.log_missing(rollout, "val")
    value, options = logged["val/reward/missing"]
    assert value == int((~rollout.judged & rollout.prompts.valid[:, None]).sum()) > 0
    assert options == {
        "on_step": False, "on_epoch": True, "reduce_fx": "sum", "sync_dist": True, "batch_size": 1
    }  # fmt: skip


def test_rows_that_even_out_the_ranks_are_not_counted_missing(files: Path) -> None:
    module, scored = scored_by(files)
    logged = attach(module, FakeTrainer())
    rollout = module.loaded.statistics(forget(scored, LEFT))[0]
    rollout.prompts.valid[2] = False
    module.log_missing(rollout, "val")
    value, options = logged["val/reward/missing"]
    assert value == 1
    assert options["sync_dist"] and options["reduce_fx"] == "sum"


def test_a_target_never_sees_a_missing_reward(files: Path) -> None:
    module, scored = scored_by(files)
    target, seen = module.target, []
    module.target = lambda rollout: seen.append(rollout.rewards) or target(rollout)
    updates(module, [forget(scored, LEFT)], [1.0])
    assert seen and all(rewards.isfinite().all() for rewards in seen)


def fit(files: Path, directory: Path, reward: Any, **changes: Any) -> tuple[Any, Any]:
    data = make_data(files, reward=reward, **({"reward_calls": SKIP} | changes))
    module = prepared("klrl", data, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1), lr_scheduler=None)
    samples = SampleTable(directory=str(directory / "samples"), samples=4)
    monitors = [RewardMonitor(), KLMonitor(), BestOfNWinRate(), samples]
    before = weights(module)
    trainer = make_trainer(directory, *monitors, steps=2, log_every_n_steps=1)
    trainer.fit(module, data)
    moved = any(not torch.equal(value, before[name]) for name, value in weights(module).items())
    return trainer, moved


@pytest.mark.filterwarnings("ignore:the reward says None or NaN")
def test_a_run_counts_what_is_missing_and_goes_on(files: Path, tmp_path: Path) -> None:
    trainer, moved = fit(files, tmp_path, Picky("abcd"))
    metrics = trainer.callback_metrics
    assert moved
    assert 0 < metrics["train/reward/missing"] < 16
    assert 0 < metrics["val/reward/missing"] < 12, "three prompts, four responses each"
    assert all(math.isfinite(value) for value in metrics.values())
    rows = [json.loads(line) for path in sorted((tmp_path / "samples").glob("val-*")) for line in path.open()]
    shown = [one for row in rows for one in row["responses"]]
    assert len(shown) == 12
    assert metrics["val/reward/missing"] == sum(one["reward"] is None for one in shown), "over all batches"
    assert {one["reward"] is None for one in shown if one["text"][:1] in tuple("abcd")} == {True}
    assert {one["reward"] is None for one in shown if one["text"][:1] not in tuple("abcd")} == {False}


def test_a_run_without_any_reward_moves_nothing(files: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="the reward says None or NaN of response '.*' to prompt"):
        trainer, moved = fit(files, tmp_path, Picky([""]), val=None)
    assert not moved
    assert trainer.callback_metrics["train/reward/missing"] == 16


def test_the_default_stops(files: Path, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"is nan .*data.reward_calls.on_missing: skip"):
        fit(files, tmp_path, Picky("abcd"), reward_calls=RewardCalls())


def test_retries_are_logged(files: Path, tmp_path: Path) -> None:
    class Flaky(Picky):
        calls = 0

        def __call__(self, *arguments: Any) -> Tensor:
            self.calls += 1
            if self.calls == 2:
                raise ConnectionError("out")
            return super().__call__(*arguments)

    with pytest.warns(UserWarning, match="ConnectionError: out"):
        trainer, _ = fit(files, tmp_path, Flaky(""), val=None, reward_calls=RewardCalls(retries=1, backoff_s=0.0))
    assert trainer.callback_metrics["train/reward/retries"] == 1
    assert "train/reward/missing" not in trainer.callback_metrics


def test_resumes_agree_on_what_is_skipped(files: Path) -> None:
    one, other = (make_data(files, reward_calls=RewardCalls(on_missing=how)).actors for how in ("stop", "skip"))
    assert one.identity() | {"on_missing": "skip"} == other.identity()
    assert make_data(files, reward_calls=RewardCalls(workers=3, retries=2)).actors.identity() == one.identity()
