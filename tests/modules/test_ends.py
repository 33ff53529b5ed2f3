"""What ends a response: one answer for SFT, sampling, tables and exports, whichever file says it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.helpers import save_tiny_model
from tests.modules.setting import ALPHABET, VowelReward, make_module, make_table, make_trainer
from vbon_lightning import AlignmentDataModule, ReferenceSampler, TextSource
from vbon_lightning.callbacks import PolicyExport
from vbon_lightning.reference_table import ReferenceTableError

OTHER = 3 + ALPHABET.index("h")
"""Ends a text for the generation config alone, as a base model's does that got a chat tokenizer."""


@pytest.fixture
def base(tmp_path: Path) -> str:
    return save_tiny_model(tmp_path / "base", alphabet=ALPHABET, generation={"eos_token_id": OTHER, "pad_token_id": 0})


def data_of(tmp_path: Path, policy: str, **changes: Any) -> AlignmentDataModule:
    (tmp_path / "texts.txt").write_text("ab\nabc\nbc\ncab\n")
    arguments = {"policy": policy, "train": TextSource(path=str(tmp_path / "texts.txt")), "batch_size": 4}
    return AlignmentDataModule(**(arguments | {"reward": VowelReward(), "max_new_tokens": 24} | changes))


def test_a_model_stops_where_it_was_taught_to(base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = data_of(tmp_path, base)
    module = make_module("sft", data, optimizer=lambda p: torch.optim.AdamW(p, lr=0.05), lr_scheduler=None)
    with caplog.at_level(logging.INFO):
        make_trainer(tmp_path, PolicyExport(str(tmp_path / "export")), steps=60).fit(module, data)
    assert caplog.text.count("A response ends at h (10), </s> (2); SFT teaches </s>") == 1
    assert "- **A response ends at:** h (10), " in (tmp_path / "export" / "README.md").read_text()
    trained = data_of(tmp_path, str(tmp_path / "export"))
    sampler = ReferenceSampler(trained.actors, samples=1)
    sampler.configure_model()
    batch = trained.prompt_batch(trained.prompts("train"))
    found = sampler.loaded.sample(sampler.loaded.policy, batch, num_samples=32, seed=0, stream="a", step=0)
    assert found.finished.float().mean() > 0.9
    # And so does transformers, from the export alone.
    assert set(GenerationConfig.from_pretrained(tmp_path / "export").eos_token_id) == {2, OTHER}
    drawn = AutoModelForCausalLM.from_pretrained(tmp_path / "export").generate(batch.tokens[:1], max_new_tokens=24)
    assert int(drawn[0, -1]) in (2, OTHER)


def test_named_tokens_end_responses_too(base: str, tmp_path: Path) -> None:
    ends = {}
    for name, more in (("none", []), ("named", ["c", "d"])):
        data = data_of(tmp_path, base, end_tokens=more)
        module = make_module("klrl", data)
        module.configure_model()
        ends[name] = set(module.loaded.end_ids)
        assert set(module.generation_settings()["eos_token_id"]) == ends[name]
        found = module.loaded.rollout(
            data.prompt_batch(data.prompts("train")), num_samples=8, seed=0, stream="a", step=0
        )
        lasts = {ids[-1] for group in module.loaded.token_ids(found.completions) for ids in group if len(ids) < 24}
        assert lasts <= ends[name] and lasts & ends[name]
    assert ends["named"] - ends["none"] == {3 + ALPHABET.index(letter) for letter in "cd"}


def test_a_table_made_with_other_ends_is_refused(tmp_path: Path) -> None:
    from tests.modules.setting import make_data, make_files

    files = make_files(tmp_path / "files")
    table = make_table(files)
    named = make_data(files, reference_table=table, end_tokens=["c"])
    with pytest.raises(ValueError, match="end_tokens"):
        make_trainer(tmp_path, steps=1).fit(make_module("bonsft", named), named)
    # The same by another name: the reference's own generation config says so since.
    generation = GenerationConfig.from_pretrained(files / "llama")
    generation.eos_token_id = [2, 3 + ALPHABET.index("c")]
    generation.save_pretrained(files / "llama")
    data = make_data(files, reference_table=table)
    with pytest.raises((ReferenceTableError, ValueError)):
        make_trainer(tmp_path, steps=1).fit(make_module("bonsft", data), data)
