"""Writing the reference table: misfits are refused by name, writers do not collide, kills lose nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crashes import count_calls, killed_at, with_files_of
from tests.reference_table.setting import FINGERPRINT, content, make_row, shards, write
from vbon_lightning.reference_table import ReferenceTable, ReferenceTableError, ReferenceTableWriter, prompt_key
from vbon_lightning.reference_table import writer as writer_module


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rewards": [0.0, float("nan"), 1.0]},
            r"'prompt 7': the reward of response ' response 7.1 é\\n' is nan",
        ),
        ({"rewards": [0.0, 1.0, 1e39]}, r"reward of response ' response 7.2 é\\n' is inf, not finite"),
        ({"log_probs": [0.0, float("-inf"), 0.0]}, "log-prob of response ' response 7.1"),
        (
            {"log_probs": [0.0, -1.0, 0.5]},
            r"log-prob of response ' response 7.2 é\\n' is 0.5, the log of no probability",
        ),
        ({"rewards": [0.0, 1.0]}, "'prompt 7' has 3 responses but 2 rewards"),
        ({"finished": [True]}, "3 responses but 1 finished"),
        ({"log_probs": []}, "3 responses but 0 log_probs"),
        ({"response_tokens": [[1]] * 4}, "3 responses but 4 response_tokens"),
        ({"response_tokens": [[1], [], [2, -1]]}, r"\[0, 2\*\*31\), and those of response .* 7.2 .* go from -1 to 2"),
        ({"response_tokens": [[1], [2**31], []]}, "response 7.1 .* go from 2147483648 to 2147483648"),
        ({"responses": [], "response_tokens": [], "rewards": []}, "'prompt 7' has no responses"),
        ({"prompt_tokens": []}, "'prompt 7': a prompt needs at least one token"),
        ({"key": "0" * 64}, f"expected the key {prompt_key([1, 107])} of its prompt tokens, got 0000"),
        ({"responses": ["a", "\ud800", "b"]}, "cannot be stored as UTF-8"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_by_name(tmp_path: Path, change: dict, message: str) -> None:
    writer = ReferenceTableWriter(tmp_path, FINGERPRINT, shard="rank0")
    with pytest.raises(ReferenceTableError, match=message):
        writer.write([make_row(1), make_row(7)._replace(**change)])
    assert shards(tmp_path) == []


def test_a_shard_name_cannot_leave_the_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got '\.\./rank0'"):
        ReferenceTableWriter(tmp_path, FINGERPRINT, shard="../rank0")


def test_writers_side_by_side_and_after_a_restart_do_not_collide(tmp_path: Path) -> None:
    a, b = (ReferenceTableWriter(tmp_path, FINGERPRINT, shard=name) for name in ("rank1", "rank1-000000"))
    a.write([make_row(0)])
    b.write([make_row(1)])
    again = ReferenceTableWriter(tmp_path, FINGERPRINT, shard="rank1")
    assert again.finished_keys() == a.finished_keys() == {make_row(0).key, make_row(1).key}
    again.write([make_row(2)])
    assert shards(tmp_path) == [
        "part-rank1-000000-000000.parquet",
        "part-rank1-000000.parquet",
        "part-rank1-000001.parquet",
    ]
    assert content(tmp_path) == [make_row(0), make_row(2), make_row(1)]


def test_only_the_writer_of_the_same_name_cleans_leftovers(tmp_path: Path) -> None:
    write(tmp_path, make_row(1))
    leftovers = [
        tmp_path / name
        for name in (
            ".part-rank0-000001.parquet.tmp",
            ".fingerprint-rank0.json",
            "..fingerprint-rank0.json.tmp",
        )
    ]
    foreign = tmp_path / ".part-rank00-000001.parquet.tmp"
    for file in (*leftovers, foreign):
        file.write_bytes(b"half a shard")
    assert content(tmp_path) == [make_row(1)]
    ReferenceTableWriter(tmp_path, FINGERPRINT, shard="rank0")
    assert not any(file.exists() for file in leftovers)
    assert foreign.exists()


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = write(tmp_path, make_row(1))
    before = sorted(tmp_path.iterdir())

    def full(stream: object, tables: object) -> None:
        stream.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(writer_module, "write_tables", full)
    for attempt in (lambda: writer.write([make_row(2)]), lambda: writer.write([make_row(3)])):
        with pytest.raises(OSError, match="no space left"):
            attempt()
    assert sorted(tmp_path.iterdir()) == before


def test_compaction_merges_own_shards_and_changes_nothing_else(tmp_path: Path) -> None:
    writer = ReferenceTableWriter(tmp_path, FINGERPRINT, shard="rank0")
    for i in range(70):
        writer.write([make_row(i)])
    write(tmp_path, make_row(100), shard="rank1")
    before = content(tmp_path)
    writer.compact()
    assert shards(tmp_path) == ["part-rank0-000070.parquet", "part-rank1-000000.parquet"]
    assert content(tmp_path) == before
    writer.compact()
    writer.write([make_row(71)])
    assert shards(tmp_path)[:2] == ["part-rank0-000070.parquet", "part-rank0-000071.parquet"]


@pytest.mark.parametrize("unlinked", range(4))
def test_a_kill_during_compaction_leaves_the_same_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unlinked: int
) -> None:
    writer = write(tmp_path, make_row(1), make_row(2))
    writer.write([make_row(2, value=50.0), make_row(3)])  # a repeated prompt: the first wins
    writer.write([make_row(3, value=50.0), make_row(4)])
    before = content(tmp_path)
    assert before == [make_row(i) for i in (1, 2, 3, 4)]
    unlink, left = Path.unlink, [unlinked]

    def killed(path: Path, **options: bool) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        if unlinked < 3:
            with pytest.raises(KeyboardInterrupt):
                writer.compact()
        else:
            writer.compact()
    assert len(shards(tmp_path)) == 4 - unlinked
    assert content(tmp_path) == before
    resumed = ReferenceTableWriter(tmp_path, FINGERPRINT, shard="rank0")
    assert resumed.finished_keys() == {row.key for row in before}
    resumed.compact()
    assert len(shards(tmp_path)) == 1
    assert content(tmp_path) == before


def test_compaction_keeps_the_row_of_most_responses_however_it_is_killed(tmp_path: Path) -> None:
    """Killed before each of its file-system calls, and with the disk full: the same rows, and the next run goes on."""

    def half_topped_up(path: Path) -> ReferenceTableWriter:
        writer = write(path, make_row(1, samples=2), make_row(2, samples=2))
        writer.write([make_row(2, samples=4), make_row(3, samples=4)])
        writer.write([make_row(1, samples=4), make_row(2, samples=4, value=50.0)])
        return writer

    half_topped_up(tmp_path / "whole").compact()
    expected = sorted(content(tmp_path / "whole"))
    assert expected == sorted(make_row(i, samples=4) for i in (1, 2, 3))
    calls = count_calls(half_topped_up(tmp_path / "counted").compact, tmp_path)
    assert calls >= 8
    kills: list[Callable[[Callable[[], None]], str]] = [
        lambda work, call=call: killed_at(call, work, tmp_path) for call in range(1, calls + 1)
    ]
    kills += [lambda work, fatal=fatal: with_files_of(200, work, fatal=fatal) for fatal in (False, True)]
    for number, kill in enumerate(kills):
        path = tmp_path / str(number)
        assert kill(half_topped_up(path).compact) in ("died", "failed")
        assert sorted(content(path)) == expected
        ReferenceTableWriter(path, FINGERPRINT, shard="rank0").compact()
        assert len(shards(path)) == 1
        assert sorted(content(path)) == expected


WRITE_UNTIL_KILLED = """
import sys
from tests.reference_table.setting import FINGERPRINT, make_row
from vbon_lightning.reference_table import ReferenceTableWriter
writer = ReferenceTableWriter(sys.argv[1], FINGERPRINT, shard=sys.argv[2])
done = writer.finished_keys()
for i in range(int(sys.argv[3]), int(sys.argv[4])):
    if make_row(i).key not in done:
        writer.write([make_row(i, samples=200)])
        print(i, flush=True)
        if i % 10 == 9:
            writer.compact()
