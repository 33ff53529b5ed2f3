"""GRPO's update against TRL's documented loss, written out."""

from __future__ import annotations

import inspect
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from tests.modules.fake import FakeTrainer, attach
from tests.modules.one_update import assert_same_gradient, gradient, move, set_up, token_log_probs
from tests.modules.setting import make_data, make_files
from vbon_lightning import GRPO, PFPPO, RLOO
from vbon_lightning.types import Rollout

BETA, CLIP = 0.3, 0.1


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


def trl_loss(module: Any, rollout: Rollout, old: list[list[Tensor]], norm: str, scale: bool) -> Tensor:
    """TRL's GRPOTrainer: token ratios, clipped, beta k3 beside it, and the three ways to average over tokens."""
    live = token_log_probs(module.policy, rollout)
    with torch.no_grad():
        reference = token_log_probs(module.actors.reference, rollout)
    responses: list[Tensor] = []
    for row, rewards in enumerate(rollout.rewards.tolist()):
        spread = statistics.stdev(rewards) + 1e-4 if scale else 1.0
        for place, reward in enumerate(rewards):
            advantage = (reward - statistics.fmean(rewards)) / spread
            ratio = (live[row][place] - old[row][place]).exp()
            surrogate = torch.minimum(
                ratio * advantage, ratio.clamp(1 - CLIP, 1 + (module.clip_high or CLIP)) * advantage
            )
            apart = reference[row][place] - live[row][place]
            responses.append(-surrogate + BETA * (apart.exp() - apart - 1))
    if norm == "grpo":
        return torch.stack([tokens.mean() for tokens in responses]).mean()
    if norm == "dr_grpo":
        return torch.cat(responses).sum() / (len(responses) * module.loaded.max_new_tokens)
    return torch.cat(responses).mean()


@pytest.mark.parametrize("norm", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize(("scale", "later"), [(True, False), (True, True), (False, True)])
def test_the_loss_is_the_documented_one(norm: str, scale: bool, later: bool, files: Path) -> None:
    several = {"clip": CLIP, "clip_high": 0.15, "epochs_per_rollout": 2} if later else {"epochs_per_rollout": 1}
    options = {"length_norm": norm, "scale_rewards": scale, "minibatches": 1, **several}
    module, batch = set_up("grpo", files, beta=BETA, **options)
    scored = module._sample(batch, 0)
    lengths = scored.completions.mask.sum(-1)
    assert lengths.min() < lengths.max()
    if later:  # the second update: the policy is no longer the one that sampled
        (experience,) = module._collect(scored)
        with torch.no_grad():
            old = token_log_probs(module.policy, experience.rollout)
        move(module)
        loss, rollout, logs = module._minibatch_update(experience)
        assert logs["clip_fraction"] > 0
    else:
        loss, rollout, _ = module._on_policy_update(scored)
        with torch.no_grad():
            old = token_log_probs(module.policy, rollout)
    hand = trl_loss(module, rollout, old, norm, scale)
    torch.testing.assert_close(loss, hand, rtol=1e-4, atol=1e-5)
    assert_same_gradient(module, loss, hand)


def test_what_is_not_said(files: Path) -> None:
    module: Any = GRPO(make_data(files).actors)
    assert module.mean_over == "responses"
    assert GRPO(make_data(files).actors, length_norm="dapo").mean_over == "tokens"
    # Without a KL an estimator of it is refused, unless the normalised advantages ask for one.
    free: Any = GRPO(make_data(files).actors, beta=0.0, kl_estimator="sampled", normalise=True)
    assert (free.beta, free.normalise) == (0.0, True)
    with pytest.raises(ValueError, match=r"^model\.kl_estimator=sampled has no effect with model\.beta=0"):
        GRPO(make_data(files).actors, beta=0.0, kl_estimator="sampled")


def test_without_the_kl(files: Path) -> None:
    module, batch = set_up("grpo", files, beta=0.0, minibatches=1, epochs_per_rollout=1)
    loss, rollout, _ = module._on_policy_update(module._sample(batch, 0))
    assert rollout.token_kl.sum() > 1e-3, "it is still measured"
    again, _, _ = module._on_policy_update(module._sample(batch, 0)._replace(reference_rewards=None))
    assert_same_gradient(module, loss, again)


def test_a_mean_over_tokens_is_over_those_of_all_ranks(files: Path) -> None:
    """This rank's mean counts for its share of the tokens, times the ranks that Lightning divides by."""
    module, batch = set_up("grpo", files, length_norm="dapo", minibatches=1, epochs_per_rollout=1)
    scored = module._sample(batch, 0)
    alone, rollout, _ = module._on_policy_update(scored)
    tokens = int(rollout.completions.mask.sum())
    attach(module, FakeTrainer(other=3.0 * tokens))
    module._weights = [1.0]
    module._weights[0] = 4.0 * tokens  # the first batch of the update: no other is known yet
    together, _, _ = module._on_policy_update(scored)
    torch.testing.assert_close(together, alone * 2 / 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_high": 0.0}, "model.clip_high must be a number > 0, got 0.0"),
        ({"beta": -0.1}, "model.beta must be a number >= 0, got -0.1"),
        ({"length_norm": "x"}, "model.length_norm must be one of grpo, dr_grpo, dapo; got 'x'"),
        ({"estimator": "ppo"}, "GRPO compares the responses to a prompt with each other, and a critic cannot"),
        (
            {"samples_per_prompt": 1},
            "GRPO compares the responses to a prompt with each other: set model.samples_per_prompt, which is 1, to 2",
        ),
    ],
)
def test_options_that_make_no_sense(changes: dict[str, Any], message: str, files: Path) -> None:
    with pytest.raises(ValueError, match=message):
        GRPO(make_data(files).actors, **changes)


