"""Reports on Best-of-N and on policies, against enumeration and sums made by hand."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from tests.evaluation.setting import best_of
from tests.rollouts import LEFT, MISSING, make_rollout, one_prompt, silence
from vbon_lightning.decoding import Decoded, DecodingCost
from vbon_lightning.evaluation import PolicyReport, bon_reports, evaluate_policy
from vbon_lightning.evaluation.reports import DecodedBatch, evaluate_decoder
from vbon_lightning.evaluation.writing import comparison_markdown
from vbon_lightning.functional import bon_expected_reward
from vbon_lightning.types import Rollout


def test_bon_reports(table: torch.Tensor) -> None:
    noise = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 9, table.shape, generator=noise)
    finished = torch.rand(table.shape, generator=noise) < 0.5
    judge = torch.randn(table.shape, generator=noise)
    reports = bon_reports(table, n_values=[4, 2], lengths=lengths, finished=finished, judge_rewards=judge)
    assert [(r.name, r.method, r.n) for r in reports] == [
        ("reference", "reference", 1),
        ("Best-of-2", "Best-of-N", 2),
        ("Best-of-4", "Best-of-N", 4),
    ]
    for report in reports:
        assert (report.prompts, report.samples) == (2, 6)
        assert report.reward.mean == pytest.approx(bon_expected_reward(table, n=report.n).mean().item(), rel=1e-5)
        assert report.win_rate.mean <= report.win_rate_bound + 1e-9
        assert report.kl.mean <= report.kl_bound + 1e-9
    reference, two, four = reports
    assert (reference.kl.mean, reference.win_rate.mean) == (0, pytest.approx(0.5))
    assert reference.length.mean == pytest.approx(lengths.double().mean().item())
    assert reference.judge_reward.mean == pytest.approx(judge.double().mean().item())
    # The estimate from the responses' probabilities is the bound for long ones, whatever the reward does.
    assert reference.kl_check is None and two.kl_check is None
    # Four and four of six cannot be disjoint, so there is no unbiased win rate.
    assert set(two.win_rate_vs_bon) == {2, 4}
    assert set(four.win_rate_vs_bon) == {2}
    assert two.win_rate_vs_bon[2].mean == pytest.approx(0.5)
    picked = [
        np.mean(
            [
                sum(p * finished[row, i].item() for i, p in best_of(table[row].tolist(), subset).items())
                for subset in itertools.combinations(range(6), 4)
            ]
        )
        for row in range(2)
    ]
    assert four.finished.mean == pytest.approx(np.mean(picked))


def test_bon_reports_check_their_arguments() -> None:
    with pytest.raises(ValueError, match="Best-of-8 needs at least 8"):
        bon_reports(torch.zeros(2, 6), n_values=[8])
    with pytest.raises(ValueError, match=r"lengths must have the rewards' shape \(2, 6\), got \(2, 5\)"):
        bon_reports(torch.zeros(2, 6), n_values=[2], lengths=torch.zeros(2, 5))
    with pytest.raises(ValueError, match="n >= 1"):
        bon_reports(torch.zeros(2, 6), n_values=[0])


def test_evaluate_policy() -> None:
    rollouts = [
        make_rollout(prompts=3, seed=1, references=6),
        make_rollout(prompts=5, seed=2, references=6, fillers=2),
    ]
    report = evaluate_policy(
        iter(rollouts), name="mine", method="vBoN", n_values=[3], judge=lambda rollout: 2 * rollout.rewards
    )
    values: dict[str, list[float]] = {key: [] for key in ("reward", "kl", "kl_check", "length", "finished", "1", "3")}
    for rollout in rollouts:
        for row in range(int(rollout.prompts.valid.sum())):
            values["reward"].append(rollout.rewards[row].double().mean().item())
            values["kl"].append(rollout.token_kl[row].double().sum(-1).mean().item())
            ratio = rollout.log_probs[row].double() - rollout.reference_log_probs[row].double()
            values["kl_check"].append(ratio.sum(-1).mean().item())
            values["length"].append(rollout.completions.mask[row].double().sum(-1).mean().item())
            values["finished"].append(rollout.completions.finished[row].double().mean().item())
            for n in (1, 3):
                subsets = list(itertools.combinations(rollout.reference_rewards[row].tolist(), n))
                outcomes = [
                    (r > max(subset)) + 0.5 * (r == max(subset))
                    for r in rollout.rewards[row].tolist()
                    for subset in subsets
                ]
                values[str(n)].append(float(np.mean(outcomes)))
    assert (report.name, report.method, report.prompts, report.samples, report.n) == (
        "mine",
        "vBoN",
        6,
        4,
        None,
    )
    found = {key: getattr(report, key) for key in ("reward", "kl", "kl_check", "length", "finished")}
    found |= {"1": report.win_rate, "3": report.win_rate_vs_bon[3]}
    for key, estimate in found.items():
        half = stats.t.ppf(0.975, 5) * np.std(values[key], ddof=1) / math.sqrt(6)
        assert estimate.mean == pytest.approx(np.mean(values[key]), abs=1e-9), key
        assert estimate.half_width == pytest.approx(half, abs=1e-9), key
    assert report.judge_reward.mean == pytest.approx(2 * report.reward.mean)


def test_evaluate_policy_without_a_table() -> None:
    report = evaluate_policy([make_rollout(references=None)], name="mine")
    assert report.win_rate is None
    assert report.win_rate_vs_bon == {}
    with pytest.raises(ValueError, match="'mine' bring none"):
        evaluate_policy([make_rollout(references=None)], name="mine", n_values=[2])


def test_evaluate_policy_checks_its_arguments() -> None:
    with pytest.raises(ValueError, match="no prompts"):
        evaluate_policy([], name="mine")
    with pytest.raises(ValueError, match="Best-of-9 needs at least 9"):
        evaluate_policy([make_rollout(references=8)], name="mine", n_values=[9])


def test_reports_survive_json(reports: list[PolicyReport]) -> None:
    for report in reports:
        assert PolicyReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_responses_without_a_reward_are_left_out_of_a_report_and_counted() -> None:
    rollout = make_rollout()
    found = evaluate_policy(
        [silence(rollout, *MISSING)], name="mine", n_values=[3], judge=lambda r: 2 * r.rewards.nan_to_num(100.0)
    )
    left = [evaluate_policy([one_prompt(rollout, row, kept)], name="mine", n_values=[3]) for row, kept in LEFT]
    assert (found.prompts, found.missing) == (2, 8)
    for name in ("reward", "kl", "kl_check", "win_rate", "length", "finished"):
        values = [getattr(report, name).mean for report in left]
        assert getattr(found, name).mean == pytest.approx(np.mean(values)), name
    assert found.win_rate_vs_bon[3].mean == pytest.approx(np.mean([report.win_rate_vs_bon[3].mean for report in left]))
    assert found.judge_reward.mean == pytest.approx(2 * found.reward.mean)
    half = [*MISSING, (0, 0)]
    judged = evaluate_policy([silence(rollout, *MISSING)], name="mine", judge=lambda r: silence(r, *half).rewards)
    assert judged.judge_reward.mean == pytest.approx((rollout.rewards[0, [2, 3]].mean() + rollout.rewards[1, 1]) / 2)
    assert "8 responses of mine have no reward and count nowhere" in comparison_markdown([found], title="")


def test_what_the_judge_says_nothing_of_is_left_out() -> None:
    rewards = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    judge = torch.tensor([[5.0, torch.nan, 7.0], [torch.nan] * 3])
    reference, _ = bon_reports(rewards, n_values=[2], judge_rewards=judge)
    assert reference.judge_reward.mean == pytest.approx(6.0)


def test_a_decoders_choice_without_a_reward_is_left_out() -> None:
    rollout = make_rollout()
    silent = silence(rollout, *MISSING)

    def batch(part: Rollout) -> DecodedBatch:
        tokens, mask, finished, _ = part.completions
        decoded = Decoded(tokens, mask, finished, part.token_kl, DecodingCost(1, 1, 1))
        return DecodedBatch(part.prompts, decoded, part.responses, part.rewards, 2 * part.rewards.nan_to_num(100.0))

    found = evaluate_decoder([batch(silent)], name="mine", method="mine", n=2, n_values=[3])
    left = [
        evaluate_decoder([batch(one_prompt(rollout, row, kept))], name="mine", method="mine", n=2, n_values=[3])
        for row, kept in LEFT
    ]
    assert (found.prompts, found.missing) == (2, 8)
    free = batch(rollout)
    free = free._replace(decoded=free.decoded._replace(token_kl=None, kl_bound=0.0))
    sample = evaluate_decoder([free], name="mine", method="mine", n=2)
    assert (sample.kl.mean, sample.kl_is_bound) == (0, False) and "plain sample" in sample.kl_estimator
    unsaid = free._replace(decoded=Decoded(*free.decoded[:3], None, DecodingCost(1, 1, 1)))
    with pytest.raises(ValueError, match="^the decoder of 'mine' says nothing of its KL: give Decoded its token_kl"):
        evaluate_decoder([unsaid], name="mine", method="mine", n=2)
    half = batch(silent)._replace(judge_rewards=silence(rollout, *MISSING, (0, 0)).rewards)
    judged = evaluate_decoder([half], name="mine", method="mine", n=2).judge_reward
    assert judged.mean == pytest.approx((rollout.rewards[0, [2, 3]].mean() + rollout.rewards[1, 1]) / 2)
    assert evaluate_decoder([half._replace(judge_rewards=None)], name="mine", method="mine", n=2).judge_reward is None
    for name in ("reward", "kl", "win_rate", "length", "finished", "judge_reward"):
        values = [getattr(report, name).mean for report in left]
        assert getattr(found, name).mean == pytest.approx(np.mean(values)), name
