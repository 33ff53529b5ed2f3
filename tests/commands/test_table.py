"""``vbon table`` says what a table holds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.modules.setting import make_data, make_files, make_table
from vbon_lightning import cli
from vbon_lightning.commands.table import describe_table
from vbon_lightning.reference_table import ReferenceTable


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_table(make_files(tmp_path_factory.mktemp("files")))


def test_numbers_what_made_it_and_a_few_rows(path: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = describe_table(path)
    assert text.startswith("prompts: 13\nsamples: 16\nresponses: 208\nmean_reward: ")
    assert "  temperature: 1.0\n" in text
    assert '  reward: {"class": "VowelReward", "scale": "1.0"}\n' in text
    assert text.count("\nprompt '") == 3
    monkeypatch.setattr(sys, "argv", ["vbon", "table", path])
    cli.main()
    assert capsys.readouterr().out == text + "\n"


def test_the_best_and_the_worst_are_shown(path: str) -> None:
    data = make_data(Path(path).parent, reference_table=path)
    table = data.table()
    shown = describe_table(path, rows=1, responses=2).split("\nprompt ")[1].splitlines()[1:]
    rewards = sorted(table.rewards(table.keys()[0]).tolist(), reverse=True)
    found = [float(line.split()[0]) for line in shown]
    assert found == pytest.approx([*rewards[:2], *rewards[-2:]], abs=1e-3)
    assert len(describe_table(path, rows=1, responses=0).split("\nprompt ")[1].splitlines()) == 1
    assert len(describe_table(path, rows=1, responses=99).split("\nprompt ")[1].splitlines()) == 17
    assert "\nprompt" not in describe_table(path, rows=0)
    with pytest.raises(ValueError, match="--rows must be at least 0, got -1"):
        describe_table(path, rows=-1)


def test_conversations_are_shown_turn_by_turn(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = ReferenceTable.row

    def rendered(table: ReferenceTable, key: str) -> Any:
        return row(table, key)._replace(prompt="<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")

    monkeypatch.setattr(ReferenceTable, "row", rendered)
    assert "\nprompt 'user: Hello | assistant:'\n" in describe_table(path, rows=1)


def test_a_directory_that_is_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["vbon", "table", str(tmp_path)])
    with pytest.raises(SystemExit, match="there is no reference table in"):
        cli.main()
