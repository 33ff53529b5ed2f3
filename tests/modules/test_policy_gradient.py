"""One update, by hand: the gradient, the ratio, the logged KL and the critic; and noise that no rollouts share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from tests.helpers import readable
from tests.modules.setting import VowelReward, make_data, make_files, make_module, make_trainer
from vbon_lightning import KLRL
from vbon_lightning.types import Rollout, select_prompts

TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


class Record(Callback):
    """Keep what each training step logs."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.rollouts: list[Rollout] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        metrics = trainer.callback_metrics
        self.logged.append({name.removeprefix("train/"): float(metrics[name]) for name in metrics})
        self.rollouts.append(outputs["rollout"])


def by_hand(module: Any, model: Any, rollout: Rollout) -> list[list[tuple[Tensor, Tensor]]]:
    """Return log-probabilities ``[t, V]`` and tokens ``[t]`` of each response, each row run by itself."""
    rows = []
    for tokens, keep, samples, masks in zip(
        rollout.prompts.tokens, rollout.prompts.mask, rollout.completions.tokens, rollout.completions.mask, strict=True
    ):
        prompt = tokens[keep]
        row = []
        for sample, mask in zip(samples, masks, strict=True):
            response = sample[mask]
            logits = model(input_ids=torch.cat([prompt, response])[None]).logits[0]
            row.append(((logits[len(prompt) - 1 : -1] / TEMPERATURE).log_softmax(-1), response))
        rows.append(row)
    return rows


def hand_written_loss(module: Any, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Return a loss whose gradient is the update's, and the mean of score - coef KL."""
    live = by_hand(module, module.policy, rollout)
    with torch.no_grad():
        frozen = by_hand(module, module.actors.reference, rollout)
    target = module.target(rollout)
    losses, objectives = [], []
    for prompt, (row, row_reference) in enumerate(zip(live, frozen, strict=True)):
        ratios, kls, chosen = [], [], []
        for (log_p, response), (log_q, _) in zip(row, row_reference, strict=True):
            picked = log_p.gather(-1, response[:, None])[:, 0]
            chosen.append(picked)
            ratios.append(picked.detach() - log_q.gather(-1, response[:, None])[:, 0])
            kls.append((log_p.exp() * (log_p - log_q)).sum(-1))
        count, scores = len(row), target.score[prompt]
        for i in range(count):
            others = [j for j in range(count) if j != i]
            if module.kl_estimator == "sampled":
                value = [scores[j] - target.kl_coef * ratios[j].sum() for j in range(count)]
                advantage = (value[i] - torch.stack([value[j] for j in others]).mean()).expand(len(chosen[i]))
                loss = -(advantage * chosen[i]).sum()
            else:
                terms = []
                for t in range(len(chosen[i])):
                    later = [scores[j] - target.kl_coef * kls[j][t + 1 :].sum().detach() for j in range(count)]
                    advantage = later[i] - torch.stack([later[j] for j in others]).mean()
                    terms.append(-advantage * chosen[i][t] + target.kl_coef * kls[i][t])
                loss = torch.stack(terms).sum()
            losses.append(loss)
            objectives.append(scores[i] - target.kl_coef * kls[i].sum().detach())
    return torch.stack(losses).mean(), torch.stack(objectives).mean()


@pytest.mark.parametrize("kl_estimator", ["sampled", "rao_blackwell"])
@pytest.mark.parametrize("estimator", ["reinforce", "clipped"])
@pytest.mark.parametrize(("kind", "changes"), [("vbon", {}), ("vbon", {"bound": "lower"}), ("klrl", {})], ids=readable)
def test_the_update_is_the_hand_written_gradient(
    kind: str, changes: dict[str, Any], estimator: str, kl_estimator: str, files: Path
) -> None:
    data = make_data(files, temperature=TEMPERATURE)
    module: Any = make_module(kind, data, kl_estimator=kl_estimator, estimator=estimator, **changes)
    module.configure_model()
    with torch.no_grad():  # away from the reference, where the KL has a gradient
        for index, parameter in enumerate(module.policy.parameters()):
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    batch = data._collate_prompts([(i, True, row) for i, row in enumerate(data.prompts("train")[:3])])
    loss, rollout, logs = module._on_policy_update(module._sample(batch, 0))
    assert float(rollout.token_kl.sum()) > 1e-3
    parameters = list(module.policy.parameters())
    found = torch.autograd.grad(loss, parameters)
    hand, objective = hand_written_loss(module, rollout)
    expected = torch.autograd.grad(hand, parameters)
    assert max(float(part.abs().max()) for part in expected) > 1e-3
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-6)
    # The logged KL is the trained one.
    torch.testing.assert_close(logs["objective"], objective, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["clipped", "ppo"])
def test_the_ratio_is_exactly_one_before_any_update(kind: str, files: Path, tmp_path: Path) -> None:
    data, record = make_data(files), Record()
    make_trainer(tmp_path, record, steps=12, limit_val_batches=0).fit(make_module(kind, data), data)
    ratios = [logged["ratio"] for logged in record.logged]
    assert [ratios[step] for step in (0, 4, 8)] == [1.0, 1.0, 1.0]
    assert [record.logged[step]["update_kl"] for step in (0, 4, 8)] == [0.0, 0.0, 0.0]
    assert all(ratio != 1.0 for step, ratio in enumerate(ratios) if step % 4)


def test_every_prompt_is_learnt_once_a_pass(files: Path, tmp_path: Path) -> None:
    data, record = make_data(files), Record()
    make_trainer(tmp_path, record, steps=8, limit_val_batches=0).fit(make_module("clipped", data), data)
    seen = [rollout.prompts.index.tolist() for rollout in record.rollouts]
    passes = [sorted(seen[step] + seen[step + 1]) for step in range(0, 8, 2)]
    assert passes[0] == passes[1]
    assert passes[2] == passes[3]
    assert not set(passes[0]) & set(passes[2])
    assert all(len(set(prompts)) == 4 for prompts in passes)


