"""Metrics against NumPy, and over two processes against one."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torchmetrics.classification import BinaryCalibrationError

from tests.ranks import leave
from tests.rollouts import LEFT, MISSING, make_rollout, one_prompt, silence
from vbon_lightning.metrics import (
    PREFIX_PLACES,
    PrefixForecast,
    PromptMean,
    RewardStatistics,
    SequenceKL,
    WinRate,
    calibration_error,
    prefix_places,
)
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


def forecasts(rollout: Rollout, bins: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Make up predictions after each prefix, and what came of them; NaN where a row is not valid."""
    noise = torch.Generator().manual_seed(int(rollout.prompts.index[0]))
    rows, samples, length = rollout.completions.mask.shape
    log_probs = torch.randn(rows, samples, length + 1, bins, generator=noise).mul(2).log_softmax(-1)
    log_probs[~rollout.prompts.valid] = torch.nan
    return log_probs, torch.randint(0, bins, (rows, samples), generator=noise)


def update_all(metrics: dict, rollout: Rollout) -> None:
    valid, mask = rollout.prompts.valid, rollout.completions.mask
    metrics["kl"].update(rollout.token_kl, rollout.log_probs, rollout.reference_log_probs, mask, valid)
    metrics["reward"].update(rollout.rewards, mask, rollout.completions.finished, valid)
    metrics["mean"].update(rollout.rewards, valid)
    metrics["win"].update(rollout.rewards, rollout.reference_rewards, valid)
    metrics["win3"].update(rollout.rewards, rollout.reference_rewards, valid)
    metrics["forecast"].update(*forecasts(rollout), mask, valid)


