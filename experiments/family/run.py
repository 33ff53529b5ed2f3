"""Train every method on the demo at one budget and compare all of them, and the decoders, on one sheet.

python -m experiments.family.run                       # make family
python -m experiments.family.run --seeds "0 1 2"       # make family SEEDS="0 1 2"
python -m experiments.family.run --methods vbon dpo    # some of them
python -m experiments.family.run --again vbon          # make these again, finished or not
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.family.plan import RUNS, Job, Plan
from experiments.family.sheet import write_sheet

ROOT = Path(__file__).parents[2]
METHODS = Path(__file__).with_name("methods.yaml")
SHEET = RUNS / "sheet"


class Failure(NamedTuple):
    """A job that was not done, or a decoder that was left out."""

    name: str
    why: str


class Running(NamedTuple):
    """A job that is being done."""

    job: Job
    process: subprocess.Popen[bytes]
    began: float


def start(job: Job) -> subprocess.Popen[bytes]:
    """Run a job's command, its output going to its log; one thread each, which suits a model this small."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with job.log.open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "vbon_lightning", *job.words], stdout=log, stderr=subprocess.STDOUT, env=environment
        )


def run_jobs(
    jobs: Sequence[Job],
    *,
    workers: int = 2,
    again: Sequence[str] = (),
    say: Callable[[str], None] = print,
    starter: Callable[[Job], subprocess.Popen[bytes]] = start,
) -> list[Failure]:
    """Do jobs, so many side by side, each when what it needs is done; what was done before is passed over.

    A job that fails keeps no other from being done but those that need it.

    Args:
        jobs: The jobs; what one needs is among them.
        workers: How many side by side.
        again: Names of jobs to do whether they were done or not.
        say: Gets what happens, a line each.
        starter: Starts a job.

    Returns:
        Those that were not done.
    """
    waiting, running = list(jobs), list[Running]()
    done: set[str] = set()
    failures: list[Failure] = []
    try:
        while waiting or running:
            for job in list(waiting):
                lost = [failure.name for failure in failures if failure.name in job.needs]
                if lost:
                    waiting.remove(job)
                    failures.append(Failure(job.name, f"needs {', '.join(lost)}"))
                elif set(job.needs) <= done and len(running) < workers:
                    waiting.remove(job)
                    if job.name not in again and job.is_done():
                        say(f"{job.name} is done already")
                        done.add(job.name)
                        continue
                    job.stamp.unlink(missing_ok=True)
                    shutil.rmtree(job.clear, ignore_errors=True)
                    say(f"{job.command}\n       (output in {job.log})")
                    running.append(Running(job, starter(job), time.perf_counter()))
            for one in list(running):
                status = one.process.poll()
                if status is None:
                    continue
                running.remove(one)
                seconds = time.perf_counter() - one.began
                if status == 0 and one.job.output.exists():
                    one.job.record(seconds)
                    done.add(one.job.name)
                    say(f"{one.job.name} took {seconds:.0f} s")
                else:
                    why = f"ended with status {status}" if status else f"left no {one.job.output}"
                    failures.append(Failure(one.job.name, f"{why}: {one.job.log}"))
                    say(f"{one.job.name} FAILED, {failures[-1].why}")
            if running:
                time.sleep(0.05)
    finally:
        for one in running:  # this one was stopped, or broke
            one.process.terminate()
            one.process.wait()
    return failures


def make_family(plan: Plan, seeds: Sequence[int], **how: object) -> list[Failure]:
    """Train, compare, and write the sheet.

    Args:
        plan: What there is to do.
        seeds: The seeds of the trainings.
        **how: What :func:`run_jobs` takes.

    Returns:
        The jobs that were not done.
    """
    trainings = [(seed, method, plan.training(method, seed)) for seed in seeds for method in plan.methods]
    failures = run_jobs([*plan.stages, *(job for _, _, job in trainings)], **how)  # type: ignore[arg-type]
    failed = {failure.name for failure in failures}
    comparisons: dict[int, Job] = {}
    for seed in seeds:
        trained = [(method, job) for own, method, job in trainings if own == seed and job.name not in failed]
        if trained:
            comparisons[seed] = plan.comparison(seed, trained)
    if not comparisons:
        return failures
    first = [(method, job) for own, method, job in trainings if own == seeds[0] and job.name not in failed]
    decoding, lost = plan.decoding(first)
    failures += [Failure(name, why) for name, why in lost.items()]
    last = [*comparisons.values(), *([] if decoding is None else [decoding])]
    failures += run_jobs(last, **how)  # type: ignore[arg-type]
    failed = {failure.name for failure in failures}
    by_seed = {seed: job.output for seed, job in comparisons.items() if job.name not in failed}
    if by_seed:
        write_sheet(
            SHEET,
            by_seed,
            decoders=None if decoding is None or decoding.name in failed else decoding.output,
            trainings={
                method.title: [job.recorded() for _, own, job in trainings if own == method and job.name not in failed]
                for method in plan.methods
            },
            settings={method.title: plan.settings(method) for method in plan.methods},
            responses_at_once=plan.responses_at_once,
            failed={failure.name: failure.why for failure in failures},
        )
    return failures


def stop(*_: object) -> None:
    """End as a program that was killed does, but with what it started."""
    sys.exit(143)


def main(args: Sequence[str] | None = None) -> int:
    """Make the family; the status is 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0", help="seeds of the trainings, such as '0 1 2'")
    parser.add_argument("--methods", nargs="*", default=[], help="names in methods.yaml; all by default")
    parser.add_argument("--again", nargs="*", default=[], help="jobs to do again, such as vbon or vbon-s0")
    parser.add_argument("--workers", type=int, default=2, help="how many runs side by side")
    given = parser.parse_args(args)
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, stop)
    began = time.perf_counter()

    def say(text: str) -> None:
        print(f"\n[{time.perf_counter() - began:4.0f}s] {text}", flush=True)

    try:
        seeds = [int(word) for word in given.seeds.replace(",", " ").split()]
        plan = Plan.read(METHODS, given.methods)
    except ValueError as problem:
        parser.error(str(problem))
    if not seeds or len(set(seeds)) < len(seeds):
        parser.error(f"--seeds names {given.seeds!r}: give one or several different numbers")
    for config in plan.absent:
        say(f"{config} is not there: left out")
    again = [*given.again, *(f"{name}-s{seed}" for name in given.again for seed in seeds)]
    failures = make_family(plan, seeds, workers=given.workers, again=again, say=say)
    for failure in failures:
        say(f"NOT DONE: {failure.name}, {failure.why}")
    if (SHEET / "family.json").is_file():
        say(f"The sheet: {SHEET}/comparison.md, pareto.png and cost.png. For docs/family.md: "
            "python -m experiments.family.report")  # fmt: skip
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
