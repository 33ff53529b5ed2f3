"""The exported policy, loaded again by transformers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.callbacks.replay import make_trainer
from tests.callbacks.tiny import Tiny
from tests.helpers import tiny_llama
from tests.models.test_hub import FakeApi
from tests.ranks import run_two
from vbon_lightning.callbacks import PolicyExport, policy_export
from vbon_lightning.models import HubError, ReadBackError, hub


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 13)[None]).logits


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Tiny, Path]:
    module = Tiny()
    make_trainer(tmp_path, PolicyExport(), default_root_dir=str(tmp_path)).fit(module)
    return module, tmp_path / "export"


def test_the_export_is_the_trained_policy(exported: tuple[Tiny, Path]) -> None:
    module, directory = exported
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    assert torch.equal(logits(loaded), logits(module.policy))
    assert not torch.allclose(logits(loaded), logits(tiny_llama()))  # it was trained
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = "One day, a fish | é"
    assert tokenizer(text).input_ids == module.tokenizer(text).input_ids
    assert tokenizer.eos_token_id == module.tokenizer.eos_token_id


def test_the_generation_config_is_the_policys(exported: tuple[Tiny, Path]) -> None:
    config = GenerationConfig.from_pretrained(exported[1])
    expected = exported[0].generation_settings()
    assert {key: getattr(config, key) for key in expected} == expected
    model = AutoModelForCausalLM.from_pretrained(exported[1])
    assert model.generate(torch.tensor([[5, 6]])).shape[1] <= 2 + 9


def test_an_older_export_is_replaced_whole(tmp_path: Path) -> None:
    out = tmp_path / "nested" / "out"
    out.mkdir(parents=True)
    (out / "stale.txt").write_text("old")
    make_trainer(tmp_path, PolicyExport(str(out))).fit(Tiny())
    assert not (out / "stale.txt").exists()
    assert (out / "model.safetensors").is_file()
    assert [path.name for path in out.parent.iterdir()] == ["out"]  # nothing is left beside it


def test_a_failure_leaves_the_older_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "nested" / "out"
    out.mkdir(parents=True)
    (out / "stale.txt").write_text("old")

    def fail(*_: object) -> str:
        raise OSError("the disk is full")

    monkeypatch.setattr(policy_export, "model_card", fail)
    with pytest.raises(OSError, match="disk is full"):
        make_trainer(tmp_path, PolicyExport(str(out))).fit(Tiny())
    assert [path.name for path in out.parent.rglob("*")] == ["out", "stale.txt"]


@pytest.mark.parametrize(("every_validation", "exports"), [(False, 1), (True, 3)])
def test_exports_after_each_validation_if_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every_validation: bool, exports: int
) -> None:
    steps: list[int] = []
    write = policy_export.save_pretrained

    def count(model: Any, *arguments: Any, **keywords: Any) -> None:
        steps.append(trainer.global_step)
        write(model, *arguments, **keywords)

    monkeypatch.setattr(policy_export, "save_pretrained", count)
    callback = PolicyExport(str(tmp_path / "out"), every_validation=every_validation)
    trainer = make_trainer(tmp_path, callback, max_epochs=2, num_sanity_val_steps=1)
    trainer.fit(Tiny())
    assert len(steps) == exports
    assert steps[-1] == 4
    trainer.validate(Tiny(), verbose=False)
    assert len(steps) == exports  # only within training


def test_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, PolicyExport(str(tmp_path / "out")), fast_dev_run=True)
    trainer.fit(Tiny())
    assert trainer.global_step == 1
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_logger_exports_to_its_root(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, PolicyExport(), logger=False, default_root_dir=str(tmp_path))
    trainer.fit(Tiny())
    assert (tmp_path / "export" / "model.safetensors").is_file()


def test_where_it_cannot_be_written_is_said_before_training(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    trainer = make_trainer(tmp_path, PolicyExport(str(tmp_path / "out")))
    with pytest.raises(NotADirectoryError, match="the export cannot be written to .*out is a file"):
        trainer.fit(Tiny())
    assert trainer.global_step == 0


def test_what_a_killed_run_left_is_cleared_as_the_next_starts(tmp_path: Path) -> None:
    (tmp_path / ".out.0123abcd.old").mkdir()
    (tmp_path / ".out.0123abcd.old" / "mark").touch()
    (tmp_path / ".out.4567abcd.partial").mkdir()

    class Look(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(sorted(path.name for path in tmp_path.rglob("*")))

    seen: list[list[str]] = []
    make_trainer(tmp_path, PolicyExport(str(tmp_path / "out")), Look(), logger=False).fit(Tiny())
    assert seen == [["mark", "out"]]  # the older export is back


# -- the best weights --


class GetsWorse(Tiny):
    """Log a score that is best after the first epoch of two steps."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/score", float(self.trainer.global_step))


def keep_best(directory: Path, **changes: Any) -> ModelCheckpoint:
    return ModelCheckpoint(**({"dirpath": directory, "monitor": "val/score", "save_last": True} | changes))


def fit_keeping(directory: Path, *callbacks: Any, **arguments: Any) -> GetsWorse:
    module = GetsWorse()
    options: dict[str, Any] = {"max_epochs": 3, "enable_checkpointing": True}
    make_trainer(directory, *callbacks, **(options | arguments)).fit(module)
    return module


