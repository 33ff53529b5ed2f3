"""Reference tables: what they are sampled with, in which groups, and how scoring runs beside it."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.modules.fake import FakeTrainer, attach
from tests.modules.offline import table_data
from tests.modules.setting import VowelReward, make_data
from vbon_lightning import ReferenceSampler
from vbon_lightning.data.collating import batch_keys
from vbon_lightning.modules import reference_sampler
from vbon_lightning.rewards import RewardError
from vbon_lightning.sampling import SamplingRequest, prompt_noise


def test_what_a_table_is_sampled_with(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReferenceSampler, "_in_blocks", False)  # as on a GPU
    data = make_data(files, temperature=0.7)
    module = ReferenceSampler(data.actors, samples=5, rows_per_pass=2)
    module.configure_model()
    attach(module, FakeTrainer(datamodule=SimpleNamespace(table_seed=11)))
    actors, calls = module.loaded, []
    real = actors.sampler

    def sampler(model: Any, request: SamplingRequest) -> Any:
        calls.append((model, request))
        return real(model, request)

    monkeypatch.setattr(actors, "sampler", sampler)
    prompts = data.prompt_batch(data.prompts("train")[:3])
    sampled = module._sample(prompts)
    noise = prompt_noise(sampled.keys, num_samples=5, length=4, seed=11, stream="table", step=0)
    assert [int(request.noise.shape[1]) for _, request in calls] == [2, 2, 1]
    assert torch.equal(torch.cat([request.noise for _, request in calls], 1), noise)
    for model, request in calls:
        assert model is actors.policy
        assert torch.equal(request.prompt_tokens, prompts.tokens)
        assert torch.equal(request.prompt_mask, prompts.mask)
        assert (request.end_ids, request.temperature) == (actors.end_ids, 0.7)
    whole = real(actors.policy, calls[0][1]._replace(noise=noise))
    assert sampled.token_ids == actors.token_ids(whole)
    assert sampled.finished == whole.finished.tolist()
    torch.testing.assert_close(torch.tensor(sampled.log_probs), whole.log_probs.sum(-1))
    assert sampled.prompt_ids == [row[keep].tolist() for row, keep in zip(prompts.tokens, prompts.mask, strict=True)]
    for trainer in (FakeTrainer(datamodule=None), FakeTrainer(datamodule=SimpleNamespace())):
        attach(module, trainer)
        assert module._table_seed == 0


def test_on_the_cpu_no_digit_depends_on_what_else_is_sampled(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_data(files)
    module = ReferenceSampler(data.actors, samples=70)
    module.configure_model()
    attach(module, FakeTrainer(datamodule=SimpleNamespace(table_seed=11)))
    rows, asked = data.prompts("train")[:3], []
    real = module.loaded.sampler
    monkeypatch.setattr(module.loaded, "sampler", lambda *given: asked.append(given[1]) or real(*given))
    whole = module._sample(data.prompt_batch(rows))
    assert [request.noise.shape[:2] for request in asked] == 3 * [(1, 16), (1, 48), (1, 64)]
    assert all(request.prompt_mask.all() for request in asked)
    noise = prompt_noise(whole.keys, num_samples=128, length=4, seed=11, stream="table", step=0)
    assert torch.equal(torch.cat([request.noise for request in asked[3:6]], 1), noise[1:2])
    prompt = data.prompt_batch(rows[1:2])
    for places in (range(3), range(15, 18), [5, 69], [20]):
        some = module._draw(prompt, whole.keys[1:2], places, stream="table", step=0)
        for name in ("token_ids", "finished", "log_probs"):
            assert getattr(some, name)[0] == [getattr(whole, name)[1][place] for place in places]
    module.rows_per_pass = 10
    asked.clear()
    module._draw(prompt, whole.keys[1:2], [5, 12, 63], stream="table", step=0)
    assert [request.noise.shape[1] for request in asked] == [10, 6, 8], "of 0 to 9, of 10 to 15, of 56 to 63"


def test_prompts_in_groups_without_those_that_are_done(files: Path, spy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_data(files)
    module = ReferenceSampler(data.actors, samples=4, rows_per_pass=9)
    rows = data.prompts("train")
    batch = data.prompt_batch(rows)
    batch = batch._replace(valid=torch.tensor([True] * 9 + [False]))
    module.writer.taken = {row.key for row in rows} - {rows[2].key}  # the others are this process's
    asked = spy(reference_sampler, "batch_keys")
    given = list(module._groups(batch))
    assert len(asked.calls) == 1, "a prompt's key is a hash of all that its rewards depend on"
    groups, keys, ours = zip(*given, strict=True)
    assert [key for some in keys for key in some] == [row.key for row in (*rows[:2], *rows[3:9])]
    assert list(ours) == 4 * [[0, 1]]
    assert [group.index.tolist() for group in groups] == [[0, 1], [3, 4], [5, 6], [7, 8]]
    for group in groups:
        for place, number in enumerate(group.index.tolist()):
            assert group.tokens[place][group.mask[place]].tolist() == list(rows[number].tokens)
            assert group.text[place] == rows[number].text
        assert group.valid.all()
        assert bool(group.mask.any(0)[0]), "no wider than its longest prompt"
    module.rows_per_pass = 1
    assert [len(group.text) for group, _, _ in module._groups(batch)] == [1] * 8
    # Elsewhere a prompt's padding changes its last digits: groups are the same whoever makes them.
    module.rows_per_pass = 9
    monkeypatch.setattr(ReferenceSampler, "_in_blocks", False)
    assert [(group.index.tolist(), mine) for group, _, mine in module._groups(batch)] == [
        ([0, 1], [0, 1]),
        ([2, 3], [1]),
        ([4, 5], [0, 1]),
        ([6, 7], [0, 1]),
        ([8], [0]),
    ]
    module.writer.taken = {rows[5].key}
    assert [(group.index.tolist(), mine) for group, _, mine in module._groups(batch)] == [([4, 5], [1])]
    module.writer.taken = set()
    assert list(module._groups(batch)) == []


def test_of_a_group_only_what_is_this_processs_goes_on(files: Path) -> None:
    """On a GPU a whole group is sampled, whoever has made some of it, so that no digit depends on that."""
    data = make_data(files)
    module = ReferenceSampler(data.actors, samples=3)
    module.configure_model()
    attach(module, FakeTrainer(world_size=1))
    batch = data.prompt_batch(data.prompts("train")[:4])
    whole, some = module._sample(batch), module._sample(batch, ours=[2, 0])
    assert whole.keys == batch_keys(batch) and some.first == whole.first == 0
    for name in ("keys", "prompt_ids", "token_ids", "responses", "finished", "log_probs"):
        told, all_of_it = getattr(some, name), getattr(whole, name)
        assert len(all_of_it) == 4
        assert (told == [all_of_it[2], all_of_it[0]] and told[0] != told[1]) or name == "finished", name
    assert some.finished == [whole.finished[2], whole.finished[0]]
    assert some.prompts.text == [batch.text[2], batch.text[0]]
    assert some.prompts.index.tolist() == [2, 0]
    assert whole.of([1])._replace(prompts=None) == whole._replace(
        prompts=None, **{name: getattr(whole, name)[1:2] for name in ("keys", "prompt_ids", "token_ids", "responses")},
        finished=whole.finished[1:2], log_probs=whole.log_probs[1:2],
    )  # fmt: skip
    assert whole._replace(first=2).of([1]).first == 2


def test_rows_are_made_of_what_is_taken_and_keys_computed_once(
    files: Path, spy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ReferenceSampler, "_in_blocks", False)  # as on a GPU
    data = make_data(files)
    module = ReferenceSampler(data.actors, samples=3, rows_per_pass=6)
    module.configure_model()
    attach(module, FakeTrainer(world_size=1))
    rows = data.prompts("train")[:6]
    batch = data.prompt_batch(rows)
    module.writer.taken = {rows[1].key, rows[4].key}
    groups = list(module._groups(batch))
    asked = spy(reference_sampler, "batch_keys")
    assert [row.key for row in module.make_rows(batch)] == [rows[1].key, rows[4].key]
    assert len(asked.calls) == 1, "a prompt's key is a hash of all that its rewards depend on"
    # Beside others that hold the reference with it a process may have none of a group, and some of the next.
    monkeypatch.setattr(module, "_groups", lambda _: iter([(*groups[0][:2], []), groups[1]]))
    assert [row.key for row in module.make_rows(batch)] == [rows[4].key]


def test_processes_that_hold_the_reference_together_make_the_same_passes(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data(files)
    module, asked, elsewhere = ReferenceSampler(data.actors), [], 0

    def most(number: int, device: torch.device) -> int:
        asked.append((number, device))
        return max(number, elsewhere)

    monkeypatch.setattr(reference_sampler, "most", most)
    assert (module._anywhere(True), module._anywhere(False), asked) == (True, False, []), "alone nobody is asked"
    assert module._in_blocks, "alone on a CPU each prompt is sampled by itself"
    monkeypatch.setattr(ReferenceSampler, "_is_shared", True)
    assert not module._in_blocks
    assert (module._anywhere(True), module._anywhere(False)) == (True, False)
    elsewhere = 1
    assert module._anywhere(False) is True
    assert asked == [(1, module.device), (0, module.device), (0, module.device)]
    batch = data.prompt_batch(data.prompts("train")[:4])
    batch = batch._replace(valid=torch.tensor([True, True, False, True]))
    assert module._kinds(batch, batch_keys(batch), ()) == [[0, 1, 2, 3]], "whoever takes them, and what fills up"


def test_prompts_of_which_as_many_responses_are_held_are_topped_up_together(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside one of which fewer are held, responses would be sampled that are there already."""
    data = make_data(files)
    module = ReferenceSampler(data.actors)
    batch = data.prompt_batch(data.prompts("train")[:5])
    keys = batch_keys(batch)
    assert module._kinds(batch, keys, {0, 1, 3, 4}) == [[0, 1, 3, 4]], "of none any are held"
    held = dict(zip(keys, (0, 4, 0, 8, 4), strict=True))
    monkeypatch.setattr(module.writer, "table", SimpleNamespace(count=held.__getitem__))
    assert module._kinds(batch, keys, {0, 1, 2, 3, 4}) == [[0, 2], [1, 4], [3]]


