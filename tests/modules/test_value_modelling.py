"""Value modelling: the loss and the metrics by hand, what each option does, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers import readable, save_tiny_model
from tests.models.setting import bins_after
from tests.modules.setting import (
    ALPHABET,
    KillAt,
    Killed,
    make_data,
    make_files,
    make_module,
    make_table,
    make_trainer,
    weights,
)
from vbon_lightning import ReferenceSampler, TextSource
from vbon_lightning.callbacks import PolicyExport
from vbon_lightning.checks import ConfigMismatchError
from vbon_lightning.functional import bin_labels, forecast_head, reward_bins
from vbon_lightning.models import ModelError, load_value_model
from vbon_lightning.modules import value_modelling
from vbon_lightning.prefix_scorer import PrefixScorer
from vbon_lightning.reference_table import ReferenceTable, ReferenceTableError
from vbon_lightning.sampling import pick_some
from vbon_lightning.types import TableBatch

LONG = 7
"""Tokens of a response for which every third of it has prefixes."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_files(tmp_path_factory.mktemp("files"))
    make_table(directory, max_new_tokens=LONG)
    save_tiny_model(directory / "reordered", alphabet="hgfedcba")
    return directory


def table_data(files: Path, **changes: Any) -> Any:
    return make_data(files, **({"max_new_tokens": LONG, "reference_table": str(files / "table")} | changes))


