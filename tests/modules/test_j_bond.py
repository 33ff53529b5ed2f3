"""J-BOND: a step's gradient by hand, with one response a prompt and with several; and its options."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import readable
from tests.modules.fake import FakeTrainer, attach
from tests.modules.setting import make_data, make_files, make_module, prepared
from tests.modules.test_forward_term import assert_same_gradient, nll
from tests.modules.test_policy_gradient import TEMPERATURE, by_hand
from vbon_lightning.types import select_prompts


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


def stepped(files: Path, **options: Any) -> tuple[Any, Any]:
    """Return a module whose policy and anchor have gone their own ways, and what a step samples."""
    data = make_data(files, val=None, temperature=TEMPERATURE)
    module = prepared("jbond", data, **options)
    with torch.no_grad():
        for index, parameter in enumerate(module.anchor.parameters()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(50 + index))
    batch = data._collate_prompts([(i, True, row) for i, row in enumerate(data.prompts("train")[:6])])
    return module, module._sample(batch, 0)


@pytest.mark.parametrize("kl_estimator", ["rao_blackwell", "sampled"])
@pytest.mark.parametrize("samples", [1, 3])
def test_a_step_by_hand(samples: int, kl_estimator: str, files: Path) -> None:
    b, gamma = 0.3, 0.5
    module, scored = stepped(
        files, jeffreys_weight=b, regularisation=gamma, samples_per_prompt=samples, kl_estimator=kl_estimator
    )
    loss, rollout, logs = module._on_policy_update(scored)
    live, frozen = by_hand(module, module.policy, rollout), by_hand(module, module.anchor, rollout)
    returns, gains, kls, rewards = {}, {}, {}, {}
    for row, references in enumerate(rollout.reference_rewards.tolist()):
        assert len(references) == 2
        for sample in range(samples):
            (log_p, response), (log_q, _) = live[row][sample], frozen[row][sample]
            picked = log_p.gather(-1, response[:, None])[:, 0]
            reward = -math.log(16) if float(rollout.rewards[row, sample]) < min(references) else 0.0
            kl = (log_p.exp() * (log_p - log_q)).sum(-1)
            later = [kl[t + 1 :].sum().item() for t in range(4)]
            if kl_estimator == "sampled":
                ratio = float((picked - log_q.gather(-1, response[:, None])[:, 0]).sum())
                later = [ratio] * 4
            place = (row, sample)
            gains[place], kls[place], rewards[place] = picked, kl, reward
            returns[place] = torch.tensor([b * reward - (b + gamma) * paid for paid in later])
    assert len(set(rewards.values())) == 2, "some lose to both, some do not"
    losses = []
    for (row, sample), mine in returns.items():
        others = [value for (i, j), value in returns.items() if (i, j) != (row, sample) and (samples == 1 or i == row)]
        advantage = (mine - torch.stack(others).mean(0))[: len(gains[row, sample])]
        loss_here = -(advantage * gains[row, sample]).sum()
        if kl_estimator != "sampled":
            loss_here = loss_here + (b + gamma) * kls[row, sample].sum()
        losses.append(loss_here)
    forward = nll(module, rollout.prompts, rollout.extra).mean()
    assert_same_gradient(module, loss, torch.stack(losses).mean() + (1 - b) * forward)
    # What is learnt is the better of the anchor's two.
    assert rollout.extra.tokens.shape[:2] == (6, 1)
    assert logs["forward_nll"].item() == pytest.approx(forward.item(), rel=1e-4)


def test_what_the_forward_kl_learns_is_the_better_of_two(files: Path) -> None:
    module, scored = stepped(files)
    ids = module.loaded.token_ids(scored.extra)
    texts = module.loaded.decode(ids, scored.prompts)
    rewards = module.loaded.reward(scored.prompts.text, texts, ids)
    torch.testing.assert_close(rewards[:, 0], scored.reference_rewards.amax(1))
    assert (scored.reference_rewards.amax(1) > scored.reference_rewards.amin(1)).any()


def test_one_response_a_prompt_is_compared_with_those_of_all_ranks(files: Path) -> None:
    module, scored = stepped(files, kl_estimator="sampled", jeffreys_weight=1.0)
    rollout, _ = module._evaluate_responses(scored)
    whole, _ = module._advantages(module._target(rollout), rollout, None)
    mine = select_prompts(rollout, [0, 1, 2])
    rest = select_prompts(rollout, [3, 4, 5])
    target = module._target(rest)
    returns = target.score - target.kl_coef * (rest.log_probs - rest.reference_log_probs).sum(-1).detach()
    others = iter([torch.tensor(3.0), returns.sum(0).expand(rest.completions.mask.shape[-1])])
    trainer = FakeTrainer()
    attach(module, trainer)
    trainer.strategy.reduce = lambda part, reduce_op: part + next(others)
    found, _ = module._advantages(module._target(mine), mine, None)
    torch.testing.assert_close(found, whole[:3], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jeffreys_weight": 0.0}, "model.jeffreys_weight must be in .0, 1., got 0.0"),
        ({"jeffreys_weight": 1.1}, "model.jeffreys_weight must be in .0, 1., got 1.1"),
        ({"regularisation": -0.1}, "model.regularisation must be a number >= 0, got -0.1"),
        ({"reference_samples": 1}, "model.reference_samples must be >= 2, got 1"),
        ({"kl_estimator": "prefix_baseline"}, "one response a prompt has the rest of the batch for a baseline"),
        ({"jeffreys_weight": 1.0, "kl_estimator": "sampled", "normalise": True}, "one response a prompt has the rest"),
        ({"samples_per_prompt": 0}, "model.samples_per_prompt must be >= 1, got 0"),
    ],
    ids=readable,
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str, files: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_module("jbond", make_data(files), **options)


def test_an_anchor_that_stays_and_one_that_is_replaced_will_do(files: Path) -> None:
    for options, moves in (({"anchor_rate": 0.0}, False), ({"anchor_rate": 0.0, "anchor_every": 3}, True)):
        module: Any = make_module("jbond", make_data(files), **options)
        assert module.anchor_moves is moves
