"""docs/family.md: every method and decoder has a row, its YAML is right, the measured block is the committed result."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import vbon_lightning.decoding as decoding
import vbon_lightning.modules as modules
from experiments.family.report import BEGIN, END, NOTHING_YET, PAGE, committed, filled, measured
from tests.evaluation.crowd import crowd
from tests.modules.setting import adam, make_data, make_files, make_table, make_trainer
from vbon_lightning.evaluation import Estimate, PolicyReport
from vbon_lightning.modules.base import AlignmentModule

ROOT = Path(__file__).parents[1]
TEXT = PAGE.read_text(encoding="utf-8")
CELLS = [
    [cell.strip() for cell in line.strip("|").split(" | ")] for line in TEXT.splitlines() if line.startswith("| `")
]
ROWS = {row[0]: row for row in CELLS}
NAMES = {name: match[1] for name in ROWS if (match := re.match(r"`(\w+)`", name))}
DECODERS = {
    name
    for name in decoding.__all__
    if inspect.isclass(getattr(decoding, name))
    and issubclass(getattr(decoding, name), decoding.Decoder)
    and name != "Decoder"
}


def test_every_module_and_decoder_has_a_row() -> None:
    methods = {name for name in modules.__all__ if issubclass(getattr(modules, name), AlignmentModule)}
    assert set(NAMES.values()) >= methods
    assert set(NAMES.values()) >= DECODERS >= {"BestOfN", "ValueGuided"}
    assert len(ROWS) == len(CELLS), "no row twice"


VARIANTS = {
    "`VBoN`, forward": "vbon_forward.yaml",
    "`VBoN`, Jeffreys": "vbon_jeffreys.yaml",
    "`VBoN`, annealed N": "vbon_annealed.yaml",
    "`RLOO`, k3": "rloo_k3.yaml",
}
"""Rows of options that come with a configuration of the demo."""


def options(kind: type) -> set[str]:
    """Return the options of a class, those that it passes on among them."""
    found: set[str] = set()
    for one in inspect.getmro(kind):
        parameters = inspect.signature(one.__init__).parameters.values() if "__init__" in vars(one) else ()  # type: ignore[misc]
        found |= {parameter.name for parameter in parameters}
    return found


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_the_yaml_of_a_row_is_that_of_its_class(row: list[str]) -> None:
    (line,) = [cell.strip("`") for cell in row if "class_path" in cell]
    plain = yaml.safe_load(line)
    *home, name = plain["class_path"].split(".")
    assert name == NAMES[row[0]]
    kind = getattr(decoding if home else modules, name, None)
    config = VARIANTS.get(row[0])
    if kind is not None and (config is None or (ROOT / "configs/demo" / config).is_file()):
        assert ".".join(home) in ("", "vbon_lightning.decoding")
        unknown = set(plain.get("init_args", {})) - options(kind)
        assert not unknown, f"{name} has no {', '.join(unknown)}"


def test_every_paper_is_in_the_bibliography_once() -> None:
    entries = re.findall(r"^@\w+\{(\w+),", PAGE.with_name("references.bib").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(set(entries)) == len(entries)
    named = {key for row in CELLS for key in re.findall(r"\[([a-z]+\d{4}[a-z]+)\]", row[-1])}
    assert named == set(entries)
    stated = {row[0] for row in CELLS if "[" in row[-1]}
    stands_on = {"`SFT`", "`RewardModelling`", "`ReferenceSampler`", "`ValueModelling`"}
    assert set(ROWS) - stated == stands_on
    for entry in PAGE.with_name("references.bib").read_text(encoding="utf-8").split("\n@")[1:]:
        assert all(f"  {field} = {{" in entry for field in ("title", "author", "year", "eprint")), entry
        assert entry.count("{") == entry.count("}"), entry


# -- what was measured ------------------------------------------------------------------------------


def test_the_page_has_the_committed_result() -> None:
    result = committed()
    assert filled(TEXT, measured(result)) == TEXT, "run `python -m experiments.family.report --page`"
    if result is None:
        assert NOTHING_YET in TEXT
    else:
        assert (PAGE.parent / "family" / "pareto.png").is_file() and (PAGE.parent / "family" / "cost.png").is_file()


def result(*rows: PolicyReport, **more: Any) -> dict[str, Any]:
    plain = {"title": "x", "seeds": [0], "trainings": {}, "settings": {}, "responses_at_once": 192, "failed": {}}
    reports = [report.to_dict() for report in (*crowd(0), *rows)]
    return json.loads(json.dumps(plain | {"reports": reports} | more))


def test_the_page_says_what_each_training_took() -> None:
    own: dict[str, Any] = {"updates": 72, "prompts": 8, "samples_per_prompt": 16, "reference_samples": 4,
                           "learning_rate": 6.0e-4, "also": ["value"]}  # fmt: skip
    two = {"updates": 80, "prompts": 128, "learning_rate": 2.0e-4, "also": []}
    block = measured(result(settings={"mine": own, "pairs": two}, responses_at_once=7))
    took = "| mine | 72 | 8 | `samples_per_prompt: 16`, `reference_samples: 4` | 0.0006 | value |\n"
    assert took in block and "| pairs | 80 | 128 | two of the table's | 0.0002 | - |\n" in block
    assert "batch of 7," in block


def row(name: str, kl: float, win_rate: float) -> PolicyReport:
    one = crowd(1)[-1]
    return replace(one, name=name, method="x", kl=Estimate(kl, 0.01), win_rate=Estimate(win_rate, 0.02))


def cells(block: str) -> dict[str, list[str]]:
    lines = [line for line in block.split("What each training took")[0].splitlines() if line.startswith("| ")]
    found = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    header, _, *rows = found
    return {"row": header[1:]} | {row[0]: row[1:] for row in rows}


def test_what_does_not_work_comes_first() -> None:
    rows = [row("as Best-of-4", crowd(0)[2].kl.mean, 0.8), row("half", crowd(0)[2].kl.mean, 0.62)]
    rows += [row("nothing", 0.1, 0.515), row("too far", 5.0, 0.9)]
    rows += [
        replace(row(name, 0.1, 0.7), cost={"fallbacks": share}) for name, share in (("drawn", 0.21), ("seldom", 0.01))
    ]
    block = measured(result(*rows, failed={"dpo-s0": "ended with status 1: runs/family/logs/dpo-s0.log"}))
    first = block.split("![")[0]
    assert "- No better than the reference, within the interval: nothing.\n" in first
    assert "- Less than half of Best-of-N's gain at their own KL: half (40%).\n" in first
    assert "- Further from the reference than any Best-of-N here, so not compared with it: too far.\n" in first
    assert "- drawn accepted none of its responses, and fell back to a plain sample, in 21% of cases.\n" in first
    assert "seldom" not in first
    assert "- Not done: dpo-s0, ended with status 1.\n" in first and "runs/" not in first
    found = cells(block)
    share = found["row"].index("gain kept")
    assert [found[f"**{name}**"][share] for name in ("as Best-of-4", "half", "too far")] == ["100%", "40%", "-"]
    assert found["Best-of-4"][share] == found["reference"][share] == "-"
    assert "All rows are better" in measured(result(rows[0]))


def test_the_columns_are_the_reports_numbers() -> None:
    one = row("mine", 0.5, 0.7)
    one.cost = {"generated_tokens": 1234.5, "seconds": 0.0125}
    trainings = {"mine": [{"command": "x", "seconds": 60.0}, {"command": "y", "seconds": 70.0}]}
    block = measured(result(one, trainings=trainings, seeds=[0, 1]))
    found = dict(zip(cells(block)["row"], cells(block)["**mine**"], strict=True))
    assert found == {
        "family": "x",
        "reward": str(one.reward),
        "KL (nats)": "0.500 ± 0.010",
        "win rate": "0.700 ± 0.020",
        "gain kept": found["gain kept"],
        "tokens": "1,234.5",
        "ms": "12.50",
        "training (s)": "65",
    }
    assert "48 held-out prompts, 2 seeds" in block and "and seeds" in block
    assert "one seed" in measured(result(one))


def test_a_bound_of_a_kl_is_shown_as_one() -> None:
    plain = result(row("bounded", 0.5, 0.7), row("not", 0.5, 0.7))
    for report in plain["reports"]:
        if report["name"] == "bounded":
            report["kl_is_bound"] = True
    found = cells(measured(plain))
    assert found["**bounded**"][2] == "≤ 0.500" and found["**bounded**"][4] == "-" != found["**not**"][4]


def test_a_page_without_marks_is_left_alone() -> None:
    page = f"a\n{BEGIN}old\n{END}\nb\n"
    assert filled(page, "new\n") == f"a\n{BEGIN}new\n{END}\nb\n"
    assert filled(filled(page, "new\n"), "new\n") == filled(page, "new\n")
    for broken in ("a\n", f"a\n{BEGIN}old\n"):
        with pytest.raises(ValueError, match="no block between"):
            filled(broken, "new\n")


def test_keeping_a_sheet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments.family import report

    for name, place in (("RESULT", "results/family.json"), ("PAGE", "family.md"), ("PICTURES", "family")):
        monkeypatch.setattr(report, name, tmp_path / place)
    sheet = tmp_path / "sheet"
    sheet.mkdir()
    (tmp_path / "family.md").write_text(f"a\n{BEGIN}{END}\n")
    monkeypatch.setattr("sys.argv", ["report", "--sheet", str(sheet)])
    with pytest.raises(SystemExit):
        report.main()
    (sheet / "family.json").write_text(json.dumps(result(row("mine", 0.5, 0.7))))
    for picture in ("pareto.png", "cost.png"):
        (sheet / picture).write_bytes(picture.encode())
    report.main()
    assert (tmp_path / "results/family.json").read_bytes() == (sheet / "family.json").read_bytes()
    assert (tmp_path / "family" / "cost.png").read_bytes() == b"cost.png"
    assert "| **mine** | x |" in (tmp_path / "family.md").read_text()
    (tmp_path / "family.md").write_text(f"b\n{BEGIN}{END}\n")
    monkeypatch.setattr("sys.argv", ["report", "--page"])
    report.main()
    assert (tmp_path / "family.md").read_text().startswith("b\n") and "mine" in (tmp_path / "family.md").read_text()


def test_the_method_of_ones_own_that_is_printed(tmp_path: Path) -> None:
    """It learns what it says, and a resume knows its option."""
    (source,) = (part.split("```")[0] for part in TEXT.split("```python\n")[1:])
    names: dict[str, Any] = {}
    exec(source, names)
    table = make_table(make_files(tmp_path))

    def fit(beta: float, **how: Any) -> Any:
        data = make_data(tmp_path, reference_table=table)
        module = names["WinRateRL"](data.actors, beta=beta, samples_per_prompt=4, optimizer=adam)
        make_trainer(tmp_path, steps=2).fit(module, data, **how)
        return module

    module = fit(0.2)
    rollout = module.last_rollout
    for rewards, cached, scores in zip(
        rollout.rewards.tolist(), rollout.reference_rewards.tolist(), module.target(rollout).score.tolist(), strict=True
    ):
        expected = [
            (sum((other < one) + (other <= one) for other in cached) + 1) / (2 * (len(cached) + 1)) for one in rewards
        ]
        assert scores == pytest.approx(expected, abs=1e-5)
    bare = make_data(tmp_path)
    with pytest.raises(ValueError, match=r"^WinRateRL needs data\.reference_table, or model\.reference_samples$"):
        make_trainer(tmp_path, steps=1).fit(names["WinRateRL"](bare.actors, samples_per_prompt=4), bare)
    with pytest.raises(ValueError, match=r"beta: checkpoint has 0\.2, this run has 0\.3"):
        fit(0.3, ckpt_path=str(tmp_path / "last.ckpt"))
