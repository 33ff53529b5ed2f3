"""Distillation of Best-of-N: the gradient by hand, what each option does, and what is refused."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from tests.helpers import readable
from tests.models.setting import save_value_model
from tests.modules.setting import (
    KillAt,
    Killed,
    VowelReward,
    make_data,
    make_files,
    make_module,
    make_table,
    make_trainer,
    prepared,
    weights,
)
from tests.sampling.test_distilling import reverse_by_hand, teacher_by_hand, worth
from vbon_lightning import BoNDistillation, TextSource
from vbon_lightning.actors import Actors
from vbon_lightning.callbacks import BestOfNWinRate, KLMonitor, PolicyExport, RewardMonitor, SampleTable
from vbon_lightning.checks import ConfigMismatchError
from vbon_lightning.functional import binned_reward_cdf
from vbon_lightning.models import ModelError, ModelSpec, load_causal_lm
from vbon_lightning.modules import bon_distillation
from vbon_lightning.sampling import noise_seed, pick_some, prompt_noise
from vbon_lightning.sampling.distilling import CandidateRequest
from vbon_lightning.types import Responses, TableBatch

TEMPERATURE = 0.7
ALL = {"top": 11, "draws": 0}
"""Every token is a candidate."""
STATES = ("reference", "best_of_n", "policy")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_files(tmp_path_factory.mktemp("files"))
    make_table(directory, temperature=TEMPERATURE)
    data = table_data(directory, value_model=None)
    save_value_model(data, directory / "value")
    save_value_model(data, directory / "other", seed=1)
    save_value_model(make_data(directory), directory / "hotter")
    return directory


def table_data(files: Path, **changes: Any) -> Any:
    named = {
        "temperature": TEMPERATURE,
        "reference_table": str(files / "table"),
        "value_model": str(files / "value"),
    }
    return make_data(files, **(named | changes))


def table_batch(data: Any) -> TableBatch:
    return data.table_batch(data.prompts("train")[:4])


def learn(files: Path, step: int = 3, data: Any = None, **model: Any) -> tuple[Any, TableBatch, Tensor, dict]:
    """Return a module away from its reference, a batch, and its loss and logs there."""
    brought = table_data(files, **(data or {}))
    module, batch = prepared("distillation", brought, **model), table_batch(brought)
    loss, logs = module.learn(batch, batch.prompts.reference_rewards, step)
    return module, batch, loss, logs


# -- the loss --


def log_weights_by_hand(module: Any, batch: TableBatch, n: float) -> Tensor:
    """Return what Best-of-N makes of each bin of each prompt, from the table's rewards."""
    rewards, edges = batch.prompts.reference_rewards, module.loaded.value.bins.edges
    assert rewards is not None
    below = (rewards[:, None].double() <= edges[None, :, None]).sum(-1)
    inner = (below + 0.5) / (rewards.shape[1] + 1)
    if prior := module.prior_samples:
        ahead = module.loaded.value.log_cdf(batch.prompts).exp()[:, 1:-1]
        inner = (rewards.shape[1] * inner + prior * ahead) / (rewards.shape[1] + prior)
    cdf = torch.cat([torch.zeros(len(rewards), 1), inner, torch.ones(len(rewards), 1)], dim=1).double()
    above, width = cdf[:, 1:], cdf.diff(dim=-1)
    return torch.where(width > 0, (cdf**n).diff(dim=-1) / width, n * above ** (n - 1)).log()


def exact_weight(module: Any, batch: TableBatch, place: int, sample: Tensor, n: float) -> float:
    """Return w_n of a response of the table, from the ranks of its reward."""
    assert batch.prompts.reference_rewards is not None
    rewards = batch.prompts.reference_rewards[place]
    below, reached = (int((rewards < rewards[sample]).sum()), int((rewards <= rewards[sample]).sum()))
    low, high = ((count + 0.5) / (len(rewards) + 1) for count in (below, reached))
    if prior := module.prior_samples:
        scorer, count = module.loaded.value, len(rewards)
        ahead = binned_reward_cdf(rewards[None].double(), scorer.log_cdf(batch.prompts)[place : place + 1], scorer.bins)
        low, high = (
            (count * known + prior * float(log_prior[0, sample].exp())) / (count + prior)
            for known, log_prior in zip((low, high), ahead, strict=True)
        )
    return (high**n - low**n) / (high - low)


