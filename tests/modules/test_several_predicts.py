"""Several `vbon predict` on one table: they share the work, wait for each other, and make what one would have made."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.modules.setting import Killed, VowelReward, make_data, make_files, make_trainer
from tests.modules.test_reference_sampler import KillAfter
from vbon_lightning import AlignmentDataModule, ReferenceSampler, TextSource
from vbon_lightning.modules import reference_sampler
from vbon_lightning.reference_table import PromptLeases, ReferenceTable, ReferenceTableWriter, TableRow
from vbon_lightning.rewards import RewardError

PROMPTS = 10
Another = tuple[ReferenceTableWriter, PromptLeases, list[str]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def alone(files: Path, tmp_path_factory: pytest.TempPathFactory) -> list[TableRow]:
    """Return the rows that one process makes."""
    table = tmp_path_factory.mktemp("alone") / "table"
    predict(files, table)
    return rows_of(table)


class Counting(VowelReward):
    def __init__(self) -> None:
        super().__init__()
        self.prompts: list[str] = []

    def __call__(self, prompts: Any, responses: Any, token_ids: Any) -> Any:
        self.prompts += prompts
        return super().__call__(prompts, responses, token_ids)


def data_of(files: Path, table: Path, reward: Any = None, **changes: Any) -> AlignmentDataModule:
    train = TextSource(path=str(files / "train.txt"))
    settings = {"train": train, "val": None, "reference_table": str(table), "eval_batch_size": 3} | changes
    return make_data(files, reward=reward or VowelReward(), **settings)


def predict(
    files: Path,
    table: Path,
    *callbacks: Any,
    lease_s: float = 60.0,
    overlap: bool | None = None,
    trainer: Any = None,
    **changes: Any,
) -> Any:
    data = data_of(files, table, **changes)
    sampler = ReferenceSampler(data.actors, samples=4, rows_per_pass=8, lease_s=lease_s, overlap_scoring=overlap)
    return make_trainer(table.parent, *callbacks, **(trainer or {})).predict(sampler, data, return_predictions=False)


def rows_of(table: Path) -> list[TableRow]:
    return sorted(ReferenceTable.open(table).rows())


@contextmanager
def another(
    files: Path, table: Path, batch: int, seconds: float = 60.0
) -> Iterator[tuple[ReferenceTableWriter, PromptLeases, list[str]]]:
    """Be another writer that has taken a batch."""
    data = data_of(files, table)
    writer = ReferenceTableWriter(table, data.fingerprint(), shard="another")
    leases = PromptLeases(table / "leases", "another", seconds=seconds)
    keys = [prompt.key for prompt in data.table_batches()[batch]]
    assert leases.take(keys) == keys
    yield writer, leases, keys
    leases.close()


def test_three_make_what_one_makes_to_the_last_digit(files: Path, alone: list[TableRow], tmp_path: Path) -> None:
    table, children = tmp_path / "table", []
    for _ in range(3):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                predict(files, table)
            finally:
                os._exit(0 if table.exists() and len(ReferenceTable.open(table)) == PROMPTS else 1)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert rows_of(table) == alone
    assert list((table / "leases").iterdir()) == []


@pytest.mark.parametrize("batches", [1, 3])
def test_after_a_kill_it_is_the_same_to_the_last_digit(
    batches: int, files: Path, alone: list[TableRow], tmp_path: Path
) -> None:
    table, reward = tmp_path / "table", Counting()
    with pytest.raises(Killed):
        predict(files, table, KillAfter(batches))
    held = len(rows_of(table))
    assert held == 3 * batches
    predict(files, table, reward=reward)
    assert rows_of(table) == alone
    assert len(reward.prompts) == PROMPTS - held, "what is there is not scored again"


@pytest.mark.parametrize(("batch", "what"), [(1, "3 prompts"), (3, "1 prompt")])
@pytest.mark.parametrize("overlap", [False, True])
def test_what_another_has_is_waited_for(
    overlap: bool,
    batch: int,
    what: str,
    files: Path,
    alone: list[TableRow],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sleep = time.sleep
    monkeypatch.setattr(reference_sampler.time, "sleep", lambda seconds: sleep(min(seconds, 0.02)))
    table, reward = tmp_path / "table", Counting()
    with another(files, table, batch) as (writer, leases, keys), caplog.at_level(logging.INFO):

        def finish() -> None:
            for _ in range(500):  # it says so at once; if it never does, that is found out below
                if caplog.text.count("waiting for"):
                    break
                sleep(0.01)
            sleep(0.1)
            writer.write([row for row in alone if row.key in keys])
            leases.release(keys)

        other = threading.Thread(target=finish)
        other.start()
        predict(files, table, reward=reward, overlap=overlap)
        other.join()
    assert f"waiting for {what} that another took" in caplog.text
    assert caplog.text.count("waiting for") == 1, "it looks again and again, and says so once"
    assert len(reward.prompts) == PROMPTS - len(keys)
    assert rows_of(table) == alone


def test_what_a_dead_one_had_is_made_when_the_lease_is_over(
    files: Path, alone: list[TableRow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "table"
    with another(files, table, 1, 0.3) as (_, leases, _):
        leases._stopped.set()  # it says nothing any more
        waited: list[float] = []

        def sleep(seconds: float) -> None:
            waited.append(seconds)
            if sum(waited) > 1:
                raise Killed
            threading.Event().wait(seconds)

        monkeypatch.setattr(reference_sampler.time, "sleep", sleep)
        with pytest.raises(Killed):
            predict(files, table, lease_s=60.0)
        assert waited == [1.0, 1.0], "it looks every second, however long a lease is"
        assert len(rows_of(table)) == PROMPTS - 3
        waited.clear()
        predict(files, table, lease_s=0.3)
        assert 0 < sum(waited) < 1  # on a loaded machine a wait takes longer than it says
        assert set(waited) == {0.3 / 10}, "ten times in a lease that is short"
    assert rows_of(table) == alone


@pytest.mark.parametrize(("limit", "rows"), [(1, 3), (2, 6), (0.5, 6)])
def test_a_limited_run_waits_for_nobody(limit: float, rows: int, files: Path, tmp_path: Path) -> None:
    table = tmp_path / "table"
    with another(files, table, 1):
        predict(files, table, trainer={"limit_predict_batches": limit})
    assert len(rows_of(table)) == rows


@pytest.mark.parametrize("overlap", [False, True])
def test_what_is_left_at_the_end_is_made_in_the_same_way(
    overlap: bool, files: Path, alone: list[TableRow], tmp_path: Path
) -> None:
    """All batches but one are another's, who gives them back; the last is shorter."""
    table = tmp_path / "table"
    data = data_of(files, table, eval_batch_size=4)
    sampler = ReferenceSampler(data.actors, samples=4, rows_per_pass=8, overlap_scoring=overlap)
    taken: list[list[str]] = []
    take = sampler.writer.take

    def none_at_first(keys: list[str]) -> list[str]:
        taken.append(list(keys))
        return take(keys) if len(taken) > 3 else []

    sampler.writer.take = none_at_first  # type: ignore[method-assign, assignment]
    sizes: list[int] = []
    whole = sampler.call_whole

    def sized(name: str, prompts: Any, *further: Any) -> Any:
        sizes.append(len(prompts.text))
        return whole(name, prompts, *further)

    sampler.call_whole = sized  # type: ignore[method-assign]
    make_trainer(tmp_path).predict(sampler, data, return_predictions=False)
    assert rows_of(table) == alone
    assert len(sizes) > 1 and set(sizes) == {4}, "processes that hold the reference together make the same passes"


