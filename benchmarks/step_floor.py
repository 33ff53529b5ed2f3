"""What a training step cannot go below: its matrix products alone, beside whole steps of vBoN and of TRL's RLOO.

python -m benchmarks.step_floor

A step of B x G responses of T tokens runs the policy's linear layers once to sample (T products of B x G rows), twice
to score all response tokens under policy and reference, and twice more for the gradient. The floor is the time of just
these products, of the same shapes, one after another: no attention, no norms, no softmax, no optimizer, no Python.
Runs alternate, each a process of its own.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from benchmarks import training_steps
from benchmarks.bench import answer, isolated, median, table, write
from benchmarks.models import directory
from benchmarks.training_steps import PROMPTS, SAMPLES

CASES: list[dict[str, Any]] = [
    {"model": "demo", "words": 5, "length": 32},
    {"model": "10M", "words": 5, "length": 32},
]


def work(job: dict[str, Any]) -> dict[str, float]:
    """Time the products of a step."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["path"], dtype="float32")
    shapes = [tuple(part.weight.shape) for part in model.modules() if isinstance(part, nn.Linear)]
    rows, length = PROMPTS * SAMPLES, job["length"]

    def product(count: int, wide: int, out: int) -> float:
        left, right = torch.randn(count, wide), torch.randn(out, wide)
        marks = []
        for _ in range(6):
            start = time.perf_counter()
            torch.nn.functional.linear(left, right)
            marks.append(time.perf_counter() - start)
        return median(marks[1:])

    sampling = length * sum(product(rows, wide, out) for out, wide in shapes)
    scoring = 2 * sum(product(rows * length, wide, out) for out, wide in shapes)
    # The gradient of what goes in, and of the weights.
    backward = sum(product(rows * length, out, wide) + product(out, rows * length, wide) for out, wide in shapes)
    operations = 2 * rows * length * 5 * sum(out * wide for out, wide in shapes)
    seconds = sampling + scoring + backward
    return {"seconds": seconds, "sampling": sampling, "scoring": scoring, "backward": backward,
            "gflops_per_second": operations / seconds / 1e9}  # fmt: skip


def main(steps: int = 8, repeats: int = 2, threads: int = 2) -> None:
    """Measure both models.

    Args:
        steps: Training steps a run, the first two of which do not count.
        repeats: Runs of each.
        threads: Threads that torch may use.
    """
    results, rows = [], []
    with tempfile.TemporaryDirectory() as root:
        for case in CASES:
            job = case | {"root": root, "path": directory(case["model"], Path(root)), "steps": steps}
            found: dict[str, list[dict[str, float]]] = {"floor": [], "ours": [], "trl": []}
            for _ in range(repeats):
                found["floor"].append(isolated(__file__, job, threads=threads))
                for side in ("ours", "trl"):
                    found[side].append(isolated(training_steps.__file__, job | {"side": side}, threads=threads))
            floor = median([run["seconds"] for run in found["floor"]])
            ours, trl = (median([run["seconds_per_step"] for run in found[side]]) for side in ("ours", "trl"))
            results.append({**case, "runs": found})
            rows.append(
                [
                    f"{case['model']}, prompts of {case['words']} words, {case['length']} new tokens",
                    f"{floor:.2f} s",
                    f"{ours:.2f} s",
                    f"{trl:.2f} s",
                    f"{floor / ours:.0%}",
                    f"**{trl / ours:.1f}**",
                    f"{trl / floor:.1f}",
                ]
            )
            print(rows[-1], flush=True)
    write(
        "step_floor",
        f"Seconds of a step of {PROMPTS} prompts x {SAMPLES} responses: its matrix products alone, vBoN's and TRL "
        f"RLOO's whole; medians of {repeats} alternating runs, {threads} threads. The last column is the ratio that a "
        "step without anything but its products would reach.",
        table(["case", "products", "vBoN", "TRL RLOO", "products' share of vBoN", "ratio", "ratio at the floor"], rows),
        results,
        ["lightning", "trl"],
    )


if __name__ == "__main__" and not answer(work):
    auto_cli(main, as_positional=False)
