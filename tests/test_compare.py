"""`vbon compare` with a judge, on a tiny model and table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.helpers import save_tiny_model
from tests.test_data import ALPHABET, Lengths, write_table
from vbon_lightning.data import AlignmentDataModule
from vbon_lightning.evaluation.command import compare
from vbon_lightning.sources import TextSource


class Counting(Lengths):
    """A judge that knows how many responses it has scored."""

    scored = 0

    def __call__(self, prompts: Any, responses: Any, token_ids: Any) -> Tensor:
        self.scored += sum(len(row) for row in responses)
        return super().__call__(prompts, responses, token_ids)


@pytest.mark.parametrize("judge_table", [True, False])
@pytest.mark.parametrize("table_samples", [None, 4])
def test_the_judge_of_the_table(tmp_path: Path, judge_table: bool, table_samples: int | None) -> None:
    model = save_tiny_model(tmp_path / "model", alphabet=ALPHABET)
    prompts = ["ab", "cde", "f"]
    (tmp_path / "test.txt").write_text("".join(f"{text}\n" for text in prompts))
    data = AlignmentDataModule(
        policy=model,
        reward=Lengths(),
        test=TextSource(path=str(tmp_path / "test.txt")),
        reference_table=str(tmp_path / "table"),
        table_samples=table_samples,
        max_new_tokens=4,
    )
    write_table(data, prompts, samples=6)
    judge = Counting()
    reports = compare(
        data,
        {"mine": str(model)},
        output=str(tmp_path / "out"),
        n=[2],
        samples=5,
        judge=judge,
        judge_table=judge_table,
        device="cpu",
    )
    assert [report.name for report in reports] == ["reference", "Best-of-2", "mine"]
    assert [report.judge_reward is not None for report in reports] == [judge_table, judge_table, True]
    held = table_samples or 6
    assert reports[0].samples == held
    assert judge.scored == 3 * 5 + (3 * held if judge_table else 0)
