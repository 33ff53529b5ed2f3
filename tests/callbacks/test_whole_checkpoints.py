"""Every run writes whole checkpoints, unless it has a plugin of its own, and clears up after those that were killed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import TorchCheckpointIO

from tests.callbacks.replay import make_trainer
from tests.callbacks.tiny import Tiny
from vbon_lightning.callbacks import WholeCheckpoints
from vbon_lightning.checkpoints import WholeCheckpointIO
from vbon_lightning.staging import lock


def fit(directory: Path, callback: WholeCheckpoints, **arguments: Any) -> Any:
    kept = ModelCheckpoint(dirpath=directory, save_last=True)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": True, "max_steps": 1}
    trainer = make_trainer(directory, callback, kept, **(options | arguments))
    trainer.fit(Tiny())
    return trainer


class Own(TorchCheckpointIO):
    """A user's plugin."""


@pytest.mark.parametrize(
    ("enabled", "plugins", "expected"),
    [
        (True, [], WholeCheckpointIO),
        (False, [], TorchCheckpointIO),
        (True, [Own()], Own),
        (False, [WholeCheckpointIO()], WholeCheckpointIO),
    ],
)
def test_which_one_writes(enabled: bool, plugins: list[Any], expected: type, tmp_path: Path) -> None:
    trainer = fit(tmp_path, WholeCheckpoints(enabled), plugins=plugins)
    assert type(trainer.strategy.checkpoint_io) is expected
    digest = b"vbon_lightning sha256" in (tmp_path / "last.ckpt").read_bytes()[-100:]
    assert digest == (expected is WholeCheckpointIO)


@pytest.mark.parametrize("enabled", [True, False])
def test_leftovers_go_and_what_is_being_written_stays(enabled: bool, tmp_path: Path) -> None:
    places = [tmp_path / "run" / version / "checkpoints" for version in ("", "version_1", "version_2")]
    for place in places:
        place.mkdir(parents=True)
        (place / ".last.ckpt.0123abcd.partial").touch()
    (tmp_path / "checkpoints").mkdir()
    other = tmp_path / "checkpoints" / ".last.ckpt.0123abcd.partial"  # of another run
    live = places[1] / ".last.ckpt.89abcdef.partial"
    for path in (other, live):
        path.touch()
    with live.open("ab") as stream:
        lock(stream.fileno())
        kept = ModelCheckpoint(save_last=True)
        logger = CSVLogger(tmp_path, name="run", version="version_2")
        trainer = make_trainer(
            tmp_path, WholeCheckpoints(enabled), kept, logger=logger, enable_checkpointing=True, max_steps=1
        )
        trainer.fit(Tiny())
        hidden = [sorted(name for name in os.listdir(place) if name.startswith(".")) for place in places]
    assert kept.dirpath == str(places[2])
    everything = [[".last.ckpt.0123abcd.partial"]] * 3
    everything[1] = [*everything[1], live.name]
    assert hidden == ([[], [live.name], []] if enabled else everything)
    assert other.exists()