"""


def test_killed_processes_resume_to_the_same_table(tmp_path: Path) -> None:
    path = tmp_path / "table"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}

    def start(shard: str, first: int, last: int) -> subprocess.Popen:
        arguments = [sys.executable, "-c", WRITE_UNTIL_KILLED, str(path), shard, str(first), str(last)]
        return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE)

    processes = [start("rank0", 0, 10_000), start("rank1", 10_000, 20_000)]
    for process, lines_to_see in zip(processes, (25, 13), strict=True):
        for _ in range(lines_to_see):
            assert process.stdout is not None
            assert process.stdout.readline()
    acknowledged = []
    for process in processes:
        process.send_signal(signal.SIGKILL)
        acknowledged.append(process.communicate()[0].split(b"\n"))
        assert process.returncode == -signal.SIGKILL
    table = ReferenceTable.open(path, fingerprint=FINGERPRINT)
    number = {make_row(i, samples=1).key: i for i in range(20_000)}
    found = sorted(map(number.__getitem__, table.keys()))
    low, high = [i for i in found if i < 10_000], [i for i in found if i >= 10_000]
    # Rows were written in order, so what is there has no gaps.
    assert low == list(range(len(low)))
    assert high == list(range(10_000, 10_000 + len(high)))
    assert len(low) >= 25
    assert len(high) >= 13
    for last, lines_seen in ((low[-1], acknowledged[0]), (high[-1], acknowledged[1])):
        assert all(int(line) <= last for line in lines_seen if line)  # what was acknowledged is there
    for shard, first, count in (("rank0", 0, len(low)), ("rank1", 10_000, len(high))):
        writer = ReferenceTableWriter(path, FINGERPRINT, shard=shard)
        assert make_row(first + count).key not in writer.finished_keys()
        writer.write([make_row(first + count, samples=200)])
        writer.compact()
    assert len(shards(path)) == 2
    assert not list(path.glob(".*"))
    expected = [*range(len(low) + 1), *range(10_000, 10_001 + len(high))]
    assert content(path) == [make_row(i, samples=200) for i in expected]
