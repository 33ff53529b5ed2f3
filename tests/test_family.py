"""What `make family` does: what is done when, what is done again, what a failure keeps from being done."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.family import plan as planning
from experiments.family.plan import Job, Plan
from experiments.family.run import METHODS, SHEET, make_family, run_jobs, stop
from experiments.family.sheet import joined, read_reports
from tests.evaluation.crowd import crowd
from vbon_lightning.evaluation import Estimate, PolicyReport

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def job(name: str, needs: tuple[str, ...] = (), content: str = "x") -> Job:
    config = Path(f"{name}.yaml")
    if not config.exists():
        config.write_text(content)
    made = Path("made")
    return Job(
        name,
        ("fit", "--config", str(config)),
        configs=(config,),
        needs=needs,
        inputs=tuple(made / need for need in needs),
        output=made / name,
        clear=made / name,
    )


class Starter:
    """Runs processes that do next to nothing, and remembers which, and how many at once."""

    def __init__(self, failing: tuple[str, ...] = (), empty: tuple[str, ...] = (), seconds: float = 0.0) -> None:
        self.failing, self.empty, self.seconds = failing, empty, seconds
        self.started: list[str] = []
        self.running: list[subprocess.Popen[bytes]] = []
        self.most = 0

    def __call__(self, job: Job) -> subprocess.Popen[bytes]:
        self.started.append(job.name)
        assert not job.output.exists(), "what an earlier run left is gone"
        if job.name not in (*self.failing, *self.empty):
            self.make(job)
        status = 3 if job.name in self.failing else 0
        process = subprocess.Popen(["/bin/sh", "-c", f"sleep {self.seconds}; exit {status}"])
        self.running.append(process)
        self.most = max(self.most, sum(one.poll() is None for one in self.running))
        return process

    def make(self, job: Job) -> None:
        job.output.mkdir(parents=True)
        (job.output / "config.json").write_text(f"{job.name} {job.configs[0].read_text()}")


def names(jobs: list[Job], **how: Any) -> list[str]:
    """Return which jobs are done."""
    starter = Starter()
    assert run_jobs(jobs, say=lambda text: None, starter=starter, **how) == []
    return starter.started


CHAIN = (("sft", ()), ("reward", ()), ("table", ("sft", "reward")), ("vbon", ("table",)), ("dpo", ("table",)))


def chain() -> list[Job]:
    return [job(name, needs) for name, needs in CHAIN]


def test_what_is_needed_comes_first_and_what_is_done_is_not_done_again() -> None:
    jobs = chain()[::-1]  # whatever the order
    started = names(jobs)
    assert sorted(started) == sorted(name for name, _ in CHAIN)
    assert all(started.index(need) < started.index(name) for name, needs in CHAIN for need in needs)
    assert names(jobs) == []
    assert names(jobs, again=["vbon"]) == ["vbon"]


def test_an_edited_config_is_made_again_and_what_stands_on_it() -> None:
    names(chain())
    Path("dpo.yaml").write_text("other")
    assert names(chain()) == ["dpo"]
    Path("table.yaml").write_text("other")
    assert names(chain()) == ["table", "vbon", "dpo"]
    # What comes out the same is no reason to go on.
    Path("sft.yaml").write_text("x ")
    Path("sft.yaml").write_text("x")
    assert names(chain()) == []


def test_other_words_another_version_or_a_lost_output_are_reasons_too(monkeypatch: pytest.MonkeyPatch) -> None:
    names(chain())
    (*others, dpo) = chain()
    assert names([*others, replace(dpo, words=(*dpo.words, "--n", "4"))]) == ["dpo"]
    names(chain())
    shutil.rmtree("made/vbon")
    assert names(chain()) == ["vbon"]
    Path("made/table/config.json").write_text("somebody made another")
    assert names(chain()) == ["vbon", "dpo"]
    Path("made/table/README.md").write_text("a card that changes with every comparison")
    Path("made/table/config.json").rename("made/table/part-of-another-time.json")
    assert names(chain()) == []
    monkeypatch.setattr("vbon_lightning.__version__", "x")
    assert len(names(chain())) == len(CHAIN)


def test_a_failure_stops_what_needs_it_and_nothing_else() -> None:
    said: list[str] = []
    jobs = [*chain(), job("other"), job("after", ("other",))]
    failures = run_jobs(jobs, say=said.append, starter=Starter(failing=("table",), empty=("other",)))
    assert {failure.name: failure.why for failure in failures} == {
        "table": "ended with status 3: runs/family/logs/table.log",
        "other": "left no made/other: runs/family/logs/other.log",
        "vbon": "needs table",
        "dpo": "needs table",
        "after": "needs other",
    }
    assert any("table FAILED" in line for line in said) and any(
        line.startswith("vbon fit --config sft") for line in said
    )
    assert sorted(names(jobs)) == ["after", "dpo", "other", "table", "vbon"], "what was done is done"


@pytest.mark.parametrize("workers", [1, 2])
def test_so_many_run_side_by_side(workers: int) -> None:
    starter = Starter(seconds=0.1)
    run_jobs([job(str(place)) for place in range(4)], workers=workers, say=lambda text: None, starter=starter)
    assert starter.most == workers


def test_a_run_that_was_killed_goes_on() -> None:
    class Killed(Starter):
        def __call__(self, job: Job) -> subprocess.Popen[bytes]:
            if job.name == "vbon":
                raise KeyboardInterrupt
            return super().__call__(job)

    starter = Killed()
    with pytest.raises(KeyboardInterrupt):
        run_jobs([*chain(), job("last")], workers=1, say=lambda text: None, starter=starter)
    assert starter.started == ["sft", "reward", "table"]
    Path("made/vbon").mkdir()  # half of it
    assert names([*chain(), job("last")]) == ["vbon", "dpo", "last"]


# -- the plan ---------------------------------------------------------------------------------------


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, here: Path) -> Plan:
    shutil.copytree(ROOT / "configs" / "demo", here / "configs" / "demo")
    return Plan.read(METHODS)


def test_every_policy_of_the_demo_is_in_the_family(plan: Plan) -> None:
    described = yaml.safe_load(METHODS.read_text())
    trained = {
        path.stem
        for path in (ROOT / "configs" / "demo").glob("*.yaml")
        if "PolicyExport" in path.read_text() and path.stem not in {*described["prepare"], "pretrain"}
    }
    missing = trained - set(described["methods"]) - {"vader"}
    assert not missing, f"add {', '.join(sorted(missing))} to experiments/family/methods.yaml"
    assert {method.name for method in plan.methods} == trained & set(described["methods"])
    assert {method.name for method in plan.methods} >= {"vbon", "kl_rl", "bon_sft", "dpo", "bonbon", "distil", "dial"}
    titles = [method["title"] for method in described["methods"].values()]
    assert len(set(titles)) == len(titles)


def test_configs_that_are_not_there_are_left_out(plan: Plan, here: Path) -> None:
    (here / "configs/demo/dpo.yaml").unlink()
    (here / "configs/demo/compare_decoders.yaml").unlink(missing_ok=True)
    less = Plan.read(METHODS)
    assert "configs/demo/dpo.yaml" in less.absent and "dpo" not in {method.name for method in less.methods}
    assert less.decoding([]) == (None, {})
    with pytest.raises(ValueError, match=r"methods.yaml has no method vbom: it has vbon, "):
        Plan.read(METHODS, ["vbom"])
    assert [method.name for method in Plan.read(METHODS, ["vbon"]).methods] == ["vbon"]


def test_a_training_has_its_seed_and_place_and_waits_for_what_its_config_names(plan: Plan) -> None:
    by_name = {method.name: method for method in plan.methods}
    found = plan.training(by_name["kl_rl"], 3)
    assert found.command == (
        "vbon fit --config configs/demo/data.yaml --config configs/demo/kl_rl.yaml --model.init_args.beta 0.6 "
        "--seed_everything 3 --trainer.default_root_dir runs/family/kl_rl-s3"
    )
    assert found.output == Path("runs/family/kl_rl-s3/export")
    assert set(found.needs) == {"sft", "reward", "table"}
    assert set(plan.training(by_name["distil"], 0).needs) == {"sft", "reward", "table", "value"}
    for method in plan.methods:  # or the export would not be where it is looked for
        config = yaml.safe_load(method.config.read_text())
        exports = [one for one in config["trainer"]["callbacks"] if one["class_path"].endswith("PolicyExport")]
        assert len(exports) == 1 and "directory" not in exports[0].get("init_args", {}), method.config


def test_all_trainings_have_the_budget_of_vbon(plan: Plan) -> None:
    """As many updates; the tilted policy, whose stage is the demo's own, has a little fewer."""
    for method in plan.methods:
        config = yaml.safe_load(method.config.read_text())
        assert config["trainer"]["max_steps"] == (72 if method.name == "dial" else 80), method.config
    by_name = {method.name: plan.settings(method) for method in plan.methods}
    assert by_name["vbon"] == {
        "updates": 80, "prompts": 8, "samples_per_prompt": 16, "learning_rate": 6.0e-4, "also": []
    }  # fmt: skip
    assert (by_name["a_star_po"]["prompts"], by_name["dial"]["updates"]) == (128, 72)
    assert [name for name, own in by_name.items() if own["also"]] == ["distil", "dial"]