def make_metrics() -> dict:
    return {
        "kl": SequenceKL(),
        "reward": RewardStatistics(),
        "mean": PromptMean(),
        "win": WinRate(),
        "win3": WinRate(n=3),
        "forecast": PrefixForecast(),
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
        assert not summary[-1].any()
        assert summary[0].isnan().all()
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
    leave()


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
            torch.testing.assert_close(results[name], expected, rtol=1e-12, atol=1e-12, equal_nan=True)


# -- forecasts --


def test_prefix_places() -> None:
    mask = torch.arange(7) < torch.tensor([1, 2, 3, 4, 7])[:, None]
    found = [
        [PREFIX_PLACES[place] for place in row[: length + 1]]
        for row, length in zip(prefix_places(mask[None])[0].tolist(), mask.sum(-1).tolist(), strict=True)
    ]
    assert found == [
        ["prompt", "end"],
        ["prompt", "early", "end"],
        ["prompt", "early", "middle", "end"],
        ["prompt", "early", "early", "middle", "end"],
        ["prompt", "early", "early", "early", "middle", "middle", "late", "end"],
    ]


@pytest.mark.parametrize("bins", [1, 4, 10])
@pytest.mark.parametrize("count", [1, 30, 2000])
def test_calibration_error_is_torchmetrics(bins: int, count: int) -> None:
    noise = torch.Generator().manual_seed(count)
    probs = torch.rand(count, generator=noise).square()
    happened = torch.rand(count, generator=noise) < probs.sqrt()
    reference = BinaryCalibrationError(n_bins=bins, norm="l1")
    found = calibration_error(probs.view(-1, 1), happened.view(-1, 1), bins=bins)
    assert found.item() == pytest.approx(reference(probs, happened.long()).item(), abs=1e-5)


def test_calibration_error_of_simple_predictions() -> None:
    sure = torch.tensor([0.0, 1.0, 1.0])
    assert calibration_error(sure, sure.bool()) == 0
    assert calibration_error(sure, ~sure.bool()) == 1
    # The bins from 0.9 to 1 and from 0.8 to 0.9, in which it is a little too high and much too low.
    assert calibration_error(torch.tensor([1.0, 0.9, 0.85]), torch.tensor([True, True, False])) == pytest.approx(
        (0.1 + 0.85) / 3
    )
    assert calibration_error(torch.zeros(0), torch.zeros(0, dtype=torch.bool)).isnan()


def test_prefix_forecast() -> None:
    metric, bins = PrefixForecast(), 5
    rollouts = [make_rollout(length=9, seed=seed, fillers=seed) for seed in range(2)]
    losses: dict[str, list[float]] = {place: [] for place in PREFIX_PLACES}
    scores: dict[str, list[float]] = {place: [] for place in PREFIX_PLACES}
    upper: dict[str, list[tuple[float, int]]] = {place: [] for place in PREFIX_PLACES}
    for rollout in rollouts:
        mask, valid = rollout.completions.mask, rollout.prompts.valid
        log_probs, labels = forecasts(rollout, bins)
        metric.update(log_probs, labels, mask, valid)
        for row, sample in itertools.product(range(len(mask)), range(mask.shape[1])):
            length, label = int(mask[row, sample].sum()), int(labels[row, sample])
            for tokens in range(length + 1 if valid[row] else 0):
                inner = ("early", "middle", "late")[3 * (tokens - 1) // length]
                place = "prompt" if tokens == 0 else "end" if tokens == length else inner
                probs = log_probs[row, sample, tokens].double().exp().numpy()
                losses[place].append(-np.log(probs[label]))
                scores[place].append(np.mean((np.cumsum(probs) - (np.arange(bins) >= label)) ** 2))
                upper[place].append((probs[2:].sum(), int(label >= 2)))
    summary = metric.compute()
    for number, place in enumerate(PREFIX_PLACES):
        assert summary.prefixes[number] == len(losses[place]) > 3
        assert summary.nll[number].item() == pytest.approx(np.mean(losses[place]), rel=1e-6)
        assert summary.crps[number].item() == pytest.approx(np.mean(scores[place]), rel=1e-6)
        reference = BinaryCalibrationError(n_bins=10, norm="l1")
        said, happened = (torch.tensor(column) for column in zip(*upper[place], strict=True))
        expected = reference(said.float(), happened).item()
        assert summary.calibration_error[number].item() == pytest.approx(expected, abs=1e-6)


def test_a_place_without_prefixes_has_no_numbers() -> None:
    rollout = make_rollout(length=1)
    metric = PrefixForecast()
    metric.update(*forecasts(rollout), rollout.completions.mask)
    summary = metric.compute()
    assert summary.prefixes.tolist() == [12, 0, 0, 0, 12]
    for values in summary[:3]:
        assert values.isnan().tolist() == [False, True, True, True, False]


def test_what_lies_behind_the_end_is_no_forecast() -> None:
    rollout = make_rollout()
    mask, (log_probs, labels) = rollout.completions.mask, forecasts(rollout)
    behind = ~torch.nn.functional.pad(mask, (1, 0), value=True)
    dirty, clean = PrefixForecast(), PrefixForecast()
    dirty.update(log_probs.masked_fill(behind[..., None], torch.nan).requires_grad_(), labels, mask)
    clean.update(log_probs, labels, mask)
    assert behind.any()
    assert torch.equal(dirty.sums, clean.sums)
    assert not dirty.compute().nll.requires_grad


def test_responses_without_a_reward_are_left_out() -> None:
    rollout = make_rollout()
    silent, left = silence(rollout, *MISSING), [one_prompt(rollout, row, kept) for row, kept in LEFT]

    def statistics(part: Rollout) -> RewardStatistics:
        metric = RewardStatistics()
        metric.update(part.rewards, part.completions.mask, part.completions.finished, part.prompts.valid)
        return metric

    def kl(part: Rollout) -> SequenceKL:
        metric = SequenceKL()
        mask = part.completions.mask & part.judged.unsqueeze(-1)
        metric.update(part.token_kl, part.log_probs, part.reference_log_probs, mask, part.prompts.valid)
        return metric

    def win_rate(part: Rollout) -> WinRate:
        metric = WinRate(2)
        assert part.reference_rewards is not None
        metric.update(part.rewards, part.reference_rewards, part.prompts.valid)
        return metric

    for make, count in ((statistics, 4), (kl, 4), (win_rate, 2)):
        found, whole = make(silent), make(left[0])
        whole.sums += make(left[1]).sums
        assert found.compute()[-1] == count
        torch.testing.assert_close(found.sums, whole.sums)
