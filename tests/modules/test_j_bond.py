"""J-BOND: a step's gradient by hand, with one response a prompt and with several; and its options."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers import readable
from tests.modules.fake import FakeTrainer, attach
from tests.modules.one_update import UNEVEN
from tests.modules.setting import make_data, make_files, make_module, prepared
from tests.modules.test_forward_term import assert_same_gradient, nll
from tests.modules.test_policy_gradient import TEMPERATURE, by_hand
from vbon_lightning import JBOND
from vbon_lightning.types import select_prompts


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


def stepped(files: Path, brought: dict[str, Any] | None = None, **options: Any) -> tuple[Any, Any]:
    """Return a module whose policy and anchor have gone their own ways, and what a step samples."""
    data = make_data(files, **({"val": None, "temperature": TEMPERATURE} | (brought or {})))
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


@pytest.mark.parametrize("kl_estimator", ["rao_blackwell", "sampled"])
def test_one_response_a_prompt_is_compared_with_those_of_all_ranks(kl_estimator: str, files: Path) -> None:
    """Also where the longest of them is another rank's: each pads to its own."""
    module, scored = stepped(files, UNEVEN, kl_estimator=kl_estimator, jeffreys_weight=1.0)
    rollout, _ = module._evaluate_responses(scored)
    whole, _ = module._advantages(module._target(rollout), rollout, None)
    order = rollout.completions.mask.sum(-1)[:, 0].argsort()
    mine, rest = cut(rollout, order[:3].tolist()), select_prompts(rollout, order[3:].tolist())
    width = mine.completions.mask.shape[-1]
    assert width < rest.completions.mask.shape[-1]
    paid = rest.token_kl.flip(-1).cumsum(-1).flip(-1) - rest.token_kl
    if kl_estimator == "sampled":
        paid = (rest.log_probs - rest.reference_log_probs).sum(-1, keepdim=True).expand(paid.shape)
    target = module._target(rest)
    totals = (target.score.unsqueeze(-1) - target.kl_coef * paid.detach()).sum((0, 1))
    totals = torch.cat([totals, totals[-1:].expand(UNEVEN["max_new_tokens"] - len(totals))])
    others = iter([torch.tensor(3.0), totals])
    trainer = FakeTrainer()
    attach(module, trainer)
    trainer.strategy.reduce = lambda part, reduce_op: part + next(others)
    found, _ = module._advantages(module._target(mine), mine, None)
    torch.testing.assert_close(found, whole[order[:3], :, :width], atol=1e-5, rtol=1e-5)


def cut(rollout: Any, rows: list[int]) -> Any:
    """Return some prompts of a rollout, no wider than the longest of their responses."""
    some = select_prompts(rollout, rows)
    width = int(some.completions.mask.sum(-1).max())
    whole = some.completions
    found = {
        name: part[..., :width] for name, part in whole._asdict().items() if name in ("tokens", "mask", "log_probs")
    }
    return some._replace(
        completions=whole._replace(**found),
        **{name: getattr(some, name)[..., :width] for name in ("log_probs", "reference_log_probs", "token_kl")},
    )


LATE: list[tuple[dict[str, Any], int, dict[str, Any], str]] = [
    ({}, 1, {"world_size": 1}, "takes its baseline from the other prompts of an update, and there are none"),
    (
        {"anchor_rate": 0.0, "estimator": "clipped", "minibatches": 4},
        4,
        {"world_size": 1},
        "set data.batch_size to at least 2 for each of",
    ),
    ({}, 4, {"accumulate_grad_batches": 2}, "gradients accumulated over several are not those of a larger one: set tr"),
]