def test_a_comparison_names_policies_as_methods_yaml_does(plan: Plan) -> None:
    some = [(method, plan.training(method, 0)) for method in plan.methods if method.name in ("vbon", "dial")]
    found = plan.comparison(0, some)
    settings = yaml.safe_load(found.configs[1].read_text())
    assert settings["policies"] == {
        "vBoN": "runs/family/vbon-s0/export",
        "Tilted, dialled to 4": {"name": "runs/family/dial-s0/export", "dial": 4},
    }
    assert settings["methods"] == {"vBoN": "vBoN", "Tilted, dialled to 4": "value model"}
    assert settings["data"] == {"eval_batch_size": 6} and settings["samples"] == 32
    assert settings["n"] == [2, 4, 8, 16] and "judge" in settings and settings["cards"] is False
    assert Path("runs/family/vbon-s0/export") in found.inputs
    assert found.output == Path("runs/family/compare-s0/comparison.json")


def test_decoders_are_compared_without_policies(plan: Plan, here: Path) -> None:
    own = {
        "decoders": {
            "Drawn, n = 2": {"class_path": "vbon_lightning.decoding.BestOfN", "init_args": {"n": 2}},
            "Mixed": {"class_path": "DeRa", "init_args": {"strength": 0.5, "policy": "runs/demo/vbon/export"}},
            "Tree": {"class_path": "TreeBoN", "init_args": {"preference_policy": "runs/demo/other/export"}},
        },
        "methods": {"Mixed": "two models"},
        "policies": {"x": "runs/demo/x/export"},
        "output": "elsewhere",
        "samples": 4,
        "data": {"value_model": "runs/demo/value/export"},
    }
    (here / "configs/demo/compare_decoders.yaml").write_text(yaml.safe_dump(own))
    plan = Plan.read(METHODS)
    trained = [(method, plan.training(method, 0)) for method in plan.methods if method.name == "vbon"]
    found, lost = plan.decoding(trained)
    assert found is not None and lost == {"Tree": "needs runs/demo/other/export"}
    settings = yaml.safe_load(found.configs[1].read_text())
    assert (settings["policies"], settings["samples"]) == ({}, 4) and "judge" not in settings
    drawn, mixed = settings["decoders"].values()
    assert drawn == own["decoders"]["Drawn, n = 2"]
    assert mixed["init_args"] == {"policy": "runs/family/vbon-s0/export", "strength": 0.5}, (
        "the one that was trained here"
    )
    assert Path("runs/family/vbon-s0/export") in found.inputs
    assert (
        settings["methods"] == {"Drawn, n = 2": "decoding", "Mixed": "two models"}
        and settings["output"] == "runs/family/compare-decoders"
    )
    assert Path("runs/demo/value/export") in found.inputs
    # As many responses in a batch as a comparison of policies has.
    assert settings["data"] == {"value_model": "runs/demo/value/export", "eval_batch_size": 48}


