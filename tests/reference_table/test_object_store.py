"""The chain with its table in an object store: made by several, trained from, compared with, scored anew, exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.modules.setting import VowelReward, make_data, make_files, make_module, make_table, make_trainer
from vbon_lightning import ReferenceSampler, TextSource
from vbon_lightning.callbacks import BestOfNWinRate
from vbon_lightning.commands.table import describe_table
from vbon_lightning.data.readers import open_parts
from vbon_lightning.evaluation.command import compare
from vbon_lightning.reference_table import FingerprintMismatch, ReferenceTable, export_jsonl, table_path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def url(files: Path, bucket: str) -> str:
    """Return the table of two runs: the first was limited, as if it had been killed."""
    place = f"{bucket}/tables/first"
    for limit in (2, 1.0):
        data = make_data(files, reference_table=place)
        trainer = make_trainer(files, callbacks=[], enable_checkpointing=False, limit_predict_batches=limit)
        trainer.predict(ReferenceSampler(data.actors, samples=16), data, return_predictions=False)
    return place


def test_it_is_the_table_of_a_directory(url: str, files: Path) -> None:
    there, here = ReferenceTable.open(url), ReferenceTable.open(make_table(files))
    assert sorted(there.rows()) == sorted(here.rows())
    assert there.fingerprint == here.fingerprint
    assert sorted(path.name.partition("-")[0] for path in table_path(url).iterdir()) == [
        "fingerprint.json",
        "part",
        "part",
    ], "no lease is left"
    assert "prompts: 13" in describe_table(url)


@pytest.mark.parametrize("kind", ["vbon", "bonsft"])
def test_training_reads_it(kind: str, url: str, files: Path, tmp_path: Path) -> None:
    logged = {}
    for place in (url, make_table(files)):
        data = make_data(files, reference_table=place)
        module = make_module(kind, data, **({"reference_samples": 0} if kind == "vbon" else {}))
        trainer = make_trainer(tmp_path, *([BestOfNWinRate(n=[2])] if kind == "vbon" else []), steps=2)
        trainer.fit(module, data)
        logged[place] = {name: float(value) for name, value in trainer.callback_metrics.items()}
    found, expected = logged.values()
    assert found == pytest.approx(expected, nan_ok=True)
    assert len(found) > 3
    if kind == "vbon":
        assert any("win_rate" in name for name in found)


def test_worker_processes_read_it(url: str, files: Path, tmp_path: Path) -> None:
    data = make_data(files, reference_table=url, num_workers=1)
    make_trainer(tmp_path, steps=1).fit(make_module("bonsft", data), data)


def test_a_comparison_reads_it(url: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_data(files, reference_table=url, test=TextSource(path=str(files / "val.txt")))
    reports = compare(data, {"mine": str(files / "llama")}, output=str(tmp_path), n=[2], samples=4)
    assert [report.name for report in reports][:2] == ["reference", "Best-of-2"]


def test_its_responses_are_scored_by_another_reward(url: str, files: Path, bucket: str) -> None:
    place = f"{bucket}/tables/second"
    data = make_data(files, reference_table=place, reward=VowelReward(scale=2.0))
    sampler = ReferenceSampler(data.actors, samples=16, responses_from=url)
    trainer = make_trainer(files, callbacks=[], enable_checkpointing=False)
    trainer.predict(sampler, data, return_predictions=False)
    first, second = (sorted(ReferenceTable.open(table).rows()) for table in (url, place))
    for one, other in zip(first, second, strict=True):
        assert other.responses == one.responses
        assert other.rewards == pytest.approx([2 * reward for reward in one.rewards])


def test_a_table_of_other_settings_is_refused(url: str, files: Path) -> None:
    with pytest.raises(FingerprintMismatch, match=r"the reference table s3://bucket/tables/first .*\n  temperature"):
        make_data(files, reference_table=url, temperature=0.5).table()


def test_its_lines_go_to_the_store_and_are_read_as_a_source(url: str, bucket: str) -> None:
    target = f"{bucket}/lines.jsonl.gz"
    export_jsonl(ReferenceTable.open(url), target)
    (part,) = open_parts(target)
    found: list[dict[str, Any]] = [row for _, row in part.rows({})]
    assert [row["prompt"] for row in found] == [row.prompt for row in ReferenceTable.open(url).rows()]
    assert json.dumps(found[0]["rewards"])
