"""Two processes that hold a policy together (gloo, on the CPU) learn what one learns that has it whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
from safetensors.torch import load_file
from torch import Tensor

from tests import sharded
from tests.helpers import readable
from tests.modules.setting import make_data, make_files, make_module, make_trainer, weights
from tests.ranks import run_two
from vbon_lightning import ReferenceSampler, ShardedStrategy, TextSource, cli
from vbon_lightning.callbacks import DialCalibration
from vbon_lightning.reference_table import ReferenceTable
from vbon_lightning.rewards import RewardCalls
from vbon_lightning.sharded_strategy import check_can_shard

ROUNDED = "bf16-mixed"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sharded.make_sharding_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def two(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run everything over two processes, once."""
    directory = tmp_path_factory.mktemp("two")
    run_two("tests.sharded", str(files), str(directory), timeout=150)
    return directory


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("one")


@pytest.fixture(scope="module")
def alone(files: Path, one: Path) -> Any:
    """Run a case in this process, once."""
    made: dict[str, Any] = {}

    def get(kind: str) -> Any:
        if kind not in made:
            made[kind] = sharded.fit(kind, files, one / kind, ranks=1)
        return made[kind]

    return get


@pytest.fixture(scope="module")
def together(two: Path) -> list[dict[str, Any]]:
    return [torch.load(two / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("kind", [kind for kind in sharded.CASES if kind != ROUNDED])
def test_the_weights_are_those_of_one_process(kind: str, together: Any, alone: Any) -> None:
    for found in together:
        close(found[kind]["weights"], alone(kind)["weights"])


def test_rounded_weights_are_near_those_of_one_process(files: Path, together: Any, alone: Any) -> None:
    _, module = sharded.setting(ROUNDED, files, ranks=1)
    module.configure_model()
    start, expected = weights(module), alone(ROUNDED)["weights"]

    def apart(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
        return sum(float((first[name] - second[name]).abs().sum()) for name in expected)

    for found in together:
        assert found[ROUNDED]["weights"]["policy.lm_head.weight"].dtype == torch.float32
        print(apart(found[ROUNDED]["weights"], expected), apart(start, expected))
        assert apart(found[ROUNDED]["weights"], expected) < 0.2 * apart(start, expected)


@pytest.mark.parametrize("kind", ["vbon", "ppo", "lora", "recomputing"])
def test_responses_are_those_of_one_process(kind: str, together: Any, alone: Any) -> None:
    expected = alone(kind)["texts"][0]
    # Rank r has every second prompt of what one process has, with the same samples.
    assert [row for pair in zip(*(found[kind]["texts"][0] for found in together), strict=True) for row in pair] == (
        expected
    )
    assert together[0][kind]["lengths"] != together[1][kind]["lengths"], "the ranks had as many passes to make"


def test_each_process_holds_half(together: Any, alone: Any) -> None:
    for kind in ("vbon", "ppo", "lora", "tilted"):
        expected = alone(kind)["held"]
        for name, count in expected.items():
            held = [found[kind]["held"][name] for found in together]
            assert sum(held) == count, (kind, name)
            assert max(held) <= 0.55 * count, (kind, name)
    assert alone("vbon")["held"]["reference"] > 0


def test_metrics_are_those_of_one_process(together: Any, alone: Any) -> None:
    expected = {name: value for name, value in alone("vbon")["logs"].items() if name.startswith("val/")}
    assert {"val/kl", "val/reward", "val/win_rate"} <= set(expected)
    for found in together:
        assert {name: found["vbon"]["logs"][name] for name in expected} == pytest.approx(expected, abs=1e-5)


def test_a_checkpoint_is_that_of_one_process(two: Path, one: Path, alone: Any) -> None:
    alone("vbon")
    ours, theirs = (
        torch.load(directory / "vbon/step=2.ckpt", weights_only=False, map_location="cpu") for directory in (two, one)
    )
    assert set(ours) == set(theirs)
    close(ours["state_dict"], theirs["state_dict"])
    (ours,), (theirs,) = ours["optimizer_states"], theirs["optimizer_states"]
    assert [group["params"] for group in ours["param_groups"]] == [group["params"] for group in theirs["param_groups"]]
    assert set(ours["state"]) == set(theirs["state"])
    for place, moments in theirs["state"].items():
        for name, value in moments.items():
            assert type(ours["state"][place][name]) is Tensor
            torch.testing.assert_close(ours["state"][place][name], value, rtol=1e-4, atol=1e-6)


def test_a_resumed_run_ends_with_the_same_bits(together: Any) -> None:
    for found in together:
        ours, theirs = found["resumed"]["weights"], found["vbon"]["weights"]
        assert all(torch.equal(value, ours[name]) for name, value in theirs.items())
        assert found["resumed"]["texts"] == found["vbon"]["texts"][2:]


def test_a_checkpoint_is_resumed_without_sharding(together: Any) -> None:
    for found in together:
        close(found["resumed by ddp"]["weights"], found["vbon"]["weights"])
        assert found["resumed by ddp"]["held"]["policy"] > 1.8 * found["vbon"]["held"]["policy"]


def test_a_group_holds_a_whole(together: Any, alone: Any) -> None:
    for found in together:
        assert found["replicated"]["held"] == alone("replicated")["held"]


@pytest.mark.parametrize("export", ["vbon/export", "vbon/best", "lora/export", "tilted/export", "recomputing/export"])
def test_exports_are_those_of_one_process(export: str, two: Path, one: Path, alone: Any) -> None:
    alone(export.split("/")[0])
    names = {path.name for path in (one / export).iterdir()}
    assert {path.name for path in (two / export).iterdir()} == names
    close(*(load_file(directory / export / "model.safetensors") for directory in (two, one)))
    for name in ("config.json", "generation_config.json"):
        assert (two / export / name).read_text() == (one / export / name).read_text()


def test_a_table_is_that_of_one_process(files: Path, two: Path, one: Path) -> None:
    sharded.predict(files, one, ranks=1)
    ours, theirs = (ReferenceTable.open(directory / "table") for directory in (two, one))
    keys = sorted(theirs.keys())
    assert sorted(ours.keys()) == keys
    assert len(ours) == 7  # one process has a prompt more than the other
    for key in keys:
        assert ours.row(key)._replace(log_probs=None) == theirs.row(key)._replace(log_probs=None)
        assert ours.row(key).log_probs == pytest.approx(theirs.row(key).log_probs, abs=1e-5)


def test_one_token_here_and_six_there(files: Path, together: Any) -> None:
    expected = [sharded.passes(files, rank, sharded=False) for rank in range(2)]
    assert [int(found["mask"].sum(-1).max()) for found in expected] == [1, 6]
    for found, alone in zip((found["passes"] for found in together), expected, strict=True):
        length = alone["tokens"].shape[-1]
        assert torch.equal(found["tokens"][..., :length], alone["tokens"])
        assert not found["mask"][..., length:].any()
        torch.testing.assert_close(found["loss"], alone["loss"])
        for name, value in found["gradients"].items():
            mean = (expected[0]["gradients"][name] + expected[1]["gradients"][name]) / 2
            torch.testing.assert_close(value, mean, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text)


# -- what is refused ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("tiny"))


def check(module: LightningModule, data: Any, *, stage: str = "fit", **arguments: Any) -> None:
    """Check as a trainer would that is about to start."""
    options: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    trainer = Trainer(**(options | arguments), strategy=ShardedStrategy())
    trainer.state.fn = {"fit": "fit", "predict": "predict"}[stage]
    if data is not None:
        trainer.datamodule = data  # type: ignore[attr-defined]
    check_can_shard(module, trainer)


SKIP = RewardCalls(on_missing="skip")


@pytest.mark.parametrize(
    ("data", "trainer", "message"),
    [
        ({"sampler": "graph"}, {}, "data.sampler eager, not graph"),
        ({"sampler": "vllm"}, {}, "data.sampler eager, not vllm"),
        ({}, {"callbacks": [EMAWeightAveraging()]}, "leave out EMAWeightAveraging"),
        ({}, {"callbacks": [StochasticWeightAveraging(0.1)]}, "leave out StochasticWeightAveraging"),
        ({}, {"callbacks": [DialCalibration()]}, "DialCalibration, which samples between steps"),
        ({"reward_calls": SKIP}, {}, "set data.reward_calls.on_missing to error"),
    ],
    ids=readable,
)
def test_what_does_not_go_together_is_refused(
    data: dict[str, Any], trainer: dict[str, Any], message: str, tiny: Path
) -> None:
    brought = make_data(tiny, **data)
    with pytest.raises(ValueError, match=message) as raised:
        check(make_module("vbon", brought), brought, **trainer)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("option", [{"anchor_every": 2}, {"anchor_rate": 0.1}], ids=readable)
def test_an_anchor_that_moves_is_refused(option: dict[str, Any], tiny: Path) -> None:
    brought = make_data(tiny)
    with pytest.raises(ValueError, match="fsdp keeps no anchor, a second copy of what is trained: set model.anch"):
        check(make_module("klrl", brought, **option), brought)


def test_what_does_is_not(tiny: Path) -> None:
    brought = make_data(tiny)
    for precision in ("32-true", "64-true", "bf16-mixed", "bf16-true"):
        check(make_module("vbon", brought), brought, precision=precision)
    skipping = make_data(tiny, reward_calls=SKIP)
    check(make_module("klrl", skipping), skipping)
    check(make_module("vbon", skipping), make_data(tiny, reward_calls=SKIP, reference_table="a table"))


def test_a_precision_that_scales_the_loss_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "precision", "16-mixed")  # without a GPU Lightning takes another
    brought = make_data(tiny)
    with pytest.raises(ValueError, match="takes trainer.precision 32-true, .*; got 16-mixed"):
        check(make_module("klrl", brought), brought)


def test_an_older_torch_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.distributed.fsdp, "fully_shard")
    with pytest.raises(ValueError, match=f"needs torch 2.6 or newer, and this is {torch.__version__[:4]}"):
        check(LightningModule(), None)


def test_further_draws_for_a_table_and_other_modules_are_refused(tiny: Path) -> None:
    skipping = make_data(tiny, reward_calls=SKIP)
    with pytest.raises(ValueError, match="further reference responses"):
        check(ReferenceSampler(skipping.actors, samples=2), skipping, stage="predict")
    with pytest.raises(ValueError, match="LightningModule is none"):
        check(LightningModule(), None)


def test_processes_wait_as_long_as_they_are_told() -> None:
    assert ShardedStrategy(timeout_minutes=3)._timeout.total_seconds() == 180
    assert ShardedStrategy(process_group_backend="gloo").process_group_backend == "gloo"
    with pytest.raises(ValueError, match="timeout_minutes of ShardedStrategy must be positive, got 0"):
        ShardedStrategy(timeout_minutes=0)


def test_groups_are_of_one_size() -> None:
    with pytest.raises(ValueError, match="replicas of ShardedStrategy must be at least 1, got 0"):
        ShardedStrategy(replicas=0)


def test_options_that_only_processes_and_models_tell_are_refused(tiny: Path) -> None:
    def fit(policy: Any = None, **options: Any) -> None:
        train = TextSource(path=str(tiny / "texts.txt"))
        data = make_data(tiny, train=train, val=None, **({} if policy is None else {"policy": policy}))
        make_trainer(tiny, steps=1, enable_checkpointing=False, callbacks=[], strategy=ShardedStrategy(**options)).fit(
            make_module("sft", data), data
        )

    with pytest.raises(ValueError, match="replicas=3 of ShardedStrategy does not divide the 1 processes"):
        fit(replicas=3)
    skipping = {"model_type": "opt", "hidden_size": 8, "ffn_dim": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    sizes = {"word_embed_proj_dim": 8, "layerdrop": 0.5, "max_position_embeddings": 32}
    try:
        with pytest.raises(ValueError, match="`layerdrop` does: set model.dropout to false"):
            fit({"config": skipping | sizes, "tokenizer": str(tiny / "llama")})
    finally:
        torch.distributed.destroy_process_group()


def test_no_checkpoint_is_written_in_the_middle_of_a_step(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for environment in (SLURMEnvironment(), LightningEnvironment()):
        strategy = ShardedStrategy()
        strategy.cluster_environment = environment
        strategy.forbid_saving_in_a_signal()
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    slurm = SLURMEnvironment(auto_requeue=True)
    strategy.cluster_environment = slurm
    strategy.forbid_saving_in_a_signal()
    assert slurm.auto_requeue is False


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ("--trainer.strategy=fsdp", "ShardedStrategy"),
        ("--trainer.strategy.class_path=vbon_lightning.ShardedStrategy", "ShardedStrategy"),
        ("--trainer.strategy=ddp", "DDPStrategy"),
    ],
)
def test_the_command_line_knows_it_as_fsdp(given: str, kind: str, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["vbon"])
    monkeypatch.setattr(cli.VbonCLI, "_run_subcommand", lambda self, subcommand: None)
    train = f"--data.train.path={tiny / 'texts.txt'}"
    words = ["fit", "--model", "SFT", f"--data.policy={tiny / 'llama'}", train, "--trainer.logger=false"]
    made = cli.run([*words, "--trainer.accelerator=cpu", "--trainer.devices=2", given])
    assert type(made.trainer.strategy).__name__ == kind