def test_the_best_weights_are_exported_and_the_policy_stays(tmp_path: Path) -> None:
    kept, newest = keep_best(tmp_path), keep_best(tmp_path / "newest", monitor=None)
    exports = [tmp_path / "last", tmp_path / "best"]
    callbacks = [PolicyExport(str(path), best=path.name == "best") for path in exports]
    module = fit_keeping(tmp_path, newest, kept, *callbacks)
    last, best = (AutoModelForCausalLM.from_pretrained(path) for path in exports)
    assert "step=2" in kept.best_model_path
    expected = GetsWorse()
    expected.load_state_dict(torch.load(kept.best_model_path, weights_only=True)["state_dict"])
    assert torch.equal(logits(best), logits(expected.policy))
    assert torch.equal(logits(last), logits(module.policy))
    assert not torch.allclose(logits(last), logits(best))
    at_the_end = torch.load(newest.last_model_path, weights_only=True)["state_dict"]
    assert all(torch.equal(value, at_the_end[name]) for name, value in module.state_dict().items())
    cards = [(path / "README.md").read_text() for path in exports]
    assert ["**Weights:**" in card for card in cards] == [False, True]
    assert "- **Weights:** after step 2, the best `val/score` (2)\n" in cards[1]


@pytest.mark.parametrize("kept", [None, {"monitor": None}, {"save_top_k": 0}], ids=str)
def test_nothing_says_what_is_the_best(kept: dict[str, Any] | None, tmp_path: Path) -> None:
    callbacks = [] if kept is None else [keep_best(tmp_path, **kept)]
    with pytest.raises(ValueError, match="PolicyExport has `best`, but no ModelCheckpoint .* `monitor`"):
        fit_keeping(tmp_path, PolicyExport(str(tmp_path / "out"), best=True), *callbacks)
    assert not (tmp_path / "last.ckpt").exists()  # nothing was trained
    fit_keeping(tmp_path, PolicyExport(str(tmp_path / "out"), best=True), *callbacks, fast_dev_run=True)
    assert not (tmp_path / "out").exists()


def test_stopped_before_there_was_a_best(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no checkpoint was kept by 'val/score': the last weights are exported"):
        module = fit_keeping(tmp_path, keep_best(tmp_path), PolicyExport(str(tmp_path / "out"), best=True), max_steps=1)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(module.policy))


def test_a_policy_that_cannot_be_exported_leaves_its_weights(tmp_path: Path) -> None:
    module = Tiny()
    module.policy.config.hidden_act = "relu"  # what is read again has it, the policy has not
    trainer = make_trainer(tmp_path, PolicyExport(), max_epochs=1, default_root_dir=str(tmp_path))
    with pytest.raises(ReadBackError, match="another model.*weights are in .*export.state_dict.pt"):
        trainer.fit(module)
    assert not (tmp_path / "export").exists()
    kept = torch.load(tmp_path / "export.state_dict.pt", weights_only=True)
    assert all(torch.equal(kept[name], value) for name, value in module.state_dict().items())


# -- the hub --


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    fake = FakeApi()
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    return fake


def test_the_whole_export_is_uploaded_once(tmp_path: Path, api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    upload = hub.HubTarget.upload

    def watched(self: hub.HubTarget, directory: Path, *, message: str) -> str:
        seen.extend(sorted(path.name for path in directory.iterdir()))
        return upload(self, directory, message=message)

    monkeypatch.setattr(hub.HubTarget, "upload", watched)
    export = PolicyExport(str(tmp_path / "out"), every_validation=True, push_to_hub="me/mine")
    make_trainer(tmp_path, export, max_epochs=2).fit(Tiny())
    assert [name for name, _, _ in api.calls] == ["whoami", "create_repo", "upload_folder"]
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(seen)
    assert api.calls[-1][2]["folder_path"] == tmp_path / "out"
    assert api.calls[-1][2]["commit_message"] == "Tiny after 4 steps"
    assert 'from_pretrained("me/mine")' in (tmp_path / "out" / "README.md").read_text()


def test_the_hub_is_asked_before_training(tmp_path: Path, api: FakeApi) -> None:
    api.fails = "whoami"
    export = PolicyExport(str(tmp_path / "out"), push_to_hub={"repo_id": "me/mine", "private": True})
    trainer = make_trainer(tmp_path, export)
    with pytest.raises(HubError, match="set HF_TOKEN"):
        trainer.fit(Tiny())
    assert trainer.global_step == 0 and not (tmp_path / "out").exists()


def test_a_failed_upload_loses_nothing(tmp_path: Path, api: FakeApi) -> None:
    api.fails = "upload_folder"
    module = Tiny()
    with pytest.raises(HubError, match=f"safe in {tmp_path / 'out'}"):
        make_trainer(tmp_path, PolicyExport(str(tmp_path / "out"), push_to_hub="me/mine")).fit(module)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(module.policy))


def test_nothing_is_uploaded_where_nothing_is_trained(tmp_path: Path, api: FakeApi) -> None:
    export = PolicyExport(str(tmp_path / "out"), push_to_hub="me/mine")
    make_trainer(tmp_path, export, fast_dev_run=True).fit(Tiny())
    make_trainer(tmp_path, export).validate(Tiny(), verbose=False)
    assert not api.calls
    with pytest.raises(HubError, match="is no repository's name"):
        PolicyExport(push_to_hub="no such/name/here")


@pytest.mark.slow
@pytest.mark.parametrize(("fails", "steps"), [("create_repo", 0), ("upload_folder", 1)])
def test_one_rank_talks_to_the_hub_and_all_hear_of_it(tmp_path: Path, fails: str, steps: int) -> None:
    run_two("tests.callbacks.hub_distributed", str(tmp_path), fails)
    said = {path.stem[-1]: path.read_text().split(" ", 2) for path in tmp_path.glob("*-rank?.txt")}
    assert [int(said[rank][0]) for rank in "01"] == [2 if fails == "create_repo" else 3, 0]
    assert [int(said[rank][1]) for rank in "01"] == [steps, steps]
    assert said["0"][2] == said["1"][2]
    assert "the hub says no" in said["1"][2]
