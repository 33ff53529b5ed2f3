"""The files of a comparison."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.crashes import count_calls, killed_at, with_files_of
from tests.hostile import HOSTILE, RENDERERS, Seen, squeezed
from vbon_lightning._visible import visible
from vbon_lightning.evaluation import Estimate, PolicyReport, ScoredText, TextSample, write_comparison
from vbon_lightning.evaluation.cards import write_cards
from vbon_lightning.evaluation.temperatures import TemperatureReport, write_temperatures
from vbon_lightning.evaluation.writing import comparison_markdown, write_together


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


def test_costs_have_a_picture_and_rows_of_their_own(tmp_path: Path, reports: list[PolicyReport]) -> None:
    for place, report in enumerate(reports):
        report.cost = {"generated_tokens": 10.25 + place, "seconds": 0.5}
    reports[-1].cost = {"generated_tokens": 2000.0, "peak_memory_mib": 3.0, "fallbacks": 0.0}
    reports[-2].cost = None
    samples = [TextSample("Once", {"reference": [ScoredText("a", 0.5)]})]
    written = write_comparison(reports, tmp_path, title="x", samples=samples, logger=False)
    assert set(written) == {"comparison.json", "comparison.md", "pareto.png", "cost.png", "samples.md"}
    assert imread(written["cost.png"]).shape[0] > 500
    costs = written["comparison.md"].read_text().split("| a response |")[1]
    assert costs.startswith(" generated tokens | seconds | peak memory mib |")
    assert "| reference | 10.2 | 0.5 | - |" in costs
    assert f"| **{reports[-1].name}** | 2,000.0 | - | 3.0 |" in costs
    assert reports[-2].name not in costs and "N samples of the reference" in costs
    assert "fallbacks" not in costs, "where nobody has any"
    reports[-1].cost["fallbacks"] = 0.212
    assert f"| **{reports[-1].name}** | 2,000.0 | - | 3.0 | 0.21 |" in comparison_markdown(reports, title="x")

    for report in reports:
        report.cost = None
    assert "cost.png" not in write_comparison(reports, tmp_path, title="y", logger=False)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"comparison.json", "comparison.md", "pareto.png"}, "no picture nor texts of another comparison"


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


# -- killed, or out of room ------------------------------------------------------------------------


class _Work:
    """Writes all that `vbon compare` writes: the files, the loggers' and the card of an export."""

    def __init__(self, reports: list[PolicyReport], out: Path, export: Path) -> None:
        self.reports, self.out, self.export = reports, out, export

    def __call__(self, title: str, logger: bool = True) -> None:
        samples = [TextSample("Once", {"mine": [ScoredText(title, 0.5)]})]
        write_comparison(self.reports, self.out, title=title, samples=samples, logger=logger)
        estimate = Estimate(0.5, 0.1)
        hot = [TemperatureReport("mine", 0.7, estimate, estimate, estimate, estimate)]
        write_temperatures(hot, self.out, title=title, trained_at=1.0)
        directories = {self.reports[-1].name: self.export}
        write_cards(self.reports, directories, dataset="posts", split="test", settings={"title": title})

    def check(self, titles: set[str]) -> None:
        """Each file is whole, and those that belong together are of the same comparison, or not all there."""
        found = {path.name: path.read_bytes() for path in self.out.glob("[!.]*") if path.is_file()}
        for first, others in (
            ("comparison.json", ("comparison.md", "samples.md", "pareto.png", "cost.png")),
            ("temperatures.json", ("temperatures.md", "temperatures.png")),
        ):
            said = {json.loads(found[first])["title"]} if first in found else titles
            assert first not in found or all(name in found for name in others)
            for name in (name for name in others if name in found):
                text = found[name]
                if name.endswith(".png"):
                    assert text.endswith(b"IEND\xaeB`\x82")
                else:
                    assert {title for title in titles if title.encode() in text} & said
                    assert text.endswith(b"\n")
        card = (self.export / "README.md").read_text()
        assert "Something to keep." in card and card.startswith("---\n")


class _Drawn(Figure):
    def savefig(self, fname: Any, **_: Any) -> None:
        fname.write(b"\x89PNG IEND\xaeB`\x82")


@pytest.fixture
def work(tmp_path: Path, reports: list[PolicyReport], monkeypatch: pytest.MonkeyPatch) -> _Work:
    small = _Drawn(figsize=(1, 1))  # to draw takes its time, and has tests of its own
    FigureCanvasAgg(small)
    for drawn in ("pareto", "cost"):
        monkeypatch.setattr(f"vbon_lightning.evaluation.writing.{drawn}_figure", lambda *_, made=small, **__: made)
    monkeypatch.setattr("vbon_lightning.evaluation.temperatures.temperature_figure", lambda *_, made=small, **__: made)
    out, export = tmp_path / "here" / "out", tmp_path / "here" / "run" / "export"
    export.mkdir(parents=True)
    (export / "README.md").write_text("---\ntags:\n- vbon-lightning\n---\n\n# Mine\n\nSomething to keep.\n")
    work = _Work(reports, out, export)
    work("old one", logger=False)
    return work


def test_a_kill_at_any_call_leaves_whole_files_of_one_comparison(work: _Work, tmp_path: Path) -> None:
    here, kept = tmp_path / "here", tmp_path / "kept"
    shutil.copytree(here, kept)

    def again(logger: bool = False) -> None:
        work("new one", logger=logger)

    calls = count_calls(again, here)
    assert calls > 25
    for call in range(1, calls + 1):
        shutil.rmtree(here)
        shutil.copytree(kept, here)
        assert killed_at(call, again, here) == "died"
        work.check({"old one", "new one"})
        again()
        work.check({"new one"})
        assert not list(here.rglob(".*.tmp")), "what the killed one left is used again"


def test_a_kill_while_it_is_logged_keeps_no_other_from_going_on(work: _Work, tmp_path: Path) -> None:
    for call in range(20, 60, 6):
        assert killed_at(call, lambda: work("new one"), tmp_path / "here") == "died"
        work.check({"old one", "new one"})
    work("last one")
    assert len(list(work.out.glob("events.out.tfevents.*"))) == 1
    assert json.loads((work.out / "comparison.json").read_text())["title"] == "last one"


@pytest.mark.parametrize("fatal", [False, True])
def test_a_disk_that_is_full_leaves_the_comparison_that_was_there(work: _Work, fatal: bool) -> None:
    sizes = sorted(path.stat().st_size for path in work.out.iterdir() if path.is_file())
    for size in sorted({0, *sizes[:-1], *(size - 1 for size in sizes[:-1])}):  # at some only the largest fails
        before = {path.name: path.read_bytes() for path in work.out.glob("comparison.*")}
        ended = with_files_of(size, lambda: work("new one", logger=False), fatal=fatal)
        assert ended == ("died" if fatal else "failed")
        work.check({"old one", "new one"})
        if size < len(before["comparison.json"]):
            assert {path.name: path.read_bytes() for path in work.out.glob("comparison.*")} == before
            assert fatal or not list(work.out.glob(".*.tmp"))
    work("new one")
    work.check({"new one"})


@pytest.mark.parametrize("fatal", [False, True])
def test_files_that_belong_together_are_replaced_together(fatal: bool, tmp_path: Path) -> None:
    old = {"first": b"old", "second": b"old"}
    write_together(tmp_path, old)
    ended = with_files_of(100, lambda: write_together(tmp_path, {"first": b"x" * 200, "second": b"y"}), fatal=fatal)
    assert ended == ("died" if fatal else "failed"), "small as they are, all are on the disk before one is in place"
    assert {name: (tmp_path / name).read_bytes() for name in old} == old