def still(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


class Record(Callback):
    """Keep the batches and losses of training."""

    def __init__(self) -> None:
        self.batches: list[TableBatch] = []
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append(batch)
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


def fit(files: Path, directory: Path, *callbacks: Any, steps: int = 1, data: Any = None, **model: Any) -> Any:
    """Train, or go on where there is a checkpoint; return the module, the trainer and what was recorded."""
    brought, record = table_data(files, **(data or {})), Record()
    module = make_module("valuemodelling", brought, **model)
    trainer = make_trainer(directory, record, *callbacks, steps=steps)
    resume = directory / "last.ckpt"
    trainer.fit(module, brought, ckpt_path=resume if resume.exists() else None)
    return module, trainer, record


def first_loss(files: Path, directory: Path, **changes: Any) -> float:
    """Return the loss before anything is learnt."""
    return fit(files, directory, optimizer=still, data=changes.pop("data", None), **changes)[2].losses[0]


# -- the loss --


def real(tokens: torch.Tensor, mask: torch.Tensor) -> list[int]:
    return tokens[mask].tolist()


def losses_by_hand(module: Any, batch: TableBatch, place: int, sample: int) -> list[float]:
    """Return the cross-entropy of each prefix of a response, run by itself."""
    prompt = real(batch.prompts.tokens[place], batch.prompts.mask[place])
    response = real(batch.responses.tokens[place, sample], batch.responses.mask[place, sample])
    assert batch.prompts.reference_rewards is not None
    label = int((module.scorer.bins.edges < batch.prompts.reference_rewards[place, sample]).sum())
    return [-float(bins_after(module.policy, prompt, response[:length])[label]) for length in range(len(response) + 1)]


@pytest.mark.parametrize("probe", [0, 4096])
def test_the_loss_is_the_mean_cross_entropy_of_every_prefix(probe: int, files: Path, tmp_path: Path) -> None:
    module, _, record = fit(files, tmp_path, optimizer=still, steps=2, probe=probe)
    for step, (batch, loss) in enumerate(zip(record.batches, record.losses, strict=True)):
        picks = pick_some(batch.prompts.index.tolist(), among=16, count=3, seed=0, stream="pick", step=step)
        by_hand = [losses_by_hand(module, batch, place, k) for place in range(4) for k in picks[place].tolist()]
        assert len({len(losses) for losses in by_hand}) > 1, "responses of several lengths"
        means = [sum(losses) / len(losses) for losses in by_hand]
        assert loss == pytest.approx(sum(means) / len(means), rel=1e-4)


def test_picks_are_distinct_and_change_with_the_step() -> None:
    options: dict[str, Any] = {"among": 9, "seed": 3, "stream": "pick"}
    picks = [pick_some([4, 7], count=5, step=step, **options) for step in range(400)]
    assert all(len(set(row)) == 5 for pick in picks for row in pick.tolist())
    assert torch.equal(picks[3], pick_some([4, 7], count=5, step=3, **options))
    assert torch.equal(picks[3][1:], pick_some([7], count=5, step=3, **options))
    often = torch.bincount(torch.cat(picks).flatten(), minlength=9) / 800
    assert (often - 5 / 9).abs().max() < 4 * math.sqrt(5 / 9 * 4 / 9 / 800)
    assert pick_some([4], count=9, step=0, **options)[0].sort().values.tolist() == list(range(9))


def test_the_bins_are_those_of_the_tables_rewards(files: Path, tmp_path: Path) -> None:
    data = table_data(files, missing_eos_penalty=0.25)
    module, _, _ = fit(files, tmp_path, data={"missing_eos_penalty": 0.25}, bins=5, atoms=3)
    expected = reward_bins(data.table_rewards(data.prompts("train")), bins=5, atoms=3)
    assert torch.equal(module.scorer.bins.edges, expected.edges)
    assert torch.equal(module.scorer.bins.atoms, expected.atoms)
    assert module.scorer.fingerprint == data.fingerprint() | {"missing_eos_penalty": 0.25}
    assert module.policy.config.longest == LONG


@pytest.mark.parametrize(
    "change",
    [
        {"bins": 3},
        {"responses_per_prompt": 5},
        {"probe": 0},
        {"probe": 80},
        {"seed": 1},
        {"body": "gpt2"},
        {"body": "value"},
        {"data": {"table_samples": 8}},
    ],
    ids=readable,
)
def test_options_change_the_loss(change: dict[str, Any], files: Path, tmp_path: Path) -> None:
    if "body" in change:
        if change["body"] == "value":
            fit(files, tmp_path / "value", PolicyExport(str(files / "value")), steps=3)
        change = {"body": str(files / change["body"])}
    assert abs(first_loss(files, tmp_path / "changed", **change) - first_loss(files, tmp_path / "plain")) > 1e-3


def test_dropout_changes_the_loss_of_a_body_that_has_it(files: Path, tmp_path: Path) -> None:
    found = [first_loss(files, tmp_path / str(i), body=str(files / "gpt2"), dropout=bool(i)) for i in range(2)]
    assert abs(found[0] - found[1]) > 1e-3


def test_one_of_other_rewards_is_not_evaluated(files: Path, tmp_path: Path) -> None:
    fit(files, tmp_path, steps=1)
    hotter = make_files(tmp_path / "hotter")
    make_table(hotter, temperature=0.3, max_new_tokens=LONG)
    other = table_data(hotter, temperature=0.3, val=TextSource(path=str(hotter / "train.txt")))
    with pytest.raises(ModelError, match="temperature: the value model has .*, this run has 0.3"):
        make_trainer(tmp_path / "v").validate(
            make_module("valuemodelling", other), other, ckpt_path=tmp_path / "last.ckpt", weights_only=True
        )


def test_a_table_of_another_vocabulary_is_refused(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def largest(table: ReferenceTable, size: int) -> None:
        raise ReferenceTableError(f"a token beyond {size}")

    monkeypatch.setattr(ReferenceTable, "check_tokens", largest)
    with pytest.raises(ReferenceTableError, match="a token beyond 11"):
        fit(files, tmp_path)


def test_the_probe_is_a_better_start(files: Path, tmp_path: Path) -> None:
    assert first_loss(files, tmp_path / "probe") < first_loss(files, tmp_path / "none", probe=0) - 0.1


def test_it_learns(files: Path, tmp_path: Path) -> None:
    seen = {"data": {"val": TextSource(path=str(files / "train.txt"))}, "probe": 0, "responses_per_prompt": 8}
    _, trainer, _ = fit(files, tmp_path / "start", optimizer=still, steps=2, **seen)
    start = float(trainer.callback_metrics["val/loss"])
    _, trainer, _ = fit(files, tmp_path / "end", steps=70, **seen)
    assert float(trainer.callback_metrics["val/loss"]) < 0.7 * start


# -- the metrics --


def place_of(length: int, size: int) -> str:
    if length == 0:
        return "prompt"
    if length == size:
        return "end"
    return ("early", "middle", "late")[3 * (length - 1) // size]


def calibration(events: list[tuple[float, float]]) -> float:
    """Return the mean gap between what ten groups of like predictions say and what happens."""
    groups: dict[int, list[tuple[float, float]]] = {}
    for said, happened in events:
        groups.setdefault(min(9, int(10 * said)), []).append((said, happened))
    gaps = [abs(sum(said for said, _ in group) - sum(happened for _, happened in group)) for group in groups.values()]
    return sum(gaps) / len(events)


def test_metrics_by_place_in_the_response(files: Path, tmp_path: Path) -> None:
    module, trainer, _ = fit(files, tmp_path, optimizer=still, steps=2, bins=5, data={"table_samples": 6})
    data = trainer.datamodule
    losses: dict[str, list[float]] = {}
    scores: dict[str, list[float]] = {}
    events: dict[str, list[tuple[float, float]]] = {}
    for row in data.prompts("val"):
        batch = data.table_batch([row])
        labels = bin_labels(batch.prompts.reference_rewards[0], module.scorer.bins.edges).tolist()
        for sample, label in enumerate(labels):
            response = real(batch.responses.tokens[0, sample], batch.responses.mask[0, sample])
            for length in range(len(response) + 1):
                log_probs = bins_after(module.policy, row.tokens, response[:length])
                place, probs = place_of(length, len(response)), log_probs.exp().tolist()
                losses.setdefault(place, []).append(-log_probs[label].item())
                score = sum((sum(probs[: k + 1]) - (label <= k)) ** 2 for k in range(5)) / 5
                scores.setdefault(place, []).append(score)
                events.setdefault(place, []).append((sum(probs[2:]), float(label >= 2)))
    assert set(losses) == {"prompt", "early", "middle", "late", "end"}
    expected = {f"nll/{place}": sum(found) / len(found) for place, found in losses.items()}
    expected["loss"] = sum(expected.values()) / 5
    expected |= {f"crps/{place}": sum(found) / len(found) for place, found in scores.items()}
    expected |= {f"calibration_error/{place}": calibration(found) for place, found in events.items()}
    metrics = {name.removeprefix("val/"): float(value) for name, value in trainer.callback_metrics.items()}
    del metrics["train/loss"]
    assert metrics == pytest.approx(expected, abs=2e-5)


def test_filler_rows_count_nowhere(files: Path, tmp_path: Path) -> None:
    module, trainer, _ = fit(files, tmp_path, optimizer=still)
    data = trainer.datamodule
    prompts = data.prompts("train")
    found = []
    for rows in (prompts[:1], prompts[:2]):
        batch = data.table_batch(rows)
        batch = batch._replace(prompts=batch.prompts._replace(valid=torch.tensor([True, False][: len(rows)])))
        module._start_counting()
        with torch.no_grad():
            module.count(batch)
        found.append({name: float(value) for name, value in module.counted().items()})
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_places_that_do_not_occur_are_left_out(files: Path, tmp_path: Path) -> None:
    module, trainer, _ = fit(files, tmp_path, optimizer=still)
    batch = trainer.datamodule.table_batch(trainer.datamodule.prompts("train")[:2])
    module._start_counting()
    assert module.counted() == {}
    tokens, mask = (part[..., :1] for part in batch.responses)
    with torch.no_grad():
        module.count(batch._replace(responses=batch.responses._replace(tokens=tokens, mask=mask)))
    found = module.counted()
    kinds = ("nll", "crps", "calibration_error")
    assert set(found) == {"loss", *(f"{kind}/{place}" for kind in kinds for place in ("prompt", "end"))}
    assert found["loss"].item() == pytest.approx((found["nll/prompt"] + found["nll/end"]).item() / 2)


def test_early_stopping_and_the_best_checkpoint(files: Path, tmp_path: Path) -> None:
    stop = EarlyStopping(monitor="val/loss", patience=2)
    best = ModelCheckpoint(dirpath=tmp_path / "best", monitor="val/loss")
    _, trainer, _ = fit(files, tmp_path, stop, best, optimizer=still, steps=40)
    assert trainer.global_step == 6, "two batches an epoch, and nothing gets better"
    assert Path(best.best_model_path).exists()
    assert best.best_model_score == trainer.callback_metrics["val/loss"]


# -- its export --


def test_the_export_says_what_was_trained(files: Path, tmp_path: Path) -> None:
    module, trainer, record = fit(files, tmp_path, PolicyExport(str(tmp_path / "export")), steps=4)
    metrics = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    loaded = PrefixScorer.load(str(tmp_path / "export"))
    batch = record.batches[0]
    with torch.no_grad():
        expected = module.scorer.bin_log_probs(batch.prompts, batch.responses)
    assert torch.equal(loaded.bin_log_probs(batch.prompts, batch.responses), expected)
    assert loaded.fingerprint == trainer.datamodule.fingerprint() | {"missing_eos_penalty": 0.0}
    # And is evaluated on its own as it was in training.
    data = table_data(files)
    alone = make_module("valuemodelling", data, body=str(tmp_path / "export"))
    (again,) = make_trainer(tmp_path / "alone").validate(alone, data, verbose=False)
    assert again == pytest.approx({name: float(value) for name, value in metrics.items()})


def test_no_export_of_a_policy_is_one(files: Path, tmp_path: Path) -> None:
    data = table_data(files)
    with pytest.raises(ModelError, match="is no value model"):
        make_trainer(tmp_path).validate(make_module("valuemodelling", data), data, verbose=False)
    with pytest.raises(ModelError, match="is no value model"):
        load_value_model(str(files / "llama"))


def test_the_export_of_the_best_weights(files: Path, tmp_path: Path) -> None:
    # By what gets lower as it learns, the first is the best.
    best = ModelCheckpoint(dirpath=tmp_path / "best", monitor="val/loss", mode="max")
    module, _, _ = fit(files, tmp_path, best, PolicyExport(str(tmp_path / "export"), best=True), steps=8)
    state = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    exported = load_value_model(str(tmp_path / "export")).state_dict()
    assert all(torch.equal(value, state[f"policy.{name}"]) for name, value in exported.items())
    last = weights(module)
    assert any(not torch.equal(value, last[f"policy.{name}"]) for name, value in exported.items())


# -- its checkpoints --


def test_a_checkpoint_is_evaluated_as_in_training(files: Path, tmp_path: Path) -> None:
    run, trainer, _ = fit(files, tmp_path / "run", steps=4, bins=5)
    expected = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    other, _, _ = fit(files, tmp_path / "other")
    loaded = type(other).load_from_checkpoint(tmp_path / "run" / "last.ckpt", actors=table_data(files).actors)
    new = make_module("valuemodelling", table_data(files))
    # One with bins of its own takes those of the checkpoint.
    assert not torch.equal(other.scorer.bins.edges, run.scorer.bins.edges)
    for number, module in enumerate((new, other, loaded)):
        path = None if module is loaded else tmp_path / "run" / "last.ckpt"
        trainer = make_trainer(tmp_path / str(number))
        (found,) = trainer.validate(module, table_data(files), ckpt_path=path, weights_only=True, verbose=False)
        assert found == pytest.approx(expected)
        assert torch.equal(module.scorer.bins.edges, run.scorer.bins.edges)
        assert torch.equal(module.scorer.bins.atoms, run.scorer.bins.atoms)
        assert module.scorer.fingerprint == table_data(files).fingerprint() | {"missing_eos_penalty": 0.0}


def test_a_checkpoint_that_does_not_say_its_bins(files: Path, tmp_path: Path) -> None:
    fit(files, tmp_path)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    del content["vbon_lightning"]["value_model"]
    torch.save(content, tmp_path / "older.ckpt")
    data = table_data(files)
    with pytest.raises(ValueError, match=r"does not say which bins .* evaluate the export instead, as `model.body`"):
        make_trainer(tmp_path / "v").validate(make_module("valuemodelling", data), data, tmp_path / "older.ckpt")


# -- what is refused --


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"bins": 1}, "model.bins must be at least 2, got 1"),
        ({"atoms": 0}, "model.atoms must be at least 2, got 0"),
        ({"probe": -1}, "model.probe must be at least 0, got -1"),
        ({"responses_per_prompt": 0}, "model.responses_per_prompt must be an integer >= 1, got 0"),
    ],
    ids=readable,
)
def test_options_that_make_no_sense(model: dict[str, Any], message: str, files: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_module("valuemodelling", table_data(files), **model)


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ({}, {"reward": None}, "needs a reward: set `data.reward`"),
        ({}, {"reference_table": None}, "ValueModelling learns from cached responses: name a table"),
        ({}, {"reference_table": "nowhere"}, "there is no reference table in nowhere"),
        ({}, {"temperature": 0.7}, "temperature: the table has 1.0, this run has 0.7"),
        ({"responses_per_prompt": 17}, {}, "model.responses_per_prompt = 17, but the reference table .* brings 16"),
        ({}, {"table_samples": 2}, "model.responses_per_prompt = 3, but the reference table .* brings 2"),
        ({"body": "reordered"}, {}, "one vocabulary, but 8 tokens differ"),
    ],
    ids=readable,
)
def test_what_it_cannot_learn_from(
    model: dict[str, Any], data: dict[str, Any], message: str, files: Path, tmp_path: Path
) -> None:
    if "body" in model:
        model = {"body": str(files / model["body"])}
    brought = table_data(files, **data)
    module = make_module("valuemodelling", brought, **model)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path).fit(module, brought)
    assert module.policy is None, "no model was loaded"


