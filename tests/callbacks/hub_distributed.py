"""What each of two processes runs for the test of a failing upload; the test starts it twice."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from tests.callbacks.replay import make_trainer
from tests.callbacks.tiny import Tiny
from tests.models.test_hub import FakeApi
from tests.ranks import leave
from vbon_lightning.callbacks import PolicyExport
from vbon_lightning.models import HubError, hub

if __name__ == "__main__":
    directory, fails, rank = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    api = FakeApi(fails)
    hub.HfApi = lambda: api  # type: ignore[assignment, misc]
    export = PolicyExport(str(directory / "out"), push_to_hub="me/mine")
    trainer = make_trainer(directory, export, devices=2, strategy="ddp")
    try:
        trainer.fit(Tiny())
        said = ""
    except HubError as problem:
        said = str(problem)
    (directory / f"{os.getpid()}-rank{rank}.txt").write_text(f"{len(api.calls)} {trainer.global_step} {said}")
    leave()