@pytest.mark.parametrize("method", [GRPO, PFPPO, RLOO])
def test_two_responses_are_a_group(method: Any, files: Path) -> None:
    assert method(make_data(files).actors, samples_per_prompt=2).samples_per_prompt == 2


def said(text: str) -> dict[str, Any]:
    """Return the options that a text names, each as it would be written in a config."""
    return {name: yaml.safe_load(value) for name, value in re.findall(r"`(\w+): ([\w.]+)", text)}


@pytest.mark.parametrize("name", ["Dr. GRPO", "DAPO"])
def test_the_recipes_that_are_printed_are_taken(name: str, files: Path) -> None:
    page = Path(__file__).parents[2].joinpath("docs/estimators.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith(f"| {name} (")]
    recipe = said(row.split("|")[2])
    begin, end = {"Dr. GRPO": ('"Dr. GRPO"', "Of DAPO"), "DAPO": ("Of DAPO", "not its sampling")}[name]
    prose = " ".join((inspect.getdoc(GRPO) or "").split())
    assert recipe == said(prose[prose.index(begin) : prose.index(end)])
    module = GRPO(make_data(files).actors, **recipe)
    assert len(recipe) >= 2 and all(module.hparams[option] == value for option, value in recipe.items())


def test_the_mean_that_holds_the_sample_leaves_the_kl_more_weight(files: Path) -> None:
    """RLOO with beta G/(G - 1) has GRPO's gradient over (G - 1)/G, where nothing else sets the two apart."""
    unscaled = {"scale_rewards": False, "minibatches": 1, "epochs_per_rollout": 1, "samples_per_prompt": 4}
    exact = {"kl_estimator": "rao_blackwell", "length_norm": "dr_grpo"}
    grpo, batch = set_up("grpo", files, beta=BETA, **unscaled, **exact)
    rloo, _ = set_up("rloo", files, beta=BETA * 4 / 3, kl_estimator="rao_blackwell", samples_per_prompt=4)
    move(grpo)
    move(rloo)
    scored = grpo._sample(batch, 0)
    gradients = []
    for module in (grpo, rloo):
        loss, _, _ = module._on_policy_update(scored)
        gradients.append(gradient(module, loss))
    shrunk = gradients[1] * 3 / 4 / grpo.loaded.max_new_tokens
    torch.testing.assert_close(gradients[0], shrunk, rtol=1e-3, atol=1e-6)
    assert gradients[0].norm() > 1e-2
