"""The command line: help, configurations, errors, and what a run leaves behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers import save_tiny_model
from tests.models.test_hub import FakeApi
from tests.modules.setting import ALPHABET, make_files
from vbon_lightning import __version__, cli
from vbon_lightning.models import hub
from vbon_lightning.reference_table import ReferenceTable

ROOT = Path(__file__).parents[1]
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def vbon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run the command in this process, in an empty directory."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, traceback: bool = False) -> None:
        monkeypatch.setattr("sys.argv", ["vbon", *arguments])
        monkeypatch.setenv(cli.TRACEBACK, "1" if traceback else "0")
        cli.main()

    return run


def config(files: Path, directory: Path, **changes: Any) -> str:
    """Write a configuration, its dotted keys changed, and return its path."""
    values: dict[str, Any] = {
        "seed_everything": 3,
        "model": {"class_path": "VBoN", "init_args": {"n": 4, "samples_per_prompt": 4, "reference_samples": 16}},
        "data": {
            "policy": str(files / "llama"),
            "reward": {"class_path": "tests.modules.setting.VowelReward"},
            "train": {"path": str(files / "train.txt")},
            "val": {"path": str(files / "val.txt")},
            "max_new_tokens": 4,
            "batch_size": 4,
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 2,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    }
    for key, value in changes.items():
        place = values
        *path, last = key.split("__")
        for name in path:
            place = place[name]
        if value is None:
            place.pop(last, None)
        else:
            place[last] = value
    directory.mkdir(exist_ok=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(values))
    return str(directory / "config.yaml")


def failure(capsys: pytest.CaptureFixture[str], run: Callable[[], None]) -> str:
    """Return the one line a failing command ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run()
    captured = capsys.readouterr()
    message = stop.value.code if isinstance(stop.value.code, str) else captured.err.strip().splitlines()[-1]
    assert stop.value.code not in (0, None)
    assert message.startswith("vbon: ")
    assert "Traceback" not in captured.err
    return message


# -- help and configurations ----------------------------------------------------------------------------


