"""BoN-SFT and DPO: the loss by hand, what is picked, and what is refused before it starts."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from tests.functional.test_preference import gap_by_quadrature
from tests.helpers import EOS
from tests.modules.setting import make_data, make_files, make_module, make_table, make_trainer
from vbon_lightning import DPO, BoNSFT
from vbon_lightning.callbacks import BestOfNWinRate, KLMonitor, PolicyExport, RewardMonitor, SampleTable
from vbon_lightning.functional import bon_selection_weights
from vbon_lightning.models import ModelSpec
from vbon_lightning.modules.offline import select_responses
from vbon_lightning.reference_table import ReferenceTableError, import_jsonl
from vbon_lightning.sampling import pick_groups
from vbon_lightning.types import Responses, TableBatch

TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_files(tmp_path_factory.mktemp("files"))
    make_table(directory, temperature=TEMPERATURE)
    return directory


def table_data(files: Path, **changes: Any) -> Any:
    return make_data(files, **({"temperature": TEMPERATURE, "reference_table": str(files / "table")} | changes))


def table_batch(data: Any) -> TableBatch:
    return data._collate_responses([(i, True, row) for i, row in enumerate(data.prompts("train")[:4])])


class Record(Callback):
    """Keep what each training step logs."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert set(outputs) == {"loss"}
        metrics = trainer.callback_metrics
        self.logged.append({name.removeprefix("train/"): float(metrics[name]) for name in metrics})


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


# -- the loss --