def test_other_settings_of_the_same_table_share_it_too(files: Path, alone: list[TableRow], tmp_path: Path) -> None:
    """Batches that overlap: what another has of one is left to it."""
    table, reward = tmp_path / "table", Counting()
    with another(files, table, 1) as (writer, leases, keys):
        threading.Timer(0.5, lambda: (writer.write([r for r in alone if r.key in keys]), leases.release(keys))).start()
        predict(files, table, reward=reward, eval_batch_size=4)
    assert len(reward.prompts) == PROMPTS - 3
    assert [row._replace(log_probs=None) for row in rows_of(table)] == [row._replace(log_probs=None) for row in alone]


def test_a_failing_run_gives_its_prompts_back(files: Path, tmp_path: Path) -> None:
    class Failing(VowelReward):
        def __call__(self, *arguments: Any) -> Any:
            raise RuntimeError("no reward")

    with pytest.raises(RewardError, match="no reward"):
        predict(files, tmp_path / "table", reward=Failing())
    assert list((tmp_path / "table" / "leases").iterdir()) == []
    assert not [thread for thread in threading.enumerate() if thread.name == "leases"]


def test_a_table_in_the_memory_of_the_process_is_warned_of(files: Path, tmp_path: Path) -> None:
    table = "memory://warned/table"
    with pytest.warns(UserWarning, match=f"{table} is in the memory of this process, and gone when it ends"):
        predict(files, tmp_path / "unused", reference_table=table)
    assert len(ReferenceTable.open(table)) == PROMPTS