def picked_by_hand(module: Any, batch: TableBatch, step: int) -> Tensor:
    """Return which of the table's responses a step learns from, ``[4, 3]``."""
    identities, rewards = batch.prompts.index.tolist(), batch.prompts.reference_rewards
    if module.states != "best_of_n":
        return pick_some(identities, among=16, count=3, seed=0, stream="pick", step=step)
    assert rewards is not None
    n, noise = module.drawn_n(step), prompt_noise(identities, num_samples=1, length=1, seed=0, stream="pick", step=step)
    found = []
    for place, row in enumerate(rewards):
        order = row.argsort(stable=True)
        upto = torch.tensor([exact_weight(module, batch, place, sample, n) for sample in order]).double().cumsum(0)
        marks = [(number + float(noise[place])) / 3 * float(upto[-1]) for number in range(3)]
        found.append([int(order[int((upto <= mark).sum())]) for mark in marks])
    return torch.tensor(found)


def responses_by_hand(module: Any, batch: TableBatch, step: int) -> Responses:
    """Return the responses that a step learns from."""
    if module.states == "policy":
        options: dict[str, Any] = {"num_samples": 3, "seed": 0, "stream": "train", "step": step}
        found = module.loaded.sample(module.policy, batch.prompts, **options)
        return Responses(found.tokens, found.mask)
    index = picked_by_hand(module, batch, step)
    rows = torch.arange(len(index))[:, None]
    return Responses(batch.responses.tokens[rows, index], batch.responses.mask[rows, index])


@pytest.mark.parametrize(
    ("states", "divergence", "n", "draws", "options"),
    [
        ("reference", "forward", 4, 0, {}),
        ("best_of_n", "forward", 3.5, 0, {}),
        ("policy", "forward", 4, 0, {}),
        ("best_of_n", "reverse", 4, 0, {}),
        ("policy", "reverse", 3.5, 0, {}),
        ("best_of_n", "forward", 4, 3, {}),
        ("policy", "forward", 4, 3, {}),
        ("best_of_n", "reverse", 4, 3, {}),
        ("policy", "reverse", 4, 3, {}),
        ("policy", "reverse", 4, 3, {"log_ratio_floor": -0.5}),
        ("best_of_n", "forward", 2, 3, {"prior_samples": 4.0}),
    ],
)
def test_the_loss_by_hand(
    states: str, divergence: str, n: float, draws: int, options: dict[str, Any], files: Path
) -> None:
    request = CandidateRequest(top=2 if draws else 11, draws=draws)
    module, batch, loss, logs = learn(files, **request._asdict(), states=states, divergence=divergence, n=n, **options)
    check_by_hand(module, batch, loss, logs, n, request)


@pytest.mark.parametrize(("states", "divergence"), [("best_of_n", "forward"), ("policy", "reverse")])
@pytest.mark.parametrize("degree", [1, 2])
def test_the_loss_of_a_step_is_that_of_its_n(states: str, divergence: str, degree: int, files: Path) -> None:
    request = CandidateRequest(top=2, draws=3)
    options = {"n_range": [5.0, 9.0], "dial_degree": degree, "states": states, "divergence": divergence}
    module, batch, loss, logs = learn(files, data=tilted(files), **request._asdict(), **options, n=4)
    n = module.drawn_n(3)
    assert 5 <= n <= 9
    assert module.policy.n == n, "until the backward pass is over"
    assert len(module.policy.heads) == degree
    check_by_hand(module, batch, loss, logs, n, request)
    module.on_after_backward()
    assert module.policy.n == 4, "the N that is evaluated and exported"


def tilted(files: Path) -> dict[str, Any]:
    return {"policy": ModelSpec(str(files / "llama"), tilt=str(files / "value"))}


