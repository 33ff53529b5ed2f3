"""What a mutation run remembers, of one file whose mutants a double tries."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("mutmut")

from experiments.mutation import mutation

TWICE = "def twice(number: int) -> int:\n    return number + number * 1\n"
PLUS, TIMES, NUMBER = "number - number * 1", "number + number / 1", "number + number * 2"


class Project:
    """A project of one module, whose mutants are written and not tried."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.module = root / "vbon_lightning" / "functional" / "twice.py"
        self.module.parent.mkdir(parents=True)
        self.module.write_text(TWICE)
        for folder in ("tests", "configs", "docs", "experiments/mutation"):
            (root / folder).mkdir(parents=True)
        for file in ("README.md", "pyproject.toml"):
            (root / file).write_text("")
        self.runs, self.result = root / "runs", root / "experiments" / "mutation" / "result.json"
        self.page, self.reasons = root / "docs" / "mutation.md", root / "reasons.yaml"
        self.reasons.write_text(yaml.safe_dump({"everywhere": [{"added": r"\* 2", "reason": "a reason"}]}))
        for name, value in {
            "ROOT": root,
            "RUNS": self.runs,
            "RESULT": self.result,
            "REPORT": self.page,
            "REASONS": self.reasons,
            "PARTS": {"functional": mutation.Part(["functional/*.py"], ["tests"])},
        }.items():
            monkeypatch.setattr(mutation, name, value)
        self._patch = monkeypatch

    def run(self, verdict: Callable[[str], int | None]) -> dict[str, int | None]:
        """Return what was known, and the names of what was tried again, before a run that ends with these verdicts."""
        before: dict[str, int | None] = {}
        start = mutation.subprocess.run

        def tried(command: list[str], **options: Any) -> Any:
            if "mutmut" not in command:
                return start(command, **options)
            (meta,) = mutation._results("functional")
            found = json.loads(meta.read_text())
            for name, code in found["exit_code_by_key"].items():
                change = mutation._read_mutant("functional", "functional/twice.py", name, False)
                before[change.added.removeprefix("return ")] = code
                if code is None:
                    found["exit_code_by_key"][name] = verdict(change.added.removeprefix("return "))
            meta.write_text(json.dumps(found))

        with self._patch.context() as patch:
            patch.setattr(mutation.subprocess, "run", tried)
            mutation.run("functional")
        mutation.report()
        return before


RESULT = mutation.RESULT


def test_a_run_goes_on_from_the_committed_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = Project(tmp_path, monkeypatch)
    first = {PLUS: 1, TIMES: 0, NUMBER: 0}
    assert project.run(lambda change: first.get(change)) == dict.fromkeys([PLUS, TIMES, NUMBER])
    page = project.page.read_text()
    assert "| functional/twice.py | 3 | 2 | 33.3% |" in page
    assert page.count("**open**") == 1 and page.count("a reason") == 1

    shutil.rmtree(project.runs)
    # What was killed stays so, what survived for a reason is left, what survived for none is tried again.
    assert project.run(lambda change: 1) == {PLUS: 1, TIMES: None, NUMBER: 0}
    assert "| functional/twice.py | 3 | 1 | 66.7% |" in project.page.read_text()


def test_what_was_not_tried_is_not_taken_for_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = Project(tmp_path, monkeypatch)
    project.run({PLUS: 1, TIMES: None, NUMBER: 1}.get)
    assert "not counted: `functional/twice.py: 1`" in project.page.read_text()
    (row, _) = json.loads(project.result.read_text())["files"]
    assert row["source"] == hashlib.sha256(TWICE.encode()).hexdigest() and len(row["waiting"]) == 1

    shutil.rmtree(project.runs)
    assert project.run(lambda change: 1) == {PLUS: 1, TIMES: None, NUMBER: 1}
    assert "not counted" not in project.page.read_text()


def test_of_a_changed_file_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = Project(tmp_path, monkeypatch)
    project.run(lambda change: 1)
    shutil.rmtree(project.runs)
    project.module.write_text(TWICE.replace("number * 1", "1 * number"))
    assert set(project.run(lambda change: 1).values()) == {None}


def test_numbers_of_another_version_of_the_tool_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = Project(tmp_path, monkeypatch)
    project.run(lambda change: 1)
    shutil.rmtree(project.runs)
    project.result.write_text(json.dumps({**json.loads(project.result.read_text()), "mutmut": "0.1"}))
    assert set(project.run(lambda change: 1).values()) == {None}


def test_a_reason_does_not_save_what_only_the_quick_tests_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = Project(tmp_path, monkeypatch)
    part = mutation.Part(["functional/*.py"], ["tests"], passes=(True, False))
    monkeypatch.setattr(mutation, "PARTS", {"functional": part})
    verdicts = iter([0, 0, 0, 1, 1, 1])
    project.run(lambda change: next(verdicts))
    assert "| functional/twice.py | 3 | 0 | 100.0% |" in project.page.read_text()


def test_nor_where_the_run_ended_before_all_tests_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = Project(tmp_path, monkeypatch)
    report = mutation.report
    monkeypatch.setattr(mutation, "report", lambda: None)
    project.run(lambda change: 0)
    monkeypatch.setattr(mutation, "report", report)
    assert set(project.run(lambda change: 1).values()) == {None}


def test_the_readme_says_what_was_tried_and_that_all_is_explained() -> None:
    """The numbers are those of the committed result, and so is the claim."""
    result = json.loads(RESULT.read_text())
    rows = {row["file"]: row for row in result["files"]}
    killed = [rows[f"all of {part}"]["killed"] for part in ("functional/", "modules/", "elsewhere")]
    tried = sum(int(row["mutants"]) for name, row in rows.items() if name.startswith("all of "))
    readme = " ".join((Path(__file__).parents[1] / "README.md").read_text().split())
    assert f"were tried on {tried:,} mistakes made on purpose" in readme
    assert "they notice {}, {} and {}, and each".format(*killed) in readme
    assert [row["change"] for row in result["survivors"] if not row["reason"]] == []
    assert [row["file"] for row in result["files"] if row.get("waiting")] == []
