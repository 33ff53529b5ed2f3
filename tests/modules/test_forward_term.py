"""The forward KL beside a policy gradient, or alone: its gradient by hand, its responses, and what it costs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import readable
from tests.models.setting import make_valued_files
from tests.modules.fake import FakeTrainer, attach
from tests.modules.setting import Picky, VowelReward, make_data, make_module, make_trainer, prepared
from tests.modules.test_policy_gradient import TEMPERATURE, hand_written_loss
from tests.modules.wiring.setting import Spy
from vbon_lightning.modules import forward_term
from vbon_lightning.rewards import RewardCalls
from vbon_lightning.types import Responses

N, B = 4, 0.3


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_valued_files(tmp_path_factory.mktemp("files"), temperature=TEMPERATURE)


def setting(kind: str, files: Path, *, table: bool = False, **options: Any) -> tuple[Any, Any]:
    """Return a module away from its reference, and a batch as training brings it."""
    named = {"reference_table": str(files / "table")} if table else {}
    data = make_data(files, val=None, temperature=TEMPERATURE, **named)
    module = prepared(kind, data, **({"reference_samples": 0} if table else {}), **options)
    rows = data.prompts("train")[:3]
    batch = data.table_batch(rows) if table else data._collate_prompts([(i, True, row) for i, row in enumerate(rows)])
    return module, batch


def nll(module: Any, prompts: Any, responses: Responses) -> Tensor:
    """Return each response's negative log-likelihood ``[B, K]``, each run by itself."""
    rows = []
    for tokens, keep, samples, masks in zip(
        prompts.tokens, prompts.mask, responses.tokens, responses.mask, strict=True
    ):
        row = []
        for sample, mask in zip(samples, masks, strict=True):
            prompt, response = tokens[keep], sample[mask]
            logits = module.policy(input_ids=torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
            log_p = (logits / TEMPERATURE).log_softmax(-1)
            row.append(-log_p.gather(-1, response[:, None]).sum())
        rows.append(torch.stack(row))
    return torch.stack(rows)


def subset_weights(rewards: Tensor, n: int) -> Tensor:
    """Return the chance of each response to be the best of n of them, ties shared, from every subset."""
    weights = torch.zeros_like(rewards)
    subsets = list(itertools.combinations(range(len(rewards)), n))
    for subset in subsets:
        best = max(rewards[list(subset)])
        winners = [place for place in subset if rewards[place] == best]
        weights[winners] += 1 / len(winners) / len(subsets)
    return weights


def assert_same_gradient(module: Any, loss: Tensor, by_hand: Tensor) -> None:
    parameters = list(module.policy.parameters())
    found, expected = (torch.autograd.grad(value, parameters, retain_graph=True) for value in (loss, by_hand))
    assert max(float(part.abs().max()) for part in expected) > 1e-3
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("forward_responses", [3, None])
@pytest.mark.parametrize("table", [False, True], ids=["fresh", "table"])
def test_the_gradient_of_the_mixture(table: bool, forward_responses: int | None, files: Path) -> None:
    module, batch = setting(
        "jeffreys", files, table=table, jeffreys_weight=B, forward_responses=forward_responses, estimator="reinforce"
    )
    loss, rollout, logs = module._on_policy_update(module._sample(batch, 0))
    backward, objective = hand_written_loss(module, rollout)
    each = nll(module, rollout.prompts, rollout.extra)
    if forward_responses is None:
        weights = torch.stack([subset_weights(row, N) for row in rollout.reference_rewards])
        forward = (weights * each).sum(-1).mean()
    else:
        assert each.shape == (3, 3)
        forward = each.mean()
    assert_same_gradient(module, loss, B * backward + (1 - B) / (N - 1) * forward)
    held = [value for value in rollout if isinstance(value, Tensor)]
    assert not any(value.requires_grad for value in held), "what callbacks see holds no graph of the policy's passes"
    torch.testing.assert_close(logs["forward_nll"], forward.detach(), rtol=1e-4, atol=1e-4)
    want = B * objective - (1 - B) / (N - 1) * forward.detach()
    torch.testing.assert_close(logs["objective"], want, rtol=1e-4, atol=1e-4)
    if table:
        # What is learnt stands in the table.
        cached = {tuple(row[keep].tolist()) for row, keep in zip(
            batch.responses.tokens.flatten(0, 1), batch.responses.mask.flatten(0, 1), strict=True)}  # fmt: skip
        for row, keep in zip(rollout.extra.tokens.flatten(0, 1), rollout.extra.mask.flatten(0, 1), strict=True):
            assert tuple(row[keep].tolist()) in cached


@pytest.mark.parametrize("table", [False, True], ids=["fresh", "table"])
def test_the_forward_divergence_alone_samples_nothing_from_the_policy(
    table: bool, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, batch = setting("forward", files, table=table, forward_responses=None)
    logged: dict[str, Tensor] = {}
    monkeypatch.setattr(module, "log_dict", logged.update)
    asked = []
    monkeypatch.setattr(type(module.loaded), "scored_responses", lambda *_, **__: asked.append(1))
    loss = module.training_step(batch, 0)["loss"]
    assert not asked
    prompts = batch.prompts if table else batch
    if table:
        responses, rewards = batch.responses, prompts.reference_rewards
    else:
        how = {"num_samples": 16, "seed": 0, "stream": "train/reference", "step": 0}
        responses, rewards = module.loaded.reference_responses(prompts, **how)
    weights = torch.stack([subset_weights(row, N) for row in rewards])
    forward = (weights * nll(module, prompts, responses)).sum(-1).mean()
    assert_same_gradient(module, loss, forward / (N - 1))
    assert set(logged) == {"train/objective", "train/forward_nll"}
    assert logged["train/objective"].item() == pytest.approx(-loss.item())
    assert logged["train/forward_nll"].item() == pytest.approx(forward.item(), rel=1e-4)
    assert module.batches_seen == 1


def test_what_is_picked_is_another_at_each_step(files: Path) -> None:
    module, batch = setting("jeffreys", files, table=True)
    first, second = (module._sample(batch, number).extra for number in (0, 1))
    assert first.tokens.tolist() != second.tokens.tolist()
    assert torch.equal(module._sample(batch, 0).extra.tokens, first.tokens)


def test_minibatches_keep_their_own_prompts_responses(files: Path) -> None:
    module, batch = setting("jeffreys", files, estimator="clipped", epochs_per_rollout=2, minibatches=3)
    whole = module._sample(batch, 0)
    parts = module._collect(whole)
    for row, part in enumerate(parts):
        assert torch.equal(part.rollout.extra.tokens, whole.extra.tokens[row : row + 1])
        loss, _, logs = module._minibatch_update(part)
        expected = nll(module, part.rollout.prompts, part.rollout.extra).mean()
        assert logs["forward_nll"].item() == pytest.approx(expected.item(), rel=1e-4)
        assert {"clip_fraction", "ratio", "update_kl"} < set(logs), "beside what the backward divergence logs"
        assert loss.requires_grad


def test_a_critic_reads_the_policys_own_responses_only(files: Path) -> None:
    module, batch = setting("jeffreys", files, estimator="ppo")
    rollout = module._sample(batch, 0)
    _, values = module._evaluate_responses(rollout)
    _, alone = module._evaluate_responses(rollout._replace(extra=None))
    assert values.shape == rollout.completions.mask.shape
    torch.testing.assert_close(values, alone)


def test_references_without_a_reward_are_drawn_again_with_their_rewards(files: Path) -> None:
    data = make_data(files, reward=Picky("ab"), reward_calls=RewardCalls(on_missing="skip"))
    module = prepared("jeffreys", data)
    batch = data._collate_prompts([(i, True, row) for i, row in enumerate(data.prompts("train")[:4])])
    how = {"num_samples": 8, "seed": 3, "stream": "a", "step": 0}
    responses, rewards = module.loaded.reference_responses(batch, **how)
    assert not rewards.isnan().any()
    ids = module.loaded.token_ids(responses)
    texts = module.loaded.decode(ids, batch)
    assert not any(text.startswith(("a", "b")) for row in texts for text in row)
    torch.testing.assert_close(rewards, VowelReward()(batch.text, texts, ids))
    plain = prepared("jeffreys", make_data(files))
    anything, _ = plain.loaded.reference_responses(batch, **how)
    first = plain.loaded.decode(plain.loaded.token_ids(anything), batch)
    kept = [(a, b) for ours, theirs in zip(texts, first, strict=True) for a, b in zip(ours, theirs, strict=True)]
    assert any(theirs.startswith(("a", "b")) for _, theirs in kept)
    assert all(ours == theirs for ours, theirs in kept if not theirs.startswith(("a", "b")))


def test_responses_without_a_reward_take_nothing_from_the_forward_kl(files: Path) -> None:
    data = make_data(files, reward_calls=RewardCalls(on_missing="skip"))
    module = prepared("jeffreys", data, jeffreys_weight=B, estimator="reinforce")
    batch = data._collate_prompts([(i, True, row) for i, row in enumerate(data.prompts("train")[:3])])
    scored = module._sample(batch, 0)
    rewards = scored.rewards.clone()
    rewards[0], rewards[1, :2] = torch.nan, torch.nan
    scored = scored._replace(rewards=rewards)
    loss, _, logs = module._on_policy_update(scored)
    without, _, _ = module._on_policy_update(scored._replace(extra=None))
    assert loss.isfinite()
    assert (loss - without).item() == pytest.approx((1 - B) / (N - 1) * logs["forward_nll"].item(), rel=1e-4)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("vbon", {"divergence": "x"}, "model.divergence must be one of backward, forward, jeffreys; got 'x'"),
    ("jeffreys", {"jeffreys_weight": 1.0}, "model.jeffreys_weight must be in .0, 1., got 1.0"),
    ("jeffreys", {"jeffreys_weight": 0.0}, "model.jeffreys_weight must be in .0, 1., got 0.0"),
    ("jeffreys", {"forward_responses": 0}, "model.forward_responses must be an integer >= 1, got 0"),
    ("jeffreys", {"normalise": True, "kl_estimator": "sampled"}, "and not the forward KL, whose weight would be an"),
    ("forward", {"estimator": "clipped", "minibatches": 2}, "model.divergence=forward learns from the reference's"),
    ("forward", {"value_model": True}, "model.divergence=forward learns from the reference's"),
]


@pytest.mark.parametrize(("kind", "options", "message"), REFUSED, ids=readable)
def test_options_that_make_no_sense(kind: str, options: dict[str, Any], message: str, files: Path) -> None:
    data = make_data(files, value_model=str(files / "value"))
    with pytest.raises(ValueError, match=message):
        make_module(kind, data, **options)


LATE: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = [
    ({"n": 2.5}, {}, {}, "takes the best of a whole number of responses, got n = 2.5"),
    ({"reference_samples": 0}, {}, {}, "needs reference rewards|learns from the reference's responses: name a table"),
    ({"reference_samples": 0, "value_model": True}, {"value_model": "value"}, {}, "responses: name a table"),
    ({"reference_samples": 3}, {}, {}, "M = 3 reference re"),
    ({}, {"reward_calls": RewardCalls(on_missing="skip")}, {"accumulate_grad_batches": 2}, "weighs accumulated batch"),
]


@pytest.mark.parametrize(("options", "data", "trainer", "message"), LATE, ids=readable)
def test_what_it_cannot_learn_from_is_refused_before_it_starts(
    options: dict[str, Any], data: dict[str, Any], trainer: dict[str, Any], message: str, files: Path, tmp_path: Path
) -> None:
    named = {name: str(files / value) if isinstance(value, str) else value for name, value in data.items()}
    brought = make_data(files, val=None, temperature=TEMPERATURE, **named)
    run = make_trainer(tmp_path, steps=1, **trainer)
    with pytest.raises(ValueError, match=message):
        run.fit(make_module("jeffreys", brought, **options), brought)


def test_prompts_of_a_loader_alone_bring_no_responses_to_learn_from(files: Path) -> None:
    module: Any = make_module("jeffreys", make_data(files, value_model=str(files / "value")), reference_samples=0)
    attach(module, FakeTrainer(precision="32-true"))  # without a data module
    with pytest.raises(ValueError, match=r"^model\.divergence=jeffreys learns from .*: name a table"):
        module.setup("fit")


def test_a_named_value_model_has_no_part_in_it(files: Path) -> None:
    data = make_data(files, value_model=str(files / "value"))
    forward: Any = make_module("forward", data)
    jeffreys: Any = make_module("jeffreys", data)
    assert (forward.uses_value_model, jeffreys.uses_value_model) == (False, True)


def test_ties_among_the_best_are_broken_by_noise_of_their_own(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, batch = setting("forward", files)
    asked = Spy(forward_term.pick_best)
    monkeypatch.setattr(forward_term, "pick_best", asked)
    module.training_step(batch, 0)
    ((_, how),) = asked.calls
    assert (how["stream"], how["seed"], how["step"]) == ("train/forward", module.seed, 0), "apart from what samples"


def test_the_forward_kl_alone_learns_from_the_anchor_where_it_moves(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for options, moves in (({}, False), ({"anchor_rate": 0.1}, True)):
        module, batch = setting("forward", files, **options)
        asked = Spy(module.loaded.reference_responses)
        monkeypatch.setattr(module.loaded, "reference_responses", asked)
        module.training_step(batch, 0)
        module.training_step(batch, 1)
        assert [(how["anchored"], how["step"]) for _, how in asked.calls] == [(moves, 0), (moves, 1)]


def test_what_is_skipped_goes_with_batches_that_are_not_accumulated(files: Path, tmp_path: Path) -> None:
    data = make_data(files, val=None, reward=Picky("a"), reward_calls=RewardCalls(on_missing="skip"))
    module: Any = make_module("forward", data)
    attach(module, FakeTrainer(datamodule=data))
    module.setup("fit")
    attach(module, FakeTrainer(datamodule=data, accumulate_grad_batches=2))
    with pytest.raises(ValueError, match=r"^data\.reward_calls\.on_missing=skip weighs accumulated batches"):
        module.setup("fit")
