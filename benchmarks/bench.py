"""What the benchmarks share: isolated runs, the machine in words, versions, and results as JSON and Markdown."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
ROOT = Path(__file__).parents[1]


def isolated(script: str, job: dict[str, Any], *, threads: int) -> dict[str, Any]:
    """Run a job in a process of its own and return what it printed last, as JSON.

    Args:
        script: The benchmark's file, which answers ``--job``.
        job: What to do.
        threads: Threads that torch may use.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    command = [sys.executable, script, "--job", json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{job} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def answer(work: Any) -> bool:
    """Do the job named on the command line, where there is one, and print its result."""
    if "--job" not in sys.argv:
        return False
    print(json.dumps(work(json.loads(sys.argv[sys.argv.index("--job") + 1]))))
    return True


def machine(accelerator: str | None = None) -> str:
    """Describe the machine in words, and the accelerator that was used, if any."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores of {name}, {gigabytes:.0f} GiB of memory, {accelerator or 'no accelerator'} used"


def versions(*names: str) -> dict[str, str]:
    """Return the installed versions of packages, Python's first."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table, the first column left-aligned."""
    lines = [header, [":---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write(
    name: str,
    title: str,
    body: str,
    data: Any,
    packages: Sequence[str],
    command: str | None = None,
    accelerator: str | None = None,
) -> None:
    """Write results/NAME.json and results/NAME.md and print the latter.

    Args:
        name: The file's name.
        title: What was measured, a sentence or two.
        body: The table.
        data: All numbers.
        packages: Whose versions to name.
        command: What was run; this process's command line by default.
        accelerator: The accelerator that was used, if any.
    """
    command = command or shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    used = versions("torch", "transformers", *packages)
    about = {"command": command, "machine": machine(accelerator), "versions": used}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({**about, "results": data}, indent=1) + "\n")
    named = ", ".join(f"{package} {number}" for package, number in used.items())
    text = f"{title}\n\n{body}\n`{command}` on {machine(accelerator)}; {named}.\n"
    (RESULTS / f"{name}.md").write_text(text)
    print(text)
