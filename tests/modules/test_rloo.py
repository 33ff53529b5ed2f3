"""RLOO's update against the one written out, with the KL in the loss or in the reward."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch

from tests.modules.one_update import assert_same_gradient, gradient, set_up, token_log_probs
from tests.modules.setting import make_files

BETA = 0.3


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize("estimator", ["reinforce", "clipped"])
@pytest.mark.parametrize("kl", ["k3", "sampled"])
def test_the_update_by_hand(kl: str, estimator: str, files: Path) -> None:
    options = {} if kl == "sampled" else {"kl_estimator": kl}  # which is what the paper has
    module, batch = set_up("rloo", files, beta=BETA, estimator=estimator, **options)
    loss, rollout, _ = module._on_policy_update(module._sample(batch, 0))
    live = token_log_probs(module.policy, rollout)
    with torch.no_grad():
        reference = token_log_probs(module.actors.reference, rollout)
    losses = []
    for row, rewards in enumerate(rollout.rewards.tolist()):
        apart = [(p - q) for p, q in zip(live[row], reference[row], strict=True)]
        if kl == "sampled":  # off the reward, as TRL has it
            rewards = [r - BETA * float(a.detach().sum()) for r, a in zip(rewards, apart, strict=True)]
        for place, reward in enumerate(rewards):
            baseline = statistics.fmean(other for j, other in enumerate(rewards) if j != place)
            one = -(reward - baseline) * live[row][place].sum()
            if kl == "k3":
                one = one + BETA * ((-apart[place]).exp() - 1 + apart[place]).sum()
            losses.append(one)
    assert_same_gradient(module, loss, torch.stack(losses).mean())


def test_it_is_kl_rl_but_for_the_kl(files: Path) -> None:
    """With the same estimator of the KL it is KLRL, to the bit."""
    gradients = []
    for kind in ("rloo", "klrl"):
        module, batch = set_up(kind, files, beta=BETA, kl_estimator="rao_blackwell")
        gradients.append(gradient(module, module._on_policy_update(module._sample(batch, 0))[0]))
    assert torch.equal(*gradients)