def test_help(vbon: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        vbon("--help")
    text = capsys.readouterr().out
    listed = re.findall(r"^    ([a-z]+) +(.*)", text.split("Available subcommands:")[1], flags=re.MULTILINE)
    assert [name for name, _ in listed] == list(cli.COMMANDS)
    assert all(cli.COMMANDS[name].summary.startswith(words) for name, words in listed if words)
    with pytest.raises(SystemExit, match="0"):
        vbon("--version")
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_listed_command_has_help_of_its_own(name: str, vbon: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        vbon(name, "--help")
    text = capsys.readouterr().out
    assert f"usage: vbon {name}" in text.replace(" [options]", "")
    assert "Args:" not in text


def options(text: str) -> dict[str, str]:
    """Return the help of each option, what jsonargparse adds by itself left out."""
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        head = re.match(r"  (--[\w.]+)", line)
        if head:
            name = head.group(1)
            found[name] = re.split(r"\s{2,}", line.strip(), maxsplit=1)[1] if "   " in line.strip() else ""
        elif line.startswith("      ") and name:
            found[name] += " " + line.strip()
        else:
            name = ""
    return {option: re.sub(r"\((required, )?type:.*", "", help_).strip() for option, help_ in found.items()}


def test_every_data_option_is_documented(vbon: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        vbon("fit", "--help")
    data = {key: value for key, value in options(capsys.readouterr().out).items() if key.startswith("--data.")}
    assert {"--data.policy", "--data.train", "--data.temperature", "--data.table_splits"} < set(data)
    assert not [option for option, help_ in data.items() if not help_]


@pytest.mark.parametrize(
    "module",
    [
        *("VBoN", "KLRL", "BOND", "JBOND", "WIND", "SFT", "BoNSFT", "DPO", "QRPO", "AStarPO", "BoNRegression"),
        "ReferenceSampler",
    ],
)
def test_every_module_option_is_documented(module: str, vbon: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        vbon("fit", "--model.help", module)
    model = options(capsys.readouterr().out)
    named = {
        "VBoN": "n",
        "KLRL": "minibatches",
        "BOND": "second_term",
        "JBOND": "regularisation",
        "WIND": "fit",
        "SFT": "dropout",
        "BoNSFT": "eval_samples",
        "DPO": "pairs_per_prompt",
        "QRPO": "ties",
        "AStarPO": "beta1",
        "BoNRegression": "responses",
        "ReferenceSampler": "samples",
    }[module]
    assert {"--model.actors", "--model.seed", f"--model.{named}"} < set(model)
    assert not [option for option, help_ in model.items() if not help_]


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("VBoN", {"n": 3.0, "bound": "lower", "estimator": "clipped", "minibatches": 2}),
        ("KLRL", {"beta": 0.3, "estimator": "ppo", "epochs_per_rollout": 2}),
        ("BOND", {"divergence": "forward", "forward_responses": None, "anchor_every": 7}),
        ("WIND", {"fit": "nce", "beta": 0.5}),
        ("SFT", {"dropout": False}),
        ("BoNSFT", {"n": 3, "selection": "groups", "eval_samples": 2}),
        ("DPO", {"n": 3, "loss": "bonbon", "alpha": 0.01}),
        ("QRPO", {"beta": 0.3, "ties": "mid", "responses": "policy"}),
        ("AStarPO", {"beta1": 0.5, "beta2": 0.3}),
        ("BoNRegression", {"n": 2.5, "log_ratio_floor": -2.0}),
        ("ReferenceSampler", {"samples": 7}),
    ],
)
def test_a_printed_config_parses_to_itself(
    module: str,
    arguments: dict[str, Any],
    vbon: Run,
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    written = config(files, tmp_path, model={"class_path": module, "init_args": arguments})
    command = "predict" if module == "ReferenceSampler" else "fit"

    def printed(path: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit, match="0"):
            vbon(command, "--config", path, "--print_config")
        return capsys.readouterr().out

    first = printed(written)
    values = yaml.safe_load(first)
    assert values["model"]["init_args"].items() >= arguments.items()
    (tmp_path / "again.yaml").write_text(first)
    assert printed(str(tmp_path / "again.yaml")) == first


def test_seeds_and_models_are_linked(vbon: Run, files: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["vbon"])
    made = cli.run(["fit", "--config", config(files, tmp_path), "--seed_everything", "11"])
    assert (made.model.seed, made.datamodule.seed) == (11, 11)
    assert made.model.actor_spec is made.datamodule.actors
    assert made.model.batches_seen == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml"]  # no logger, so nothing to save


# -- a whole session ------------------------------------------------------------------------------------


def test_predict_fit_validate(vbon: Run, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = str(tmp_path / "table")
    sampler = {"class_path": "ReferenceSampler", "init_args": {"samples": 16}}
    sampling = config(files, tmp_path / "predict", model=sampler, data__reference_table=table)
    vbon("predict", "--config", sampling)
    assert ReferenceTable.open(table).samples == 16
    assert len(ReferenceTable.open(table)) == 13
    vbon("predict", "--config", sampling)  # nothing is left to do
    assert len(ReferenceTable.open(table)) == 13

    model = {"class_path": "VBoN", "init_args": {"n": 4, "samples_per_prompt": 4}}
    training = config(files, tmp_path / "fit", model=model, data__reference_table=table)
    vbon("fit", "--config", training, "--trainer.enable_checkpointing", "true", "--trainer.logger", "true")
    (last,) = tmp_path.rglob("*.ckpt")
    assert list(tmp_path.rglob("lightning_logs/vbon/config.yaml"))
    vbon("validate", "--config", training, "--ckpt_path", str(last))

    # The checkpoint's settings neither win silently nor lose silently.
    resume = ["fit", "--config", training, "--ckpt_path", str(last), "--trainer.max_steps", "3"]
    message = failure(capsys, lambda: vbon(*resume, "--model.n", "3"))
    assert "n: checkpoint has 4.0, this run has 3.0" in message
    vbon(*resume)

    # A table made otherwise.
    message = failure(capsys, lambda: vbon("fit", "--config", training, "--data.temperature", "0.5"))
    assert "temperature: the table has 1.0, this run has 0.5" in message
    message = failure(capsys, lambda: vbon("fit", "--config", training, "--data.train.path", str(files / "texts.txt")))
    assert re.search(r"prompt 'aa' .* is not among the 13 prompts", message)
    message = failure(capsys, lambda: vbon("fit", "--config", training, "--model.n", "17"))
    assert "M = 16 reference rewards a prompt, fewer than n = 17" in message
    message = failure(capsys, lambda: vbon("predict", "--config", sampling, "--ckpt_path", str(last)))
    assert "takes no --ckpt_path" in message


def test_learning_from_the_table_alone(
    vbon: Run, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = str(tmp_path / "table")
    sampler = {"class_path": "ReferenceSampler", "init_args": {"samples": 16}}
    vbon("predict", "--config", config(files, tmp_path / "predict", model=sampler, data__reference_table=table))
    monitors = [
        {"class_path": "vbon_lightning.callbacks.PolicyExport", "init_args": {"directory": str(tmp_path / "export")}},
        *({"class_path": f"vbon_lightning.callbacks.{name}"} for name in ("KLMonitor", "BestOfNWinRate")),
    ]
    for name, arguments in (
        ("BoNSFT", {"n": 4, "responses_per_prompt": 2}),
        ("BoNSFT", {"n": 4, "selection": "groups"}),
        ("DPO", {"n": 4, "beta": 0.5}),
        ("DPO", {"n": 4, "loss": "bonbon"}),
    ):
        model = {"class_path": name, "init_args": arguments}
        path = config(files, tmp_path / "fit", model=model, data__reference_table=table, trainer__callbacks=monitors)
        vbon("fit", "--config", path, "--trainer.enable_checkpointing", "true", "--trainer.default_root_dir", "run")
        last = max((tmp_path / "run").rglob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
        card = (tmp_path / "export" / "README.md").read_text()
        assert f"trained with {name} by" in card
        assert all(metric in card for metric in ("train/loss", "val/kl", "val/win_rate_vs_bon4"))
        assert ("train/accuracy" in card) == ("train/margin" in card) == (name == "DPO")
        vbon("validate", "--config", path, "--ckpt_path", str(last))
        vbon("fit", "--config", path, "--ckpt_path", str(last), "--trainer.max_steps", "3")
        message = failure(
            capsys,
            lambda path=path, last=last: vbon(
                "fit", "--config", path, "--ckpt_path", str(last), "--trainer.max_steps", "3", "--model.n", "3"
            ),
        )
        assert "n: checkpoint has 4, this run has 3" in message

    path = config(files, tmp_path / "fit", model={"class_path": "DPO", "init_args": {"n": 4}})
    assert "DPO learns from cached responses: name a table" in failure(capsys, lambda: vbon("fit", "--config", path))
    many = ("--data.reference_table", table, "--model.n", "17")
    message = failure(capsys, lambda: vbon("fit", "--config", path, *many))
    assert "M = 16 responses a prompt, fewer than the 34" in message
    message = failure(capsys, lambda: vbon("fit", "--config", path, "--model.n", "1"))
    assert "model.n must be an integer > 1, got 1" in message


@pytest.mark.parametrize("target", ["me/mine", {"repo_id": "me/mine", "private": True}, "not a name"], ids=str)
def test_an_export_names_its_place_on_the_hub(
    target: Any, vbon: Run, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    api = FakeApi("whoami")
    monkeypatch.setattr(hub, "HfApi", lambda: api)
    export = {"class_path": "vbon_lightning.callbacks.PolicyExport", "init_args": {"push_to_hub": target}}
    found = failure(capsys, lambda: vbon("fit", "--config", config(files, tmp_path, trainer__callbacks=[export])))
    if target == "not a name":
        assert "push_to_hub: 'not a name' is no repository's name" in found and not api.calls
    else:
        assert "push_to_hub: cannot log in to the hub to write to 'me/mine': set HF_TOKEN" in found


# -- errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__init_args__n": 1}, "model.n must be a number > 1"),
        ({"model__init_args__n": 0.5}, "model.n must be a number > 1"),
        ({"model__init_args__n": 17}, "M = 16 reference rewards a prompt, fewer than n = 17"),
        ({"model__init_args__bound": "upper"}, "upper"),
        ({"model__init_args__estimator": "a2c"}, "a2c"),
        ({"model__init_args__kl_estimator": "k4"}, "k4"),
        ({"model__init_args__epochs_per_rollout": 2}, "REINFORCE is unbiased for one update"),
        ({"model__init_args__samples_per_prompt": 1}, "needs model.samples_per_prompt >= 2, got 1"),
        (
            {"model__init_args__estimator": "clipped", "model__init_args__minibatches": 3},
            "model.minibatches=3 does not divide data.batch_size=4",
        ),
        ({"model__init_args__reference_samples": 0}, "vBoN needs reference rewards: name a table"),
        (
            {"model__init_args__reference_samples": 0, "data__reference_table": "nowhere"},
            "there is no reference table in nowhere",
        ),
        ({"model__init_args__betta": 1}, "Option 'betta' is not accepted"),
        ({"model__class_path": "VBON"}, "VBON"),
        ({"model": None}, "fit.model"),
        ({"model": {"class_path": "ReferenceSampler"}}, "No `training_step()` method defined"),
        ({"data__temperature": -1.0}, "temperature must be positive"),
        ({"data__temperatur": 1.0}, "temperatur"),
        ({"data__max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"data__max_new_tokens": 62}, "exceed the model's context of 64 tokens"),
        ({"data__batch_size": 0}, "data.batch_size must be at least 1"),
        ({"data__batch_size": 11}, "10 training rows do not fill one batch of 11"),
        ({"data__reward": None}, "VBoN needs a reward: set `data.reward`"),
        ({"data__train": None}, "no train data: set `data.train`"),
        ({"data__train": {"path": "nowhere.txt"}}, "nowhere.txt"),
        ({"data__train": {"file": "x.txt"}}, "file"),
        ({"data__policy": "./nowhere"}, "nowhere"),
        ({"trainer__max_step": 3}, "max_step"),
        ({"datas": {"policy": "x"}}, "datas"),
    ],
    ids=str,
)
def test_a_mistake_ends_with_one_line(
    changes: dict[str, Any],
    message: str,
    vbon: Run,
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = config(files, tmp_path, **changes)
    found = failure(capsys, lambda: vbon("fit", "--config", path))
    assert message in found
    assert "Given value" not in found


@pytest.mark.parametrize("kind", ["nan", "short"])
def test_a_bad_reward_names_prompt_and_response(
    kind: str, vbon: Run, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = {
        "class_path": "vbon_lightning.rewards.CallableReward",
        "init_args": {"function": f"tests.modules.setting.{kind}_reward"},
    }
    path = config(files, tmp_path, data__reward=reward)
    found = failure(capsys, lambda: vbon("fit", "--config", path))
    if kind == "nan":
        assert re.search(r"is nan .*prompt '\w+', response '\w*'", found)
    else:
        assert "row 0 has 3 rewards for 4 responses" in found


def test_errors_of_the_command_line_itself(vbon: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere.yaml" in failure(capsys, lambda: vbon("fit", "--config", "nowhere.yaml"))
    assert "no command 'fitt': did you mean `vbon fit`?" in failure(capsys, lambda: vbon("fitt"))
    assert "no command 'xyz': the commands are init, fit, predict" in failure(capsys, lambda: vbon("xyz"))
    (Path.cwd() / "empty.yaml").write_text("{}")
    assert "stand behind it: vbon table" in failure(capsys, lambda: vbon("--config", "empty.yaml", "table"))
    assert "bogus" in failure(capsys, lambda: vbon("fit", "--data.policy", "x", "--bogus", "1"))


def test_a_missing_checkpoint(vbon: Run, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config(files, tmp_path)
    assert "nowhere.ckpt" in failure(capsys, lambda: vbon("fit", "--config", path, "--ckpt_path", "nowhere.ckpt"))


def test_a_run_that_diverges_or_a_checkpoint_that_is_broken_ends_with_one_line(
    vbon: Run, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 1e30}}
    export = {"class_path": "PolicyExport", "init_args": {"directory": str(tmp_path / "export")}}
    run = {"trainer__callbacks": [export], "trainer__default_root_dir": str(tmp_path), "trainer__max_steps": 1}
    vbon("fit", "--config", config(files, tmp_path / "good", trainer__enable_checkpointing=True, **run))
    before = (tmp_path / "export" / "model.safetensors").read_bytes()
    (kept,) = tmp_path.rglob("*.ckpt")
    path = config(files, tmp_path / "bad", model__init_args__optimizer=optimizer, **run | {"trainer__max_steps": 9})
    assert "training stopped at step 2: the loss is nan" in failure(capsys, lambda: vbon("fit", "--config", path))
    assert (tmp_path / "export" / "model.safetensors").read_bytes() == before
    data = bytearray(kept.read_bytes())
    data[len(data) // 2] ^= 1
    kept.write_bytes(data)
    good = str(tmp_path / "good" / "config.yaml")
    found = failure(capsys, lambda: vbon("fit", "--config", good, "--ckpt_path", str(kept)))
    assert f"the checkpoint {kept} is damaged" in found


def test_a_traceback_on_request(vbon: Run, files: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="n must be a number > 1"):
        vbon("fit", "--config", config(files, tmp_path, model__init_args__n=1), traceback=True)


def test_predict_asks_for_a_table_and_a_reward_first(
    vbon: Run, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sampler = {"class_path": "ReferenceSampler"}
    path = config(files, tmp_path, model=sampler)
    assert "set data.reference_table to a directory" in failure(capsys, lambda: vbon("predict", "--config", path))
    path = config(files, tmp_path, model=sampler, data__reference_table="table", data__reward=None)
    assert "needs a reward: set `data.reward`" in failure(capsys, lambda: vbon("predict", "--config", path))


def test_a_policy_and_reference_of_different_vocabularies(
    vbon: Run, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_tiny_model(tmp_path / "other", alphabet=ALPHABET[:5])
    path = config(files, tmp_path, data__reference=other)
    assert "vocabular" in failure(capsys, lambda: vbon("fit", "--config", path))


@pytest.mark.slow
def test_the_module_runs_without_clutter(files: Path, tmp_path: Path) -> None:
    """One real process: ``python -m vbon_lightning`` over two ranks that it starts itself."""
    path = config(files, tmp_path, trainer__devices=2, trainer__strategy="ddp", data__batch_size=2)
    done = subprocess.run(
        [sys.executable, "-m", "vbon_lightning", "fit", "--config", path],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "max_steps=2` reached" in output
    for clutter in ("Tip:", "Loading weights", "Warning", "deprecated", "litlogger"):
        assert clutter not in output, output


OWN_REWARD = """
def by_vowels(prompts, responses):
    raise {kind}("nothing to score")
"""


@pytest.mark.parametrize("kind", ["ValueError", "KeyError", "OSError", "SystemExit"])
def test_an_error_in_a_users_reward_says_where(
    kind: str, vbon: Run, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    module = f"own_reward_{kind.lower()}"
    (tmp_path / f"{module}.py").write_text(OWN_REWARD.format(kind=kind))
    monkeypatch.syspath_prepend(str(tmp_path))
    reward = {"class_path": "vbon_lightning.rewards.CallableReward", "init_args": {"function": f"{module}.by_vowels"}}
    path = config(files, tmp_path / "config", data__reward=reward)
    with pytest.raises(SystemExit) as stopped:
        vbon("fit", "--config", path)
    said = str(stopped.value)
    assert f"{module}.by_vowels raised {kind}" in said and f"in by_vowels ({tmp_path}" in said and "row 0" in said
    assert said.count("VBON_TRACEBACK=1") == 1
    with pytest.raises(ValueError, match="raised") as caught:
        vbon("fit", "--config", path, traceback=True)
    assert type(caught.value.__cause__).__name__ == kind


def test_an_error_in_a_users_class_says_where(
    vbon: Run, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_callback.py").write_text(
        "from lightning.pytorch import Callback\n\n\nclass Watch(Callback):\n"
        "    def on_train_start(self, trainer, pl_module):\n        raise ValueError('nothing to watch')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path = config(files, tmp_path / "config", trainer__callbacks=[{"class_path": "own_callback.Watch"}])
    with pytest.raises(SystemExit) as stopped:
        vbon("fit", "--config", path)
    said = str(stopped.value)
    assert (
        said.startswith("vbon: nothing to watch (in on_train_start, ")
        and "own_callback.py, line 6; VBON_TRACEBACK" in said
    )


# -- what a run leaves behind -----------------------------------------------------------------------------


def runs(directory: Path) -> set[str]:
    """Return where below a directory there are TensorBoard runs, as it names them."""
    return {str(path.parent.relative_to(directory)) for path in directory.rglob("events.out.tfevents.*")}


def test_runs_have_short_names(vbon: Run, files: Path, tmp_path: Path) -> None:
    path = config(files, tmp_path / "config", trainer__logger=None, trainer__enable_checkpointing=True)
    run = ["fit", "--config", path, "--trainer.default_root_dir", "runs/mine"]
    mine = tmp_path / "runs" / "mine"
    with pytest.raises(SystemExit, match="5000"):
        vbon(*run, "--data.max_new_tokens", "5000")
    assert not mine.exists()  # what could not be set up was no run
    vbon(*run)
    assert runs(tmp_path / "runs") == {"mine"}
    assert {"checkpoints", "config.yaml", "hparams.yaml", "samples"} <= {path.name for path in mine.iterdir()}
    vbon(*run)
    assert runs(tmp_path / "runs") == {"mine", "mine/version_1"}
    assert list((mine / "version_1" / "checkpoints").iterdir())
    # What is resumed goes on in the same place, what is only evaluated does not.
    (last,) = (mine / "checkpoints").iterdir()
    before = {path.name: path.read_bytes() for path in mine.iterdir() if path.is_file()}
    with pytest.raises(SystemExit, match="Resume with the settings"):
        vbon(*run, "--ckpt_path", str(last), "--data.temperature", "0.5")
    assert {path.name: path.read_bytes() for path in mine.iterdir() if path.is_file()} == before
    vbon(*run, "--ckpt_path", str(last), "--trainer.max_steps", "3")
    assert runs(tmp_path / "runs") == {"mine", "mine/version_1"}
    vbon("validate", *run[1:], "--ckpt_path", str(last))
    assert runs(tmp_path / "runs") == {"mine", "mine/version_1", "mine/version_2"}


def test_a_reference_table_is_no_run(vbon: Run, files: Path, tmp_path: Path) -> None:
    table = ["--model", "ReferenceSampler", "--model.samples", "2", "--data.reference_table", "table"]
    path = config(files, tmp_path / "config", trainer__logger=None, model=None)
    vbon("predict", "--config", path, *table, "--trainer.default_root_dir", "runs/mine")
    assert (tmp_path / "table").is_dir()
    assert not runs(tmp_path)


def test_a_run_without_a_directory_is_called_by_its_method(vbon: Run, files: Path, tmp_path: Path) -> None:
    vbon("fit", "--config", config(files, tmp_path / "config", trainer__logger=True))
    assert runs(tmp_path / "lightning_logs") == {"vbon"}


def test_a_logger_of_ones_own_is_left_alone(vbon: Run, files: Path, tmp_path: Path) -> None:
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "csv"}}
    vbon("fit", "--config", config(files, tmp_path / "config", trainer__logger=logger))
    assert not runs(tmp_path)
    assert (tmp_path / "csv/lightning_logs/version_0/metrics.csv").is_file()
    vbon("fit", "--config", config(files, tmp_path / "config"))  # no logger
    assert not runs(tmp_path)


def test_the_best_policy_takes_one_line(vbon: Run, files: Path, tmp_path: Path) -> None:
    callbacks = [
        {"class_path": "BestPolicy", "init_args": {"max_kl": 50.0}},
        {"class_path": "PolicyExport", "init_args": {"best": True}},
    ]
    changes = {"trainer__callbacks": callbacks, "trainer__enable_checkpointing": True}
    path = config(files, tmp_path / "config", **changes)
    vbon("fit", "--config", path, "--trainer.val_check_interval", "1", "--trainer.default_root_dir", "run")
    assert len(list((tmp_path / "run/checkpoints").glob("best-step=*.ckpt"))) == 1
    assert "the best `val/win_rate`" in (tmp_path / "run/export/README.md").read_text()


def test_defaults_are_replaced_by_their_short_names(vbon: Run, files: Path, tmp_path: Path) -> None:
    own = [
        {"class_path": "BestOfNWinRate", "init_args": {"n": [3]}},
        {"class_path": "SampleTable", "init_args": {"enabled": False}},
    ]
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "csv"}}
    path = config(files, tmp_path / "config", trainer__callbacks=own, trainer__logger=logger)
    vbon("fit", "--config", path, "--trainer.log_every_n_steps", "1")
    header = (tmp_path / "csv/lightning_logs/version_0/metrics.csv").read_text().splitlines()[0].split(",")
    assert "train/win_rate_vs_bon3" in header and "train/win_rate_vs_bon4" not in header
    assert {"train/kl", "train/reward", "val/kl"} <= set(header)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_how_the_reward_is_called_is_a_line_of_yaml(
    vbon: Run, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = {"workers": 2, "retries": 1, "timeout_s": 60, "on_missing": "skip"}
    path = config(files, tmp_path, data__reward_calls=calls)
    with pytest.raises(SystemExit):
        vbon("fit", "--config", path, "--print_config")
    printed = yaml.safe_load(capsys.readouterr().out)["data"]["reward_calls"]
    assert printed == calls | {"backoff_s": 1.0, "per_call": None}
    vbon("fit", "--config", path)
    found = failure(capsys, lambda: vbon("fit", "--config", path, "--data.reward_calls.workers", "0"))
    assert "data.reward_calls.workers must be an integer >= 1, got 0" in found


def test_rows_may_stand_in_the_configuration(vbon: Run, files: Path, tmp_path: Path, capsys: Any) -> None:
    rows = [{"text": text} for text in ("ab", "cd", "ba", "dc", "abc", "d", "c", "da")]
    vbon("fit", "--config", config(files, tmp_path, data__train=rows))
    vbon("fit", "--config", config(files, tmp_path, data__train={"path": rows, "column": "text", "stop": 4}))
    found = failure(capsys, lambda: vbon("fit", "--config", config(files, tmp_path, data__train=[{"txt": 1}] * 8)))
    assert "8 rows in memory: which column holds the text" in found
