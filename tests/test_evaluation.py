"""Reports against enumeration, and the files of a comparison."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.rollouts import make_rollout
from vbon_lightning.evaluation import (
    Estimate,
    PolicyReport,
    ScoredText,
    TextSample,
    bon_reports,
    estimate_mean,
    evaluate_policy,
    pareto_figure,
    text_samples,
    write_comparison,
)
from vbon_lightning.evaluation.best_of_n import bon_against_bon, bon_kl, selection_weights
from vbon_lightning.functional import bon_expected_reward, bon_kl_bound, bon_self_win_rate

TABLES = {
    "distinct": [[0.3, 0.1, 0.7, 0.2, 0.9, -1.0], [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]],
    "tied": [[0.0, 0.0, 1.0, 1.0, 1.0, 2.0], [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]],
    "constant": [[0.5] * 6, [0.0] * 6],
}


@pytest.fixture(params=TABLES)
def table(request: pytest.FixtureRequest) -> torch.Tensor:
    return torch.tensor(TABLES[request.param])


def best_of(row: list[float], chosen: tuple[int, ...]) -> dict[int, float]:
    """Probability that each chosen response is returned, ties broken uniformly."""
    top = max(row[i] for i in chosen)
    winners = [i for i in chosen if row[i] == top]
    return {i: winners.count(i) / len(winners) for i in set(winners)}


# -- intervals --


def test_interval_is_students() -> None:
    values = torch.tensor([0.1, 0.5, 0.4, 0.9, -0.3])
    found = estimate_mean(values)
    low, high = stats.ttest_1samp(values.double().numpy(), 0.0).confidence_interval(0.95)
    assert found.mean == pytest.approx((low + high) / 2)
    assert found.half_width == pytest.approx((high - low) / 2)
    assert str(found) == "0.320 ± 0.558"


def test_interval_covers_as_often_as_it_says() -> None:
    draws = torch.randn(2000, 5, generator=torch.Generator().manual_seed(0))
    estimates = [estimate_mean(row) for row in draws]
    covered = np.mean([abs(e.mean) <= e.half_width for e in estimates])
    # A normal quantile in place of Student's would cover 88% of the time.
    assert covered == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 2000))


def test_one_prompt_has_no_interval() -> None:
    assert estimate_mean(torch.tensor([2.0])) == Estimate(2.0, None)
    assert str(Estimate(2.0, None)) == "2.000"


@pytest.mark.parametrize("values", [torch.zeros(0), torch.zeros(2, 2), torch.tensor([1.0, math.nan])])
def test_intervals_need_numbers(values: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="interval over prompts"):
        estimate_mean(values)


# -- Best-of-N from the table, by enumeration --


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_selection_weights(table: torch.Tensor, n: int) -> None:
    weights = selection_weights(table, n=n)
    for row, found in zip(table.tolist(), weights.tolist(), strict=True):
        expected: Counter = Counter()
        for subset in itertools.combinations(range(6), n):
            expected.update(best_of(row, subset))
        assert found == pytest.approx([expected[i] / math.comb(6, n) for i in range(6)])


@pytest.mark.parametrize("n", [1, 2, 4, 9])
def test_kl_of_the_empirical_distribution(table: torch.Tensor, n: int) -> None:
    """Enumerate N draws with replacement from the levels of reward; ties are broken uniformly."""
    for row, found in zip(table.tolist(), bon_kl(table, n=n).tolist(), strict=True):
        levels = sorted(Counter(row).items())
        drawn: Counter = Counter()
        for draws in itertools.combinations_with_replacement(range(len(levels)), n):
            ways = math.factorial(n) / math.prod(math.factorial(c) for c in Counter(draws).values())
            drawn[max(draws)] += ways * math.prod(levels[i][1] / 6 for i in draws)
        expected = sum(p * math.log(p / (levels[i][1] / 6)) for i, p in drawn.items())
        assert found == pytest.approx(expected, abs=1e-9)


def test_kl_is_near_its_limit_for_many_distinct_rewards() -> None:
    rewards = torch.rand(2, 64, generator=torch.Generator().manual_seed(0))
    for n in (2, 4, 8, 16):
        short = bon_kl_bound(n) - bon_kl(rewards, n=n)
        assert ((short > 0) & (short < 0.003)).all()


@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 1), (1, 3), (2, 4), (3, 3)])
def test_best_of_n_against_best_of_m(table: torch.Tensor, n: int, m: int) -> None:
    found = bon_against_bon(table, n=n, m=m).tolist()
    for row, value in zip(table.tolist(), found, strict=True):
        outcomes = []
        for mine in itertools.combinations(range(6), n):
            for theirs in itertools.combinations(sorted(set(range(6)) - set(mine)), m):
                ours, other = max(row[i] for i in mine), max(row[i] for i in theirs)
                outcomes.append((ours > other) + 0.5 * (ours == other))
        assert value == pytest.approx(np.mean(outcomes))


def test_two_routes_to_one_win_rate(table: torch.Tensor) -> None:
    for n in range(1, 6):
        ours = bon_against_bon(table, n=n, m=1).float()
        torch.testing.assert_close(ours, bon_self_win_rate(table, n=n))


def test_subsets_must_fit() -> None:
    with pytest.raises(ValueError, match="needs 7 cached responses"):
        bon_against_bon(torch.zeros(1, 6), n=4, m=3)


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


# -- policies --


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


# -- files --


@pytest.fixture
def reports() -> list[PolicyReport]:
    table = (torch.rand(6, 32, generator=torch.Generator().manual_seed(0)) * 9).round()
    policies = [
        evaluate_policy([make_rollout(6, seed=seed)], name=name, method=method, n_values=[4])
        for seed, name, method in (
            (1, "vBoN | N=4", "vBoN"),
            (2, "KL-RL 0.1", "KL-RL"),
            (3, "KL-RL 0.3", "KL-RL"),
        )
    ]
    return [*bon_reports(table, n_values=[2, 4, 8]), *policies]


def test_reports_survive_json(reports: list[PolicyReport]) -> None:
    for report in reports:
        assert PolicyReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_the_files_of_a_comparison(tmp_path: Path, reports: list[PolicyReport]) -> None:
    samples = [
        TextSample("Once | upon", {"reference": [ScoredText("a\nb", -0.25)], "vBoN": [ScoredText("c", 1, False)]})
    ]
    out = tmp_path / "nested" / "out"
    written = write_comparison(reports, out, title="A title", command="vbon compare --x 1", samples=samples)
    assert set(written) == {"comparison.json", "comparison.md", "pareto.png", "samples.md"}
    assert {path.name for path in out.iterdir() if "tfevents" not in path.name} == set(written)

    plain = json.loads(written["comparison.json"].read_text(encoding="utf-8"))
    assert [PolicyReport.from_dict(report) for report in plain["reports"]] == reports
    assert (plain["title"], plain["command"]) == ("A title", "vbon compare --x 1")

    lines = written["comparison.md"].read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("|")]
    header = [cell.strip() for cell in rows[0].strip("|").split("|")]
    assert header == [
        "policy", "method", "reward", "KL (nats)", "win rate", "win rate over Best-of-4", "tokens", "finished"
    ]  # fmt: skip
    assert len(rows) == 2 + len(reports)
    assert f"| **vBoN \\| N=4** | vBoN | {reports[4].reward} | {reports[4].kl} |" in rows[6]
    assert "vbon compare --x 1" in lines

    height, width, _ = imread(written["pareto.png"]).shape
    assert width > height > 500
    assert "| reference | a<br>b | -0.250 |" in written["samples.md"].read_text(encoding="utf-8")

    events = EventAccumulator(str(out)).Reload()
    (event,) = events.Scalars("KL-RL 0.1/kl")
    assert event.value == pytest.approx(reports[5].kl.mean, rel=1e-6)
    assert events.Tags()["images"] == ["pareto"]


def test_a_comparison_is_written_over(tmp_path: Path, reports: list[PolicyReport]) -> None:
    write_comparison(reports, tmp_path, title="old", tensorboard=False)
    written = write_comparison(reports[:2], tmp_path, title="new", tensorboard=False)
    assert json.loads(written["comparison.json"].read_text())["title"] == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "comparison.json",
        "comparison.md",
        "pareto.png",
    ]


def test_numbers_that_are_not_are_refused_before_anything_is_written(
    tmp_path: Path, reports: list[PolicyReport]
) -> None:
    reports[0].kl_bound = math.nan
    with pytest.raises(ValueError, match="JSON"):
        write_comparison(reports, tmp_path, title="x", tensorboard=False)
    assert not list(tmp_path.iterdir())


def test_the_figure_shows_every_report(reports: list[PolicyReport]) -> None:
    figure = pareto_figure(reports, title="A title")
    left, right = figure.axes
    names = ["KL-RL 0.1", "KL-RL 0.3", "N=2", "N=4", "N=8", "reference", "vBoN | N=4"]
    for axes in (left, right):
        assert sorted(text.get_text() for text in axes.texts if text.get_text()) == names
        assert "nats" in axes.get_xlabel()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "Best-of-N",
        "Best-of-N without ties",
        "vBoN",
        "KL-RL",
    ]


def test_labels_do_not_cover_each_other() -> None:
    noise = torch.Generator().manual_seed(0)
    crowd = [
        PolicyReport(f"policy {i}", f"method {i}", 5, 1, Estimate(0.5, 0.01), Estimate(1.0, 0.1), "", n=None,
                     win_rate=Estimate(0.6, 0.01))
        for i in range(6)
    ]  # fmt: skip
    figure = pareto_figure([*bon_reports(torch.randn(9, 64, generator=noise), n_values=[2, 4, 8]), *crowd])
    renderer = figure.canvas.get_renderer()
    for axes in figure.axes:
        boxes = [text.get_window_extent(renderer) for text in axes.texts if text.get_text()]
        assert not [(a, b) for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]
        assert all(axes.get_window_extent(renderer).contains(box.x0, box.y0) for box in boxes)


@pytest.mark.parametrize("number", [0, 4])
def test_a_figure_of_one_report(reports: list[PolicyReport], number: int) -> None:
    assert len(pareto_figure([reports[number]]).axes) == 2


def test_a_figure_without_win_rates_says_so(reports: list[PolicyReport]) -> None:
    for report in reports:
        report.win_rate = None
    left, right = pareto_figure(reports).axes
    assert [text.get_text() for text in left.texts] == ["no reference rewards"]
    assert right.lines


def test_a_figure_needs_reports() -> None:
    with pytest.raises(ValueError, match="at least one report"):
        pareto_figure([])


# -- texts --


def test_texts_of_the_same_prompts_side_by_side() -> None:
    before = [make_rollout(prompts=2, seed=1, fillers=1), make_rollout(prompts=2, seed=2, first=2)]
    after = [make_rollout(prompts=4, seed=3)]
    samples = text_samples({"reference": iter(before), "vBoN": after}, prompts=2, samples=3)
    assert [sample.prompt for sample in samples] == ["prompt | 0", "prompt | 2"]
    assert [list(sample.responses) for sample in samples] == [["reference", "vBoN"]] * 2
    assert samples[1].responses["vBoN"][2] == ScoredText(
        "response 2.2", after[0].rewards[2, 2].item(), after[0].completions.finished[2, 2].item()
    )


def test_only_as_many_rollouts_as_needed_are_read() -> None:
    endless = (make_rollout(prompts=2, seed=i, first=2 * i) for i in itertools.count())
    assert len(text_samples({"reference": endless}, prompts=3)) == 3
