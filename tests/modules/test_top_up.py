"""Tables of fewer responses than are asked for: topped up, they are the tables that would have been made at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.crashes import count_calls, killed_at
from tests.modules.fake import FakeTrainer, attach
from tests.modules.setting import PROMPTS, Killed, Picky, VowelReward, make_files, make_trainer
from tests.modules.test_reference_sampler import KillAfter, Watched, data_of, rows_of
from vbon_lightning import ReferenceSampler
from vbon_lightning.modules import reference_sampler
from vbon_lightning.reference_table import (
    OtherPrompt,
    PromptNotInTable,
    ReferenceTable,
    ReferenceTableError,
    import_jsonl,
)
from vbon_lightning.rewards import RewardCalls
from vbon_lightning.sampling.further import replace_missing
from vbon_lightning.types import PromptBatch

SKIP = RewardCalls(on_missing="skip")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


def fill(files: Path, table: Path, samples: int, *callbacks: Any, source: Path | None = None, **changes: Any) -> None:
    data = data_of(files, table, **({"reward": VowelReward()} | changes))
    sampler = ReferenceSampler(
        data.actors, samples=samples, rows_per_pass=64, responses_from=None if source is None else str(source)
    )
    make_trainer(table.parent, *callbacks, enable_checkpointing=False, callbacks=list(callbacks)).predict(
        sampler, data, return_predictions=False
    )


@pytest.fixture(scope="module")
def at_once(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """Return the rows of tables that are made at once."""
    made: dict[str, list[Any]] = {}

    def rows(samples: int, **changes: Any) -> list[Any]:
        name = f"{samples} {sorted(changes)}"
        if name not in made:
            table = tmp_path_factory.mktemp("at_once") / "table"
            fill(files, table, samples, **changes)
            made[name] = rows_of(table)
        return made[name]

    return rows


@pytest.mark.parametrize(("few", "many"), [(1, 3), (7, 20), (16, 18), (20, 70)])
def test_a_table_is_topped_up_to_the_bit(few: int, many: int, files: Path, tmp_path: Path, at_once: Any) -> None:
    table, reward = tmp_path / "table", Watched()
    fill(files, table, few)
    first = {row.key: row for row in rows_of(table)}
    fill(files, table, many, reward=reward)
    assert rows_of(table) == at_once(many)
    assert len(list(table.glob("*.parquet"))) == 1, "what was there is merged with what came"
    for row in rows_of(table):
        kept = first[row.key]
        assert (row.rewards[:few], row.log_probs[:few]) == (kept.rewards, kept.log_probs)  # type: ignore[index]
    assert len(reward.prompts) == len(PROMPTS)
    fill(files, table, many, reward=reward)
    assert len(reward.prompts) == len(PROMPTS), "nothing is scored twice"


def test_only_the_further_responses_are_scored(files: Path, tmp_path: Path) -> None:
    class Counting(VowelReward):
        responses = 0

        def __call__(self, prompts: Any, responses: Any, token_ids: Any) -> Any:
            Counting.responses += sum(map(len, responses))
            return super().__call__(prompts, responses, token_ids)

    fill(files, tmp_path / "table", 5)
    fill(files, tmp_path / "table", 8, reward=Counting())
    assert Counting.responses == 3 * len(PROMPTS)


@pytest.mark.parametrize("batches", [1, 3])
def test_a_top_up_that_is_killed_goes_on(batches: int, files: Path, tmp_path: Path, at_once: Any) -> None:
    """Also in other batches; what reads the table in between uses the common M."""
    table = tmp_path / "table"
    fill(files, table, 4)
    with pytest.raises(Killed):
        fill(files, table, 20, KillAfter(batches))
    half = ReferenceTable.open(table)
    assert (half.samples, half.most_samples) == (4, 20)
    assert [len(row.rewards) for row in half.rows()] == [20] * 3 * batches + [4] * (len(PROMPTS) - 3 * batches)
    data = data_of(files, table, VowelReward())
    with pytest.warns(UserWarning, match="holds 4 to 20 responses a prompt: the first 4 are used"):
        assert data.table_rewards(data.prompts("train")).tolist() == [row.rewards[:4] for row in at_once(20)]
    with pytest.raises(ValueError, match=r"holds 20 responses a prompt, and model\.samples=8 is fewer"):
        fill(files, table, 8)
    fill(files, table, 20, eval_batch_size=4)
    assert sorted(rows_of(table)) == sorted(at_once(20))


def test_a_kill_at_any_file_system_call_of_a_top_up(files: Path, tmp_path: Path, at_once: Any) -> None:
    def begun(name: str) -> Callable[[], None]:
        fill(files, tmp_path / name, 2, eval_batch_size=5)
        return lambda: fill(files, tmp_path / name, 3, eval_batch_size=5)

    calls = count_calls(begun("counted"), tmp_path)
    for call in range(1, calls + 1):
        work, table = begun(str(call)), tmp_path / str(call)
        assert killed_at(call, work, tmp_path) == "died"
        between = ReferenceTable.open(table)
        assert [row.rewards[:2] for row in between.rows()] == [row.rewards[:2] for row in at_once(3)]
        work()
        assert rows_of(table) == at_once(3)


@pytest.mark.filterwarnings("ignore:the reward says None")
@pytest.mark.parametrize("workers", [1, 2])
def test_further_draws_for_missing_rewards(workers: int, files: Path, tmp_path: Path, at_once: Any) -> None:
    """The draws that stand for responses without a reward are a function of their places alone."""
    table, changes = tmp_path / "table", {"reward": Picky("bdfh"), "reward_calls": SKIP}
    fill(files, table, 5, **changes)
    calls = RewardCalls(on_missing="skip", workers=workers)
    fill(files, table, 9, **changes | {"reward_calls": calls})
    fill(files, table, 24, **changes | {"reward_calls": calls})
    assert sorted(rows_of(table)) == sorted(at_once(24, **changes))
    assert not any(text.startswith(tuple("bdfh")) for row in rows_of(table) for text in row.responses)


def test_a_table_from_other_responses_is_topped_up(files: Path, tmp_path: Path, at_once: Any) -> None:
    source, table = tmp_path / "source", tmp_path / "table"
    fill(files, source, 20)
    scaled = {"reward": VowelReward(scale=3.0)}
    fill(files, table, 6, source=source, **scaled)
    fill(files, table, 20, source=source, **scaled)
    assert rows_of(table) == at_once(20, **scaled)


@pytest.mark.parametrize("changes", [{}, {"source": "itself"}])
def test_fewer_are_refused_before_a_model_is_loaded(
    changes: dict[str, Any], files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "table"
    fill(files, table, 4)
    before = rows_of(table)
    monkeypatch.setattr(ReferenceSampler, "configure_model", lambda module: pytest.fail("a model is loaded"))
    message = (
        rf"^the reference table {table} holds 4 responses a prompt, and model\.samples=3 is fewer: set it to 4 or more "
        r"\(more tops the table up\)\. A training that is to use fewer says so with data\.table_samples$"
    )
    with pytest.raises(ValueError, match=message):
        fill(files, table, 3, **({"source": table} if changes else {}))
    assert rows_of(table) == before


def test_prompts_that_are_added_get_as_many(files: Path, tmp_path: Path, at_once: Any) -> None:
    table = tmp_path / "table"
    fill(files, table, 4, train=[{"text": text} for text in PROMPTS[:3]])
    fill(files, table, 7)
    assert rows_of(table) == at_once(7)


def test_an_import_stays_unknown_where_it_was(files: Path, tmp_path: Path) -> None:
    """Its log-probabilities are not made up when it is topped up."""
    table = tmp_path / "table"
    data = data_of(files, table, VowelReward())
    (tmp_path / "in.jsonl").write_text('{"prompt": "ab", "responses": ["c", "d"], "rewards": [1.0, 2.0]}\n')
    encode = data.tokenizer.encode
    import_jsonl(tmp_path / "in.jsonl", table, encode=encode, encode_response=encode, fingerprint=data.fingerprint())
    fill(files, table, 3)
    row = next(row for row in rows_of(table) if row.prompt == "ab")
    assert (row.responses[:2], row.rewards[:2], len(row.rewards)) == (["c", "d"], [1.0, 2.0], 3)
    assert (row.log_probs, row.finished) == (None, None)
    assert all(other.log_probs is not None for other in rows_of(table) if other.prompt != "ab")


def test_a_row_of_another_text_is_refused_before_a_model_is_loaded(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "table"
    data = data_of(files, table, VowelReward())
    lines = ['{"prompt": "AB", "text": "c", "reward": 1.0}', '{"prompt": "cd", "text": "c", "reward": 1.0}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    encode: Any = lambda text: data.tokenizer.encode(text.lower())  # noqa: E731
    import_jsonl(tmp_path / "in.jsonl", table, encode=encode, encode_response=encode, fingerprint=data.fingerprint())
    with pytest.raises(OtherPrompt, match="prompt 'ab' has the tokens of 'AB', whose responses and rewards are in"):
        fill(files, tmp_path / "other", 1, source=table, train=[{"text": "cd"}, {"text": "ab"}], eval_batch_size=1)
    with pytest.raises(PromptNotInTable, match="prompt 'ef' .* is not among the 2 prompts of the reference table"):
        fill(files, tmp_path / "other", 1, source=table, train=[{"text": "cd"}, {"text": "ef"}], eval_batch_size=1)
    assert not list((tmp_path / "other").glob("*.parquet"))
    monkeypatch.setattr(ReferenceSampler, "configure_model", lambda module: pytest.fail("a model is loaded"))
    for samples in (1, 3):
        with pytest.raises(OtherPrompt, match="prompt 'ab' has the tokens of 'AB', whose responses and rewards are in"):
            fill(files, table, samples)


def test_responses_of_another_vocabulary_are_refused(files: Path, tmp_path: Path) -> None:
    data = data_of(files, tmp_path / "source", VowelReward())
    (tmp_path / "in.jsonl").write_text('{"prompt": "ab", "text": "c", "reward": 1.0}\n')
    made_of: dict[str, Any] = {"encode": data.tokenizer.encode, "fingerprint": data.fingerprint()}
    import_jsonl(tmp_path / "in.jsonl", tmp_path / "source", encode_response=lambda text: [11], **made_of)
    with pytest.raises(ReferenceTableError, match="to 'ab' with the token id 11, and the model has 11 tokens"):
        fill(files, tmp_path / "table", 1, source=tmp_path / "source", train=[{"text": "ab"}])


def test_a_top_up_may_take_as_many_further_draws_as_the_whole(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed: list[Any] = []

    def noting(*given: Any, most: int | None = None) -> Any:
        allowed.append(most)
        return replace_missing(*given, most=most)

    monkeypatch.setattr(reference_sampler, "replace_missing", noting)
    for samples in (20, 21):
        fill(files, tmp_path / "table", samples, train=[{"text": "ab"}])
    assert allowed == [20, 21]


def test_the_precision_of_a_table_is_that_of_its_top_up(files: Path, tmp_path: Path) -> None:
    table = tmp_path / "table"
    fill(files, table, 2)
    data = data_of(files, table, VowelReward())
    trainer = make_trainer(tmp_path, callbacks=[], enable_checkpointing=False, precision="bf16-mixed")
    with pytest.raises(ReferenceTableError, match="precision: the table has '32-true', this run has 'bf16-mixed'"):
        trainer.predict(ReferenceSampler(data.actors, samples=3), data, return_predictions=False)


def beside_a_table(files: Path, table: Path) -> tuple[ReferenceSampler, PromptBatch]:
    """Return a sampler of 7 responses that has opened a table of 4, and two of its prompts."""
    fill(files, table, 4)
    data = data_of(files, table, VowelReward())
    module = ReferenceSampler(data.actors, samples=7)
    module.configure_model()
    attach(module, FakeTrainer(datamodule=data))
    module.writer.table = ReferenceTable.open(table)
    return module, data.prompt_batch(data.prompts("train")[:2])


def test_rows_that_another_process_has_topped_up_by_now(files: Path, tmp_path: Path, at_once: Any) -> None:
    """A row is longer than when the table was opened: what comes is put behind its first ones, none twice."""
    module, prompts = beside_a_table(files, tmp_path / "table")
    assert module.writer.table is not None
    longer = at_once(7)
    for lengths, first in (((4, 6), 4), ((7, 7), 6), ((6, 7), 6)):
        rows = dict(zip(("a", "ab"), (longer[place] for place in (0, 1)), strict=True))
        cut = {
            row.key: row._replace(**{name: getattr(row, name)[:length] for name in row._fields[3:]})
            for row, length in zip(rows.values(), lengths, strict=True)
        }
        module.writer.table.row = lambda key, text=None, cut=cut: cut[key]  # type: ignore[method-assign]
        sampled = module._sample(prompts)
        assert sampled.first == first
        found = sampled.topped_up(dict(enumerate(sampled.rows({row: longer[row].rewards[first:] for row in (0, 1)}))))
        assert found == longer[:2]


def test_processes_that_hold_the_reference_together_sample_all_and_keep_what_is_there(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each must make as many passes as the others, whatever its own prompts lack."""
    module, prompts = beside_a_table(files, tmp_path / "table")
    monkeypatch.setattr(ReferenceSampler, "_is_shared", True)
    sampled = module._sample(prompts)
    assert sampled.first == 0
    assert [len(group) for group in sampled.responses] == [7, 7]
    held = [row.rewards for row in sampled.held if row is not None]
    found = sampled.topped_up(dict(enumerate(sampled.rows({row: [9.0] * 7 for row in (0, 1)}))))
    assert [row.rewards for row in found] == [[*rewards, 9.0, 9.0, 9.0] for rewards in held]
    assert [len(row.responses) for row in found] == [7, 7]
