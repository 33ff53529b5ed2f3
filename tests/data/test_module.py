"""The data module: what it refuses, what its batches carry, and what it deals to whom."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from safetensors.torch import load_file, save_file
from tokenizers import normalizers
from torch import Tensor

from tests.helpers import BOS, EOS, save_tiny_model, tiny_tokenizer
from vbon_lightning.checks import ConfigMismatchError
from vbon_lightning.data import AlignmentDataModule
from vbon_lightning.data import module as data_module
from vbon_lightning.data.encoding import PromptError
from vbon_lightning.data.sources import TextSource
from vbon_lightning.models import ModelError, ModelSpec
from vbon_lightning.reference_table import (
    FingerprintMismatch,
    OtherPrompt,
    PromptNotInTable,
    ReferenceTableError,
    ReferenceTableWriter,
    TableRow,
    prompt_key,
)
from vbon_lightning.rewards import RewardModel
from vbon_lightning.types import PromptBatch, TextBatch

ALPHABET = "abcdefgh"
TRAIN = ["ab", "cde", "f", "gh", "hgf", "abc", "dd", "ee", "fgh", "c"]
VAL = ["ba", "ab", "hh"]


class Lengths(RewardModel):
    def __call__(self, prompts: Any, responses: Any, token_ids: Any) -> Tensor:
        return torch.tensor([[float(len(ids)) for ids in group] for group in token_ids])

    def identity(self) -> dict[str, str]:
        return {"name": "lengths"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), alphabet=ALPHABET)


@pytest.fixture
def make(model, tmp_path):
    """Make a data module; its files lie in ``tmp_path``."""

    def build(
        module: Any = None, world: int = 1, rank: int = 0, stage: TrainerFn = TrainerFn.FITTING, **settings: Any
    ) -> AlignmentDataModule:
        for name, lines in (("train", TRAIN), ("val", VAL)):
            (tmp_path / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
        arguments: dict = {
            "policy": model,
            "reward": Lengths(),
            "train": TextSource(path=str(tmp_path / "train.txt")),
            "val": TextSource(path=str(tmp_path / "val.txt")),
            "max_new_tokens": 6,
            "batch_size": 2,
        }
        data = AlignmentDataModule(**(arguments | settings))
        if module is not None or world > 1:
            data.trainer = SimpleNamespace(  # type: ignore[assignment]
                lightning_module=module, world_size=world, global_rank=rank, state=SimpleNamespace(fn=stage)
            )
        return data

    return build


def write_table(data: AlignmentDataModule, texts: list[str], samples: int = 4) -> None:
    writer = ReferenceTableWriter(Path(str(data.reference_table)), data.fingerprint(), shard="rank0")
    rows = []
    for number, text in enumerate(texts):
        tokens = data.tokenizer(text)["input_ids"]
        rows.append(
            TableRow(
                key=prompt_key(tokens),
                prompt=text,
                prompt_tokens=tokens,
                responses=["a"] * samples,
                response_tokens=[[3 if sample % 2 else EOS] for sample in range(samples)],
                rewards=[10.0 * number + sample for sample in range(samples)],
                log_probs=[-1.0] * samples,
                finished=[sample % 2 == 0 for sample in range(samples)],
            )
        )
    writer.write(rows)


def texts_of(batches: Any) -> list[str]:
    return [text for batch in batches for text, valid in zip(batch.text, batch.valid.tolist(), strict=True) if valid]


# --- what it refuses ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "data.batch_size must be at least 1, got 0"),
        ({"eval_batch_size": 0}, "data.eval_batch_size must be at least 1, got 0"),
        ({"table_samples": 0}, "data.table_samples must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"too_long": "cut"}, "data.too_long must be one of error, truncate_left; got 'cut'"),
        ({"long_text": "drop"}, "data.long_text must be one of truncate, split; got 'drop'"),
        ({"table_splits": ["train", "dev"]}, "data.table_splits must be one of train, val, test; got 'dev'"),
    ],
)
def test_settings_that_make_no_sense(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


@pytest.mark.parametrize(("stage", "split"), [("fit", "train"), ("validate", "val"), ("test", "test")])
def test_a_missing_split_is_named(make, stage, split):
    with pytest.raises(ValueError, match=f"no {split} data: set `data.{split}`"):
        make(**{split: None}).setup(stage)


def test_validation_is_optional_while_fitting(make):
    data = make(val=None)
    data.setup("fit")
    assert data.val_dataloader() == []


@pytest.mark.parametrize("world", [1, 2])
def test_too_few_rows_for_a_batch(make, world):
    size = 10 // world
    make(module=SimpleNamespace(), world=world, batch_size=size).setup("fit")
    message = f"10 training rows do not fill one batch of {size + 1} on {world} rank"
    with pytest.raises(ValueError, match=message):
        make(module=SimpleNamespace(), world=world, batch_size=size + 1).setup("fit")


def test_a_long_prompt_is_named(make):
    with pytest.raises(PromptError, match=r"train.txt, row 2: the prompt has 3 tokens"):
        make(max_prompt_tokens=2).setup("fit")


def test_a_table_that_is_not_there(make, tmp_path):
    with pytest.raises(ReferenceTableError, match="there is no reference table in .*; make it with `vbon predict`"):
        make(reference_table=str(tmp_path / "table")).setup("fit")
    with pytest.raises(ValueError, match=r"no reference table: set `data.reference_table`"):
        make().table()


def test_a_prompt_that_the_table_lacks_is_named(make, tmp_path):
    data = make(reference_table=str(tmp_path / "table"))
    write_table(data, [*TRAIN, "ba", "ab"])
    with pytest.raises(PromptNotInTable, match="prompt 'hh'"):
        data.setup("fit")
    make(reference_table=str(tmp_path / "table"), val=None).setup("fit")


@pytest.mark.parametrize(
    ("change", "field"),
    [({"temperature": 0.5}, "temperature"), ({"max_new_tokens": 7}, "max_new_tokens"), ({"table_seed": 3}, "seed")],
)
def test_a_table_of_other_settings_is_refused(make, tmp_path, change, field):
    table = str(tmp_path / "table")
    write_table(make(reference_table=table), [*TRAIN, *VAL])
    with pytest.raises(FingerprintMismatch, match=f"{field}: the table has"):
        make(reference_table=table, **change).setup("fit")


@pytest.mark.parametrize("how", ["nan", "cut", "no weights", "no config"])
def test_a_broken_reference_is_named_and_not_its_table(how, make, model, tmp_path):
    """Beside a table, whose fingerprint would differ from that of a model that nobody has."""
    policy = Path(shutil.copytree(model, tmp_path / "policy"))
    table = str(tmp_path / "table")
    write_table(make(policy=str(policy), reference_table=table), TRAIN)
    weights = load_file(policy / "model.safetensors")
    if how == "nan":
        weights["model.norm.weight"][3] = torch.nan
        save_file(weights, policy / "model.safetensors", metadata={"format": "pt"})
        problem = r"the weight model\.norm\.weight in .*/policy/model\.safetensors holds NaN"
    elif how == "cut":
        (policy / "model.safetensors").write_bytes((policy / "model.safetensors").read_bytes()[:-9])
        problem = r"policy/model\.safetensors' is broken or cut short"
    else:
        name = {"no weights": "model.safetensors", "no config": "config.json"}[how]
        (policy / name).unlink()
        problem = f"policy' holds {how.replace('config', 'config.json')}"
    for setting in ({"policy": str(policy)}, {"reference": str(policy)}):
        with pytest.raises(ModelError, match=problem):
            make(reference_table=table, **setting).table()


def test_the_table_is_left_alone_where_rewards_are_sampled_afresh(make, tmp_path):
    data = make(module=SimpleNamespace(reference_samples=4), reference_table=str(tmp_path / "absent"))
    data.setup("fit")
    assert next(iter(data.train_dataloader())).reference_rewards is None


def test_more_samples_than_the_table_holds(make, tmp_path):
    data = make(reference_table=str(tmp_path / "table"), table_samples=5)
    write_table(data, [*TRAIN, *VAL], samples=4)
    with pytest.raises(ValueError, match=r"data.table_samples=5, but .* holds 4 responses a prompt"):
        data.setup("fit")


# --- what batches carry ---


@pytest.mark.parametrize("penalty", [0.0, 100.0])
def test_the_first_samples_of_the_table(make, tmp_path, penalty):
    table = str(tmp_path / "table")
    write_table(make(reference_table=table), [*TRAIN, *VAL], samples=4)
    settings = {"reference_table": table, "missing_eos_penalty": penalty}
    whole, part = make(**settings), make(**settings, table_samples=3)
    assert (whole.reference_rewards, part.reference_rewards) == (4, 3)
    for one, other in zip(whole.val_dataloader(), part.val_dataloader(), strict=True):
        assert one.reference_rewards.shape[1] == 4
        assert torch.equal(one.reference_rewards[:, :3], other.reference_rewards)


def test_the_samples_behind_those_that_taught(make, tmp_path):
    table = str(tmp_path / "table")
    write_table(make(reference_table=table), [*TRAIN, *VAL], samples=4)
    skipping = ({}, {"table_skip": 1}, {"table_skip": 1, "table_samples": 2})
    whole, rest, one = (make(reference_table=table, **more) for more in skipping)
    assert (whole.reference_rewards, rest.reference_rewards, one.reference_rewards) == (4, 3, 2)
    for all_of_them, last, some in zip(*(data.val_dataloader() for data in (whole, rest, one)), strict=True):
        assert torch.equal(all_of_them.reference_rewards[:, 1:], last.reference_rewards)
        assert torch.equal(all_of_them.reference_rewards[:, 1:3], some.reference_rewards)
    responses = one.table_batch(one.prompts("train")[:2]).responses
    assert torch.equal(responses.tokens, whole.table_batch(whole.prompts("train")[:2]).responses.tokens[:, 1:3])
    with pytest.raises(ValueError, match=r"data.table_samples=4 behind data.table_skip=1, but .* holds 4 responses"):
        make(reference_table=table, table_skip=1, table_samples=4).reference_rewards  # noqa: B018
    with pytest.raises(ValueError, match=r"behind data.table_skip=4"):
        make(reference_table=table, table_skip=4).reference_rewards  # noqa: B018
    with pytest.raises(ValueError, match="data.table_skip must be at least 0, got -1"):
        make(reference_table=table, table_skip=-1)


def test_batches_of_prompts(make):
    data = make()
    data.setup("fit")
    for batch in data.val_dataloader():
        assert isinstance(batch, PromptBatch)
        assert batch.reference_rewards is None
        for place, row in enumerate(batch.index.tolist()):
            text = VAL[row]
            assert batch.text[place] == text
            assert batch.tokens[place][batch.mask[place]].tolist() == [3 + ALPHABET.index(c) for c in text]
            assert batch.mask[place, -1]


def test_batches_of_texts(make):
    data = make(module=SimpleNamespace(batch_kind="text"))
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    assert isinstance(batch, TextBatch)
    assert batch.tokens.tolist() == [[4, 3, 2], [3, 4, 2]]
    assert batch.loss_mask.tolist() == [[False, True, True]] * 2


@pytest.mark.parametrize("penalty", [0.0, 2.5])
def test_batches_carry_the_tables_rewards_and_the_penalty(make, tmp_path, penalty):
    table = str(tmp_path / "table")
    texts = list(dict.fromkeys([*TRAIN, *VAL]))
    write_table(make(reference_table=table), texts)
    data = make(reference_table=table, missing_eos_penalty=penalty)
    data.setup("fit")
    cut = torch.tensor([0.0, 1.0, 0.0, 1.0])
    seen = 0
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            assert batch.reference_rewards.dtype == torch.float32
            for text, rewards in zip(batch.text, batch.reference_rewards, strict=True):
                assert torch.equal(rewards, 10.0 * texts.index(text) + torch.arange(4) - penalty * cut)
                seen += 1
    assert seen == 13


def test_the_tables_keys_are_the_tokens_of_the_prompt(make, tmp_path):
    # Two prompts of one text but other tokens are two prompts.
    data = make(reference_table=str(tmp_path / "table"))
    (prompt,) = [row for row in data.prompts("train") if row.text == "cde"]
    assert prompt.key == prompt_key([5, 6, 7])
    assert prompt.key != prompt_key([BOS, 5, 6, 7])


# --- which batches ---


def test_training_deals_whole_batches_anew_each_epoch(make):
    module = SimpleNamespace(batches_seen=0)
    data = make(module=module, batch_size=3)
    data.setup("fit")
    loader = data.train_dataloader()
    epochs = []
    for epoch in range(3):
        module.batches_seen = 3 * epoch
        batches = list(loader)
        assert [len(batch.text) for batch in batches] == [3, 3, 3]
        epochs.append(texts_of(batches))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert all(len(set(epoch)) == 9 for epoch in epochs)


def test_training_brings_the_tables_responses_where_they_are_asked_for(make, tmp_path):
    module = SimpleNamespace(batches_seen=0, batch_kind="responses")
    data = make(module=module, reference_table=str(tmp_path / "table"), missing_eos_penalty=0.5)
    write_table(data, [*TRAIN, *VAL])
    data.setup("fit")
    for batch in data.train_dataloader():
        assert batch.responses.tokens.tolist() == [[[EOS], [3]] * 2] * 2
        assert batch.responses.mask.all()
        index = torch.tensor([TRAIN.index(text) for text in batch.prompts.text])
        assert batch.prompts.reference_rewards.tolist() == [
            [10.0 * i, 10.0 * i + 0.5, 10.0 * i + 2, 10.0 * i + 2.5] for i in index.tolist()
        ]
    for batch in data.val_dataloader():  # prompts, to be sampled from
        assert batch.reference_rewards.shape[1] == 4
        assert batch.tokens.shape == batch.mask.shape


# --- one row, one text ---


def folding(model: str, tmp_path: Path) -> Any:
    """Return the model with a tokenizer for which capitals are small letters."""
    tokenizer = tiny_tokenizer(alphabet=ALPHABET)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(tmp_path / "folding")
    return ModelSpec(name=model, tokenizer=str(tmp_path / "folding"))


def test_two_texts_of_a_split_do_not_share_a_row(make, model, tmp_path):
    rows = [{"text": "ab"}, {"text": "c"}, {"text": "AB"}]
    settings = {"policy": folding(model, tmp_path), "train": rows, "val": None}
    with pytest.raises(PromptError, match="the prompts 'ab' and 'AB' have the same tokens"):
        make(**settings, reference_table=str(tmp_path / "table")).setup("fit")
    # Without a table they share nothing: their noise is that of their rows, and each is scored by its own text.
    data = make(**settings, module=SimpleNamespace(batches_seen=0))
    data.setup("fit")
    assert [prompt.text for prompt in data.prompts("train")] == ["ab", "c", "AB"]
    assert len({prompt.key for prompt in data.prompts("train")}) == 2


def test_two_texts_of_two_splits_do_not_share_a_row(make, model, tmp_path):
    settings = {
        "policy": folding(model, tmp_path),
        "train": [{"text": "ab"}],
        "reference_table": str(tmp_path / "table"),
    }
    data = make(**settings, val=[{"text": "AB"}], batch_size=1)
    with pytest.raises(PromptError, match="the prompts 'ab' and 'AB' have the same tokens"):
        data.predict_dataloader()
    write_table(data, ["ab"])
    with pytest.raises(OtherPrompt, match="prompt 'AB' has the tokens of 'ab', whose responses and rewards are in"):
        data.setup("fit")


@pytest.mark.parametrize("batch_kind", ["prompts", "responses"])
def test_a_streamed_prompt_is_compared_with_its_row_when_its_turn_comes(make, model, tmp_path, batch_kind):
    (tmp_path / "stream.txt").write_text("ab\ncd\nef\nAB\n")
    module = SimpleNamespace(batches_seen=0, batch_kind=batch_kind)
    streamed = TextSource(path=str(tmp_path / "stream.txt"), streaming=True, buffer_size=1)
    settings = {"policy": folding(model, tmp_path), "val": None, "reference_table": str(tmp_path / "table")}
    data = make(module=module, train=streamed, batch_size=1, **settings)
    write_table(data, ["ab", "cd", "ef"])
    data.setup("fit")
    batches = iter(data.train_dataloader())
    for _ in range(3):
        next(batches)
    with pytest.raises(OtherPrompt, match="prompt 'AB' has the tokens of 'ab'"):
        next(batches)
    # The first batch is looked at before anything starts.
    (tmp_path / "stream.txt").write_text("AB\ncd\n")
    with pytest.raises(OtherPrompt, match="prompt 'AB' has the tokens of 'ab'"):
        make(module=module, train=streamed, batch_size=1, **settings).setup("fit")


def test_a_conversation_is_another_where_the_reward_reads_its_messages(make, tmp_path):
    template = "{% for message in messages %}{{ message.content | trim }}{% endfor %}"
    rows = [{"messages": [{"role": "user", "content": text}]} for text in ("ab", " ab")]
    settings = {"train": rows, "val": None, "chat": {"template": template}, "reference_table": str(tmp_path / "table")}
    assert len(make(**settings).prompts("train")) == 2

    class Reading(Lengths):
        reads_columns = True

    with pytest.raises(PromptError, match="'content': ' ab'.* have the same tokens"):
        make(**settings, reward=Reading()).prompts("train")


# --- tables of several precisions, and of several M ---


def test_a_table_serves_the_precision_that_it_was_made_in(make, tmp_path):
    def run(precision: str | None) -> AlignmentDataModule:
        data = make(module=SimpleNamespace(batches_seen=0), reference_table=str(tmp_path / f"table-{made_in}"))
        if precision is None:
            data.trainer = None  # as in `vbon compare`
        else:
            data.trainer.precision = precision
        return data

    for made_in, other in (("32-true", "bf16-mixed"), ("bf16-mixed", "32-true"), ("bf16-true", "bf16-mixed")):
        write_table(run(made_in), TRAIN)
        assert ("precision" in run(made_in).fingerprint()) == (made_in != "32-true")
        assert run(made_in).table().samples == run(None).table().samples == 4
        with pytest.raises(FingerprintMismatch, match=f"precision: the table has '{made_in}', this run has '{other}'"):
            run(other).table()
        with pytest.raises(FingerprintMismatch, match=f"precision: the table has '{made_in}', this run has '{other}'"):
            write_table(run(other), TRAIN)


def test_a_table_that_is_half_topped_up_says_so_once(make, tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(data_module, "rank_zero_warn", said.append)
    data = make(module=SimpleNamespace(batches_seen=0), reference_table=str(tmp_path / "table"))
    write_table(data, [*TRAIN, *VAL], samples=2)
    assert data.reference_rewards == 2
    assert not said
    write_table(data, TRAIN[:3], samples=5)
    data = make(module=SimpleNamespace(batches_seen=0), reference_table=str(tmp_path / "table"))
    data.setup("fit")
    assert data.reference_rewards == 2
    assert {batch.reference_rewards.shape[1] for batch in data.train_dataloader()} == {2}
    assert len(said) == 1
    assert "holds 2 to 5 responses a prompt: the first 2 are used. `vbon predict` with model.samples=5" in said[0]


def test_training_resumes_at_any_batch(make):
    def stream(start: int, count: int, **settings: Any) -> list[list[str]]:
        module = SimpleNamespace(batches_seen=start, updates_per_rollout=2)
        data = make(module=module, batch_size=3, **settings)
        data.setup("fit")
        loader, seen = data.train_dataloader(), []
        while len(seen) < count:
            for batch in loader:
                seen.append(batch.text)
                module.batches_seen += 1
        return seen[:count]

    whole = stream(0, 12)
    assert whole[0] == whole[1] != whole[2]
    for start in range(12):
        assert stream(start, 12 - start) == whole[start:]
    assert stream(0, 12, seed=1) != whole


@pytest.mark.parametrize("loader", ["train", "val"])
def test_ranks_share_the_rows(make, loader):
    def rows(world: int, rank: int) -> list[list[str]]:
        module = SimpleNamespace(batches_seen=0)
        data = make(module=module, world=world, rank=rank, batch_size=4 // world)
        data.setup("fit")
        return [texts_of([batch]) for batch in getattr(data, f"{loader}_dataloader")()]

    one, two = rows(1, 0), [rows(2, 0), rows(2, 1)]
    assert len(two[0]) == len(two[1]) == len(one)
    assert [sorted(a + b) for a, b in zip(*two, strict=True)] == [sorted(batch) for batch in one]


def test_rows_that_only_even_out_the_ranks_are_marked(make):
    valid = []
    for rank in range(2):
        data = make(module=SimpleNamespace(), world=2, rank=rank)
        data.setup("validate")
        valid += [flag for batch in data.val_dataloader() for flag in batch.valid.tolist()]
    assert sorted(valid) == [False, True, True, True]


def test_workers_deal_the_same(make):
    texts = []
    for workers in (0, 1):
        data = make(module=SimpleNamespace(batches_seen=1), num_workers=workers)
        data.setup("fit")
        texts.append(texts_of(data.train_dataloader()))
    assert texts[0] == texts[1]
    assert len(texts[0]) == 8


def test_predict_deals_each_missing_prompt_once(make):
    data = make()
    assert texts_of(data.predict_dataloader()) == [*TRAIN, "ba", "hh"]
    assert texts_of(make(table_splits=["val"]).predict_dataloader()) == VAL
    finished = {row.key for row in data.prompts("train") if row.text != "cde"}
    data = make(module=SimpleNamespace(finished_keys=lambda: finished, batch_kind="prompts"))
    assert texts_of(data.predict_dataloader()) == ["ab", "cde", "ba", "hh"], "batches stay whole"


def test_predict_deals_what_can_be_taken(make):
    asked: list[list[str]] = []
    names = {row.key: row.text for row in [*make().prompts("train"), *make().prompts("val")]}

    def take(keys: list[str]) -> list[str]:
        asked.append([names[key] for key in keys])
        return [] if "f" in asked[-1] else keys

    finished = {key for key, name in names.items() if name in ("ab", "cde", "hgf")}
    module = SimpleNamespace(finished_keys=lambda: finished, take=take, batch_kind="prompts")
    dealt = [texts_of(make(module=module, world=2, rank=rank).predict_dataloader()) for rank in range(2)]
    assert dealt[0] == ["dd", "ee", "ba", "hh", "hgf", "abc", "fgh", "c"], "its share, then the other rank's"
    assert dealt[1] == ["hgf", "abc", "fgh", "c", "dd", "ee", "ba", "hh"]
    assert asked[:5] == [["f", "gh"], ["dd", "ee"], ["ba", "hh"], ["hgf", "abc"], ["fgh", "c"]]
    assert [len(make(module=module, world=2, rank=rank).predict_dataloader()) for rank in range(2)] == [3, 2]


def test_predict_needs_no_table_and_no_rewards(make, tmp_path):
    data = make(reference_table=str(tmp_path / "table"))
    data.setup("predict")
    assert all(batch.reference_rewards is None for batch in data.predict_dataloader())


def test_predict_needs_prompts(make):
    with pytest.raises(ValueError, match=r"no prompts to sample from: set one of data.test"):
        make(table_splits=["test"]).predict_dataloader()


# --- resuming ---


def test_state_is_plain_and_read_back(make):
    state = make().state_dict()
    assert json.loads(json.dumps(state)) == state
    make().load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 3}, "batch_size: checkpoint has 2, this run has 3"),
        ({"seed": 5}, "seed: checkpoint has 0, this run has 5"),
        ({"max_prompt_tokens": 9}, "max_prompt_tokens: checkpoint has None, this run has 9"),
        ({"max_text_tokens": 9}, "max_text_tokens: checkpoint has None, this run has 9"),
        ({"too_long": "truncate_left"}, "too_long: checkpoint has 'error', this run has 'truncate_left'"),
        ({"long_text": "split"}, "long_text: checkpoint has 'truncate', this run has 'split'"),
        ({"train": None}, "train"),
    ],
)
def test_other_data_are_refused_by_name(make, change, message):
    with pytest.raises(ConfigMismatchError, match=message):
        make(**change).load_state_dict(make().state_dict())


def test_other_content_of_the_file_is_refused(make, tmp_path):
    state = make().state_dict()
    data = make()
    (tmp_path / "train.txt").write_text("".join(f"{line}\n" for line in TRAIN[::-1]))
    with pytest.raises(ConfigMismatchError, match="train_content: checkpoint has"):
        data.load_state_dict(state)


def test_evaluation_may_use_other_data(make):
    state = make().state_dict()
    make(module=SimpleNamespace(), stage=TrainerFn.TESTING, batch_size=3).load_state_dict(state)
    with pytest.raises(ConfigMismatchError, match="batch_size"):
        make(module=SimpleNamespace(), batch_size=3).load_state_dict(state)


# --- columns that were found, rows in memory, rows as a stream ---


def test_what_was_found_is_said(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    talk = [{"role": "user", "content": "ab"}]
    data = make(train=[{"id": 1, "messages": talk}] * 2, val=None, chat={"template": "{{ messages[0].content }}"})
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        data.setup("fit")
    assert "data.train: column=messages, conversations, rendered by data.chat.template" in caplog.text
    assert data.prompts("train")[0].text == "ab"


def test_a_stream_brings_the_batches_of_its_rows(make: Any, tmp_path: Path) -> None:
    module = SimpleNamespace(batches_seen=0, updates_per_rollout=1)
    (tmp_path / "stream.txt").write_text("".join(f"{line}\n" for line in TRAIN))
    data = make(module, train=TextSource(str(tmp_path / "stream.txt"), streaming=True, buffer_size=4, stop=9))
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert [len(batch.text) for batch in batches] == [2] * 4
    assert sorted(texts_of(batches[:2])) == sorted(TRAIN[:4])
    assert [TRAIN[row] for batch in batches for row in batch.index.tolist()] == texts_of(batches)
    before = data.state_dict()
    data.load_state_dict(before)
    (tmp_path / "stream.txt").write_text("".join(f"{line}\n" for line in ["h", *TRAIN]))
    changed = make(module, train=TextSource(str(tmp_path / "stream.txt"), streaming=True, buffer_size=4, stop=9))
    changed.setup("fit")
    with pytest.raises(ConfigMismatchError, match="train_content"):
        changed.load_state_dict(before)


def test_what_a_stream_cannot_do_is_refused(make: Any, tmp_path: Path) -> None:
    (tmp_path / "stream.txt").write_text("ab\n\n" * 3)
    rows = TextSource(str(tmp_path / "stream.txt"), streaming=True)
    with pytest.raises(ValueError, match=r"3 training rows do not fill one batch of 4 on 1 rank"):
        make(SimpleNamespace(batches_seen=0), train=rows, batch_size=4).setup("fit")
    with pytest.raises(ValueError, match=r"data\.num_workers must be 0 where data\.train is streamed"):
        make(SimpleNamespace(batches_seen=0), train=rows, num_workers=1).setup("fit")
    with pytest.raises(ValueError, match=r"set data\.max_text_tokens"):
        make(SimpleNamespace(batch_kind="text"), train=rows).setup("fit")
    for option in ({"unique": True}, {"shuffle_seed": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} needs all rows at once"):
            TextSource("a.txt", streaming=True, **option)
    with pytest.raises(ValueError, match="buffer_size must be at least 1"):
        TextSource("a.txt", buffer_size=0)
    limited = make(SimpleNamespace(batch_kind="text"), train=rows, max_text_tokens=7)
    limited.setup("fit")
    assert limited.longest() == 7
    prompts = make(SimpleNamespace(batches_seen=0), train=rows, val=None, max_prompt_tokens=5)
    prompts.setup("fit")
    assert prompts.longest() == 5
