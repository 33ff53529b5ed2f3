"""The samples that are written for people to read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.callbacks.replay import Replay, make_trainer
from tests.rollouts import make_rollout, silence
from vbon_lightning.callbacks import SampleTable
from vbon_lightning.callbacks.sample_table import sample_markdown
from vbon_lightning.types import Rollout


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run_directory(tmp_path: Path) -> Path:
    return tmp_path / "run" / "0"


@pytest.fixture
def val() -> list[Rollout]:
    return [make_rollout(seed=1, fillers=1), make_rollout(seed=2, first=3), make_rollout(seed=3, first=6)]


def test_the_first_valid_prompts_of_an_epoch_are_written(tmp_path: Path, val: list[Rollout]) -> None:
    trainer = make_trainer(tmp_path, SampleTable(prompts=4, samples=2), max_epochs=2)
    trainer.fit(Replay([make_rollout()] * 2, val))
    files = sorted(path.name for path in (run_directory(tmp_path) / "samples").iterdir())
    assert files == ["val-00000002.jsonl", "val-00000004.jsonl"]
    rows = read(run_directory(tmp_path) / "samples" / files[0])
    # The third row of the first batch is a filler.
    assert [row["index"] for row in rows] == [0, 1, 3, 4]
    assert [row["prompt"] for row in rows] == ["prompt | 0", "prompt | 1", "prompt | 3", "prompt | 4"]
    assert {(row["stage"], row["step"], len(row["responses"])) for row in rows} == {("val", 2, 2)}
    second = rows[3]["responses"][1]
    rollout = val[1]
    assert second == {
        "text": "response 4.1",
        "reward": rollout.rewards[1, 1].item(),
        "tokens": rollout.completions.mask[1, 1].sum().item(),
        "finished": rollout.completions.finished[1, 1].item(),
    }


def test_tensorboard_shows_a_table(tmp_path: Path, val: list[Rollout]) -> None:
    make_trainer(tmp_path, SampleTable(prompts=1)).fit(Replay([make_rollout()], val))
    events = EventAccumulator(str(run_directory(tmp_path))).Reload()
    (event,) = events.Tensors("val/samples/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert "| prompt | response | reward | tokens |" in text
    assert "prompt \\| 0 | response 0.0" in text


def test_training_samples_every_so_many_steps(tmp_path: Path) -> None:
    train = [make_rollout(seed=i, first=3 * i) for i in range(6)]
    trainer = make_trainer(tmp_path, SampleTable(every_n_steps=2, prompts=2), accumulate_grad_batches=2)
    trainer.fit(Replay(train, [make_rollout()]))
    files = sorted(path.name for path in (run_directory(tmp_path) / "samples").iterdir())
    assert files == ["train-00000002.jsonl", "val-00000003.jsonl"]
    # Step 2 ends with the fourth batch.
    assert [row["index"] for row in read(run_directory(tmp_path) / "samples" / files[0])] == [9, 10]


def test_a_directory_of_ones_own(tmp_path: Path, val: list[Rollout]) -> None:
    own = tmp_path / "own"
    trainer = make_trainer(tmp_path, SampleTable(directory=str(own)))
    trainer.test(Replay(test=val), verbose=False)
    assert [path.name for path in own.iterdir()] == ["test-00000000.jsonl"]


def test_a_logger_without_text_gets_none(tmp_path: Path, val: list[Rollout]) -> None:
    logger = CSVLogger(str(tmp_path), name="csv", version="0")
    make_trainer(tmp_path, SampleTable(), logger=logger).fit(Replay([make_rollout()], val))
    assert (tmp_path / "csv" / "0" / "samples" / "val-00000001.jsonl").is_file()


@pytest.mark.parametrize("arguments", [{"fast_dev_run": True}, {"logger": False}])
def test_nothing_breaks_without_a_log_directory(tmp_path: Path, val: list[Rollout], arguments: dict) -> None:
    arguments = {"default_root_dir": str(tmp_path)} | arguments
    trainer = make_trainer(tmp_path, SampleTable(every_n_steps=1), **arguments)
    trainer.fit(Replay([make_rollout()], val))
    assert trainer.global_step == 1
    written = list(tmp_path.rglob("*.jsonl"))
    assert bool(written) == ("fast_dev_run" not in arguments)


def test_the_sanity_check_writes_nothing(tmp_path: Path, val: list[Rollout]) -> None:
    trainer = make_trainer(tmp_path, SampleTable(), num_sanity_val_steps=2)
    trainer.fit(Replay([make_rollout()], val))
    assert [path.name for path in tmp_path.rglob("*.jsonl")] == ["val-00000001.jsonl"]


def test_a_module_without_responses_is_named(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="brings no responses"):
        make_trainer(tmp_path, SampleTable()).fit(Replay(steps=2))
    assert not list(tmp_path.rglob("*.jsonl"))


def test_any_text_fits_a_cell() -> None:
    response = {"text": "a|b\n<b>`c`\n\n", "reward": 0.5, "tokens": 3, "finished": False}
    rows = [{"prompt": "", "responses": [response]}]
    line = sample_markdown(rows).splitlines()[2]
    assert line == "| (empty) | a\\|b<br>&lt;b>\\`c\\`<br><br> […] | 0.500 | 3 |"


@pytest.mark.parametrize("arguments", [{"prompts": 0}, {"samples": 0}, {"every_n_steps": -1}])
def test_sizes_are_checked(arguments: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        SampleTable(**arguments)


def test_a_response_without_a_reward_has_none(tmp_path: Path) -> None:
    rollout = silence(make_rollout(), (0, 1))
    trainer = make_trainer(tmp_path, SampleTable(prompts=1, samples=2, directory=str(tmp_path / "own")))
    trainer.validate(Replay([], val=[rollout]))
    (path,) = (tmp_path / "own").iterdir()
    row = json.loads(path.read_text())
    assert [one["reward"] for one in row["responses"]] == [float(rollout.rewards[0, 0]), None]
    assert sample_markdown([row]).splitlines()[-1].split(" | ")[2] == "-"
