"""Scoring that overlaps with sampling: the same table, no row lost or repeated, errors told; and the progress bar."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from torch import Tensor

from tests.modules.setting import Killed, Picky, VowelReward, make_data, make_files, make_trainer
from vbon_lightning import AlignmentDataModule, ReferenceSampler, TextSource
from vbon_lightning.reference_table import ReferenceTable, ReferenceTableError, TableRow
from vbon_lightning.reference_table.shards import rows_to_table, write_tables
from vbon_lightning.rewards import RewardCalls, RewardError, RewardFailure

PROMPTS = 10


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


class Watched(VowelReward):
    """Note the threads and torch modes it is called in; sleep, and break where told."""

    def __init__(self, pause: float = 0.0, break_at: int | None = None) -> None:
        super().__init__()
        self.pause, self.break_at = pause, break_at
        self.threads: list[str] = []
        self.modes: list[tuple[Any, ...]] = []
        self.prompts: list[str] = []

    def __call__(
        self,
        prompts: Sequence[str],
        responses: Sequence[Sequence[str]],
        token_ids: Sequence[Sequence[Sequence[int]]],
    ) -> Tensor:
        if self.break_at == len(self.threads):
            raise ValueError("no reward for this one")
        time.sleep(self.pause)
        self.threads.append(threading.current_thread().name)
        self.modes.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        self.prompts += prompts
        return super().__call__(prompts, responses, token_ids)


def data_of(files: Path, table: Path, reward: Any, **changes: Any) -> AlignmentDataModule:
    train = TextSource(path=str(files / "train.txt"))
    settings: dict[str, Any] = {"train": train, "val": None, "reward": reward, "reference_table": str(table)}
    return make_data(files, **(settings | {"eval_batch_size": 3} | changes))


def predict(
    files: Path, table: Path, reward: Any, *callbacks: Any, overlap: bool | None, data: Any = None, **trainer: Any
) -> Any:
    changes = data or {}
    module_data = data_of(files, table, reward, **changes)
    sampler = ReferenceSampler(module_data.actors, samples=4, rows_per_pass=8, overlap_scoring=overlap)
    found = make_trainer(table.parent, *callbacks, **trainer).predict(sampler, module_data)
    assert sampler._caller is None
    return found


def rows_of(table: Path) -> list[TableRow]:
    opened = ReferenceTable.open(table)
    return [opened.row(key) for key in opened.keys()]  # noqa: SIM118


def assert_same_rows(table: Path, whole: Path, *, to_the_bit: bool = True) -> None:
    """Compare tables whose prompts stood in other batches: not a bit differs, unless other shapes were multiplied."""
    ours, theirs = sorted(rows_of(table)), sorted(rows_of(whole))
    assert len(ours) == len(theirs) == PROMPTS
    for one, other in zip(ours, theirs, strict=True):
        if not to_the_bit:
            assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)
            one = one._replace(log_probs=other.log_probs)
        assert one == other


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_table_is_the_same(precision: str, files: Path, tmp_path: Path) -> None:
    found, rewards, returned = {}, {}, {}
    for overlap in (False, True):
        rewards[overlap] = Watched()
        table = tmp_path / str(overlap) / "table"
        returned[overlap] = predict(files, table, rewards[overlap], overlap=overlap, precision=precision)
        found[overlap] = rows_of(table)
    assert found[True] == found[False]
    assert len(found[True]) == PROMPTS
    flat = {overlap: [row for rows in batches for row in rows] for overlap, batches in returned.items()}
    assert flat[True] == flat[False], "all rows are returned, in order"
    assert set(rewards[False].threads) == {threading.main_thread().name}
    assert all(name.startswith("scoring") for name in rewards[True].threads)
    assert rewards[True].prompts == rewards[False].prompts
    assert rewards[True].modes == rewards[False].modes


def test_scoring_waits_for_nothing_but_the_group_before(files: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """While a group is scored, the next one is sampled."""
    sampled: list[float] = []
    sample = ReferenceSampler._sample

    def noting(self: Any, *group: Any) -> Any:
        sampled.append(time.perf_counter())
        return sample(self, *group)

    monkeypatch.setattr(ReferenceSampler, "_sample", noting)
    scored: list[float] = []

    class Slow(Watched):
        def __call__(self, *arguments: Any) -> Tensor:
            rewards = super().__call__(*arguments)
            scored.append(time.perf_counter())
            return rewards

    predict(files, tmp_path / "table", Slow(pause=0.2), overlap=True)
    assert len(sampled) == len(scored) > 3
    assert all(begun < ended for begun, ended in zip(sampled[1:], scored, strict=False))
    assert all(ended < begun for ended, begun in zip(scored, sampled[2:], strict=False)), "one group ahead, not more"


def test_on_the_cpu_it_is_off_unless_asked_for(files: Path, tmp_path: Path) -> None:
    reward = Watched()
    predict(files, tmp_path / "table", reward, overlap=None)
    assert set(reward.threads) == {threading.main_thread().name}


@pytest.mark.parametrize("broken", [0, 1, 4])
def test_an_error_of_the_reward_is_told_and_what_was_scored_is_kept(broken: int, files: Path, tmp_path: Path) -> None:
    table = tmp_path / "table"
    with pytest.raises(ValueError, match="no reward for this one"):
        predict(files, table, Watched(break_at=broken), overlap=True)
    left = list(table.glob("*.parquet"))
    reward = Watched()
    predict(files, table, reward, overlap=True)
    whole = tmp_path / "whole" / "table"
    predict(files, whole, Watched(), overlap=False)
    assert_same_rows(table, whole)
    assert len(reward.prompts) == len(set(reward.prompts))
    assert (len(reward.prompts) < PROMPTS) == bool(left)


class KillAfter(Callback):
    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_predict_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        if batch_idx == self.batches:
            raise Killed


@pytest.mark.parametrize("batches", [1, 2, 3])
def test_a_kill_loses_and_repeats_nothing(batches: int, files: Path, tmp_path: Path) -> None:
    table = tmp_path / "table"
    with pytest.raises(Killed):
        predict(files, table, Watched(), KillAfter(batches), overlap=True)
    reward = Watched()
    predict(files, table, reward, overlap=True)
    whole = tmp_path / "whole" / "table"
    predict(files, whole, Watched(), overlap=False)
    assert_same_rows(table, whole)
    # Groups are of 2 and 1 prompts: of each batch killed, all but its last group was written.
    assert len(reward.prompts) == PROMPTS - (3 * batches - 1)


def test_a_limited_run_returns_its_last_group(files: Path, tmp_path: Path) -> None:
    predict(files, tmp_path / "table", Watched(), overlap=True, limit_predict_batches=2)
    assert len(rows_of(tmp_path / "table")) == 6


def test_an_interrupted_module_begins_anew(files: Path, tmp_path: Path) -> None:
    data = data_of(files, tmp_path / "table", Watched())
    sampler = ReferenceSampler(data.actors, samples=4, rows_per_pass=8, overlap_scoring=True)
    with pytest.raises(Killed):
        make_trainer(tmp_path, KillAfter(2)).predict(sampler, data)
    rows = make_trainer(tmp_path).predict(sampler, data)
    assert len([row for batch in rows for row in batch]) == PROMPTS - 5


def test_nothing_is_sampled_where_nothing_is_missing(files: Path, tmp_path: Path) -> None:
    table = tmp_path / "table"
    predict(files, table, Watched(), overlap=False)
    before = rows_of(table)
    for overlap in (False, True):
        reward = Watched()
        assert predict(files, table, reward, overlap=overlap) == [[]]
        assert not reward.prompts
    assert rows_of(table) == before


def test_a_table_that_the_reference_cannot_have_made_is_not_gone_on_with(files: Path, tmp_path: Path) -> None:
    """Token ids beyond its vocabulary, and ends that are none of its own."""
    predict(files, tmp_path / "table", Watched(), overlap=False, limit_predict_batches=1)
    (made,) = [path for path in (tmp_path / "table").iterdir() if path.suffix == ".parquet"]
    rows = rows_of(tmp_path / "table")
    first = rows[0]
    places = range(1, len(first.rewards))
    for tokens, finished, problem in (
        ([5000], False, r"the token id 5000, and the model has \d+ tokens"),
        ([5], True, r"said to be finished though no token at their end \(response 0\)"),
    ):
        changed = first._replace(
            response_tokens=[tokens, *(first.response_tokens[place] for place in places)],
            finished=[finished, *(first.finished[place] for place in places)],  # type: ignore[index]
        )
        with made.open("wb") as stream:
            write_tables(stream, iter([rows_to_table([changed, *rows[1:]])]))
        reward = Watched()
        with pytest.raises(ReferenceTableError, match=problem):
            predict(files, tmp_path / "table", reward, overlap=False)
        with pytest.raises(ReferenceTableError, match=problem):
            rescore(files, tmp_path / "other" / "table", tmp_path / "table", reward)
        assert not reward.prompts


def test_the_bar_counts_what_is_missing_and_says_how_long(files: Path, tmp_path: Path) -> None:
    table = tmp_path / "table"
    predict(files, table, Watched(), overlap=False, limit_predict_batches=2)

    class Bar(TQDMProgressBar):
        def on_predict_batch_end(self, *arguments: Any) -> None:
            super().on_predict_batch_end(*arguments)
            shown.append((self.predict_progress_bar.total, str(self.predict_progress_bar)))

    shown: list[tuple[int, str]] = []
    predict(files, table, Watched(), Bar(refresh_rate=1), overlap=False, enable_progress_bar=True)
    assert [total for total, _ in shown] == [2, 2], "four of ten prompts, three a batch"
    assert "{remaining}" in Bar.BAR_FORMAT
    assert "<00:" in shown[0][1], f"the time left: {shown[0][1]}"
    columns = [type(column).__name__ for column in RichProgressBar().configure_columns(_trainer())]
    assert any("Time" in name for name in columns)


def _trainer() -> Any:
    return make_trainer(Path("unused"))


@pytest.mark.parametrize("settings", [{"sampler": "graph"}, {"max_rows": 3}, {"sampler": "graph", "max_rows": 5}])
def test_the_table_does_not_depend_on_the_sampler(settings: dict[str, Any], files: Path, tmp_path: Path) -> None:
    predict(files, tmp_path / "one" / "table", Watched(), overlap=False)
    predict(files, tmp_path / "other" / "table", Watched(), overlap=False, data=settings)
    assert_same_rows(tmp_path / "one" / "table", tmp_path / "other" / "table", to_the_bit=False)


def rescore(files: Path, table: Path, source: Path, reward: Any, samples: int = 4, **changes: Any) -> None:
    data = data_of(files, table, reward, **changes)
    sampler = ReferenceSampler(data.actors, samples=samples, responses_from=str(source))
    make_trainer(table.parent).predict(sampler, data, return_predictions=False)


def test_another_reward_scores_the_same_responses(files: Path, tmp_path: Path) -> None:
    predict(files, tmp_path / "first", VowelReward(), overlap=False)
    rescore(files, tmp_path / "second", tmp_path / "first", VowelReward(scale=3.0), samples=3)
    first, second = sorted(rows_of(tmp_path / "first")), sorted(rows_of(tmp_path / "second"))
    assert len(second) == PROMPTS
    for one, other in zip(first, second, strict=True):
        assert other.rewards == pytest.approx([3 * reward for reward in one.rewards[:3]], rel=1e-6)
        assert (other.responses, other.response_tokens) == (one.responses[:3], one.response_tokens[:3])
        assert (other.log_probs, other.finished) == (one.log_probs[:3], one.finished[:3])  # type: ignore[index]
    # It is a table of its own reward, as if its responses had been sampled for it.
    assert data_of(files, tmp_path / "second", VowelReward(scale=3.0)).table().samples == 3


def test_responses_of_another_temperature_are_refused(files: Path, tmp_path: Path) -> None:
    predict(files, tmp_path / "first", VowelReward(), overlap=False)
    with pytest.raises(ReferenceTableError, match="temperature"):
        rescore(files, tmp_path / "second", tmp_path / "first", VowelReward(scale=3.0), temperature=0.5)
    with pytest.raises(ValueError, match="has 4 responses a prompt, fewer than model.samples=5"):
        rescore(files, tmp_path / "third", tmp_path / "first", VowelReward(scale=3.0), samples=5)


def test_a_table_in_double_precision(files: Path, tmp_path: Path) -> None:
    data = make_data(files, reference_table=str(tmp_path / "table"))
    trainer = make_trainer(tmp_path, callbacks=[], enable_checkpointing=False, precision="64-true")
    trainer.predict(ReferenceSampler(data.actors, samples=3), data, return_predictions=False)
    assert data.table().samples == 3


# -- several workers, failures, responses without a reward -----------------------------------------


def fill(files: Path, table: Path, reward: Any, *callbacks: Any, samples: int = 4, **changes: Any) -> ReferenceSampler:
    data = data_of(files, table, reward, **changes)
    sampler = ReferenceSampler(data.actors, samples=samples, rows_per_pass=2 * samples)
    make_trainer(table.parent, *callbacks).predict(sampler, data, return_predictions=False)
    return sampler


@pytest.mark.parametrize("per_call", ["batch", "prompt", "response"])
def test_several_workers_make_the_same_table(per_call: Any, files: Path, tmp_path: Path) -> None:
    plain, several = tmp_path / "plain" / "table", tmp_path / "several" / "table"
    fill(files, plain, VowelReward())
    fill(files, several, VowelReward(), reward_calls=RewardCalls(workers=3, per_call=per_call))
    assert rows_of(several) == rows_of(plain)
    # What made it is the same: either run may use either table, and go on with it.
    assert data_of(files, several, VowelReward()).table().samples == 4


def test_several_workers_score_a_group_while_the_next_is_sampled(files: Path, tmp_path: Path, monkeypatch: Any) -> None:
    sampled = [threading.Event() for _ in range(7)]
    scoring, scored = threading.Event(), threading.Event()
    sample = ReferenceSampler._sample

    def noting(self: Any, *group: Any) -> Any:
        next(event for event in sampled if not event.is_set()).set()
        assert not sampled[1].is_set() or scoring.wait(30), "the second group is sampled before the first is scored"
        assert not sampled[2].is_set() or scored.is_set(), "one group ahead, not more"
        return sample(self, *group)

    class Waiting(VowelReward):
        def __call__(self, *arguments: Any) -> Tensor:
            scoring.set()
            assert sampled[1].wait(30), "the first group is scored before the second is sampled"
            scored.set()
            return super().__call__(*arguments)

    monkeypatch.setattr(ReferenceSampler, "_sample", noting)
    fill(files, tmp_path / "table", Waiting(), reward_calls=RewardCalls(workers=2))
    assert len(rows_of(tmp_path / "table")) == PROMPTS


class FailsAt(VowelReward):
    """Raise at one prompt, so often; then only once the others of its group are scored."""

    def __init__(self, prompt: str, other: str, times: int = 99) -> None:
        super().__init__()
        self.prompt, self.other, self.left, self.seen = prompt, other, times, list[str]()
        self.scored = threading.Event()

    def __call__(self, prompts: Any, responses: Any, token_ids: Any) -> Tensor:
        self.seen += prompts
        if self.prompt in prompts and self.left:
            self.left -= 1
            assert self.scored.wait(30)
            raise ConnectionError("the judge is out")
        if self.other in prompts:
            self.scored.set()
        return super().__call__(prompts, responses, token_ids)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.filterwarnings("ignore:.*asked again")
def test_a_failing_reward_names_the_prompt_and_keeps_what_is_done(workers: int, files: Path, tmp_path: Path) -> None:
    """Groups of two and one: `bcd` and `cde` are one."""
    table, calls = tmp_path / "table", RewardCalls(workers=workers, retries=1, backoff_s=0.0)
    with pytest.raises(RewardFailure, match="the judge is out.*; row 1: prompt 'cde', first response .*asked 2 times"):
        fill(files, table, FailsAt("cde", "bcd"), reward_calls=calls)
    kept = {"a", "ab", "abc", "bcd"}
    assert {row.prompt for row in rows_of(table)} == kept
    reward = FailsAt("d", "cde", times=1)
    fill(files, table, reward, reward_calls=calls)
    assert not kept & set(reward.seen), "they are not asked for again"
    assert reward.seen.count("d") == 2
    fill(files, tmp_path / "whole" / "table", VowelReward())
    assert_same_rows(table, tmp_path / "whole" / "table")


@pytest.mark.filterwarnings("ignore:the reward says None")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_response_without_a_reward_is_replaced_by_a_further_draw(
    workers: int, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, draw = RewardCalls(workers=workers, on_missing="skip"), ReferenceSampler._draw
    noise: set[tuple[str, bool]] = set()

    def drawing(self: Any, *given: Any, stream: str, step: int) -> Any:
        noise.add((stream, step > 0))
        return draw(self, *given, stream=stream, step=step)

    monkeypatch.setattr(ReferenceSampler, "_draw", drawing)
    sampler = fill(files, tmp_path / "one" / "table", Picky("bdfh"), samples=16, reward_calls=calls)
    found = rows_of(tmp_path / "one" / "table")
    assert len(found) == PROMPTS
    assert sampler.loaded.record.missing > 20
    assert noise == {("table", False), ("table/further", True)}
    fill(files, tmp_path / "all" / "table", VowelReward(), samples=16)
    kept = 0
    for row, whole in zip(sorted(found), sorted(rows_of(tmp_path / "all" / "table")), strict=True):
        assert len(row.responses) == 16, "M stays M"
        assert not any(text.startswith(tuple("bdfh")) for text in row.responses)
        for place, text in enumerate(whole.responses):
            if not text.startswith(tuple("bdfh")):
                kept += 1
                assert row.responses[place] == text
                assert row.rewards[place] == whole.rewards[place]
                assert row.log_probs[place] == whole.log_probs[place]  # type: ignore[index]
        scored = VowelReward()([row.prompt], [row.responses], [row.response_tokens])
        assert row.rewards == pytest.approx(scored[0].tolist())
        expected = [log_prob_of(sampler, row.prompt, tokens) for tokens in row.response_tokens]
        assert row.log_probs == pytest.approx(expected, abs=1e-4), "they are those of what replaced them"
    assert 0 < kept < 16 * PROMPTS


def log_prob_of(sampler: ReferenceSampler, prompt: str, response: Sequence[int]) -> float:
    """Return the log-probability of a response from a plain pass."""
    actors = sampler.loaded
    begun = actors.tokenizer(prompt)["input_ids"]
    with torch.no_grad():
        logits = actors.policy(input_ids=torch.tensor([[*begun, *response]])).logits[0, len(begun) - 1 : -1]
    return float(logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).sum())


@pytest.mark.filterwarnings("ignore:the reward says None")
def test_further_draws_do_not_depend_on_the_run(files: Path, tmp_path: Path) -> None:
    """Other groups, a kill and several workers: the same table."""
    skip = RewardCalls(on_missing="skip")
    fill(files, tmp_path / "one" / "table", Picky("abc"), reward_calls=skip)
    other = tmp_path / "other" / "table"
    with pytest.raises(Killed):
        fill(files, other, Picky("abc"), KillAfter(2), reward_calls=skip)
    fill(files, other, Picky("abc"), reward_calls=RewardCalls(on_missing="skip", workers=2), eval_batch_size=5)
    assert_same_rows(tmp_path / "one" / "table", other)


@pytest.mark.filterwarnings("ignore:the reward says None")
def test_a_prompt_without_any_reward_is_named_and_what_is_finished_is_kept(files: Path, tmp_path: Path) -> None:
    class Refusing(VowelReward):
        def __call__(self, prompts: Any, responses: Any, token_ids: Any) -> Tensor:
            silent = torch.tensor([[prompt == "cde"] for prompt in prompts])
            return super().__call__(prompts, responses, token_ids).masked_fill(silent, torch.nan)

    table = tmp_path / "table"
    with pytest.raises(RewardError, match="the prompt 'cde' of the reference table: 4 of its 4 .* 16 further"):
        fill(files, table, Refusing(), reward_calls=RewardCalls(on_missing="skip"))
    assert {row.prompt for row in rows_of(table)} == {"a", "ab", "abc", "bcd"}
    with pytest.raises(RewardError, match=r"the reward of row 1, response 0 is nan .*prompt 'cde'"):
        fill(files, tmp_path / "stop" / "table", Refusing())
    assert {row.prompt for row in rows_of(tmp_path / "stop" / "table")} == {"a", "ab", "abc", "bcd"}


@pytest.mark.filterwarnings("ignore:the reward says None")
def test_a_table_that_stopped_goes_on_with_what_is_missing_skipped(files: Path, tmp_path: Path) -> None:
    class Late(Picky):
        def __call__(self, prompts: Any, responses: Any, token_ids: Any) -> Tensor:
            late = torch.tensor([[prompt == "d"] for prompt in prompts])
            full = VowelReward()(prompts, responses, token_ids)
            return torch.where(late, super().__call__(prompts, responses, token_ids), full)

    table, skip, reward = tmp_path / "table", RewardCalls(on_missing="skip"), Late("abcd")
    with pytest.raises(RewardError, match="is nan .*prompt 'd'"):
        fill(files, table, reward, samples=8)
    stopped = rows_of(table)
    assert len(stopped) == 5
    assert data_of(files, table, reward, reward_calls=skip).table().samples == 8
    fill(files, table, reward, samples=8, reward_calls=skip)
    assert {str(row) for row in stopped} <= {str(row) for row in rows_of(table)}
    assert len(rows_of(table)) == PROMPTS
    assert data_of(files, table, reward, reward_calls=skip).table().samples == 8
    with pytest.raises(ReferenceTableError, match="on_missing: the table has 'skip', this run has '.absent.'"):
        data_of(files, table, reward).table()


@pytest.mark.filterwarnings("ignore:the reward says None")
def test_responses_of_another_table_are_replaced_too(files: Path, tmp_path: Path) -> None:
    predict(files, tmp_path / "first", VowelReward(), overlap=False)
    skip = RewardCalls(on_missing="skip")
    rescore(files, tmp_path / "second", tmp_path / "first", Picky("abc"), reward_calls=skip)
    fill(files, tmp_path / "third" / "table", Picky("abc"), reward_calls=skip)
    assert_same_rows(tmp_path / "second", tmp_path / "third" / "table")
