"""The files of a comparison."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from matplotlib.image import imread

from vbon_lightning.evaluation import PolicyReport, ScoredText, TextSample, write_comparison


def test_the_files_of_a_comparison(tmp_path: Path, reports: list[PolicyReport]) -> None:
    samples = [
        TextSample("Once | upon", {"reference": [ScoredText("a\nb", -0.25)], "vBoN": [ScoredText("c", 1, False)]})
    ]
    out = tmp_path / "nested" / "out"
    written = write_comparison(reports, out, title="A title", command="vbon compare --x 1", samples=samples)
    assert set(written) == {"comparison.json", "comparison.md", "pareto.png", "samples.md"}
    assert {path.name for path in out.iterdir() if path.suffix in (".json", ".md", ".png")} == set(written)

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


def test_a_comparison_is_written_over(tmp_path: Path, reports: list[PolicyReport]) -> None:
    write_comparison(reports, tmp_path, title="old", logger=False)
    written = write_comparison(reports[:2], tmp_path, title="new", logger=False)
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
        write_comparison(reports, tmp_path, title="x", logger=False)
    assert not list(tmp_path.iterdir())
