"""Setups in which value models gave a wrong number, or none: each found by trying, each mended."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.decoding import test_value_guided as guided
from tests.models.setting import LENGTHS, TOKENS, new_model, save_value_model, scramble
from tests.modules import test_bon_distillation as distillation
from tests.modules import test_value_modelling as modelling
from tests.modules.setting import make_data, make_files, make_module, make_table, make_trainer
from vbon_lightning import ValueModelling
from vbon_lightning.callbacks import PolicyExport
from vbon_lightning.decoding import ValueGuided
from vbon_lightning.models import ModelError, as_spec, load_tokenizer, model_identity, save_pretrained
from vbon_lightning.sampling import lookahead

DATA = {"max_new_tokens": 4, "temperature": distillation.TEMPERATURE}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_files(tmp_path_factory.mktemp("files"))
    make_table(directory, temperature=distillation.TEMPERATURE)
    save_value_model(distillation.table_data(directory, value_model=None), directory / "value")
    return directory


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_body_with_gaps_is_refused(kind: str, files: Path, tmp_path: Path) -> None:
    shutil.copytree(files / kind, tmp_path / "m")
    weights = load_file(tmp_path / "m/model.safetensors")
    del weights[next(name for name in weights if ".0." in name)]
    save_file(weights, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks"):
        new_model(str(tmp_path / "m"))


def test_the_global_random_state_stays(files: Path) -> None:
    before = torch.get_rng_state()
    new_model(str(files / "llama"))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_dropout_of_a_value_models_body(files: Path, tmp_path: Path) -> None:
    body = str(files / "gpt2")
    save_pretrained(new_model(body, dropout=True), load_tokenizer(as_spec(body)), tmp_path)
    model = scramble(new_model(str(tmp_path), dropout=True))
    assert not torch.equal(model(TOKENS, LENGTHS), model(TOKENS, LENGTHS))


def test_the_heads_start_knows_no_dropout(files: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"data": DATA, "body": str(files / "gpt2"), "dropout": True}
    first, second = (modelling.fit(files, tmp_path / str(i), **options)[2].losses for i in range(2))
    assert first == second


def test_the_identity_is_not_the_path_of_the_body(files: Path, tmp_path: Path) -> None:
    shutil.copytree(files / "llama", tmp_path / "moved")
    found = []
    for place, body in enumerate((files / "llama", tmp_path / "moved")):
        save_pretrained(new_model(str(body)), load_tokenizer(as_spec(str(body))), tmp_path / str(place))
        found.append(model_identity(str(tmp_path / str(place))))
    assert found[0] == found[1]


def test_the_card_says_what_it_is(files: Path, tmp_path: Path) -> None:
    modelling.fit(files, tmp_path, PolicyExport(str(tmp_path / "export")), data=DATA)
    card = (tmp_path / "export/README.md").read_text()
    assert "AutoModelForSequenceClassification" not in card
    assert "ClassifierReward" not in card
    assert "value_model: path/to/this/directory" in card


def test_a_checkpoint_is_evaluated(files: Path, tmp_path: Path) -> None:
    module, _, _ = modelling.fit(files, tmp_path, data=DATA)
    data = distillation.table_data(files)
    loaded = ValueModelling.load_from_checkpoint(tmp_path / "last.ckpt", actors=data.actors)
    expected = module.state_dict()
    assert list(loaded.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    trainer = make_trainer(tmp_path / "validated")
    alone = make_module("valuemodelling", data)
    (found,) = trainer.validate(alone, data, ckpt_path=tmp_path / "last.ckpt", weights_only=True, verbose=False)
    assert "val/loss" in found


def test_what_the_value_model_reads_is_counted(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = make_files(tmp_path_factory.mktemp("files"))
    save_value_model(make_data(directory, **guided.SETTING), directory / "value of gpt2")
    actors = guided.load(directory)
    assert actors.value is not None
    lookahead.can_look_ahead(actors.value.model)  # it runs the model to know
    reads: list[int] = []
    actors.value.model.body.register_forward_hook(
        lambda _, arguments, options, out: reads.append(options["input_ids"].numel()), with_kwargs=True
    )
    prompts = guided.prompts_of([guided.PROMPTS[0]])
    found = ValueGuided(n=4, top=7)(actors, prompts, num_samples=5, **guided.OPTIONS)
    assert found.cost.value_tokens == sum(reads)
