"""The files of a comparison."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.hostile import HOSTILE, RENDERERS, Seen, squeezed
from vbon_lightning._visible import visible
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
    assert f"| **vBoN &#124; N=4** | vBoN | {reports[4].reward} | {reports[4].kl} |" in rows[6]
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


def test_names_and_texts_are_shown_and_not_followed(tmp_path: Path, reports: list[PolicyReport]) -> None:
    texts = iter(HOSTILE * 2)
    for report in reports:  # also those of Best-of-N: a decoder has an N and a name that somebody gave it
        report.name, report.method = next(texts), next(texts)
    reports[1].cost = {"seconds": 1.0}
    said = {name: [ScoredText(f"{text} said", 0.5, False)] for name, text in zip(HOSTILE, HOSTILE[::-1], strict=True)}
    samples = [TextSample(text, said) for text in HOSTILE[:3]]
    written = write_comparison(reports, tmp_path, title=HOSTILE[0], command=HOSTILE[7], samples=samples)
    (events,) = tmp_path.glob("events.out.tfevents.*")
    logged = EventAccumulator(str(events), size_guidance={"tensors": 0}).Reload()
    pages = {name: written[name].read_text(encoding="utf-8") for name in ("comparison.md", "samples.md")}
    pages |= {
        tag: logged.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0].decode()
        for tag in ("comparison", "samples")
    }
    assert pages["comparison"] == pages["comparison.md"]
    allowed = {"table", "thead", "tbody", "tr", "th", "td", "br", "p", "h1", "h2", "strong", "ul", "li", "pre", "code"}
    for name, page in pages.items():
        seen = Seen(RENDERERS["TensorBoard"](page))
        assert {tag for tag, _ in seen.tags} <= allowed
        shown = squeezed(seen.text)
        for text in [report.name for report in reports] if "comparison" in name else HOSTILE:
            assert squeezed(visible(text)) in shown, (name, text)
    plain = json.loads(written["comparison.json"].read_text(encoding="utf-8"))
    assert [PolicyReport.from_dict(report) for report in plain["reports"]] == reports, "programs get them as they are"
