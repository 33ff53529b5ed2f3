"""Policies at other sampling temperatures: their averages, table and figure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.rollouts import LEFT, MISSING, make_rollout, one_prompt, silence
from vbon_lightning.evaluation.drawing import BON_COLOUR, STYLES
from vbon_lightning.evaluation.temperatures import (
    evaluate_temperature,
    temperature_figure,
    temperature_markdown,
    write_temperatures,
)


def test_averages_over_prompts() -> None:
    rollouts = [make_rollout(seed=seed, first=3 * seed, fillers=seed) for seed in range(2)]
    report = evaluate_temperature(rollouts, name="policy", temperature=0.5)
    kept = [(rollout, row) for rollout in rollouts for row in range(3) if rollout.prompts.valid[row]]
    assert len(kept) == 5
    wins, rewards = [], []
    for rollout, row in kept:
        ours, theirs = rollout.rewards[row], rollout.reference_rewards[row]  # type: ignore[index]
        wins.append(torch.tensor([[float(a > b) + 0.5 * float(a == b) for b in theirs] for a in ours]).mean())
        rewards.append(ours.mean())
    assert report.win_rate.mean == pytest.approx(float(torch.stack(wins).mean()), abs=1e-6)
    assert report.reward.mean == pytest.approx(float(torch.stack(rewards).mean()), abs=1e-6)
    assert report.temperature == 0.5


def test_reference_rewards_are_needed() -> None:
    with pytest.raises(ValueError, match="win rates of 'policy' need reference rewards"):
        evaluate_temperature([make_rollout(references=None)], name="policy", temperature=1.0)
    with pytest.raises(ValueError, match="there are no prompts to evaluate 'policy' on"):
        evaluate_temperature([], name="policy", temperature=1.0)


def test_the_files(tmp_path: Path) -> None:
    reports = [
        evaluate_temperature([make_rollout(seed=seed)], name=name, temperature=temperature)
        for seed, (name, temperature) in enumerate([("a", 0.5), ("a", 1.0), ("b|c", 1.0)])
    ]
    written = write_temperatures(reports, tmp_path, title="Title", trained_at=0.7)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(written)
    plain = json.loads((tmp_path / "temperatures.json").read_text())
    assert [report["temperature"] for report in plain["reports"]] == [0.5, 1.0, 1.0]
    table = temperature_markdown(reports, title="Title", trained_at=0.7)
    assert table == (tmp_path / "temperatures.md").read_text()
    assert f"| b&#124;c | - | {reports[2].win_rate} |" in table
    assert "its own temperature, 0.7" in table
    assert (tmp_path / "temperatures.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("count", [1, 2, 30])
def test_in_the_figure_no_interval_hides_another(count: int) -> None:
    names = ["reference", *(f"policy {number}" for number in range(count - 1))]
    at = [0.3, 0.7, 1.0]
    reports = [
        evaluate_temperature([make_rollout(seed=seed)], name=name, temperature=temperature)
        for seed, name in enumerate(names)
        for temperature in at
    ]
    figure = temperature_figure(reports, title="Title", trained_at=0.5)
    for axes, key in zip(figure.axes, ("win_rate", "reward"), strict=True):
        drawn = [container.lines[0].get_xydata() for container in axes.containers]
        heights = [[getattr(r, key).mean for r in reports if r.name == name] for name in names]
        assert [line[:, 1].tolist() for line in drawn] == heights
        for place, temperature in enumerate(at):
            across = [line[place, 0] for line in drawn]
            assert sorted(set(across)) == across  # side by side, in the order of the legend
            assert sum(across) / count == pytest.approx(temperature)
            assert max(abs(x - temperature) for x in across) < 0.3 / 2 - 0.05  # nearest to their own temperature
        assert [label.get_text() for label in axes.get_xticklabels()] == ["0.3", "0.7", "1"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*names, "temperature of the reference table"]


def test_the_reference_looks_as_in_the_pareto_figure() -> None:
    reports = [evaluate_temperature([make_rollout()], name=name, temperature=1.0) for name in ("reference", "vBoN")]
    figure = temperature_figure(reports, title="Title", trained_at=1.0)
    reference, policy = (container.lines[0] for container in figure.axes[0].containers)
    assert (reference.get_color(), reference.get_marker()) == (BON_COLOUR, "*")
    assert (policy.get_color(), policy.get_marker()) == STYLES[0]


def test_responses_without_a_reward_are_left_out() -> None:
    rollout = make_rollout()
    found = evaluate_temperature([silence(rollout, *MISSING)], name="policy", temperature=0.5)
    left = [evaluate_temperature([one_prompt(rollout, *part)], name="policy", temperature=0.5) for part in LEFT]
    for name in ("reward", "win_rate", "length", "finished"):
        assert getattr(found, name).mean == pytest.approx(sum(getattr(one, name).mean for one in left) / 2), name
