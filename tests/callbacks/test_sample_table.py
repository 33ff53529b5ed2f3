"""The samples that are written for people to read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.callbacks.replay import Replay, make_trainer
from tests.crashes import count_calls, killed_at, with_files_of
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


def texts(directory: Path, tag: str) -> dict[int, str]:
    events = EventAccumulator(str(run_directory(directory))).Reload()
    return {event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors(f"{tag}/text_summary")}


class Improves(Replay):
    """Answers otherwise at each validation."""

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        rollout = super().validation_step(batch, batch_idx)["rollout"]
        said = [[f"{text} of {self.trainer.global_step}" for text in row] for row in rollout.responses]
        return {"rollout": rollout._replace(responses=said)}


def test_responses_of_a_prompt_stand_side_by_side(tmp_path: Path) -> None:
    val = [make_rollout(prompts=2, seed=1)]
    make_trainer(tmp_path, SampleTable(prompts=2, samples=2), max_epochs=7).fit(Improves([make_rollout()], val))
    shown = texts(tmp_path, "val/samples")
    assert list(shown) == [1, 2, 3, 4, 5, 6, 7]
    first, second = shown[2].split("\n\n**")
    assert first.startswith("**prompt &#124; 0**\n\n| step 1 | step 2 |\n")
    assert second.startswith("prompt &#124; 1**")
    line = first.splitlines()[5].strip("| ").split(" | ")  # the second sample
    assert [cell.split("<br>")[0].removesuffix(" […]") for cell in line] == ["response 0.1 of 1", "response 0.1 of 2"]
    assert line[0].endswith(f"*reward {val[0].rewards[0, 1]:.3f}, {val[0].completions.mask[0, 1].sum()} tokens*")
    # The first, for how it began, and the last four.
    assert "| step 1 | step 4 | step 5 | step 6 | step 7 |" in shown[7]


def test_a_resumed_run_shows_what_was_before(tmp_path: Path) -> None:
    kept, val = ModelCheckpoint(tmp_path, save_last=True), [make_rollout()]
    make_trainer(tmp_path, SampleTable(), kept, enable_checkpointing=True).fit(Improves([make_rollout()], val))
    again = make_trainer(tmp_path, SampleTable(), max_epochs=2)
    again.fit(Improves([make_rollout()], val), ckpt_path=tmp_path / "last.ckpt")
    assert "| step 1 | step 2 |" in texts(tmp_path, "val/samples")[2]


def test_an_evaluation_of_its_own_shows_itself_alone(tmp_path: Path, val: list[Rollout]) -> None:
    table, module = SampleTable(prompts=1), Improves([make_rollout()], val, test=val)
    trainer = make_trainer(tmp_path, table, max_epochs=2)
    trainer.fit(module)
    assert "| step 1 | step 2 |\n" in texts(tmp_path, "val/samples")[2]
    trainer.validate(module, verbose=False)
    assert "\n| step 2 |\n" in texts(tmp_path, "val/samples")[2]
    trainer.test(module, verbose=False)
    assert "| step 2 |\n" in texts(tmp_path, "test/samples")[2]


def test_another_prompt_in_its_place_does_not_stand_beside_it() -> None:
    response = {"text": "a", "reward": 0.0, "tokens": 1, "finished": True}
    rows = {step: [{"prompt": f"{step}", "responses": [response]}] for step in (1, 2)}
    assert "step 1" not in sample_markdown(rows)
    assert "| step 2 |" in sample_markdown(rows)


def test_other_loggers_get_a_table(tmp_path: Path, val: list[Rollout]) -> None:
    logger: Any = create_autospec(WandbLogger, instance=True)
    logger.save_dir, logger.name, logger.version = str(tmp_path), "run", "0"
    make_trainer(tmp_path, SampleTable(prompts=1, samples=2), logger=logger).fit(Replay([make_rollout()], val))
    (name,), given = logger.log_table.call_args
    assert (name, given["step"]) == ("val/samples", 1)
    assert list(given["columns"]) == ["step", "prompt", "response", "reward", "tokens", "finished"]
    assert [row[:3] for row in given["data"]] == [[1, "prompt | 0", f"response 0.{sample}"] for sample in (0, 1)]
    assert given["data"][1][3] == pytest.approx(val[0].rewards[0, 1].item())


def test_conversations_are_shown_turn_by_turn(tmp_path: Path) -> None:
    rollout = make_rollout(prompts=2)
    rendered = ["<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"] * 2
    talks = [[{"role": "user", "content": "Hello"}], [{"role": "system", "content": "Be | brief"}]]
    plain = rollout._replace(prompts=rollout.prompts._replace(text=rendered))
    talked = rollout._replace(prompts=plain.prompts._replace(messages=talks))
    for directory, shown in ((tmp_path / "talked", talked), (tmp_path / "plain", plain)):
        make_trainer(directory, SampleTable()).fit(Replay([make_rollout()], [shown]))
    assert "**user: Hello**" in texts(tmp_path / "talked", "val/samples")[1]
    assert "**system: Be &#124; brief**" in texts(tmp_path / "talked", "val/samples")[1]
    assert "**user: Hello<br><br>assistant:**" in texts(tmp_path / "plain", "val/samples")[1]
    (path,) = (tmp_path / "talked").rglob("val-*.jsonl")
    assert [row["prompt"] for row in read(path)] == ["user: Hello", "system: Be | brief"]


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
    shown = sample_markdown({7: [{"prompt": "", "responses": [response]}]})
    assert shown == (
        "**(empty)**\n\n| step 7 |\n| :--- |\n| a&#124;b<br>&lt;b>\\`c\\` […]<br>*reward 0.500, 3 tokens* |\n"
    )


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
    assert "*reward -, " in sample_markdown({1: [row]})


def test_killed_at_every_call_or_out_of_room(tmp_path: Path) -> None:
    table = SampleTable(directory=str(tmp_path / "samples"))
    trainer = create_autospec(
        Trainer, is_global_zero=True, global_step=3, loggers=[], sanity_checking=False, fast_dev_run=False
    )
    trainer.state = TrainerState()
    target = tmp_path / "samples" / "val-00000003.jsonl"

    def write() -> None:
        table.setup(trainer, None, "fit")  # type: ignore[arg-type]
        table.begin("val")
        table.see(trainer, None, "val", make_rollout())  # type: ignore[arg-type]
        table.end(trainer, None, "val")  # type: ignore[arg-type]

    calls = count_calls(write, tmp_path)
    whole = target.read_text()
    for call in range(1, calls + 1):
        shutil.rmtree(tmp_path / "samples")
        assert killed_at(call, write, tmp_path) == "died"
        assert not target.exists() or target.read_text() == whole
        write()
        assert target.read_text() == whole and os.listdir(target.parent) == [target.name]
    for fatal, end in ((True, "died"), (False, "failed")):
        assert with_files_of(100, write, fatal=fatal) == end
        assert target.read_text() == whole