@pytest.mark.parametrize(("options", "size", "trainer", "message"), LATE, ids=readable)
def test_one_response_a_prompt_needs_a_batch_to_compare_with(
    options: dict[str, Any], size: int, trainer: dict[str, Any], message: str, files: Path
) -> None:
    module: Any = make_module("jbond", make_data(files), **options)
    attach(module, FakeTrainer(datamodule=SimpleNamespace(batch_size=size), precision="32-true", **trainer))
    with pytest.raises(ValueError, match=message):
        module.setup("fit")
    siblings: Any = make_module("jbond", make_data(files), samples_per_prompt=2, **options)
    for one in (siblings, make_module("jbond", make_data(files), estimator="ppo")):  # these have a baseline
        attach(one, FakeTrainer(datamodule=SimpleNamespace(batch_size=size), precision="32-true", **trainer))
        one.setup("fit")


def test_two_ranks_of_one_prompt_are_a_batch_of_two(files: Path) -> None:
    module: Any = make_module("jbond", make_data(files))
    attach(module, FakeTrainer(datamodule=SimpleNamespace(batch_size=1), precision="32-true"))
    module.setup("fit")


def test_a_batch_that_turns_out_to_be_one_prompt_is_refused(files: Path) -> None:
    module, scored = stepped(files)
    with pytest.raises(ValueError, match="takes its baseline from the other prompts of an update, and there are none"):
        module.training_step(select_prompts(scored.prompts, [0]), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jeffreys_weight": 0.0}, r"model.jeffreys_weight must be in \(0, 1\], got 0.0"),
        ({"jeffreys_weight": 1.1}, "model.jeffreys_weight must be in .0, 1., got 1.1"),
        ({"regularisation": -0.1}, "model.regularisation must be a number >= 0, got -0.1"),
        ({"reference_samples": 1}, "model.reference_samples must be >= 2, got 1"),
        ({"kl_estimator": "prefix_baseline"}, "one response a prompt has the rest of the batch for a baseline"),
        ({"kl_estimator": "k3"}, "one response a prompt has the rest of the batch for a baseline"),
        ({"value_model": True}, "JBOND has no use for a value model: set model.value_model to false"),
        ({"jeffreys_weight": 1.0, "kl_estimator": "sampled", "normalise": True}, "one response a prompt has the rest"),
        ({"samples_per_prompt": 0}, "model.samples_per_prompt must be >= 1, got 0"),
    ],
    ids=readable,
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str, files: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_module("jbond", make_data(files, value_model=str(files / "llama")), **options)


def test_a_value_model_that_is_named_is_left_alone(files: Path) -> None:
    data = make_data(files, value_model=str(files / "llama"))
    assert not make_module("jbond", data, anchor_rate=0.0).uses_value_model  # type: ignore[attr-defined]


def test_a_critic_foretells_the_reward_of_best_of_two(files: Path) -> None:
    module, scored = stepped(files, estimator="ppo", samples_per_prompt=3, kl_estimator="sampled")
    torch.nn.init.normal_(module.critic.weight, generator=torch.Generator().manual_seed(0))
    rollout, values = module._evaluate_responses(scored)
    advantages, returns = module._advantages(module.target(rollout), rollout, values)
    assert returns is not None and returns.shape == values.shape
    other, _ = module._advantages(module.target(rollout), rollout, values + 1)
    assert (advantages - other).abs().max() > 0.1


def test_what_is_not_said(files: Path) -> None:
    module: Any = JBOND(make_data(files).actors)
    assert (module.samples_per_prompt, module.eval_samples, module.reference_samples) == (1, 8, 2)
    assert (module.backward_weight, module.regularisation, module.anchor_rate) == (0.5, 0.0, 0.02)
    assert make_module("jbond", make_data(files), eval_samples=3).eval_samples == 3  # type: ignore[attr-defined]


def test_an_anchor_that_stays_and_one_that_is_replaced_will_do(files: Path) -> None:
    for options, moves in (({"anchor_rate": 0.0}, False), ({"anchor_rate": 0.0, "anchor_every": 3}, True)):
        module: Any = make_module("jbond", make_data(files), **options)
        assert module.anchor_moves is moves