def test_the_critic_learns(files: Path, tmp_path: Path) -> None:
    data, record = make_data(files), Record()
    module = make_module("ppo", data, lr_scheduler=None, value_clip=10.0, samples_per_prompt=16, gae_lambda=1.0)
    make_trainer(tmp_path, steps=80, limit_val_batches=0, callbacks=[record], enable_checkpointing=False).fit(
        module, data
    )
    losses = [logged["value_loss"] for logged in record.logged]
    start, end = sum(losses[:8]) / 8, sum(losses[-8:]) / 8
    assert end < 0.5 * start


def test_critic_weights_are_trained(files: Path, tmp_path: Path) -> None:
    data = make_data(files)
    module: Any = make_module("ppo", data)
    make_trainer(tmp_path, steps=1, limit_val_batches=0).fit(module, data)
    assert float(module.critic.weight.detach().abs().max()) > 0


def test_select_prompts() -> None:
    from tests.rollouts import make_rollout

    rollout = make_rollout(prompts=3)
    chosen = select_prompts(rollout, [2, 0])
    assert torch.equal(chosen.rewards, rollout.rewards[[2, 0]])
    assert chosen.prompts.text == [rollout.prompts.text[2], rollout.prompts.text[0]]
    assert chosen.responses == [rollout.responses[2], rollout.responses[0]]
    assert select_prompts(rollout._replace(reference_rewards=None), [1]).reference_rewards is None


@pytest.mark.parametrize(
    ("cls", "changes", "message"),
    [
        (
            KLRL,
            {"normalise": True},
            "normalise divides the advantages, and with model.kl_estimator=rao_",
        ),
        (KLRL, {"estimator": "a2c"}, "model.estimator must be one of reinforce, clipped, ppo; got 'a2c'"),
        (KLRL, {"kl_estimator": "k4"}, "model.kl_estimator must be one of"),
        (KLRL, {"epochs_per_rollout": 2}, "REINFORCE is unbiased for one update a rollout only"),
        (KLRL, {"minibatches": 2}, "REINFORCE is unbiased for one update a rollout only"),
        (KLRL, {"minibatches": 0}, "must be >= 1"),
        (KLRL, {"samples_per_prompt": 1}, "samples_per_prompt >= 2, got 1"),
        (KLRL, {"samples_per_prompt": 0, "estimator": "ppo"}, "samples_per_prompt must be >= 1, got 0"),
        (KLRL, {"kl_estimator": "prefix_baseline", "estimator": "ppo"}, "leave-one-out baseline"),
        (KLRL, {"eval_samples": 0}, "eval_samples must be >= 1, got 0"),
        (KLRL, {"reference_samples": -1}, "reference_samples must be >= 0, got -1"),
        (KLRL, {"clip": 0.0}, "model.clip must be > 0"),
        (KLRL, {"value_clip": -1.0}, "model.value_clip must be > 0"),
        (KLRL, {"value_coef": -1.0}, "model.value_coef must be >= 0"),
        (KLRL, {"gae_lambda": 1.5}, r"model.gae_lambda must be in \[0, 1\]"),
    ],
    ids=readable,
)
def test_options_that_make_no_sense(cls: Any, changes: dict[str, Any], message: str, files: Path) -> None:
    with pytest.raises(ValueError, match=message):
        cls(make_data(files).actors, **changes)


def test_ppo_may_have_one_sample(files: Path, tmp_path: Path) -> None:
    data = make_data(files)
    module: Any = make_module("ppo", data, samples_per_prompt=1)
    make_trainer(tmp_path, steps=4, limit_val_batches=0).fit(module, data)
    assert module.batches_seen == 4


def test_texts_that_a_reward_model_could_not_read_whole_are_counted(files: Path, tmp_path: Path) -> None:
    class Cutting(VowelReward):
        cut_prompts, cut_responses = 3, 0

    record = Record()
    data = make_data(files, reward=Cutting(), val=None)
    make_trainer(tmp_path, record, steps=1).fit(make_module("klrl", data), data)
    assert record.logged[0]["reward_cut_prompts"] == 3
    assert "reward_cut_responses" not in record.logged[0]


class Draws(Callback):
    """Keep what each training step samples."""

    def __init__(self) -> None:
        self.tokens: list[Tensor] = []
        self.advantages: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.tokens.append(outputs["rollout"].completions.tokens[batch.index.argsort()])


@pytest.mark.parametrize("kind", ["vbon", "klrl"])
def test_every_rollout_has_noise_of_its_own(kind: str, files: Path, tmp_path: Path) -> None:
    draws = Draws()
    data = make_data(files, val=None, batch_size=10)  # all prompts at every step
    still = make_module(kind, data, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0), lr_scheduler=None)
    make_trainer(tmp_path, draws, steps=3).fit(still, data)
    for first, second in ((0, 1), (1, 2), (0, 2)):
        width = min(draws.tokens[first].shape[-1], draws.tokens[second].shape[-1])
        same = (draws.tokens[first][..., :width] == draws.tokens[second][..., :width]).all(-1)
        assert same.float().mean() < 0.5, "the policy stood still, so only the noise can differ"


def test_whitening_is_not_accumulated(files: Path, tmp_path: Path) -> None:
    data = make_data(files, val=None, batch_size=2)
    module = make_module("klrl", data, kl_estimator="sampled", normalise=True)
    with pytest.raises(ValueError, match="model.normalise divides by the spread of one batch"):
        make_trainer(tmp_path, steps=1, accumulate_grad_batches=2).fit(module, data)
