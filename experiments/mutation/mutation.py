"""Break every line of the mathematics and of the modules, one at a time, and count what their tests notice.

python -m experiments.mutation.mutation             # all parts, then the report
python -m experiments.mutation.mutation functional  # one part
python -m experiments.mutation.mutation report      # what there is so far: docs/mutation.md

The mutants are mutmut's: an operator, a number, a name in a text, an argument left out, a branch forced. Those of
vbon_lightning/functional are tried by tests/functional, those of vbon_lightning/modules by tests/modules, those of
single files elsewhere (ELSEWHERE) by the tests of these names, alone. The text of errors and warnings is not
mutated. What survives for a reason has it in reasons.yaml, by regular expressions of what is removed and what is added,
for a file or for all.

A run goes on where the last one ended: it tries what is not tried yet, or has survived without a reason. Where there is
no folder of earlier runs, what result.json says of files that are the same now is taken from there. With neither, all
is tried anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.utils.file_utils import change_cwd

from experiments.mutation.decorators import move_decorators
from vbon_lightning._markdown import markdown_table

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "runs" / "mutation"
REASONS = Path(__file__).with_name("reasons.yaml")
QUICK_ONLY = "MUTATION_QUICK_ONLY"  # which quick_runs.py reads
RESULT = Path(__file__).with_name("result.json")
REPORT = ROOT / "docs" / "mutation.md"
# What anchors, decoders and costs compute outside of functional, each file tried by the tests of these names.
ELSEWHERE = [
    "actors/anchor",
    "decoding/candidates",
    "decoding/cost",
    "decoding/inference_time_pessimism",
    "decoding/sequential_monte_carlo",
    "decoding/soft_best_of_n",
    "decoding/speculative_rejection",
    "evaluation/costs",
]


class Part(NamedTuple):
    """Files that are changed, and the tests that are run on them."""

    files: list[str]
    """Patterns of files below the package."""
    tests: list[str]
    """Files and folders of tests."""
    passes: tuple[bool, ...] = (False,)
    """The quick tests first, where there are some; what they leave is tried by all."""


PARTS = {
    "functional": Part(["functional/*.py"], ["tests/functional"]),
    "modules": Part(["modules/*.py"], ["tests/modules"], (True, False)),
    "elsewhere": Part(
        [f"{file}.py" for file in ELSEWHERE],
        [f"tests/{folder}/test_{name}.py" for folder, name in (file.split("/") for file in ELSEWHERE)],
    ),
}
SETTINGS = """
[tool.mutmut]
source_paths = ["vbon_lightning"]
only_mutate = {files}
also_copy = ["configs", "docs", "README.md", "conftest.py"]
pytest_add_cli_args_test_selection = {tests}
# A test that a mutant hangs in has failed.
pytest_add_cli_args = ["-p", "no:cacheprovider", "-p", "no:warnings", "-m", "not slow", "--timeout", "60"]
process_isolation = "forkserver"
timeout_constant = 60.0
do_not_mutate_patterns = {texts}
"""
# The lines that are the text of an error or a warning, and those that begin one.
TEXTS = [
    r"^\s*raise ",
    r"^\s*rank_zero_(warn|info)\(",
    r"^\s*(warnings\.|_?log\.|logger\.)",
    r'^\s*f?"[^"]* [^"]*"\)?,?$',
]
KILLED = (1, 24, 36, 152, -24)  # a test failed, or ran for far longer than it should
SURVIVED = 0


class Mutant(NamedTuple):
    """One change and what the tests made of it."""

    name: str
    """Which numbers it among those of its function."""
    file: str
    function: str
    removed: str
    added: str
    killed: bool

    @property
    def change(self) -> str:
        """What is changed, which says more than the name: numbers move with the code around them."""
        return f"{self.function}: {self.removed}  ->  {self.added}"


def run(part: str) -> None:
    """Try all mutants of a part that were not tried since its code last changed, or survived without a reason."""
    where = RUNS / part
    begun = (where / "mutants").exists()
    for folder in ("vbon_lightning", "tests", "configs", "docs"):
        for old in (where / folder, where / "mutants" / folder):
            if folder != "vbon_lightning" or old.parent == where:  # beside the mutants stand their results
                shutil.rmtree(old, ignore_errors=True)
        shutil.copytree(ROOT / folder, where / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(Path(__file__).with_name("quick_runs.py"), where / "conftest.py")
    for source in _sources(part, where):
        source.write_text(move_decorators(source.read_text()))
    shutil.copy(ROOT / "README.md", where)
    files, tests = [f"vbon_lightning/{pattern}" for pattern in PARTS[part].files], PARTS[part].tests
    settings = SETTINGS.format(files=json.dumps(files), tests=json.dumps(tests), texts=json.dumps(TEXTS))
    (where / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + settings)
    # Which test calls what is found anew: functions move, and tests that stay would be remembered for their old places.
    (where / "mutants" / "mutmut-stats.json").unlink(missing_ok=True)
    known = _known(part)
    if not begun:
        _recall(part, known)
    # Only what a report has: what the quick tests alone did not notice is tried by all, be there a reason or not.
    explained = {name for row in known.values() for name, reason in row["survivors"].items() if reason}
    for quick in PARTS[part].passes:
        _try_mutants(part, quick, explained)


def _sources(part: str, root: Path) -> list[Path]:
    return sorted(path for pattern in PARTS[part].files for path in (root / "vbon_lightning").glob(pattern))


def _known(part: str) -> dict[str, dict[str, Any]]:
    """Return what the committed result says of the files of a part that are still the same."""
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if result.get("mutmut") != version("mutmut"):  # another one may number its mutants in another way
        return {}
    hashes = _source_hashes(part)
    return {
        row["file"]: {
            "waiting": row["waiting"],
            "survivors": {one["name"]: one["reason"] for one in result["survivors"] if one["file"] == row["file"]},
        }
        for row in result["files"]
        if "source" in row and row["source"] == hashes.get(row["file"])
    }


def _source_hashes(part: str) -> dict[str, str]:
    """Return, by file, what tells the text that its mutants are of from any other."""
    package = RUNS / part / "vbon_lightning"
    return {
        source.relative_to(package).as_posix(): hashlib.sha256(source.read_bytes()).hexdigest()
        for source in _sources(part, RUNS / part)
    }


def _recall(part: str, known: dict[str, dict[str, Any]]) -> None:
    """Write the mutants of a part, with what is known of them."""
    subprocess.run(
        [sys.executable, str(Path(__file__).with_name("generate.py"))],
        cwd=RUNS / part,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    for meta in _results(part):
        if not (row := known.get(_file_of(part, meta))):
            continue
        found = json.loads(meta.read_text())
        found["exit_code_by_key"] = {
            name: None if name in row["waiting"] else SURVIVED if name in row["survivors"] else KILLED[0]
            for name in found["exit_code_by_key"]
        }
        meta.write_text(json.dumps(found))


def _try_mutants(part: str, quick: bool, explained: set[str]) -> None:
    for meta in _results(part):
        found = json.loads(meta.read_text())
        codes = found["exit_code_by_key"]
        # What else survived is tried again: the tests may be others now.
        found["exit_code_by_key"] = {
            name: code if code in KILLED or name in explained else None for name, code in codes.items()
        }
        meta.write_text(json.dumps(found))
    cores = str(len(os.sched_getaffinity(0)))
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", cores]
    subprocess.run(command, cwd=RUNS / part, check=True, env={**os.environ, QUICK_ONLY: str(int(quick))})


def _results(part: str) -> list[Path]:
    sources = _sources(part, RUNS / part / "mutants")
    return [meta for source in sources if (meta := source.with_name(f"{source.name}.meta")).exists()]


def _file_of(part: str, meta: Path) -> str:
    """Return the file, below the package, that the results are of."""
    return meta.with_suffix("").relative_to(RUNS / part / "mutants" / "vbon_lightning").as_posix()


def read(part: str) -> list[Mutant]:
    """The mutants of a part that were tried."""
    mutants = []
    for meta in _results(part):
        codes = json.loads(meta.read_text())["exit_code_by_key"]
        tried = [(name, code) for name, code in codes.items() if code is not None]
        file = _file_of(part, meta)
        mutants += [_read_mutant(part, file, name, code in KILLED) for name, code in tried]
    return mutants


def _read_mutant(part: str, file: str, name: str, killed: bool) -> Mutant:
    function = name.split(".")[-1].split("__mutmut_")[0].removeprefix("x_").removeprefix("xǁ").replace("ǁ", ".")
    if killed:
        return Mutant(name, file, function, "", "", True)
    with change_cwd(RUNS / part):
        shown = get_diff_for_mutant(name, path=f"vbon_lightning/{file}")
    lines = [line for line in shown.splitlines() if not line.startswith(("---", "+++"))]
    removed, added = ([line[1:].strip() for line in lines if line.startswith(sign)] for sign in "-+")
    return Mutant(name, file, function, " ".join(removed), " ".join(added), False)


def report() -> None:
    """Write docs/mutation.md and the result beside this file."""
    reasons: dict[str, Any] = yaml.safe_load(REASONS.read_text())
    parts = {part: read(part) for part in PARTS if (RUNS / part / "mutants").exists()}
    rows, survivors = [], []
    stale: list[str] = []
    missing: list[str] = []
    sources: dict[str, str] = {}
    untold: dict[str, list[str]] = {}
    for part, mutants in parts.items():
        sources |= _source_hashes(part)
        untold |= _waiting(part)
        counts = Counter(mutant.file for mutant in mutants)
        killed = Counter(mutant.file for mutant in mutants if mutant.killed)
        changed, untried = _since_then(part, set(counts))
        stale, missing = stale + changed, missing + untried
        rows += [
            [file, str(count), str(count - killed[file]), f"{killed[file] / count:.1%}"]
            for file, count in counts.items()
        ]
        total = sum(killed.values())
        name = part if part == "elsewhere" else f"{part}/"
        rows.append([f"all of {name}", str(len(mutants)), str(len(mutants) - total), f"{total / len(mutants):.1%}"])
        survivors += [mutant for mutant in mutants if not mutant.killed]
    listed = [
        {"file": mutant.file, "change": mutant.change, "reason": _reason(reasons, mutant), "name": mutant.name}
        for mutant in survivors
    ]
    summary: list[dict[str, Any]] = [
        dict(zip(("file", "mutants", "survived", "killed"), row, strict=True)) for row in rows
    ]
    for row in summary:
        if row["file"] in sources:  # what a run in another folder goes on from
            row |= {"source": sources[row["file"]], "waiting": untold.get(row["file"], [])}
    waiting = [f"{file}: {len(names)}" for file, names in untold.items()]
    RESULT.write_text(json.dumps({"mutmut": version("mutmut"), "files": summary, "survivors": listed}, indent=1) + "\n")
    text = [
        "# Tests that can fail\n\n",
        "Every operator, number, name, argument and branch of `vbon_lightning/functional` and `vbon_lightning/modules`",
        ", and of what computes in single files elsewhere, changed one at a time, and the tests of the same folder or ",
        "of the same names run on each until one fails: ",
        f"`python -m experiments.mutation.mutation` (mutmut {version('mutmut')}). ",
        "The text of errors and warnings is left alone.\n\n",
        markdown_table(["file", "mutants", "survived", "killed"], rows, align="lrrr"),
        _listed("Changed since they were tried, so that these numbers are of an earlier state", stale),
        _listed("Not tried yet", missing),
        _listed("Mutants that are not tried yet since the code or its tests have changed, and not counted", waiting),
        "\n## The survivors\n\n",
        markdown_table(
            ["file", "change", "why it cannot be told"],
            [[f"`{row['file']}`", _code(row["change"]), row["reason"] or "**open**"] for row in listed],
            align="lll",
        ),
    ]
    REPORT.write_text("".join(text))
    print("".join(text[:10]), f"{sum(not row['reason'] for row in listed)} survivors without a reason")


def _listed(what: str, files: list[str]) -> str:
    return f"\n{what}: {', '.join(f'`{file}`' for file in files)}.\n" if files else ""


def _since_then(part: str, tried: set[str]) -> tuple[list[str], list[str]]:
    """Return the files of a part that have changed since they were tried, and those that have not been tried."""
    changed, untried = [], []
    for source in _sources(part, ROOT):
        file = source.relative_to(ROOT / "vbon_lightning").as_posix()
        then = RUNS / part / "vbon_lightning" / file
        if file in tried and then.read_text() != move_decorators(source.read_text()):
            changed.append(file)
        elif file not in tried and not then.exists():
            untried.append(file)
    return changed, untried


def _waiting(part: str) -> dict[str, list[str]]:
    """Return of which mutants nothing is known yet, by file."""
    found = {}
    for meta in _results(part):
        codes = json.loads(meta.read_text())["exit_code_by_key"]
        if left := [name for name, code in codes.items() if code is None]:
            found[_file_of(part, meta)] = left
    return found


def _reason(reasons: dict[str, Any], mutant: Mutant) -> str:
    for kind in (*reasons.get(mutant.file, []), *reasons["everywhere"]):
        if kind.get("function", mutant.function) != mutant.function:
            continue
        if apart := kind.get("apart_from"):
            # The two lines are the same but for this.
            fits = re.search(apart, mutant.removed) and _without(apart, mutant.removed) == _without(apart, mutant.added)
        else:
            sides = (("removed", mutant.removed), ("added", mutant.added))
            fits = all(re.search(kind.get(side, ""), text) for side, text in sides)
        if fits:
            return str(kind["reason"])
    return ""


def _without(pattern: str, text: str) -> str:
    return re.sub(r"[\s,]+", "", re.sub(pattern, "", text))


def _code(text: str) -> str:
    return "`" + text.replace("|", "\\|").replace("`", "'") + "`"


if __name__ == "__main__":
    asked = sys.argv[1:] or [*PARTS, "report"]
    for what in asked:
        if what == "report":
            report()
        elif what in PARTS:
            run(what)
        else:
            raise SystemExit(f"{what!r} is none of {', '.join(PARTS)}, report")