# -- the sheet --------------------------------------------------------------------------------------


class Comparing(Starter):
    """Trainings leave an export, comparisons the reports of a crowd, which differ by seed."""

    def make(self, job: Job) -> None:
        if job.words[0] != "compare":
            super().make(job)
            return
        job.output.parent.mkdir(parents=True)
        settings = yaml.safe_load(job.configs[1].read_text())
        reports = crowd(1)[:5]
        for name in settings["policies"]:
            win_rate = 0.6 + 0.1 * (job.name == "compare-s1")
            reports.append(replace(crowd(1)[5], name=name, method="x", win_rate=Estimate(win_rate, 0.02)))
        for name in settings.get("decoders", {}):
            reports.append(replace(crowd(1)[5], name=name, method="decoding"))
        job.output.write_text(json.dumps({"reports": [report.to_dict() for report in reports]}))


def test_the_sheet_has_what_was_trained_and_says_what_was_not(here: Path, plan: Plan) -> None:
    drawn = {"class_path": "vbon_lightning.decoding.BestOfN", "init_args": {"n": 2}}
    mixed = {"class_path": "DeRa", "init_args": {"policy": "runs/demo/kl_rl/export"}}
    own = {"decoders": {"Drawn": drawn, "Mixed": mixed}}
    (here / "configs/demo/compare_decoders.yaml").write_text(yaml.safe_dump(own))
    plan = Plan.read(METHODS, ["vbon", "dpo", "kl_rl"])
    starter = Comparing(failing=("dpo-s0", "kl_rl-s0", "kl_rl-s1"))
    failures = make_family(plan, [0, 1], say=lambda text: None, starter=starter)
    assert {failure.name for failure in failures} == {"dpo-s0", "kl_rl-s0", "kl_rl-s1", "Mixed"}
    plain = json.loads((SHEET / "family.json").read_text())
    reports = {report["name"]: report for report in plain["reports"]}
    assert list(reports)[5:] == ["vBoN", "DPO", "Drawn"]
    assert reports["vBoN"]["win_rate"]["mean"] == pytest.approx(0.65)
    assert reports["DPO"]["win_rate"]["mean"] == pytest.approx(0.7)
    assert plain["seeds"] == [0, 1] and set(plain["failed"]) == {"dpo-s0", "kl_rl-s0", "kl_rl-s1", "Mixed"}
    assert [len(plain["trainings"][title]) for title in ("vBoN", "DPO")] == [2, 1] and "KL-RL" not in plain["trainings"]
    assert set(plain["settings"]) == {"vBoN", "DPO"} and plain["settings"]["vBoN"]["updates"] == 80
    assert plain["responses_at_once"] == 192
    assert "--seed_everything 1" in plain["trainings"]["vBoN"][1]["command"]
    for name in ("comparison.md", "pareto.png", "cost.png"):
        assert (SHEET / name).stat().st_size > 500