def test_it_needs_the_data_module(files: Path, tmp_path: Path) -> None:
    module = make_module("valuemodelling", table_data(files))
    with pytest.raises(ValueError, match="fit it with an AlignmentDataModule"):
        make_trainer(tmp_path).fit(module, torch.utils.data.DataLoader([0]))


def test_a_body_of_a_value_model_with_too_few_embeddings_is_named(files: Path, tmp_path: Path) -> None:
    body = save_tiny_model(tmp_path / "body", alphabet=ALPHABET)
    policy = save_tiny_model(tmp_path / "policy", alphabet=ALPHABET)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.add_tokens(["<|extra|>"])
    resized = AutoModelForCausalLM.from_pretrained(policy)
    resized.resize_token_embeddings(len(tokenizer))
    resized.save_pretrained(policy)
    for directory in (body, policy):
        tokenizer.save_pretrained(directory)
    data = make_data(files, policy=policy, reference_table=str(tmp_path / "table"), val=None)
    trainer = make_trainer(tmp_path, callbacks=[], enable_checkpointing=False)
    trainer.predict(ReferenceSampler(data.actors, samples=4), data, return_predictions=False)
    with pytest.raises(ModelError, match=r"first '<\|extra\|>' with the id 11 of 11: resize the model"):
        make_trainer(tmp_path, steps=1).fit(make_module("valuemodelling", data, body=body), data)


