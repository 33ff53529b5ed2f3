"""Write what the towers' runs logged and the comparison measured: docs/experiments/tilted/capacity.{json,md}.

python experiments/capacity/record.py
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vbon_lightning._markdown import markdown_table
from vbon_lightning.evaluation.fronts import gain_share

RUNS, OUTPUT = Path("runs/capacity"), Path("docs/experiments/tilted")
POLICIES = {
    "Plain": ("plain", "the reference's own weights, trained"),
    "Plain-untied": ("plain-untied", "the same, with an output embedding of their own"),
    "0.26M": ("tower-0.26m", "a tower of 0.26M parameters beside it"),
    "1.9M": ("tower-1.9m", "a tower of 1.9M"),
    "10M": ("tower-10m", "a tower of 10M"),
    "Value-body": ("tower-value", "a tower of 1.9M that starts as the value model"),
    "No-own-vectors": ("tower-value-no-vectors", "the same, through the reference's embeddings of the tokens"),
    "Averaged": ("tower-value-ema", "the one before that, its weights averaged (0.98)"),
}


def teacher_kl(directory: Path) -> list[tuple[int, float]]:
    """Return what was logged of KL(teacher || policy), by step."""
    events = EventAccumulator(str(directory)).Reload()
    return [(event.step, event.value) for event in events.Scalars("train/teacher_kl")]


def main() -> None:
    """Write the results."""
    comparison = json.loads((RUNS / "comparison" / "comparison.json").read_text())
    reports = {report["name"]: report for report in comparison["reports"]}
    best = reports["Best-of-8"]
    rows: list[list[str]] = []
    results: dict[str, Any] = {}
    for name, (run, words) in POLICIES.items():
        logged = teacher_kl(RUNS / run)
        early = fmean(value for step, value in logged if 60 <= step < 80)
        last = fmean(value for _, value in logged[-5:])
        found: dict[str, Any] = {"run": run, "steps": logged[-1][0] + 1, "teacher_kl_steps_60_to_79": early}
        cells = [words, f"{early:.2f}", "-", "-", "-"]
        if name in reports:  # trained to the end
            report = reports[name]
            kept = gain_share(report["win_rate"]["mean"], best["win_rate"]["mean"])
            ratio = report["kl"]["mean"] / best["kl"]["mean"]
            half = report["win_rate"]["half_width"] / (best["win_rate"]["mean"] - 0.5)
            found |= {"teacher_kl_last_40": last, "gain_kept": kept, "gain_half_width": half, "kl_ratio": ratio}
            cells[2:] = [f"{last:.2f}", f"{100 * kept:.0f} ± {100 * half:.0f}%", f"{ratio:.2f}"]
        results[words] = found
        rows.append(cells)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    about = {"what": __doc__, "made_by": "experiments/capacity/towers.sh", "command": comparison["command"]}
    (OUTPUT / "capacity.json").write_text(json.dumps({**about, "results": results}, indent=1) + "\n")
    header = ["policy", "KL to the teacher, steps 60 to 79", "last 40", "gain kept, N = 8", "KL / Best-of-8's"]
    table = markdown_table(header, rows, align="lrrrr")
    (OUTPUT / "capacity.md").write_text(f"`bash experiments/capacity/towers.sh`\n\n{table}")
    print(table)


if __name__ == "__main__":
    main()