def test_seeds_are_joined_as_the_intervals_say() -> None:
    first, second = crowd(2), crowd(2)
    for report in second[5:]:
        assert report.win_rate is not None and report.cost is not None
        report.win_rate = Estimate(report.win_rate.mean + 0.04, 0.02)
        report.cost["generated_tokens"] += 2
    found: dict[str, PolicyReport] = {report.name: report for report in joined([first, second])}
    assert found["Best-of-4"] == first[2]
    one, joint = first[5], found[first[5].name]
    assert joint.win_rate is not None and one.win_rate is not None and one.cost is not None and joint.cost is not None
    assert joint.win_rate.mean == pytest.approx(one.win_rate.mean + 0.02)
    spread = 12.706 * 0.04 / 2**0.5 / 2**0.5  # Student's t for one degree of freedom
    assert joint.win_rate.half_width == pytest.approx((0.02**2 + spread**2) ** 0.5, rel=1e-3)
    assert joint.cost["generated_tokens"] == pytest.approx(one.cost["generated_tokens"] + 1)
    assert joined([first]) == first


def test_what_it_started_ends_when_it_is_killed() -> None:
    """By `kill`, as a scheduler does it: no training is left behind."""

    def starter(job: Job) -> subprocess.Popen[bytes]:
        if job.name == "killing":
            return subprocess.Popen(["/bin/sh", "-c", f"sleep 0.1; kill -TERM {os.getpid()}"])
        started.append(subprocess.Popen(["sleep", "60"]))
        return started[-1]

    started: list[subprocess.Popen[bytes]] = []
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(SystemExit, match="143"):
            run_jobs([job("slow"), job("killing")], say=lambda text: None, starter=starter)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert started[0].poll() == -signal.SIGTERM
    assert names([job("slow")]) == ["slow"], "it was not done"


def test_the_makefile_has_it_with_its_seeds() -> None:
    text = (ROOT / "Makefile").read_text()
    assert "-m experiments.family.run --seeds" in text and "$(SEEDS)" in text


def test_a_result_of_a_sheet_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "comparison.json"
    path.write_text(json.dumps({"reports": [report.to_dict() for report in crowd(2)]}))
    assert read_reports(path) == crowd(2)
    assert SHEET.parent == planning.RUNS
