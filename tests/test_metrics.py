"""Metrics against NumPy, and over two processes against one."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing

from tests.rollouts import make_rollout
from vbon_lightning.metrics import PromptMean, RewardStatistics, SequenceKL, WinRate
from vbon_lightning.types import Rollout

# Uneven on purpose: sizes differ, one batch ends in fillers, and the second process sees fewer batches.
BATCHES = [
    {"prompts": 3, "seed": 1},
    {"prompts": 5, "seed": 2, "first": 3, "fillers": 2},
    {"prompts": 1, "seed": 3, "first": 8},
]


def valid_rows(rollouts: list[Rollout], get) -> list[np.ndarray]:
    return [
        get(rollout)[row].double().numpy()
        for rollout in rollouts
        for row in range(len(rollout.prompts.text))
        if rollout.prompts.valid[row]
    ]


def update_all(metrics: dict, rollout: Rollout) -> None:
    valid, mask = rollout.prompts.valid, rollout.completions.mask
    metrics["kl"].update(rollout.token_kl, rollout.log_probs, rollout.reference_log_probs, mask, valid)
    metrics["reward"].update(rollout.rewards, mask, rollout.completions.finished, valid)
    metrics["mean"].update(rollout.rewards, valid)
    metrics["win"].update(rollout.rewards, rollout.reference_rewards, valid)
    metrics["win3"].update(rollout.rewards, rollout.reference_rewards, valid)


def make_metrics() -> dict:
    return {
        "kl": SequenceKL(),
        "reward": RewardStatistics(),
        "mean": PromptMean(),
        "win": WinRate(),
        "win3": WinRate(n=3),
    }


@pytest.fixture
def rollouts() -> list[Rollout]:
    return [make_rollout(references=6, **arguments) for arguments in BATCHES]


def test_sequence_kl(rollouts: list[Rollout]) -> None:
    metric = make_metrics()["kl"]
    for rollout in rollouts:
        metric.update(
            rollout.token_kl,
            rollout.log_probs,
            rollout.reference_log_probs,
            rollout.completions.mask,
            rollout.prompts.valid,
        )
    kl = np.concatenate([row.sum(-1) for row in valid_rows(rollouts, lambda r: r.token_kl)])
    ratios = valid_rows(rollouts, lambda r: r.log_probs.double() - r.reference_log_probs.double())
    ratio = np.concatenate([row.sum(-1) for row in ratios])
    tokens = sum(row.sum() for row in valid_rows(rollouts, lambda r: r.completions.mask))
    summary = metric.compute()
    assert summary.responses == len(kl) == 28
    assert summary.kl.item() == pytest.approx(kl.mean(), rel=1e-12)
    assert summary.kl_per_token.item() == pytest.approx(kl.sum() / tokens, rel=1e-12)
    assert summary.sampled.item() == pytest.approx(ratio.mean(), rel=1e-12)
    assert summary.sampled_standard_error.item() == pytest.approx(ratio.std(ddof=1) / np.sqrt(len(ratio)), rel=1e-10)


def test_what_lies_outside_the_mask_does_not_count() -> None:
    rollout = make_rollout()
    mask = rollout.completions.mask
    outside = [torch.where(mask, v, 1e6) for v in (rollout.token_kl, rollout.log_probs)]
    dirty, clean = SequenceKL(), SequenceKL()
    dirty.update(*outside, rollout.reference_log_probs, mask)
    clean.update(rollout.token_kl, rollout.log_probs, rollout.reference_log_probs, mask)
    assert not mask.all()
    assert torch.equal(dirty.sums, clean.sums)


def test_reward_statistics(rollouts: list[Rollout]) -> None:
    metric = RewardStatistics()
    for rollout in rollouts:
        completions = rollout.completions
        metric.update(rollout.rewards, completions.mask, completions.finished, rollout.prompts.valid)
    rewards = np.concatenate(valid_rows(rollouts, lambda r: r.rewards))
    summary = metric.compute()
    assert summary.mean.item() == pytest.approx(rewards.mean(), rel=1e-12)
    assert summary.std.item() == pytest.approx(rewards.std(ddof=1), rel=1e-10)
    lengths = np.concatenate(valid_rows(rollouts, lambda r: r.completions.mask.sum(-1)))
    assert summary.length.item() == pytest.approx(lengths.mean(), rel=1e-12)
    finished = np.concatenate(valid_rows(rollouts, lambda r: r.completions.finished))
    assert summary.finished.item() == pytest.approx(finished.mean(), rel=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_win_rate_is_the_mean_over_all_subsets(rollouts: list[Rollout], n: int) -> None:
    metric, expected = WinRate(n), []
    for rollout in rollouts:
        metric.update(rollout.rewards, rollout.reference_rewards, rollout.prompts.valid)
    pairs = zip(
        valid_rows(rollouts, lambda r: r.rewards),
        valid_rows(rollouts, lambda r: r.reference_rewards),
        strict=True,
    )
    for rewards, reference in pairs:
        best = np.array([max(subset) for subset in itertools.combinations(reference, n)])
        expected.append(np.mean([np.mean((r > best) + 0.5 * (r == best)) for r in rewards]))
    summary = metric.compute()
    assert summary.prompts == 7
    assert summary.mean.item() == pytest.approx(np.mean(expected), abs=1e-12)
    assert summary.standard_error.item() == pytest.approx(np.std(expected, ddof=1) / np.sqrt(7), abs=1e-12)


def test_win_rate_of_the_reference_is_one_half() -> None:
    noise = torch.Generator().manual_seed(0)
    draws = torch.randint(0, 3, (4000, 9), generator=noise).float()
    metric = WinRate()
    metric.update(draws[:, :2], draws[:, 2:])
    summary = metric.compute()
    assert abs(summary.mean - 0.5) < 4 * summary.standard_error < 0.05


def test_mean_over_prompts_weighs_prompts_alike(rollouts: list[Rollout]) -> None:
    metric = PromptMean()
    for rollout in rollouts:
        metric.update(rollout.rewards, rollout.prompts.valid)
    means = np.array([row.mean() for row in valid_rows(rollouts, lambda r: r.rewards)])
    summary = metric.compute()
    assert summary.mean.item() == pytest.approx(means.mean(), rel=1e-12)
    assert summary.standard_error.item() == pytest.approx(means.std(ddof=1) / np.sqrt(7), rel=1e-10)
    one_column = PromptMean()
    one_column.update(torch.from_numpy(means))
    assert one_column.compute().mean.item() == pytest.approx(means.mean(), rel=1e-12)


def test_sums_do_not_lose_small_batches() -> None:
    metric = PromptMean()
    metric.update(torch.full((1,), 2.0**25))
    for _ in range(100):
        metric.update(torch.ones(1))
    assert metric.compute().mean.item() == (2.0**25 + 100) / 101


def test_nothing_counted_is_said_by_the_count(recwarn: pytest.WarningsRecorder) -> None:
    for metric in make_metrics().values():
        summary = metric.compute()
        assert summary[-1] == 0
        assert summary[0].isnan()
    assert not [warning for warning in recwarn if "compute" in str(warning.message)]


def test_reset_forgets(rollouts: list[Rollout]) -> None:
    metric = WinRate()
    metric.update(rollouts[0].rewards, rollouts[0].reference_rewards)
    first = metric.compute().mean
    metric.reset()
    metric.update(1 - rollouts[0].rewards, rollouts[0].reference_rewards)
    fresh = WinRate()
    fresh.update(1 - rollouts[0].rewards, rollouts[0].reference_rewards)
    assert metric.compute().mean == fresh.compute().mean != first


def test_gradients_stay_out() -> None:
    rollout = make_rollout()
    metric = SequenceKL()
    metric.update(
        rollout.token_kl.requires_grad_(),
        rollout.log_probs,
        rollout.reference_log_probs,
        rollout.completions.mask,
    )
    assert not metric.compute().kl.requires_grad


@pytest.mark.parametrize("n", [0, -1])
def test_win_rate_needs_an_opponent(n: int) -> None:
    with pytest.raises(ValueError, match="n >= 1"):
        WinRate(n)


SHARES = [[[0, 2], [1]], [[0, 1, 2], []]]
"""Which batches each of two processes gets."""


def _work(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2)
    for case, shares in enumerate(SHARES):
        metrics = make_metrics()
        for number in shares[rank]:
            update_all(metrics, make_rollout(references=6, **BATCHES[number]))
        before = {name: metric.sums.clone() for name, metric in metrics.items()}
        results = {name: torch.stack(list(metric.compute())) for name, metric in metrics.items()}
        kept = all(torch.equal(before[name], metric.sums) for name, metric in metrics.items())
        torch.save((results, kept), f"{directory}/{case}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path: Path, rollouts: list[Rollout]) -> None:
    torch.multiprocessing.spawn(_work, (str(tmp_path),), nprocs=2)
    metrics = make_metrics()
    for rollout in rollouts:
        update_all(metrics, rollout)
    for case, rank in itertools.product(range(len(SHARES)), range(2)):
        results, kept = torch.load(tmp_path / f"{case}-{rank}.pt")
        assert kept  # a process goes on with its own sums
        for name, metric in metrics.items():
            expected = torch.stack(list(metric.compute()))
            torch.testing.assert_close(results[name], expected, rtol=1e-12, atol=1e-12)
