"""The card of an exported policy: what it says, and what it keeps private."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from lightning.pytorch import LightningDataModule

from tests.callbacks.replay import make_trainer
from tests.callbacks.tiny import Tiny
from vbon_lightning.callbacks import PolicyExport
from vbon_lightning.data.sources import TextSource


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Tiny, Path]:
    module = Tiny()
    make_trainer(tmp_path, PolicyExport(), default_root_dir=str(tmp_path)).fit(module)
    return module, tmp_path / "export"


def test_the_model_card(exported: tuple[Tiny, Path]) -> None:
    card = (exported[1] / "README.md").read_text(encoding="utf-8")
    _, front, body = card.split("---\n", 2)
    entries = yaml.safe_load(front)
    assert entries["base_model"] == "hub-user/base-model"
    assert entries["library_name"] == "transformers"
    assert entries["tags"] == ["vbon-lightning", "tiny"]
    for piece in (
        "**Method:** Tiny",
        "tests.helpers:unused",
        "| n | 4.0 |",
        "| val/win_rate | 0.625 |",
        "| torch |",
    ):
        assert piece in body, piece
    assert "**Optimizer steps:** 2" in body


def test_the_card_keeps_directories_private(tmp_path: Path) -> None:
    private = tmp_path / "secret-project" / "base"
    private.mkdir(parents=True)
    make_trainer(tmp_path, PolicyExport(str(tmp_path / "out"))).fit(Tiny(policy=str(private)))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "secret-project" not in card
    assert "**Base model:** base\n" in card
    assert "base_model:" not in card


def test_the_card_says_what_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, data = Tiny(), LightningDataModule()
    data.sources = {"train": TextSource("/secret/place/posts.jsonl", column="post", stop=7), "val": None}
    data.train_dataloader = module.train_dataloader  # type: ignore[method-assign]
    words = ["--config=/secret/a.yaml", "--data", "{path: /secret/b.txt}", "-c", "configs/c.yaml", "~/d", "org/name"]
    monkeypatch.setattr("sys.argv", ["/secret/bin/vbon", "fit", *words, "a`b"])
    make_trainer(tmp_path, PolicyExport(str(tmp_path / "out"))).fit(module, datamodule=data)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert '- **Data:** `{"path": "posts.jsonl", "column": "post", "stop": 7}`\n' in card
    line = "vbon fit --config=a.yaml --data '{path: b.txt}' -c configs/c.yaml d org/name 'a`b'"
    assert f"- **Command:** `` {line} ``\n" in card
    assert "secret" not in card and "datasets:" not in card


def test_no_command_where_python_made_it(exported: tuple[Tiny, Path]) -> None:
    card = (exported[1] / "README.md").read_text(encoding="utf-8")
    assert "**Command:**" not in card and "**Data:**" not in card


def test_a_data_set_of_the_hub_is_metadata(tmp_path: Path) -> None:
    module, data = Tiny(), LightningDataModule()
    data.sources = {"train": TextSource("someone/data")}
    data.train_dataloader = module.train_dataloader  # type: ignore[method-assign]
    make_trainer(tmp_path, PolicyExport(str(tmp_path / "out"))).fit(module, datamodule=data)
    assert yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---\n")[1])["datasets"] == [
        "someone/data"
    ]


@pytest.mark.parametrize("template", [None, "{{ messages }}"])
def test_the_chat_template_is_shown_where_there_is_one(tmp_path: Path, template: str | None) -> None:
    module = Tiny()
    module.tokenizer.chat_template = template
    make_trainer(tmp_path, PolicyExport(str(tmp_path / "out"))).fit(module)
    assert ("apply_chat_template" in (tmp_path / "out" / "README.md").read_text()) == (template is not None)
