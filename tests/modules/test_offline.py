"""What learns from the table's responses: its batches, what the methods share, and tables that will not do."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import EOS, readable
from tests.modules.offline import TEMPERATURE, Record, table_batch, table_data
from tests.modules.setting import make_data, make_files, make_module, make_table, make_trainer
from vbon_lightning.callbacks import BestOfNWinRate, KLMonitor, PolicyExport, RewardMonitor, SampleTable
from vbon_lightning.models import ModelSpec
from vbon_lightning.modules.offline import select_responses
from vbon_lightning.reference_table import ReferenceTableError, import_jsonl
from vbon_lightning.types import Responses


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_files(tmp_path_factory.mktemp("files"))
    make_table(directory, temperature=TEMPERATURE)
    return directory


# -- the table's responses --


def test_a_batch_holds_the_tables_responses_as_they_were_sampled(files: Path) -> None:
    data = table_data(files)
    batch, ends = table_batch(data), []
    for place, prompt in enumerate(data.prompts("train")[:4]):
        row = data.table().row(prompt.key)
        found = [
            ids[keep].tolist()
            for ids, keep in zip(batch.responses.tokens[place], batch.responses.mask[place], strict=True)
        ]
        assert found == row.response_tokens
        assert batch.prompts.reference_rewards[place].tolist() == row.rewards
        for ids, finished in zip(found, row.finished, strict=True):
            assert (ids[-1] == EOS) == finished
            assert finished or len(ids) == 4
            ends.append(finished)
    assert 0 < sum(ends) < len(ends), "some finish, some are cut"


def test_a_batch_holds_no_more_than_table_samples(files: Path) -> None:
    whole, part = table_batch(table_data(files)), table_batch(table_data(files, table_samples=5))
    assert torch.equal(part.prompts.reference_rewards, whole.prompts.reference_rewards[:, :5])
    assert torch.equal(part.responses.tokens, whole.responses.tokens[:, :5])
    assert torch.equal(part.responses.mask, whole.responses.mask[:, :5])


def test_select_responses_drops_padding_of_all() -> None:
    tokens = torch.arange(24).view(2, 3, 4)
    mask = torch.arange(4) < torch.tensor([[1, 4, 2], [2, 0, 4]])[..., None]
    found = select_responses(Responses(tokens, mask), torch.tensor([[2, 0], [1, 0]]))
    assert found.tokens.tolist() == [[[8, 9], [0, 1]], [[16, 17], [12, 13]]]
    assert found.mask.tolist() == [[[True, True], [True, False]], [[False, False], [True, True]]]


# -- training --


@pytest.mark.parametrize("kind", ["bonsft", "dpo"])
def test_every_callback_works(kind: str, files: Path, tmp_path: Path) -> None:
    data = table_data(files)
    callbacks = [KLMonitor(), RewardMonitor(), BestOfNWinRate(), SampleTable(directory=str(tmp_path / "samples"))]
    callbacks.append(PolicyExport(directory=str(tmp_path / "export")))
    trainer = make_trainer(tmp_path, *callbacks, steps=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(found no rollout|logs nothing|negative KL).*")
        trainer.fit(make_module(kind, data), data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert {"val/kl", "val/kl_sampled", "val/reward", "val/win_rate", "val/win_rate_vs_bon4"} <= set(metrics)
    assert metrics["val/kl"] > 0
    (samples,) = (tmp_path / "samples").iterdir()
    assert len(samples.read_text().splitlines()) == 3
    assert (tmp_path / "export" / "model.safetensors").exists()
    assert json.loads((tmp_path / "export" / "generation_config.json").read_text())["temperature"] == TEMPERATURE


@pytest.mark.parametrize("kind", ["bonsft", "dpo"])
def test_low_rank_adapters(kind: str, files: Path, tmp_path: Path) -> None:
    policy = ModelSpec(str(files / "llama"), lora={"r": 2, "lora_alpha": 8})
    data, record = table_data(files, policy=policy, reference=str(files / "llama")), Record()
    module = make_module(kind, data)
    make_trainer(tmp_path, record, steps=3).fit(module, data)
    assert record.logged[0]["loss"] != record.logged[2]["loss"]
    if kind == "dpo":
        assert record.logged[0]["accuracy"] == 0.5


# -- what is refused --


@pytest.mark.parametrize(
    ("kind", "model", "data", "message"),
    [
        ("bonsft", {}, {"reference_table": None}, "BoNSFT learns from cached responses: name a table"),
        ("dpo", {}, {"reference_table": None}, "DPO learns from cached responses: name a table"),
        ("bonsft", {}, {"reference_table": "nowhere"}, "there is no reference table in nowhere"),
        ("dpo", {}, {"temperature": 1.0}, "temperature: the table has 0.7, this run has 1.0"),
        ("dpo", {}, {"reward": None}, "needs a reward: set `data.reward`"),
        ("bonsft", {"n": 17}, {}, "brings M = 16 responses a prompt, fewer than the 17 that model.n = 17 needs"),
        ("dpo", {"n": 17, "pairs_per_prompt": 1}, {}, "M = 16 responses a prompt, fewer than the 17"),
        ("dpo", {"n": 6, "pairs_per_prompt": 3}, {}, "the 18 that model.pairs_per_prompt = 3 with groups of model"),
        ("bonsft", {"n": 6}, {"table_samples": 5}, "M = 5 responses a prompt, as data.table_samples says, fewer than"),
        ("bonsft", {"n": 6, "selection": "groups"}, {}, "the 18 that model.responses_per_prompt = 3 in groups of"),
    ],
    ids=readable,
)
def test_a_table_that_will_not_do(
    kind: str, model: dict[str, Any], data: dict[str, Any], message: str, files: Path, tmp_path: Path
) -> None:
    brought = table_data(files, **data)
    module = make_module(kind, brought, **model)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path).fit(module, brought)
    assert module.actors is None, "no model was loaded"


def test_the_largest_n_and_number_of_groups_will_do(files: Path, tmp_path: Path) -> None:
    data = table_data(files)
    for kind, model in (("bonsft", {"n": 16}), ("dpo", {"n": 8, "pairs_per_prompt": 2})):
        make_trainer(tmp_path / kind, steps=1, limit_val_batches=0).fit(make_module(kind, data, **model), data)


def imported(files: Path, directory: Path, encode_response: Any) -> Any:
    """Make data whose table comes from JSON Lines."""
    data = make_data(files, val=None, reference_table=str(directory / "table"))
    with (directory / "table.jsonl").open("w") as lines:
        for prompt in data.prompts("train"):
            responses = ["a", "ab", "e", "ef"]
            lines.write(json.dumps({"prompt": prompt.text, "responses": responses, "rewards": [1, 2, 3, 4]}) + "\n")
    import_jsonl(
        directory / "table.jsonl",
        directory / "table",
        encode=lambda text: data.tokenizer(text)["input_ids"],
        encode_response=encode_response,
        fingerprint=data.fingerprint(),
    )
    return data


def test_a_table_without_tokens_is_named(files: Path, tmp_path: Path) -> None:
    data = imported(files, tmp_path, lambda text: [])
    module = make_module("bonsft", data)
    with pytest.raises(ReferenceTableError, match="lacks the token ids of its 4 responses to prompt 'a'"):
        make_trainer(tmp_path).fit(module, data)
    assert module.actors is None


def test_an_imported_table_trains_with_a_warning(files: Path, tmp_path: Path) -> None:
    data = imported(files, tmp_path, lambda text: [3] * len(text))
    with pytest.warns(UserWarning, match="does not tell finished from truncated responses"):
        make_trainer(tmp_path, steps=1).fit(make_module("dpo", data, pairs_per_prompt=1), data)
