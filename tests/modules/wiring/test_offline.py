"""Cached responses: what is picked, compared and distilled."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.modules.fake import FakeTrainer, attach
from tests.modules.offline import table_batch, table_data
from tests.modules.setting import make_module
from tests.modules.wiring.setting import moved
from vbon_lightning.functional import (
    bon_log_ratio,
    bonbon_gap,
    bonbon_loss,
    dpo_loss,
    reward_cdf,
    sequence_log_prob,
)
from vbon_lightning.modules import (
    bon_distillation,
    bon_sft,
    dpo,
)
from vbon_lightning.modules.offline import select_responses
from vbon_lightning.sampling import noise_seed
from vbon_lightning.types import Responses


@pytest.mark.parametrize("selection", ["weights", "groups"])
def test_what_bonsft_picks_by(selection: str, files: Path, spy: Any) -> None:
    module, data = moved(files, "bonsft", n=3, responses_per_prompt=2, selection=selection, seed=7)
    batch = table_batch(data)
    picked = spy(bon_sft, "pick_best" if selection == "weights" else "pick_groups")
    logged = attach(module, FakeTrainer())
    for step in range(2):
        assert set(module.training_step(batch, 9)) == {"loss"}
        count = {"count": 2} if selection == "weights" else {"groups": 2}
        rewards = batch.prompts.reference_rewards
        assert picked.calls[step][1] == {"n": 3, **count, "seed": 7, "stream": "pick", "step": step}
        assert torch.equal(picked.calls[step][0][0], rewards)
        assert picked.calls[step][0][1] == batch.prompts.index.tolist()
    index = picked.real(*picked.calls[-1][0], **picked.calls[-1][1])
    index = index if selection == "weights" else index.best
    assert logged["train/picked_reward"][0] == pytest.approx(rewards.gather(1, index).mean().item(), rel=1e-6)
    assert set(logged) == {"train/loss", "train/picked_reward"}
    assert module.batches_seen == 2


@pytest.mark.parametrize("loss", ["dpo", "bonbon"])
def test_what_dpo_compares(loss: str, files: Path, spy: Any) -> None:
    own = {"beta": 0.3} if loss == "dpo" else {"alpha": 0.2}
    module, data = moved(files, "dpo", n=3, pairs_per_prompt=2, loss=loss, seed=7, **own)
    batch = table_batch(data)
    rewards = batch.prompts.reference_rewards.clone()
    rewards[0] = 1.0  # a prompt whose pairs all tie
    batch = batch._replace(prompts=batch.prompts._replace(reference_rewards=rewards))
    picked, scored = spy(dpo, "pick_groups"), spy(dpo, "response_statistics")
    logged = attach(module, FakeTrainer())
    got = module.training_step(batch, 0)["loss"]
    ((given, options),) = picked.calls
    assert options == {"n": 3, "groups": 2, "seed": 7, "stream": "pick", "step": 0}
    assert given[1] == batch.prompts.index.tolist()
    pairs = picked.real(*given, **options)
    assert scored.calls[0][1] == {"temperature": 0.7}
    found = scored.real(*scored.calls[0][0], **scored.calls[0][1])
    mask = scored.calls[0][0][3].mask
    log_probs = sequence_log_prob(found.log_probs, mask)
    ratios = log_probs - sequence_log_prob(found.reference_log_probs, mask)
    apart = rewards.gather(1, pairs.best) > rewards.gather(1, pairs.worst)
    assert not apart.all()
    if loss == "dpo":
        want = dpo_loss(ratios[:, :2], ratios[:, 2:], beta=0.3, told_apart=apart)
    else:
        goal = bonbon_gap(rewards, n=3).told_apart[:, None].to(ratios.dtype)
        want = bonbon_loss(log_probs[:, :2], ratios[:, :2], ratios[:, 2:], n=3, alpha=0.2, goal=goal, told_apart=apart)
    assert got.item() == pytest.approx(want.loss.item(), rel=1e-5)
    assert got.dtype == torch.float32
    values = {name: value for name, (value, _) in logged.items()}
    assert values == {
        "train/loss": pytest.approx(want.loss.item(), rel=1e-5),
        "train/accuracy": pytest.approx(want.accuracy.item()),
        "train/margin": pytest.approx(want.margin.item(), rel=1e-5),
        "train/tied_pairs": pytest.approx((~apart).float().mean().item()),
    }


@pytest.mark.parametrize("states", ["best_of_n", "reference", "policy"])
@pytest.mark.parametrize("draws", [4, 0])
def test_what_is_distilled(states: str, draws: int, files: Path, spy: Any) -> None:
    module, data = moved(
        files, "distillation", states=states, draws=draws, top=3, seed=7, n=3.0, divergence="reverse",
        log_ratio_floor=-1.0,
    )  # fmt: skip
    batch = table_batch(data)
    given = batch.prompts if states == "policy" else batch
    distilled = spy(bon_distillation, "distil")
    noise = spy(bon_distillation, "prompt_noise")
    picked = spy(bon_distillation, "pick_weighted" if states == "best_of_n" else "pick_some")
    sampled = spy(module.loaded, "sample")
    logged = attach(module, FakeTrainer())
    loss = module.training_step(given, 0)["loss"]
    assert (module.batch_kind, module.batches_seen) == ("prompts" if states == "policy" else "responses", 1)
    ((args, options),) = distilled.calls
    policy, _, scorer, prompts, responses, log_weights, log_values, request = args
    actors = module.loaded
    assert (policy, scorer, prompts) == (actors.policy, actors.value, batch.prompts)
    assert (request.top, request.draws) == (3, draws)
    rewards = batch.prompts.reference_rewards
    cdf = scorer.log_cdf(batch.prompts, rewards)
    assert torch.equal(log_weights, scorer.bon_log_weights(cdf, n=3.0).clamp(min=-1.0))
    assert float(log_weights.min()) == -1.0
    expected = scorer.log_values(prompts, responses, log_weights, normalised=False)
    torch.testing.assert_close(log_values, expected)
    assert (options["temperature"], options["reverse"]) == (0.7, True)
    uniforms = options["uniforms"]
    b, g, t = responses.mask.shape
    if draws:
        assert noise.calls[-1] == (
            (prompts.index.tolist(),),
            {
                "num_samples": g,
                "length": t * draws,
                "seed": noise_seed(7, "candidates"),
                "stream": "candidates",
                "step": 0,
            },
        )
        assert tuple(uniforms.shape) == (b, g, t, draws)
    else:
        assert uniforms is None
    if states == "policy":
        assert sampled.calls == [
            ((actors.policy, prompts), {"num_samples": 3, "seed": 7, "stream": "train", "step": 0})
        ]
        assert options["ends"] is None
        assert picked.calls == []
    else:
        place = {"count": 3, "seed": 7, "stream": "pick", "step": 0}
        exact = reward_cdf(rewards.double(), rewards.double())
        ratio = bon_log_ratio(
            torch.full_like(exact.log_below, -torch.inf), exact.log_below, n=3.0, log_at_or_below=exact.log_at_or_below
        )
        if states == "best_of_n":
            assert picked.calls[0][1] == place
            torch.testing.assert_close(picked.calls[0][0][1], ratio.softmax(-1))
        else:
            assert picked.calls[0] == ((prompts.index.tolist(),), {"among": rewards.shape[1], **place})
        index = picked.real(*picked.calls[0][0], **picked.calls[0][1])
        torch.testing.assert_close(options["ends"], ratio.gather(1, index).float() + log_values[..., 0])
    result = distilled.real(*args, **options)
    assert loss.item() == pytest.approx(result.divergence.sum(-1).mean().item(), rel=1e-5)
    assert set(logged) == {"train/loss", "train/teacher_kl"}
    assert logged["train/teacher_kl"][0] == pytest.approx(result.teacher_kl.sum(-1).mean().item(), rel=1e-5)


def test_the_dial_goes_through_its_range(files: Path) -> None:
    data = table_data(files, value_model=str(files / "value"))
    module: Any = make_module("distillation", data, n=3.0, n_range=[2.0, 16.0], seed=7)
    drawn = [module.drawn_n(step) for step in range(200)]
    assert all(2.0 <= n <= 16.0 for n in drawn)
    shares = torch.tensor([math.log(n / 2) / math.log(8) for n in drawn]).sort().values
    # A sequence of the golden ratio fills the range evenly: no gap is twice the mean of 1/200.
    assert float(shares.diff().max()) < 2.1 / 200
    start = noise_seed(7, "dial") / 2**63
    assert shares.tolist() == pytest.approx(sorted((start + k * (5**0.5 - 1) / 2) % 1 for k in range(200)), abs=1e-6)
    assert module.largest_n == 16.0
    assert module.samples_needed == (16, "model.responses_per_prompt = 3 and Best-of-16")
    fixed: Any = make_module("distillation", data, n=3.5)
    assert (fixed.drawn_n(3), fixed.largest_n) == (3.5, 3.5)
    assert fixed.samples_needed == (4, "model.responses_per_prompt = 3 and Best-of-3.5")
    alone: Any = make_module("distillation", data, n=3.5, states="policy")
    assert alone.samples_needed == (4, "Best-of-3.5")
    wide: Any = make_module("distillation", data, n=20.0, n_range=[2.0, 16.0])
    assert wide.largest_n == 20.0


def test_without_a_table_the_prediction_is_all_there_is(files: Path, spy: Any) -> None:
    module, data = moved(files, "distillation", states="policy", prior_samples=2.0)
    prompts = table_batch(data).prompts._replace(reference_rewards=None)
    asked = spy(module.loaded.value, "log_cdf")
    attach(module, FakeTrainer())
    module.training_step(prompts, 0)
    assert asked.calls == [((prompts, None), {})]


def test_picked_responses_are_as_wide_as_the_longest_of_them() -> None:
    lengths = torch.tensor([[3, 1, 0]])
    mask = torch.arange(4) < lengths[..., None]
    responses = Responses(torch.arange(12).view(1, 3, 4), mask)
    for picked, width in (([0, 1], 3), ([1, 2], 1), ([2], 1)):
        found = select_responses(responses, torch.tensor([picked]))
        assert found.tokens.shape == found.mask.shape == (1, len(picked), width)
        assert torch.equal(found.mask, mask[:, picked, :width])
