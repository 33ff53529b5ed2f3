"""PF-PPO's update: that of the drawn responses, with the baseline of all."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.modules.one_update import assert_same_gradient, set_up, token_log_probs
from tests.modules.setting import make_data, make_files
from tests.modules.wiring.setting import Spy
from vbon_lightning import PFPPO
from vbon_lightning.modules import pf_ppo

BETA = 0.3


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize(("strategy", "draws"), [("best", 3), ("best_random", 8), ("best_worst", None)])
def test_the_update_is_the_mean_over_the_draws(strategy: str, draws: int | None, files: Path) -> None:
    module, batch = set_up(
        "pfppo", files, beta=BETA, filter=strategy, draws=draws, samples_per_prompt=5, epochs_per_rollout=1
    )
    scored = module._sample(batch, 0)
    (experience,) = module._collect(scored)
    loss, rollout, _ = module._on_policy_update(scored)
    counts = (experience.weights * module.draws / 5).round(decimals=4)
    assert torch.equal(counts, counts.round())
    assert counts.sum(1).tolist() == [module.draws] * 4
    live = token_log_probs(module.policy, rollout)
    with torch.no_grad():
        reference = token_log_probs(module.actors.reference, rollout)
    losses = []
    for row, rewards in enumerate(rollout.rewards.tolist()):
        paid = [
            reward - BETA * float((p.detach() - q).sum())
            for reward, p, q in zip(rewards, live[row], reference[row], strict=True)
        ]
        for place, count in enumerate(counts[row].int().tolist()):
            baseline = statistics.fmean(other for j, other in enumerate(paid) if j != place)
            losses += [-(paid[place] - baseline) * live[row][place].sum()] * count
        drawn = {reward for reward, count in zip(rewards, counts[row], strict=True) if count}
        if strategy == "best":
            assert drawn == {max(rewards)}
        elif strategy == "best_worst":
            assert drawn == {max(rewards), min(rewards)}
        else:
            assert max(rewards) in drawn and len(drawn) > 1
    assert_same_gradient(module, loss, torch.stack(losses).mean())


def test_draws_belong_to_the_prompt_the_rollout_and_the_seed(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, batch = set_up("pfppo", files, samples_per_prompt=8, draws=3, epochs_per_rollout=1)
    rollout, _ = module._evaluate_responses(module._sample(batch, 0))
    mask = rollout.completions.mask

    def drawn(**changes: Any) -> torch.Tensor:
        return module.response_weights(rollout._replace(**changes), mask)

    first = drawn()
    assert torch.equal(drawn(), first)
    asked = Spy(pf_ppo.prompt_noise)
    monkeypatch.setattr(pf_ppo, "prompt_noise", asked)
    drawn()
    ((_, how),) = asked.calls
    assert (how["stream"], how["seed"], how["step"]) == ("filter", 0, 0), "apart from what samples"
    backwards = rollout._replace(
        rewards=rollout.rewards.flip(0), prompts=rollout.prompts._replace(index=rollout.prompts.index.flip(0))
    )
    assert torch.equal(module.response_weights(backwards, mask.flip(0)), first.flip(0)), "on whichever rank"
    others = [drawn(prompts=rollout.prompts._replace(index=rollout.prompts.index + 7))]
    module.batches_seen = 2
    others.append(drawn())
    module.batches_seen, module.seed = 0, 5
    others.append(drawn())
    assert all(not torch.equal(other, first) for other in others)


def test_a_response_without_a_reward_is_not_drawn(files: Path) -> None:
    module, batch = set_up("pfppo", files)
    rollout, _ = module._evaluate_responses(module._sample(batch, 0))
    rewards = rollout.rewards.clone()
    rewards[0, 1] = rewards[2] = math.nan
    mask = rollout.completions.mask & ~rewards.isnan().unsqueeze(-1)
    weights = module.response_weights(rollout._replace(rewards=rewards), mask)
    assert weights[0, 1] == 0 and not weights[2].any()
    torch.testing.assert_close(weights.sum(1), torch.tensor([3.0, 4.0, 0.0, 4.0]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"filter": "x"}, "model.filter must be one of best, best_random, best_worst; got 'x'"),
        ({"draws": 0}, "model.draws must be an integer >= 1, got 0"),
        ({"draws": 1.5}, "model.draws must be an integer >= 1, got 1.5"),
        ({"estimator": "ppo"}, "PFPPO compares the responses to a prompt with each other, and a critic cannot"),
    ],
)
def test_options_that_make_no_sense(changes: dict[str, Any], message: str, files: Path) -> None:
    with pytest.raises(ValueError, match=message):
        PFPPO(make_data(files).actors, **changes)
