"""A run that diverges ends where it does, says so, and spoils nothing."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from tests.callbacks.replay import make_trainer
from tests.callbacks.tiny import Tiny
from tests.models.setting import make_valued_files
from tests.modules.setting import make_data, make_module
from tests.modules.setting import make_trainer as make_module_trainer
from tests.rollouts import make_rollout
from vbon_lightning import RewardModelling, TextSource
from vbon_lightning.callbacks import FiniteCheck, PolicyExport
from vbon_lightning.callbacks.finite_check import LEAST_SCALE
from vbon_lightning.checkpoints import read_checkpoint
from vbon_lightning.finite import NotFiniteError
from vbon_lightning.modules.policy_gradient import PolicyGradient


class Diverging(LightningModule):
    """Learn two numbers, of which a batch makes a loss, or a gradient beside a finite loss, that is not finite.

    Args:
        how: ``loss``, ``gradient``, or ``never``.
        at: The batch, from 0.
        bad: What it becomes.
        rank: The only rank that it happens to.
    """

    def __init__(self, how: str, at: int, bad: float = math.nan, rank: int = 0) -> None:
        super().__init__()
        self.how, self.at, self.bad, self.rank = how, at, bad, rank
        self.fine, self.wrong = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
        self.batches = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
        loss = (self.fine - batch).square().sum() + self.wrong.sum()
        if self.batches == self.at and self.global_rank == self.rank:
            if self.how == "loss":
                loss = loss * self.bad
            if self.how == "gradient":
                self.wrong.register_hook(lambda gradient: gradient * self.bad)
        self.batches += 1
        return {"loss": loss}

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.ones(16, 2), batch_size=2)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def fit(directory: Path, module: LightningModule, *callbacks: Callback, **arguments: Any) -> Any:
    trainer = make_trainer(directory, *(callbacks or [FiniteCheck()]), logger=False, **arguments)
    trainer.fit(module)
    return trainer


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clip", [{}, {"gradient_clip_val": 1.0}], ids=["plain", "clipped"])
@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_it_stops_before_the_weights_take_the_step(how: str, clip: dict[str, Any], bad: float, tmp_path: Path) -> None:
    module = Diverging(how, at=2, bad=bad)
    said = rf"the loss is (nan|{bad})" if how == "loss" else "the gradient of wrong holds NaN or infinity, where the l"
    with pytest.raises(NotFiniteError, match=f"^training stopped at step 3: {said}.* Lower the learning rate"):
        fit(tmp_path, module, **clip)
    assert module.batches == 3
    assert all(parameter.isfinite().all() and parameter.any() for parameter in module.parameters())


@pytest.mark.parametrize(("at", "step"), [(0, 1), (1, 1), (3, 2), (4, 3)])
def test_accumulated_batches_share_a_step(at: int, step: int, tmp_path: Path) -> None:
    for how in ("loss", "gradient"):
        with pytest.raises(NotFiniteError, match=f"^training stopped at step {step}:"):
            fit(tmp_path, Diverging(how, at=at), accumulate_grad_batches=2)


def test_a_run_that_does_not_diverge_and_one_that_is_not_looked_at(tmp_path: Path) -> None:
    assert fit(tmp_path, Diverging("never", at=0)).global_step == 8
    module = Diverging("loss", at=1)
    assert fit(tmp_path, module, FiniteCheck(enabled=False)).global_step == 8
    assert module.fine.isnan().all()


class _Late(FiniteCheck):
    """Reads its numbers as on a GPU: when the next ones are put in, or must be known."""

    def __init__(self) -> None:
        super().__init__()
        read, waiting = self._late._read, list[Any]()

        def settle() -> None:
            while waiting:
                read(*waiting.pop())

        def put(values: Tensor, note: Any) -> None:
            settle()
            waiting.append((values, note))

        self._is_alone = lambda *_: False  # type: ignore[method-assign]
        self._late = SimpleNamespace(put=put, settle=settle, forget=waiting.clear)  # type: ignore[assignment]


@pytest.mark.parametrize(("at", "batches"), [(2, 4), (7, 8)])
def test_numbers_that_come_late_name_their_step(at: int, batches: int, tmp_path: Path) -> None:
    module = Diverging("gradient", at=at)
    with pytest.raises(NotFiniteError, match=f"^training stopped at step {at + 1}: the gradient of wrong"):
        fit(tmp_path, module, _Late())
    assert module.batches == batches


def test_numbers_that_come_late_are_read_before_a_checkpoint_is_written(tmp_path: Path) -> None:
    kept = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    with pytest.raises(NotFiniteError, match="^training stopped at step 3:"):
        fit(tmp_path, Diverging("gradient", at=2), _Late(), kept, enable_checkpointing=True)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=1.ckpt", "step=2.ckpt"]


class _Scaler:
    def __init__(self, scale: float, enabled: bool = True) -> None:
        self.scale, self.enabled = scale, enabled

    def is_enabled(self) -> bool:
        return self.enabled

    def get_scale(self) -> float:
        return self.scale


class _Scaled(Callback):
    """Give the precision plugin the scaler of ``16-mixed``, which a CPU does not have."""

    def __init__(self, scaler: _Scaler) -> None:
        self.scaler = scaler

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.precision_plugin.scaler = self.scaler

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if not pl_module.wrong.grad.isfinite().all():  # the scaler leaves the step out
            pl_module.zero_grad()


def test_a_loss_scale_overflows_now_and_then(tmp_path: Path) -> None:
    # An inf is the scaler's to leave out; a loss is an error all the same, and so is a scale that is gone.
    fine = _Scaled(_Scaler(1024.0))
    assert fit(tmp_path, Diverging("gradient", at=1, bad=math.inf), FiniteCheck(), fine).global_step == 8
    with pytest.raises(NotFiniteError, match="step 2: the loss is"):
        fit(tmp_path, Diverging("loss", at=1), fine, FiniteCheck())
    with pytest.raises(NotFiniteError, match=r"not finite at any loss scale \(it has shrunk to 5e-05\)"):
        fit(tmp_path, Diverging("never", at=0), _Scaled(_Scaler(LEAST_SCALE / 2)), FiniteCheck())
    assert fit(tmp_path, Diverging("never", at=0), _Scaled(_Scaler(0.0, enabled=False)), FiniteCheck()).global_step == 8


# -- where it comes from --


@pytest.mark.parametrize(
    ("field", "place", "said"),
    [
        ("log_probs", (1, 2, 0), "the log probs of the prompt 'prompt | 1', response 'response 1.2' are not finite"),
        ("reference_log_probs", (0, 1, 0), "the reference log probs of the prompt 'prompt | 0', response 'response 0."),
        ("token_kl", (0, 3, 1), "the token kl of the prompt 'prompt | 0', response 'response 0.3' are"),
        ("rewards", (1, 0), "the rewards of the prompt 'prompt | 1', response 'response 1.0' are"),
        ("reference_rewards", (1, 5), "the reference rewards of the prompt 'prompt | 1' are"),
    ],
)
def test_the_response_is_named(field: str, place: tuple[int, ...], said: str, tmp_path: Path) -> None:
    module = Diverging("loss", at=0)
    rollout = make_rollout(prompts=3, fillers=1)
    rollout = rollout._replace(responses=[[f"response {row}.{i}" for i in range(4)] for row in range(3)])
    getattr(rollout, field)[place] = math.inf
    module.last_rollout = rollout  # type: ignore[assignment]
    with pytest.raises(NotFiniteError) as raised:
        fit(tmp_path, module)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_nothing_of_the_rollout_is_to_blame(tmp_path: Path) -> None:
    module = Diverging("loss", at=0)
    rollout = make_rollout(prompts=3, fillers=1)
    rollout.rewards[0, 0] = math.nan  # there is none
    module.last_rollout = rollout  # type: ignore[assignment]
    with pytest.raises(NotFiniteError, match="the loss is nan; the last checkpoint"):
        fit(tmp_path, module)


@pytest.mark.parametrize("whose", ["own", "reference", "value"])
def test_the_weight_is_named(whose: str, tmp_path: Path) -> None:
    module = Diverging("loss", at=1)
    broken = nn.Linear(2, 2)
    nn.init.constant_(broken.bias, math.nan)
    if whose == "own":
        module.head = broken
    else:
        module.actors = SimpleNamespace(**{whose: broken})  # type: ignore[assignment]
    named = "the weight head.bias" if whose == "own" else f"the {whose} model's weight bias"
    with pytest.raises(NotFiniteError, match=f"the loss is nan: {named} holds NaN or infinity"):
        fit(tmp_path, module)


# -- every module --


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_valued_files(tmp_path_factory.mktemp("files"))
    (directory / "labelled.jsonl").write_text('{"text": "abc", "label": 0}\n{"text": "d", "label": 1}\n' * 4)
    return directory


class Spoil(Callback):
    """Put a NaN into a parameter before a batch."""

    def __init__(self, at: int, part: str = "policy") -> None:
        self.at, self.part = at, part

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop.total_batch_idx == self.at:
            with torch.no_grad():
                list(getattr(pl_module, self.part).parameters())[-1].view(-1)[0] = math.nan


CASES: dict[str, dict[str, Any]] = {
    "vbon": {},
    "klrl": {},
    "clipped": {},
    "ppo": {},
    "infalign": {},
    "maxatk": {},
    "grpo": {},
    "rloo": {},
    "pfppo": {},
    "forward": {},
    "jeffreys": {},
    "bond": {},
    "jbond": {},
    "wind": {},
    "sft": {"train": "texts.txt"},
    "bonsft": {"reference_table": "table"},
    "dpo": {"reference_table": "table"},
    "qrpo": {"reference_table": "table"},
    "bonregression2": {"reference_table": "table"},
    "astarpo": {"reference_table": "table"},
    "valuemodelling": {"reference_table": "table"},
    "distillation": {"reference_table": "table", "value_model": "value"},
    "valuecritic": {"reference_table": "table", "value_model": "value"},
}


@pytest.mark.parametrize("kind", CASES)
def test_every_module_stops_and_keeps_what_it_had(kind: str, files: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {name: str(files / value) for name, value in CASES[kind].items()}
    if "train" in options:
        options["train"] = TextSource(path=options["train"])
    data = make_data(files, val=None, **options)
    module: Any = make_module(kind, data)
    export = tmp_path / "export"
    export.mkdir()
    (export / "mark").touch()
    trainer = make_module_trainer(tmp_path, Spoil(1), PolicyExport(str(export)), steps=4)
    with pytest.raises(NotFiniteError, match=r"^training stopped at step 2: .*weight policy\.[\w.]+ holds NaN"):
        trainer.fit(module, data)
    assert [path.name for path in export.iterdir()] == ["mark"]
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 1
    samples = kind in ("bonregression2", "astarpo") or (isinstance(module, PolicyGradient) and kind != "forward")
    assert (module.last_rollout is not None) == samples  # in which a response is looked for


def test_a_reward_model(files: Path, tmp_path: Path) -> None:
    rows = TextSource(path=str(files / "labelled.jsonl"), label_column="label")
    data = make_data(files, val=None, train=rows, reward=None)
    trainer = make_module_trainer(tmp_path, Spoil(1), steps=4)
    with pytest.raises(NotFiniteError, match=r"^training stopped at step 2: .*the weight policy\.score\.weight holds"):
        trainer.fit(RewardModelling(data.actors, objective="classification"), data)


def test_a_critic(files: Path, tmp_path: Path) -> None:
    data = make_data(files, val=None)
    trainer = make_module_trainer(tmp_path, Spoil(1, "critic"), steps=4)
    with pytest.raises(NotFiniteError, match=r"^training stopped at step 2: .*the weight critic\.bias holds NaN"):
        trainer.fit(make_module("ppo", data), data)


def test_an_export_of_weights_that_are_not_finite_is_refused(tmp_path: Path) -> None:
    class SpoilAtTheEnd(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            with torch.no_grad():
                pl_module.policy.lm_head.weight[3, 0] = math.inf

    out = tmp_path / "out"
    make_trainer(tmp_path, PolicyExport(str(out)), logger=False).fit(Tiny())
    before = AutoModelForCausalLM.from_pretrained(out).lm_head.weight.clone()
    with pytest.raises(NotFiniteError, match=r"is not exported to .*out'.*lm_head\.weight holds NaN or infinity"):
        make_trainer(tmp_path, SpoilAtTheEnd(), PolicyExport(str(out)), logger=False).fit(Tiny())
    assert torch.equal(AutoModelForCausalLM.from_pretrained(out).lm_head.weight, before)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