def assert_same_gradients(module: Any, loss: Tensor, hand: Tensor) -> None:
    """Compare two losses and their gradients."""
    assert loss.item() == pytest.approx(hand.item(), rel=1e-5)
    trained = [parameter for parameter in module.policy.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(hand, trained)
    assert max(float(part.abs().max()) for part in expected) > 1e-3
    for ours, theirs in zip(torch.autograd.grad(loss, trained), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def check_by_hand(
    module: Any, batch: TableBatch, loss: Tensor, logs: dict[str, Tensor], n: float, request: CandidateRequest
) -> None:
    states, divergence, draws = module.states, module.divergence, request.draws
    scorer = module.loaded.value
    reference = module.loaded.reference or module.policy.base
    weights, responses = log_weights_by_hand(module, batch, n), responses_by_hand(module, batch, 3)
    if module.log_ratio_floor is not None:
        assert weights.min() < module.log_ratio_floor < weights.max()
        weights = weights.clamp(min=module.log_ratio_floor)
    assert not responses.mask.all() or module.n_range is not None  # whose picks for a large N are all cut ones
    noise = prompt_noise(
        batch.prompts.index.tolist(),
        num_samples=3,
        length=responses.mask.shape[-1] * max(draws, 1),
        seed=noise_seed(0, "candidates"),
        stream="candidates",
        step=3,
    ).view(*responses.mask.shape, -1)
    terms, kls = [], []
    picked = picked_by_hand(module, batch, 3)
    for place in range(4):
        prompt = batch.prompts.tokens[place][batch.prompts.mask[place]].tolist()
        at_start = worth(scorer, torch.tensor([prompt]), 0, weights[place])
        for sample in range(3):
            response = responses.tokens[place, sample][responses.mask[place, sample]].tolist()
            for length in range(len(response)):
                before = response[:length]
                logits = module.policy(input_ids=torch.tensor([prompt + before]), use_cache=False).logits[0, -1]
                ours = (logits.double() / TEMPERATURE).log_softmax(-1)
                state = (reference, scorer, prompt, before, weights[place], request)
                end = None
                if states != "policy" and length + 1 == len(response):
                    exact = exact_weight(module, batch, place, picked[place, sample], n) * float(at_start)
                    end = (response[length], exact)
                given: dict[str, Any] = {"uniforms": noise[place, sample, length][:draws], "temperature": TEMPERATURE}
                if divergence == "reverse":
                    terms.append(reverse_by_hand(ours, *state, **given, end=end))
                    kls.append(float(terms[-1].detach()))
                else:
                    found = teacher_by_hand(*state, **given, end=end)
                    reached = reference(input_ids=torch.tensor([prompt + before]), use_cache=False).logits[0, -1]
                    reached = (reached.double() / TEMPERATURE).log_softmax(-1).detach()
                    terms.append(-(found.teacher * ours).sum())
                    kls.append(float(found.tilt + (found.teacher * (reached - ours.detach())).sum()))
    assert_same_gradients(module, loss, (torch.stack(terms).sum() / 12).float())
    assert logs["teacher_kl"].item() == pytest.approx(sum(kls) / 12, rel=1e-3)
    assert set(logs) == {"teacher_kl"}


def test_draws_are_on_average_the_whole_vocabulary(files: Path) -> None:
    module, batch, exact, _ = learn(files, step=0, states="reference", responses_per_prompt=16, **ALL)
    rewards = batch.prompts.reference_rewards
    module.request = CandidateRequest(top=2, draws=8)
    with torch.no_grad():
        # The picks are all responses, in another order: only the draws differ between steps.
        losses = torch.stack([module.learn(batch, rewards, step)[0] for step in range(60)])
    assert losses.std() > 1e-3
    # The bias of a ratio is of the order of 1 in the number of draws.
    assert losses.mean().item() == pytest.approx(exact.item(), abs=0.1)


@pytest.mark.parametrize(
    "change",
    [
        {"n": 3.5},
        {"top": 3},
        {"draws": 3},
        {"top": 4, "draws": 0},
        {"responses_per_prompt": 4},
        {"seed": 1},
        {"states": "reference"},
        {"states": "policy"},
        {**ALL, "divergence": "reverse"},
        {"divergence": "reverse", "draws": 3},
        {"log_ratio_floor": -0.5},
        {"prior_samples": 8.0},
        {"step": 4},
        {"data": {"value_model": "other"}},
        {"data": {"table_samples": 8}},
    ],
    ids=readable,
)
def test_options_change_the_loss(change: dict[str, Any], files: Path) -> None:
    if "value_model" in change.get("data", {}):
        change = {"data": {"value_model": str(files / change["data"]["value_model"])}}
    assert abs(learn(files, **change)[2].item() - learn(files)[2].item()) > 1e-4


@pytest.mark.parametrize("states", STATES)
def test_chunks_change_nothing(states: str, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, whole, _ = learn(files, states=states)
    monkeypatch.setattr(bon_distillation, "distil", functools.partial(bon_distillation.distil, max_logits=11))
    other, _, parts, _ = learn(files, states=states)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
    expected = torch.autograd.grad(whole, list(module.policy.parameters()))
    for ours, theirs in zip(torch.autograd.grad(parts, list(other.policy.parameters())), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


# -- training --


class Record(Callback):
    """Keep what each training step logs."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        metrics = trainer.callback_metrics
        self.logged.append({name.removeprefix("train/"): float(metrics[name]) for name in metrics})


@pytest.mark.parametrize("states", STATES)
def test_no_reward_is_called_and_only_the_policys_states_are_sampled(
    states: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"sample": 0, "reward": 0}

    def count(kind: str, called: Any) -> Any:
        def counting(*arguments: Any, **options: Any) -> Any:
            calls[kind] += 1
            return called(*arguments, **options)

        return counting

    monkeypatch.setattr(Actors, "sample", count("sample", Actors.sample))
    monkeypatch.setattr(VowelReward, "__call__", count("reward", VowelReward.__call__))
    data, record = table_data(files), Record()
    module = make_module("distillation", data, states=states)
    make_trainer(tmp_path, record, steps=3, limit_val_batches=0).fit(module, data)
    assert calls == {"sample": 3 if states == "policy" else 0, "reward": 0}
    assert set(record.logged[0]) == {"loss", "teacher_kl"}
    make_trainer(tmp_path).validate(module, data, verbose=False)
    assert calls["reward"] == 2, "two batches"


def test_every_callback_works(files: Path, tmp_path: Path) -> None:
    data = table_data(files)
    callbacks = [KLMonitor(), RewardMonitor(), BestOfNWinRate(), SampleTable(directory=str(tmp_path / "samples"))]
    callbacks.append(PolicyExport(directory=str(tmp_path / "export")))
    trainer = make_trainer(tmp_path, *callbacks, steps=2)
    trainer.fit(make_module("distillation", data), data)
    assert {"val/kl", "val/reward", "val/win_rate", "val/win_rate_vs_bon4"} <= set(trainer.callback_metrics)
    assert (tmp_path / "export" / "model.safetensors").exists()


def test_low_rank_adapters(files: Path, tmp_path: Path) -> None:
    policy = ModelSpec(str(files / "llama"), lora={"r": 2, "lora_alpha": 8})
    data, record = table_data(files, policy=policy, reference=str(files / "llama")), Record()
    plain, first = table_data(files), Record()
    make_trainer(tmp_path / "plain", first, steps=1).fit(make_module("distillation", plain), plain)
    make_trainer(tmp_path / "lora", record, steps=3).fit(make_module("distillation", data), data)
    assert record.logged[0] == pytest.approx(first.logged[0], rel=1e-4), "both start at the reference"
    assert record.logged[0]["loss"] != record.logged[2]["loss"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Train a value model; return the files, with a table of 32 responses, and its export."""
    directory = make_files(tmp_path_factory.mktemp("trained"))
    make_table(directory, samples=32)
    data = make_data(directory, reference_table=str(directory / "table"), val=None)
    module = make_module("valuemodelling", data, bins=8, responses_per_prompt=16, lr_scheduler=None)
    export = PolicyExport(str(directory / "export"))
    make_trainer(directory, steps=120, callbacks=[export], enable_checkpointing=False).fit(module, data)
    return directory, directory / "export"


@pytest.mark.parametrize(
    "options",
    [ALL, {"top": 3, "draws": 4}, {**ALL, "states": "policy", "divergence": "reverse"}],
    ids=["all", "drawn", "its own states"],
)
def test_it_learns_to_win(options: dict[str, Any], trained: tuple[Path, Path], tmp_path: Path) -> None:
    files, value_model = trained
    seen = TextSource(path=str(files / "train.txt"))
    data = make_data(files, reference_table=str(files / "table"), value_model=str(value_model), val=None, test=seen)
    module = make_module("distillation", data, lr_scheduler=None, eval_samples=64, responses_per_prompt=8, **options)
    record = Record()
    trainer = make_trainer(tmp_path, steps=100, callbacks=[record, BestOfNWinRate(n=[4])], enable_checkpointing=False)
    trainer.fit(module, data)
    (found,) = trainer.test(module, data, verbose=False)
    assert 0.65 < found["test/win_rate"] < 0.85, "Best-of-4 has 0.8, the reference 0.5"
    kl = [logged["teacher_kl"] for logged in record.logged]
    assert sum(kl[-10:]) < 0.3 * sum(kl[:10])


# -- one policy for every N --


def test_the_n_of_a_step_is_spread_evenly_in_its_logarithm(files: Path) -> None:
    found = make_module("distillation", table_data(files), n_range=[2, 32])
    drawn = sorted(found.drawn_n(step) for step in range(64))
    assert 2 <= drawn[0] < drawn[-1] <= 32
    for place, n in enumerate(drawn):
        assert abs(math.log(n / 2) / math.log(16) - (place + 0.5) / 64) < 0.04
    again = make_module("distillation", table_data(files), n_range=[2, 32])
    other = make_module("distillation", table_data(files), n_range=[2, 32], seed=1)
    assert found.drawn_n(3) == again.drawn_n(3) != other.drawn_n(3)
    assert make_module("distillation", table_data(files), n=5).drawn_n(7) == 5


def test_the_n_of_a_step_is_the_same_on_every_rank(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = make_module("distillation", table_data(files), n_range=[2, 32])
    first = [found.drawn_n(step) for step in range(5)]
    monkeypatch.setattr(BoNDistillation, "global_rank", 3)
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.setenv(name, "3")
    torch.manual_seed(7)
    other = make_module("distillation", table_data(files), n_range=[2, 32])
    assert [other.drawn_n(step) for step in range(5)] == first
    assert len(set(first)) == 5


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_training_leaves_the_reference_where_it_is(divergence: str, files: Path, tmp_path: Path) -> None:
    module = fit(files, tmp_path, steps=4, data=tilted(files), n_range=[2, 8], n=3.5, divergence=divergence)
    reference, tokens = load_causal_lm(str(files / "llama"), trainable=False), torch.tensor([[3, 4, 5], [6, 7, 8]])
    assert module.policy.n == 3.5, "the N that is evaluated and exported"
    kept = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    assert {name.split(".")[1] for name in kept} == {"tower", "heads"}, "the reference is not in checkpoints"
    own = reference(input_ids=tokens).logits
    assert not torch.allclose(module.policy(input_ids=tokens).logits, own, atol=1e-2)
    module.policy.turn(1)
    assert torch.equal(module.policy(input_ids=tokens).logits, own)


@pytest.mark.parametrize("degree", [1, 3])
def test_the_further_it_is_dialled_the_further_it_goes(degree: int, trained: tuple[Path, Path], tmp_path: Path) -> None:
    files, value_model = trained
    # No table: the prompts' rewards are predicted.
    policy = ModelSpec(str(files / "llama"), tilt=str(value_model))
    data = make_data(files, policy=policy, value_model=str(value_model), val=None)
    module = make_module(
        "distillation",
        data,
        lr_scheduler=None,
        responses_per_prompt=8,
        states="policy",
        divergence="reverse",
        n_range=[1.5, 16],
        dial_degree=degree,
    )
    export = PolicyExport(str(tmp_path / "export"))
    make_trainer(tmp_path, steps=60, callbacks=[export], enable_checkpointing=False).fit(module, data)
    card = (tmp_path / "export" / "README.md").read_text()
    assert 'from_pretrained("path/to/this/directory", trust_remote_code=True)' in card
    assert "model.turn(n)" in card
    reference = load_causal_lm(str(files / "llama"), trainable=False)
    tokens = torch.tensor([[3, 4], [5, 6], [7, 8]])
    log_reference = reference(input_ids=tokens).logits[:, -1].log_softmax(-1)
    kls = []
    for n in (1, 2, 4, 8, 16):
        found = load_causal_lm({"name": str(tmp_path / "export"), "dial": n}, trainable=False)
        log_policy = found(input_ids=tokens).logits[:, -1].log_softmax(-1)
        kls.append(float((log_policy.exp() * (log_policy - log_reference)).sum(-1).mean()))
        module.policy.turn(n)
        live = module.policy(input_ids=tokens).logits[:, -1].log_softmax(-1)
        torch.testing.assert_close(live, log_policy, atol=1e-4, rtol=1e-4)
    assert kls[0] < 1e-6, "at N = 1 it is the reference"
    assert kls[:4] == sorted(kls[:4])
    assert kls[4] > max(2 * kls[1], 0.05)


@pytest.mark.parametrize("entries", [{}, {"lora": {"r": 2}}])
def test_only_a_tilted_policy_is_one_for_every_n(entries: dict[str, Any], files: Path, tmp_path: Path) -> None:
    policy = ModelSpec(str(files / "llama"), **entries)
    data = table_data(files, policy=policy, reference=str(files / "llama"))
    with pytest.raises(ValueError, match="one policy for every N is a tilted one: name the body that tilts it"):
        make_trainer(tmp_path, steps=1).fit(make_module("distillation", data, n_range=[2, 8]), data)


# -- what is refused --


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 1}, r"model.n must be a number > 1 \(Best-of-1 is the reference itself\), got 1"),
        ({"n": math.inf}, "model.n must be a number > 1"),
        ({"n": math.nan}, "model.n must be a number > 1"),
        ({"n": True}, "model.n must be a number > 1"),
        ({"responses_per_prompt": 0}, "model.responses_per_prompt must be an integer >= 1, got 0"),
        ({"top": 1, "draws": 0}, "must together name at least 2 candidates, got 1, 0"),
        ({"top": -1, "draws": 8}, "must together name at least 2 candidates, got -1, 8"),
        ({"states": "bon"}, "model.states must be one of reference, best_of_n, policy; got 'bon'"),
        ({"divergence": "jeffreys"}, "model.divergence must be one of forward, reverse; got 'jeffreys'"),
        ({"log_ratio_floor": 0.0}, r"model.log_ratio_floor must be negative \(nats\), got 0.0"),
        ({"log_ratio_floor": 2.0}, "model.log_ratio_floor must be negative"),
        ({"prior_samples": -1.0}, "model.prior_samples must be a number >= 0, got -1.0"),
        ({"prior_samples": math.nan}, "model.prior_samples must be a number >= 0"),
        ({"log_ratio_floor": math.nan}, "model.log_ratio_floor must be negative"),
        ({"n_range": [4]}, r"model.n_range must be two numbers, 1 < least < most, got \[4\]"),
        ({"n_range": [4, 2]}, "model.n_range must be two numbers"),
        ({"n_range": [1, 4]}, "model.n_range must be two numbers"),
        ({"n_range": [4, 4]}, "model.n_range must be two numbers"),
        ({"n_range": [2, 4, 8]}, "model.n_range must be two numbers"),
        ({"n_range": []}, "model.n_range must be two numbers"),
        ({"n_range": [2, math.inf]}, "model.n_range must be two numbers"),
        ({"dial_degree": 0}, "model.dial_degree must be an integer >= 1, got 0"),
        ({"eval_samples": 0}, "model.eval_samples must be an integer >= 1, got 0"),
    ],
    ids=readable,
)
def test_options_that_make_no_sense(changes: dict[str, Any], message: str, files: Path) -> None:
    with pytest.raises(ValueError, match=message):
        BoNDistillation(table_data(files).actors, **changes)


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ({}, {"value_model": None}, "BoNDistillation learns from a value model: train one with `ValueModelling`"),
        ({}, {"reference_table": None}, "BoNDistillation learns from cached responses: name a table"),
        ({}, {"reward": None}, "needs a reward: set `data.reward`"),
        ({"n_range": [2, 20]}, {}, "M = 16 responses a prompt, fewer than the 20 that .* and Best-of-20 needs"),
        (
            {"n": 16.5},
            {},
            "M = 16 responses a prompt, fewer than the 17 that model.responses_per_prompt = 3 and Best-of-16.5",
        ),
        ({"responses_per_prompt": 6}, {"table_samples": 5}, "M = 5 responses a prompt, as data.table_samples says"),
    ],
    ids=readable,
)
def test_what_it_cannot_learn_from(
    model: dict[str, Any], data: dict[str, Any], message: str, files: Path, tmp_path: Path
) -> None:
    brought = table_data(files, **data)
    module = make_module("distillation", brought, **model)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path).fit(module, brought)
    assert module.actors is None, "no model was loaded"