def test_who_holds_the_reference_is_asked_of_the_reference(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ReferenceSampler(make_data(files).actors)
    assert not module._is_shared, "nothing is loaded"
    module.configure_model()
    assert not module._is_shared
    monkeypatch.setattr(reference_sampler, "is_sharded", lambda model: model is module.loaded.policy)
    assert module._is_shared


def test_a_row_that_is_topped_up_is_that_of_the_prompts_text(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table refuses the row of another text that has the same tokens."""
    asked: list[tuple[str, str]] = []

    class Table:
        def __contains__(self, key: str) -> bool:
            return key != keys[1]

        def row(self, key: str, text: str) -> Any:
            asked.append((key, text))
            return SimpleNamespace(rewards=[0.0, 0.0])

    data = make_data(files)
    module = ReferenceSampler(data.actors, samples=3)
    module.configure_model()
    attach(module, FakeTrainer(world_size=1))
    batch = data.prompt_batch(data.prompts("train")[:3])
    keys = batch_keys(batch)
    monkeypatch.setattr(module.writer, "table", Table())
    assert module._sample(batch).first == 0, "one of them has none"
    assert asked == [(keys[0], batch.text[0]), (keys[2], batch.text[2])]
    assert module._sample(batch, ours=[0, 2]).first == 2


def test_what_an_interrupted_run_was_scoring_is_not_waited_for(files: Path, spy: Any) -> None:
    data = make_data(files)
    module = ReferenceSampler(data.actors)
    module.configure_model()
    attach(module, FakeTrainer(datamodule=data))
    stopped = spy(module, "_stop_scoring")
    module.on_predict_start()
    assert stopped.calls == [((), {"wait": False})]


@pytest.mark.parametrize(("problem", "wait"), [(RewardError("no"), True), (KeyboardInterrupt(), False)])
def test_only_where_a_reward_fails_the_calls_that_run_are_waited_for(
    problem: BaseException, wait: bool, files: Path, spy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(sampled: Any) -> Any:
        raise problem

    data = make_data(files)
    module = ReferenceSampler(data.actors, samples=2)
    module.configure_model()
    attach(module, FakeTrainer(world_size=1))
    rows = data.prompts("train")[:1]
    module.writer.taken = {rows[0].key}
    monkeypatch.setattr(module, "_ask", ask)
    stopped = spy(module, "_stop_scoring")
    with pytest.raises(type(problem)):
        module.make_rows(data.prompt_batch(rows))
    assert stopped.calls == [((), {"wait": wait})]


@pytest.mark.parametrize(("retries", "missing"), [(0, 0), (1, 0), (0, 2), (1, 2)])
def test_what_calling_the_reward_came_to_is_said_if_anything(
    retries: int, missing: int, files: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = ReferenceSampler(make_data(files).actors)
    module.configure_model()
    module.loaded.record.retries, module.loaded.record.missing = retries, missing
    with caplog.at_level(logging.INFO):
        module.on_predict_end()
    said = f"reward: {retries} calls made again; {missing} responses without a reward" in caplog.text
    assert said == bool(retries + missing)


def test_cached_responses_are_scored_anew(files: Path) -> None:
    data = table_data(files)
    table = data.table()
    module = ReferenceSampler(data.actors, samples=16, responses_from=str(files / "table"))
    module.configure_model()
    attach(module, FakeTrainer(datamodule=data))
    module.on_predict_start()  # 16 of the table's 16
    rows = data.prompts("train")[:3]
    prompts = data.prompt_batch(rows)
    for samples in (16, 5):
        module.samples = samples
        found = module._sample(prompts)
        keys = [row.key for row in rows]
        assert found.keys == keys
        assert found.prompt_ids == [list(row.tokens) for row in rows]
        for key, text, tokens in zip(keys, prompts.text, found.token_ids, strict=True):
            cached = table.response_tokens(key, text)
            assert tokens == [part.tolist() for part in cached.tokens.split(cached.lengths.tolist())[:samples]]
        assert found.finished == table.finished_matrix(keys, prompts.text)[:, :samples].tolist()
        assert found.log_probs == table.log_probs_matrix(keys, prompts.text)[:, :samples].tolist()
        assert torch.equal(found.prompts.tokens, prompts.tokens)
        assert torch.equal(found.prompts.mask, prompts.mask)
        assert found.prompts.text == prompts.text
    # A row whose text is another's is refused, whichever part of it is read.
    for name in ("response_tokens", "finished_matrix", "log_probs_matrix"):
        asked: list[Any] = []
        real = getattr(table, name)
        stub = SimpleNamespace(
            response_tokens=table.response_tokens,
            finished_matrix=table.finished_matrix,
            log_probs_matrix=table.log_probs_matrix,
        )
        setattr(stub, name, lambda *given, real=real, asked=asked: asked.append(given) or real(*given))
        module._source = stub  # type: ignore[assignment]
        module._sample(prompts)
        texts = [text for _, text in asked] if name == "response_tokens" else asked[0][1]
        assert list(texts) == list(prompts.text)
    module.samples = 17
    with pytest.raises(ValueError, match=r"has 16 responses a prompt, fewer than model\.samples=17: lower"):
        module._open_source(str(files / "table"))
    other = ReferenceSampler(make_data(files, temperature=0.5).actors, samples=4)
    attach(other, FakeTrainer(datamodule=make_data(files, temperature=0.5)))
    with pytest.raises(ValueError, match="temperature: the table has 0.7, this run has 0.5"):
        other._open_source(str(files / "table"))
    trainer = FakeTrainer()
    del trainer.datamodule
    attach(other, trainer)
    assert other._open_source(str(files / "table")).samples == 16


def test_a_table_is_never_resumed_by_checkpoint(files: Path) -> None:
    module = ReferenceSampler(make_data(files).actors)
    with pytest.raises(ValueError, match="^`vbon predict` samples from data.reference and takes no --ckpt_path$"):
        module.on_load_checkpoint({})


def test_scoring_that_hangs_holds_nobody_up(files: Path) -> None:
    release, begun = threading.Event(), threading.Event()

    class Hanging(VowelReward):
        def __call__(self, *arguments: Any) -> Any:
            begun.set()
            assert release.wait(30)
            return super().__call__(*arguments)

    data = make_data(files, reward=Hanging())
    module = ReferenceSampler(data.actors, samples=3, overlap_scoring=True)
    module.configure_model()
    attach(module, FakeTrainer(datamodule=data))
    sampled = module._sample(data.prompt_batch(data.prompts("train")[:2]))
    running, waiting = module._ask(sampled), module._ask(sampled)
    assert begun.wait(30)
    started = time.monotonic()
    module._stop_scoring(wait=False)
    assert time.monotonic() - started < 10
    assert waiting._futures[0].cancelled()
    assert (module._caller, module._pending) == (None, None)
    release.set()
    assert running.result().rewards.shape == (2, 3)


def test_responses_are_decoded_behind_their_prompts(files: Path, spy: Any) -> None:
    data = make_data(files)
    module = ReferenceSampler(data.actors, samples=3)
    module.configure_model()
    attach(module, FakeTrainer(datamodule=data))
    prompts = data.prompt_batch(data.prompts("train")[:2])
    decoded = spy(module.loaded, "decode")
    sampled = module._sample(prompts)
    assert torch.equal(sampled.prompts.mask, prompts.mask)
    assert decoded.calls == [((sampled.token_ids, sampled.prompts), {})]
    module._pending = reference_sampler._Asked(sampled, module._ask(sampled))
    rows = module._finish_scoring()
    assert module._pending is None
    assert [row.key for row in rows] == sampled.keys
    assert [row.responses for row in rows] == sampled.responses
    expected = VowelReward()(prompts.text, sampled.responses, sampled.token_ids).tolist()
    assert [row.rewards for row in rows] == expected
    assert [row.finished for row in rows] == sampled.finished
