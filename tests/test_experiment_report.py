"""The report of the sentiment experiment on results made up so that its numbers are known."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from vbon_lightning.evaluation import PolicyReport

FOLDER = Path(__file__).parent.parent / "experiments" / "sentiment"
sys.path.insert(0, str(FOLDER))

from budgets import _kept, costs_table, family_table, gain_table  # noqa: E402
from report import with_tables, write_report  # noqa: E402
from results import Baseline, Result, _result, read_results  # noqa: E402
from sweep import read_sweep  # noqa: E402

N = (2, 4, 8, 16, 32)
REFERENCE = "runs/sentiment/sft/export"


def estimate(mean: float) -> dict[str, float]:
    return {"mean": mean, "half_width": 0.01}


def report(name: str, method: str, kl: float, win_rate: float, judge: bool = True, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "method": method,
        "prompts": 64,
        "samples": 32,
        "reward": estimate(2 * win_rate - 1),
        "kl": estimate(kl),
        "kl_estimator": "exact",
        "win_rate": estimate(win_rate),
        "judge_reward": estimate(win_rate / 2) if judge else None,
        **more,
    }


def bon_kl(n: float) -> float:
    return math.log(n) - (n - 1) / n


def baseline(setting: str = "main") -> dict[str, Any]:
    best = [report(f"Best-of-{n}", "Best-of-N", bon_kl(n), n / (n + 1), n=n) for n in N]
    costs = {"responses": 2000, "training_responses": 1000, "samples": 512, "seconds_per_response": 0.01}
    return {
        "setting": setting,
        "table": {**costs, "device": "cpu"},
        "reports": [report("reference", "reference", 0.0, 0.5, n=1), *best, report("again", "sampled", 0.0, 0.5)],
    }


def result(
    method: str,
    title: str,
    value: float,
    seed: int,
    kl: float,
    win_rate: float,
    *,
    short: str = "n",
    group: str = "methods",
    setting: str = "main",
    table: bool = True,
) -> dict[str, Any]:
    return {
        "run": f"{method}-{short}{value}-s{seed}",
        "method": method,
        "title": title,
        "setting": setting,
        "group": group,
        "table": table,
        "strength": {"option": f"model.init_args.{short}", "short": short, "value": value},
        "seed": seed,
        "training": {
            "command": f"{method}-{short}{value}-s{seed}",
            "seconds": 40.0,
            "optimizer_steps": 100,
            "sampled_responses": 2000,
            "settings": {"module": {"class": "VBoN", "n": 8}},
        },
        "report": report(f"{title} {value}", title, kl, win_rate),
    }


def made_up() -> dict[str, dict[str, Any]]:
    """vBoN is Best-of-N with 4/5 of its gain; the others have the same gains at more KL."""
    found = [
        *(result("vbon", "vBoN", n, seed, bon_kl(n), 0.5 + 0.8 * (n / (n + 1) - 0.5)) for n in N for seed in (0, 1)),
        *(result("vbon_lower", "lower", n, 0, bon_kl(n) + 0.1, 0.48 + 0.8 * (n / (n + 1) - 0.5)) for n in N),
    ]
    for beta in (0.1, 0.2):
        found.append(result("kl_rl", "KL-RL", beta, 0, 3.0 - 5 * beta, 0.9 - beta, short="b", table=False))
    for m in (16, 64, 256):
        for seed in (0, 1):
            win_rate = 0.8 - 1 / m + 0.01 * seed
            found.append(result("m", "M", m, seed, 1.0, win_rate, short="m", group="table_samples"))
    for method, gain in (("ties_exact", 0.8), ("ties_untied", 0.75)):
        found.append(result(method, method, 4, 0, 0.5, gain, group="ties", setting="binary"))
    found.append(result("long", "vBoN-long", 4, 0, bon_kl(4), 0.77, group="long"))
    found.append(result("floor", "vBoN-floor", 8, 0, bon_kl(8), 0.75, group="floor"))
    for method, gain, kl in (("family_bond", 0.71, bon_kl(4)), ("family_far", 0.9, 9.0)):
        found.append(result(method, method, 2, 0, kl, gain, group="family"))
        found[-1]["training"] |= {"table_responses": 12288}
    found.append(result("few", "vBoN-few", 4, 0, 2 * bon_kl(4), 0.65, group="few", setting="few"))
    baselines = {"bon": baseline(), "bon-binary": baseline("binary"), "bon-few": baseline("few")}
    return {run["run"]: run for run in found} | baselines


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    for name, plain in made_up().items():
        (folder / f"{name}.json").write_text(json.dumps(plain))
    return folder


def rows(path: Path) -> dict[str, list[str]]:
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in cells[2:]}


def test_the_report(results: Path, tmp_path: Path) -> None:
    output = tmp_path / "docs"
    written = write_report(results, output)
    assert all(path.stat().st_size > 100 for path in written)
    names = (
        "gain",
        "closeness",
        "corners",
        "fronts",
        "costs",
        "break_even",
        "bounds",
        "ties",
        "table_samples",
        "runs",
        "long",
        "few",
        "floor",
        "family",
    )
    tables = {name: output / "tables" / f"{name}.md" for name in names}
    assert set(written) == {
        *tables.values(),
        *(output / f"{n}.png" for n in ("fronts", "judge", "table_samples", "long")),
    }

    # The two KL-RL runs: (2.5, 0.8) is dominated by vBoN n=16, (2.0, 0.7) by n=8.
    assert rows(tables["fronts"]) == {
        "vBoN": ["10", "100%", "100%"],
        "lower": ["5", "0%", "0%"],
        "KL-RL": ["2", "0%", "0%"],
    }
    # vBoN's gains are 0.8 of Best-of-N's at its KLs, and so is the area below them.
    assert rows(tables["corners"])["vBoN"] == ["0.80 (0.80 to 0.80)"] * 4
    assert rows(tables["gain"])["vBoN"][3].startswith("80 ±")

    closeness = [line for line in tables["closeness"].read_text().splitlines() if line.startswith("| vBoN | 4 ")]
    cells = [cell.strip() for cell in closeness[0].split("|")]
    assert cells[5:8] == ["0.80 (0.80 to 0.80)", "1.00 (1.00 to 1.00)", "2"]
    assert rows(tables["long"])["vBoN-long"] == ["4", "0.770", "0.800", "0.90", "1.00", "1"]
    assert rows(tables["few"])["vBoN-few"] == ["4", "0.650", "0.800", "0.50", "2.00", "1"]

    # Best-of-4 wins 0.8 at that KL; how far another is than any Best-of-N is not compared.
    assert rows(tables["family"])["family_bond"][3:] == ["70%", "2,000", "12,288"]
    assert rows(tables["family"])["family_far"][3] == "-"

    assert rows(tables["bounds"])["8"] == ["0.020", "0.040", "-0.100", "1 of 1"]
    assert rows(tables["ties"])["4"] == ["0.050", "0.100", "0.000", "1 of 1"]
    assert rows(tables["table_samples"])["16"][0] == "0.743 (0.738 to 0.748)"
    assert len(tables["runs"].read_text().splitlines()) > len(made_up()) - 2


def test_other_documents_have_their_tables_filled_too(results: Path, tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    document.write_text("before\n<!-- table gain -->\n<!-- end -->\nafter\n")
    assert document in write_report(results, tmp_path / "docs", [document])
    assert "| vBoN | 2 | 5 |" in document.read_text() and document.read_text().endswith("<!-- end -->\nafter\n")


def test_break_even_by_hand(results: Path, tmp_path: Path) -> None:
    write_report(results, tmp_path)
    found = rows(tmp_path / "tables" / "break_even.md")
    # KL-RL with beta 0.1 has a win rate of 0.8, Best-of-4's, and reads no table: 2000 / 3 queries, 40 / 0.03 by time.
    assert found["KL-RL β=0.1"] == ["4.0", "2,000", "667", "40", "1,333"]
    # vBoN with n = 4: 0.74, and the training prompts' 1000 responses at 0.01 seconds each.
    part = (0.74 - 2 / 3) / (0.8 - 2 / 3)
    saved = 2 ** (1 + part) - 1
    assert found["vBoN N=4"] == [f"{saved + 1:.1f}", "3,000", f"{3000 / saved:,.0f}", "50", f"{5000 / saved:,.0f}"]


def equal_budgets() -> tuple[list[Result], Baseline]:
    """Two methods, two seeds: one keeps 80% and 84% at Best-of-N's KLs, the other stops below Best-of-4's."""
    plain = [
        result("t", "Tilted", n, seed, bon_kl(n), 0.5 + (0.8 + 0.04 * seed) * (n / (n + 1) - 0.5))
        for n in N
        for seed in (0, 1)
    ]
    plain += [result("s", "Short", n, 0, bon_kl(n) / 3, 0.6) for n in (2, 4)]
    for one in plain:
        one["training"] |= {"command": f"{one['method']}-s{one['seed']}", "table_responses": 500}
    first = {"seconds": 10.0, "optimizer_steps": 7, "sampled_responses": 0, "table_responses": 800, "after": None}
    for one in plain[:10]:
        # The second seed ran on a slower machine.
        one["training"] |= {"after": first, "sampled_responses": 0, "seconds": 40.0 + 100 * one["seed"]}
    best = baseline()
    return [_result(one) for one in plain], Baseline("main", best["table"], [
        PolicyReport.from_dict(one) for one in best["reports"]
    ])  # fmt: skip


def cells(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} ")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_gains_at_best_of_ns_kl_by_hand() -> None:
    runs, bon = equal_budgets()
    # 80% and 84%: a mean of 82. At N = 4 the prompts' half-width is .01 / .3, the seeds' t(1) x .0283 / sqrt(2) = .254.
    half = math.hypot(0.01 / 0.3, 12.706 * 0.04 / 2)
    found = cells(gain_table(runs, bon), "Tilted")
    assert found[:2] == ["2", "5"] and found[3] == f"82 ± {100 * half:.0f}%"
    # The largest KL of the other is a third of Best-of-4's, between the reference's and Best-of-2's; there it has 0.6.
    short = cells(gain_table(runs, bon), "Short")
    kl = bon_kl(4) / 3
    assert kl > bon_kl(2) and short[2].startswith("60 ±") and short[3:] == ["not reached"] * 3


def test_a_gain_between_two_strengths_is_on_the_line_between_them() -> None:
    runs, bon = equal_budgets()
    two = [run for run in runs if run.title == "Tilted" and run.seed == 0 and run.value in (2, 8)]
    (low, below), (high, above) = sorted((math.sqrt(run.kl), run.win_rate) for run in two)
    part = (math.sqrt(bon_kl(4)) - low) / (high - low)
    kept = _kept(two, bon, 4)
    assert kept is not None and kept.mean == pytest.approx((below + part * (above - below) - 0.5) / 0.3)


def test_a_single_run_that_cannot_be_compared_comes_after_those_that_can() -> None:
    _, bon = equal_budgets()
    made = {"less": (bon_kl(4), 0.6), "far": (9.0, 0.9), "more": (bon_kl(4), 0.7), "most": (bon_kl(4), 0.75)}
    runs = [result(name, name, 2, 0, kl, gain, group="family") for name, (kl, gain) in made.items()]
    for one in runs:
        one["training"] |= {"table_responses": 500}
    text = family_table([_result(one) for one in runs], bon)
    assert [line.split(" | ")[0] for line in text.splitlines()[2:6]] == ["| most", "| more", "| less", "| far"]
    assert cells(text, "far")[3] == "-"


def test_costs_count_the_stages_before_and_a_dialled_policy_once() -> None:
    runs, bon = equal_budgets()
    # 800 of the table (the first stage's, which are the same responses), 7 + 100 updates, 10 + 40 s and 800 x 0.01 s.
    assert cells(costs_table(runs, bon), "Tilted") == ["800", "0", "107", "58", "58"]
    assert cells(costs_table(runs, bon), "Short")[:2] == ["500", "2,000"]


def test_a_few_results_are_enough(results: Path, tmp_path: Path) -> None:
    for path in results.glob("*.json"):
        if path.stem not in ("bon", "vbon-n4-s0"):
            path.unlink()
    names = {path.name for path in write_report(results, tmp_path / "docs")}
    assert "fronts.png" in names and "bounds.md" not in names


def test_results_without_their_baseline(results: Path, tmp_path: Path) -> None:
    (results / "bon-binary.json").unlink()
    with pytest.raises(ValueError, match=r"runs on binary, but no bon.json"):
        read_results(results)
    with pytest.raises(ValueError, match="has no run's result"):
        write_report(tmp_path / "empty", tmp_path)


def test_tables_are_put_where_the_document_asks_for_them() -> None:
    text = "a\n<!-- table one -->\nold\n<!-- end -->\nb\n<!-- table two -->\n<!-- end -->\n"
    found = with_tables(text, {"one": "| 1 |\n"})
    assert found == "a\n<!-- table one -->\n| 1 |\n<!-- end -->\nb\n<!-- table two -->\n<!-- end -->\n"
    assert with_tables(found, {"one": "| 1 |\n"}) == found
    with pytest.raises(ValueError, match="2 tables begin"):
        with_tables("<!-- table one -->\n<!-- table two -->\n<!-- end -->", {})


# --- the sweep description ---


def test_the_sweep_runs_seed_by_seed() -> None:
    sweep = read_sweep(FOLDER / "sweep.yaml")
    seeds = [run.training.seed for run in sweep.runs]
    assert seeds == sorted(seeds) and len(set(seeds)) > 1
    first = [run.method for run in sweep.runs if run.training.seed == 0]
    assert first[0] == "equal_tilted" and len(set(first)) == len({run.method for run in sweep.runs})
    for run in sweep.runs:
        words = " ".join(run.training.fit)
        assert f"--seed_everything {run.training.seed}" in words
        assert f"--{run.option} {run.value}" in words or f'"dial": {run.value}' in " ".join(run.compare)
        assert str(run.training.directory) in words and words.endswith("--ckpt_path last")
    for config in {word for training in sweep.trainings for word in training.fit if word.endswith(".yaml")}:
        assert (FOLDER.parents[1] / config).exists()


def test_a_training_comes_after_the_one_it_starts_from() -> None:
    sweep = read_sweep(FOLDER / "sweep.yaml")
    places = {training.name: place for place, training in enumerate(sweep.trainings)}
    assert len(places) == len(sweep.trainings)
    for training in sweep.trainings:
        if training.first is not None:
            assert places[training.first.name] < places[training.name]
            assert str(training.first.directory / "export") in " ".join(training.fit)
    # One policy serves all the N that it is dialled to, and its stage is no run of its own.
    dialled = [run for run in sweep.runs if run.method == "equal_tilted" and run.training.seed == 0]
    assert len(dialled) == 5 and len({run.training.name for run in dialled}) == 1
    assert len({run.comparison for run in dialled}) == 5
    value = dialled[0].training.first
    assert value is not None and value.name not in {run.training.name for run in sweep.runs}
    assert f"tilt: {value.directory}/export" in " ".join(dialled[0].training.fit)
    # Without a mention of $after it is the policy, and the reference stays the reference.
    after = next(run.training for run in sweep.runs if run.method == "vbon_after_sft")
    assert after.first is not None and f"--data.policy {after.first.directory}/export" in " ".join(after.fit)
    assert f"--data.reference {REFERENCE}" in " ".join(after.fit)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": [0]}, "seed unknown"),
        ({"seeds": [0, 0]}, "several runs are called vbon-n4-s0"),
        (
            {"methods": {"vbon": {"title": "v", "config": "c.yaml", "values": [2]}}},
            "methods.vbon: option, short missing",
        ),
        ({"methods": {"vbon": {"title": "v", "config": "c.yaml", "values": [2], "dial": True}}}, "vbon: short missing"),
        ({"methods": {"vbon": {"title": "v", "config": "c.yaml", "after": "x"}}}, "no method 'x' to come after"),
        ({"methods": {"vbon": {"title": "v"}}}, "methods.vbon: config missing"),
    ],
)
def test_a_wrong_description_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    method = {"title": "v", "config": "c.yaml", "option": "model.init_args.n", "short": "n", "values": [4]}
    plain = {
        "runs": "runs",
        "results": "results",
        "trainer": "t.yaml",
        "compare": "c.yaml",
        "reference": "r",
        "prepare": {},
        "settings": {"main": {"data": ["d.yaml"], "table": "t.yaml"}},
        "seeds": [0],
        "first": 1,
        "methods": {"vbon": method},
    }
    (tmp_path / "sweep.yaml").write_text(json.dumps(plain))
    assert [run.name for run in read_sweep(tmp_path / "sweep.yaml").runs] == ["vbon-n4-s0"]
    (tmp_path / "sweep.yaml").write_text(json.dumps(plain | change))
    with pytest.raises(ValueError, match=message):
        read_sweep(tmp_path / "sweep.yaml")