# -- resuming --


@pytest.mark.parametrize("kill", [KillAt(1), KillAt(2, validation=True), KillAt(3)], ids=["1", "validation", "3"])
def test_killed_and_resumed(kill: KillAt, files: Path, tmp_path: Path) -> None:
    dropout = {"body": str(files / "gpt2"), "dropout": True, "probe": 0}
    whole, _, _ = fit(files, tmp_path / "whole", steps=5, **dropout)
    with pytest.raises(Killed):
        fit(files, tmp_path / "killed", kill, steps=5, **dropout)
    resumed, _, _ = fit(files, tmp_path / "killed", steps=5, **dropout)
    expected, found = weights(whole), weights(resumed)
    assert list(found) == list(expected)
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


def test_a_checkpoints_head_is_not_started_anew(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def count(*arguments: Any, **options: Any) -> Any:
        calls.append(options)
        return forecast_head(*arguments, **options)

    monkeypatch.setattr(value_modelling, "forecast_head", count)
    expected, _, _ = fit(files, tmp_path / "whole", steps=4)
    assert len(calls) == 1
    with pytest.raises(Killed):
        fit(files, tmp_path / "killed", KillAt(2), steps=4)
    assert len(calls) == 2
    resumed, _, _ = fit(files, tmp_path / "killed", steps=4)
    assert len(calls) == 2
    assert all(torch.equal(value, weights(expected)[name]) for name, value in weights(resumed).items())
    # Nor is that of a model that is trained further.
    data = table_data(files)
    make_trainer(tmp_path / "further", steps=1).fit(expected, data)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "change",
    [{"bins": 5}, {"atoms": 8}, {"responses_per_prompt": 4}, {"probe": 9}, {"dropout": True}, {"seed": 2}],
    ids=readable,
)
def test_a_resume_that_disagrees_is_refused(change: dict[str, Any], files: Path, tmp_path: Path) -> None:
    fit(files, tmp_path)
    with pytest.raises(ConfigMismatchError, match=next(iter(change))):
        fit(files, tmp_path, steps=2, **change)
