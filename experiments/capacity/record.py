"""Write what policies' runs logged and their comparisons measured, as docs/experiments/tilted/NAME.{json,md}.

python experiments/capacity/record.py capacity     # after towers.sh
python experiments/capacity/record.py smollm2      # after smollm2.sh

A policy whose run is not there keeps the numbers that were written before.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vbon_lightning._markdown import markdown_table
from vbon_lightning.evaluation.fronts import gain_share

OUTPUT = Path("docs/experiments/tilted")


class Setting(NamedTuple):
    """A reference, and policies taught beside it."""

    script: str
    runs: Path
    early: tuple[int, int]
    """The steps, from and up to, of the first column."""
    last: int
    """Steps of the second."""
    policies: dict[str, tuple[str, str]]
    """Run and description, by the name in the comparison."""


SETTINGS = {
    "capacity": Setting(
        "experiments/capacity/towers.sh",
        Path("runs/capacity"),
        (60, 80),
        40,
        {
            "Plain": ("plain", "the reference's own weights, trained"),
            "Plain-untied": ("plain-untied", "the same, with an output embedding of their own"),
            "0.26M": ("tower-0.26m", "a tower of 0.26M parameters beside it"),
            "1.9M": ("tower-1.9m", "a tower of 1.9M"),
            "10M": ("tower-10m", "a tower of 10M"),
            "Value-body": ("tower-value", "a tower of 1.9M that starts as the value model"),
            "No-own-vectors": ("tower-value-no-vectors", "the same, through the reference's embeddings of the tokens"),
            "Averaged": ("tower-value-ema", "the one before that, its weights averaged (0.98)"),
        },
    ),
    "smollm2": Setting(
        "experiments/capacity/smollm2.sh",
        Path("runs/smollm2"),
        (10, 20),
        10,
        {
            "LoRA": ("lora", "low-rank adapters, r = 32"),
            "Whole": ("whole", "the reference's own weights, trained"),
            "Tower": ("tower", "a tower that starts as the value model"),
        },
    ),
}


def logged_kl(directory: Path) -> list[tuple[int, float]]:
    """Return what was logged of KL(teacher || policy), by step."""
    events = EventAccumulator(str(directory)).Reload()
    return [(event.step, event.value) for event in events.Scalars("train/teacher_kl")]


def measured(setting: Setting, name: str, run: str, comparisons: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what there is to say about one policy."""
    logged, (begin, end) = logged_kl(setting.runs / run), setting.early
    found: dict[str, Any] = {
        "run": run,
        "steps": logged[-1][0] + 1,
        f"teacher_kl_steps_{begin}_to_{end - 1}": fmean(value for step, value in logged if begin <= step < end),
        f"teacher_kl_last_{setting.last}": fmean(v for step, v in logged if step > logged[-1][0] - setting.last),
    }
    for comparison in comparisons:
        reports = {report["name"]: report for report in comparison["reports"]}
        if name not in reports:
            continue
        report, best = reports[name], reports["Best-of-8"]
        win_rate, gain = report["win_rate"], best["win_rate"]["mean"] - 0.5
        found |= {
            "command": comparison["command"],
            "gain_kept": gain_share(win_rate["mean"], best["win_rate"]["mean"]),
            "gain_half_width": win_rate["half_width"] / gain,
            "kl_ratio": report["kl"]["mean"] / best["kl"]["mean"],
        }
    return found


def row(setting: Setting, words: str, found: dict[str, Any]) -> list[str]:
    """Return a policy's row of the table."""
    (begin, end), kept = setting.early, "-"
    if "gain_kept" in found:
        kept = f"{100 * found['gain_kept']:.0f} ± {100 * found['gain_half_width']:.0f}%"
    numbers = [found.get(f"teacher_kl_steps_{begin}_to_{end - 1}"), found.get(f"teacher_kl_last_{setting.last}")]
    cells = ["-" if number is None else f"{number:.2f}" for number in numbers]
    return [words, *cells, kept, f"{found['kl_ratio']:.2f}" if "kl_ratio" in found else "-"]


def main(which: str) -> None:
    """Write the results of a setting."""
    setting, path = SETTINGS[which], OUTPUT / f"{which}.json"
    before = json.loads(path.read_text())["results"] if path.exists() else {}
    comparisons = [json.loads(file.read_text()) for file in sorted(setting.runs.glob("comparison*/comparison.json"))]
    results = {}
    for name, (run, words) in setting.policies.items():
        if (setting.runs / run).exists():
            results[words] = measured(setting, name, run, comparisons)
        elif words in before:
            results[words] = before[words]
    OUTPUT.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"made_by": setting.script, "results": results}, indent=1) + "\n")
    (begin, end), rows = setting.early, [row(setting, words, found) for words, found in results.items()]
    first = f"KL to the teacher, steps {begin} to {end - 1}"
    header = ["policy", first, f"last {setting.last}", "gain kept, N = 8", "KL / Best-of-8's"]
    text = markdown_table(header, rows, align="lrrrr")
    path.with_suffix(".md").write_text(f"`bash {setting.script}`\n\n{text}")
    print(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
