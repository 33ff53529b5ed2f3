"""What a table holds, in numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reference_table.setting import lines, load, make_row, write
from vbon_lightning.reference_table import ReferenceTable, table_summary


def test_summary_by_hand(tmp_path: Path) -> None:
    a = make_row(1, samples=4)._replace(rewards=[0.0, 0.0, 0.0, 4.0], finished=[True, True, True, False])
    b = make_row(2, samples=2)._replace(rewards=[1.0, 2.0], finished=[False, False])
    write(tmp_path, a, b)
    assert table_summary(ReferenceTable.open(tmp_path)) == {
        "prompts": 2,
        "samples": 2,
        "most_samples": 4,
        "responses": 6,
        "mean_reward": pytest.approx((1.0 + 1.5) / 2),
        "tie_fraction": pytest.approx((3 / 6 + 0) / 2),  # 3 of the 6 pairs of the first prompt tie
        "finished_share": pytest.approx(3 / 8),
    }


def test_summary_says_what_it_cannot_know(tmp_path: Path) -> None:
    load(lines(tmp_path / "in.jsonl", {"prompt": "a", "text": "b", "reward": 1}), tmp_path / "table")
    summary = table_summary(ReferenceTable.open(tmp_path / "table"))
    assert summary["finished_share"] is None
    assert summary["tie_fraction"] != summary["tie_fraction"]
