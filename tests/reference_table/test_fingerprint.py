"""What a table was made with: each field that differs is told, and the first writer's stands."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest

from tests.reference_table.setting import FINGERPRINT, make_row, write
from vbon_lightning.reference_table import (
    FingerprintMismatch,
    ReferenceTable,
    ReferenceTableError,
    ReferenceTableWriter,
)


def test_a_mismatch_lists_each_field_that_differs(tmp_path: Path) -> None:
    write(tmp_path, make_row(1))
    other = {"reference": "tiny", "reward": "other", "temperature": 1.0, "eos": {"ids": [2], "name": "</s>"}}
    for attempt in (
        lambda: ReferenceTable.open(tmp_path, fingerprint=other),
        lambda: ReferenceTableWriter(tmp_path, other, shard="rank1"),
    ):
        with pytest.raises(FingerprintMismatch) as caught:
            attempt()
        assert caught.value.differences == {
            "eos.ids": ("(absent)", [2]),
            "eos.name": ("(absent)", "</s>"),
            "max_new_tokens": (24, "(absent)"),
            "reward": ("vader", "other"),
            "temperature": (0.7, 1.0),
        }
        assert "reward: the table has 'vader', this run has 'other'" in str(caught.value)
        assert "reference" not in caught.value.differences
        assert pickle.loads(pickle.dumps(caught.value)).differences == caught.value.differences


def test_fingerprints_compare_as_json_stores_them(tmp_path: Path) -> None:
    ReferenceTableWriter(tmp_path, {"ids": (2, 1), "temperature": 1}, shard="a")
    ReferenceTableWriter(tmp_path, {"temperature": 1.0, "ids": [2, 1]}, shard="b")
    assert json.loads((tmp_path / "fingerprint.json").read_text()) == {"ids": [2, 1], "temperature": 1}
    with pytest.raises(TypeError, match="plain values only"):
        ReferenceTableWriter(tmp_path, {"path": Path("x")}, shard="a")


def test_the_loser_of_a_race_for_the_first_fingerprint_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def rival_first(source: Path, target: Path) -> None:
        Path(target).write_text(json.dumps({"reward": "rival"}))
        link(source, target)

    monkeypatch.setattr(os, "link", rival_first)
    with pytest.raises(FingerprintMismatch, match="the table has 'rival', this run has 'vader'"):
        ReferenceTableWriter(tmp_path, FINGERPRINT, shard="rank0")
    assert [file.name for file in tmp_path.iterdir()] == ["fingerprint.json"]


def test_a_file_system_without_hard_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no hard links")

    monkeypatch.setattr(os, "link", refuse)
    write(tmp_path, make_row(1))
    assert ReferenceTable.open(tmp_path, fingerprint=FINGERPRINT).keys() == [make_row(1).key]


def test_shards_without_a_usable_fingerprint_are_refused(tmp_path: Path) -> None:
    write(tmp_path, make_row(1))
    (tmp_path / "fingerprint.json").write_text("{")
    with pytest.raises(ReferenceTableError, match=r"fingerprint\.json is not valid JSON"):
        ReferenceTable.open(tmp_path)
    (tmp_path / "fingerprint.json").write_text("[]")
    with pytest.raises(ReferenceTableError, match="must hold a JSON object, got list; put the file back, or make"):
        ReferenceTable.open(tmp_path)
    for content in (b"", b"\xff\xfe{}"):
        (tmp_path / "fingerprint.json").write_bytes(content)
        with pytest.raises(ReferenceTableError, match=r"fingerprint\.json is not valid JSON .*; put the file back"):
            ReferenceTable.open(tmp_path)
    (tmp_path / "fingerprint.json").unlink()
    (tmp_path / "fingerprint.json").mkdir()
    with pytest.raises(ReferenceTableError, match=r"fingerprint\.json cannot be read: Is a directory"):
        ReferenceTable.open(tmp_path)
    (tmp_path / "fingerprint.json").rmdir()
    for attempt in (ReferenceTable.open, lambda path: ReferenceTableWriter(path, FINGERPRINT, shard="rank1")):
        with pytest.raises(ReferenceTableError, match=r"holds shards .* but no fingerprint\.json"):
            attempt(tmp_path)


def test_a_table_without_missing_rewards_serves_a_run_that_skips_them(tmp_path: Path) -> None:
    write(tmp_path, make_row(1))
    skips = FINGERPRINT | {"on_missing": "skip"}
    ReferenceTable.open(tmp_path, fingerprint=skips)
    assert json.loads((tmp_path / "fingerprint.json").read_text()) == FINGERPRINT, "reading changes nothing"
    with pytest.raises(FingerprintMismatch, match="reward"):
        ReferenceTableWriter(tmp_path, skips | {"reward": "other"}, shard="rank0")
    assert json.loads((tmp_path / "fingerprint.json").read_text()) == FINGERPRINT
    writer = ReferenceTableWriter(tmp_path, skips, shard="rank0")
    assert writer.fingerprint == skips == json.loads((tmp_path / "fingerprint.json").read_text())
    ReferenceTableWriter(tmp_path, skips, shard="rank1")
    with pytest.raises(FingerprintMismatch, match="on_missing: the table has 'skip', this run has '.absent.'"):
        ReferenceTableWriter(tmp_path, FINGERPRINT, shard="rank2")
    assert not list(tmp_path.glob(".*"))