def test_a_value_model_of_another_temperature_is_refused(files: Path, tmp_path: Path) -> None:
    data = table_data(files, value_model=str(files / "hotter"))
    with pytest.raises(ModelError, match="temperature: the value model has 1.0, this run has 0.7"):
        make_trainer(tmp_path).fit(make_module("distillation", data), data)


# -- resuming --


def fit(files: Path, directory: Path, *callbacks: Any, steps: int = 5, data: Any = None, **model: Any) -> Any:
    brought = table_data(files, **(data or {}))
    module = make_module("distillation", brought, **model)
    resume = directory / "last.ckpt"
    make_trainer(directory, *callbacks, steps=steps).fit(module, brought, ckpt_path=resume if resume.exists() else None)
    return module


@pytest.mark.parametrize(
    ("options", "kill"),
    [
        ({"states": "best_of_n"}, 1),
        ({"states": "best_of_n"}, 3),
        ({"states": "policy"}, 2),
        ({"tilt": True, "states": "policy", "divergence": "reverse", "n_range": [2, 8]}, 2),
        ({"tilt": True, "states": "best_of_n", "n_range": [2, 8], "dial_degree": 1}, 3),
        ({"tilt": True}, 1),
    ],
    ids=readable,
)
def test_killed_and_resumed(options: dict[str, Any], kill: int, files: Path, tmp_path: Path) -> None:
    options = dict(options)
    if options.pop("tilt", False):
        options["data"] = tilted(files)
    expected = weights(fit(files, tmp_path / "whole", **options))
    with pytest.raises(Killed):
        fit(files, tmp_path / "killed", KillAt(kill), **options)
    found = weights(fit(files, tmp_path / "killed", **options))
    assert list(found) == list(expected)
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n": 3.5}, "n: checkpoint has 4.0, this run has 3.5"),
        ({"top": 5}, "top"),
        ({"draws": 5}, "draws"),
        ({"states": "policy"}, "states"),
        ({"responses_per_prompt": 4}, "responses_per_prompt"),
        ({"draws": 0, "divergence": "reverse"}, "divergence"),
        ({"log_ratio_floor": -3.0}, "log_ratio_floor"),
        ({"prior_samples": 3.0}, "prior_samples"),
        ({"n_range": [2, 8]}, "n_range"),
        ({"n_range": [2, 8], "dial_degree": 1}, "dial_degree"),
        ({"data": {"value_model": "other"}}, "value_model.weights"),
    ],
    ids=readable,
)
def test_a_resume_that_disagrees_is_refused(change: dict[str, Any], named: str, files: Path, tmp_path: Path) -> None:
    fit(files, tmp_path, steps=1)
    if "data" in change:
        change = {"data": {"value_model": str(files / change["data"]["value_model"])}}
    if "n_range" in change:
        change = change | {"data": tilted(files)}
    with pytest.raises(ConfigMismatchError, match=named):
        fit(files, tmp_path, steps=2, **change)