def by_hand(model: Any, batch: TableBatch, place: int, sample: int) -> Tensor:
    """Return the log-probability of one response, run by itself."""
    prompt = batch.prompts.tokens[place][batch.prompts.mask[place]]
    response = batch.responses.tokens[place, sample][batch.responses.mask[place, sample]]
    logits = model(input_ids=torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
    return (logits / TEMPERATURE).log_softmax(-1).gather(-1, response[:, None]).sum()


def prepared(kind: str, data: Any, **changes: Any) -> Any:
    """Make a module away from its reference."""
    module: Any = make_module(kind, data, **changes)
    module.configure_model()
    with torch.no_grad():
        for index, parameter in enumerate(module.policy.parameters()):
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    return module


def assert_gradients_equal(module: Any, loss: Tensor, hand: Tensor) -> None:
    assert loss.item() == pytest.approx(hand.item(), rel=1e-5)
    parameters = list(module.policy.parameters())
    expected = torch.autograd.grad(hand, parameters)
    assert max(float(part.abs().max()) for part in expected) > 1e-3
    for ours, theirs in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("selection", ["weights", "groups"])
def test_bonsft_is_cross_entropy_on_the_picks(selection: str, files: Path) -> None:
    data = table_data(files)
    module, batch = prepared("bonsft", data, selection=selection), table_batch(data)
    rewards = batch.prompts.reference_rewards
    picks = module.pick(batch, rewards, 5)
    assert picks.shape == (4, 3)
    loss, logs = module.learn(batch, rewards, 5)
    hand = torch.stack(
        [-by_hand(module.policy, batch, place, sample) for place in range(4) for sample in picks[place].tolist()]
    )
    assert_gradients_equal(module, loss, hand.mean())
    assert logs["picked_reward"].item() == pytest.approx(rewards.gather(1, picks).mean().item())


@pytest.mark.parametrize("selection", ["weights", "groups"])
def test_bonsft_loss_is_the_weighted_cross_entropy_on_average(selection: str, files: Path) -> None:
    data = table_data(files)
    module, batch = prepared("bonsft", data, selection=selection), table_batch(data)
    rewards = batch.prompts.reference_rewards
    assert (rewards.sort(-1).values.diff() == 0).any(), "some tie"
    with torch.no_grad():
        log_probs = torch.tensor(
            [[by_hand(module.policy, batch, place, sample) for sample in range(16)] for place in range(4)]
        )
    losses = torch.stack([-log_probs.gather(1, module.pick(batch, rewards, step)).mean() for step in range(1500)])
    expected = -(bon_selection_weights(rewards, n=4) * log_probs).sum(-1).mean()
    error = losses.std().item() / math.sqrt(len(losses))
    assert losses.mean().item() == pytest.approx(expected.item(), abs=4 * error)
    plain = -log_probs.mean().item()
    assert abs(plain - expected.item()) > 20 * error, "which cross-entropy on all responses is not"


@pytest.mark.parametrize("loss_name", ["dpo", "bonbon"])
def test_dpo_by_hand(loss_name: str, files: Path) -> None:
    data = table_data(files)
    module, batch = prepared("dpo", data, loss=loss_name, beta=0.4, alpha=0.1), table_batch(data)
    rewards, reference = batch.prompts.reference_rewards, module.actors.reference
    loss, logs = module.learn(batch, rewards, 3)
    pairs = pick_groups(rewards, [0, 1, 2, 3], n=4, groups=2, seed=module.seed, stream="pick", step=3)
    terms, gaps = [], []
    for place in range(4):
        goal, ties = gap_by_quadrature(rewards[place].tolist(), 4)
        for best, worst in zip(pairs.best[place].tolist(), pairs.worst[place].tolist(), strict=True):
            assert rewards[place, best] >= rewards[place, worst]
            ours = [by_hand(module.policy, batch, place, sample) for sample in (best, worst)]
            with torch.no_grad():
                theirs = [by_hand(reference, batch, place, sample) for sample in (best, worst)]
            gap = ours[0] - theirs[0] - ours[1] + theirs[1]
            apart = float(rewards[place, best] > rewards[place, worst])
            gaps += [gap.item()] if apart else []
            if loss_name == "dpo":
                terms.append(apart * torch.log1p(torch.exp(-0.4 * gap)))
            else:
                terms.append(-0.1 * ours[0] + 0.9 * apart * (gap - goal / (1 - ties)) ** 2)
    assert_gradients_equal(module, loss, torch.stack(terms).mean())
    assert 0 < len(gaps) < 8, "some groups tie"
    assert logs["tied_pairs"].item() == pytest.approx(1 - len(gaps) / 8)
    assert logs["accuracy"].item() == pytest.approx(sum(gap > 0 for gap in gaps) / len(gaps), abs=1e-6)
    beta = 0.4 if loss_name == "dpo" else 1 / (2 * 3 * (1 + 1 / 2 + 1 / 3))
    assert logs["margin"].item() == pytest.approx(beta * sum(gaps) / len(gaps), rel=1e-4)


# -- training --


def test_dpo_starts_at_the_reference_and_learns(files: Path, tmp_path: Path) -> None:
    data, record = table_data(files), Record()
    make_trainer(tmp_path, record, steps=30, limit_val_batches=0).fit(make_module("dpo", data, beta=1.0), data)
    first = record.logged[0]
    apart = 1 - first.pop("tied_pairs")
    assert first == pytest.approx({"loss": apart * math.log(2), "accuracy": 0.5, "margin": 0.0}, abs=1e-6)
    last = record.logged[-5:]
    assert sum(logged["accuracy"] for logged in last) / 5 > 0.8
    assert sum(logged["margin"] for logged in last) / 5 > 0.5


def test_bonsft_trains_without_the_reference(files: Path, tmp_path: Path) -> None:
    data, record, calls = table_data(files), Record(), []
    module: Any = make_module("bonsft", data)
    module.configure_model()
    module.actors.reference.register_forward_hook(lambda *_: calls.append(1))
    before = make_trainer(tmp_path / "before").validate(module, data)
    assert calls
    calls.clear()
    make_trainer(tmp_path, record, steps=20, limit_val_batches=0).fit(module, data)
    assert not calls
    assert before == [{}]
    losses = [logged["loss"] for logged in record.logged]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


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


def test_dropout_is_off(files: Path, tmp_path: Path) -> None:
    make_table(make_files(tmp_path / "files"), policy=str(tmp_path / "files" / "gpt2"))
    data = make_data(
        tmp_path / "files", policy=str(tmp_path / "files" / "gpt2"), reference_table=str(tmp_path / "files" / "table")
    )
    record = Record()
    make_trainer(tmp_path, record, steps=1).fit(make_module("dpo", data), data)
    assert record.logged[0]["margin"] == 0.0


# -- what is refused --


@pytest.mark.parametrize(
    ("cls", "changes", "message"),
    [
        (BoNSFT, {"n": 1}, "model.n must be an integer > 1, got 1: BoNSFT takes the best of n"),
        (BoNSFT, {"n": 2.5}, "model.n must be an integer > 1, got 2.5"),
        (DPO, {"n": 0}, "model.n must be an integer > 1, got 0: DPO"),
        (DPO, {"n": True}, "model.n must be an integer > 1, got True"),
        (BoNSFT, {"responses_per_prompt": 0}, "model.responses_per_prompt must be an integer >= 1, got 0"),
        (BoNSFT, {"selection": "best"}, "model.selection must be one of weights, groups; got 'best'"),
        (BoNSFT, {"eval_samples": 0}, "model.eval_samples must be an integer >= 1, got 0"),
        (DPO, {"pairs_per_prompt": 1.5}, "model.pairs_per_prompt must be an integer >= 1, got 1.5"),
        (DPO, {"beta": 0.0}, "model.beta must be a number > 0"),
        (DPO, {"beta": float("nan")}, "model.beta must be a number > 0"),
        (DPO, {"loss": "ipo"}, "model.loss must be one of dpo, bonbon; got 'ipo'"),
        (DPO, {"alpha": 1.5}, r"model.alpha must be in \[0, 1\], got 1.5"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(cls: Any, changes: dict[str, Any], message: str, files: Path) -> None:
    with pytest.raises(ValueError, match=message):
        cls(table_data(files).actors, **changes)


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
    ids=str,
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


def test_cached_responses_must_fit_the_context(files: Path, tmp_path: Path) -> None:
    data = imported(files, tmp_path, lambda text: [3] * 62)
    with pytest.raises(ValueError, match="exceed the model's context of 64 tokens"):
        make_trainer(tmp_path).fit(make_module("bonsft", data), data)
