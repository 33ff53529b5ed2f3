"""What each of two processes runs for the test of the callbacks' values; the test starts it twice."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.callbacks.replay import Replay, make_trainer, stream
from tests.callbacks.test_finite_check import Diverging
from tests.callbacks.test_rollout_metrics import all_monitors
from tests.ranks import leave
from vbon_lightning.callbacks import FiniteCheck
from vbon_lightning.finite import NotFiniteError

if __name__ == "__main__":
    directory, rank = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    trainer = make_trainer(
        directory, *all_monitors(), devices=2, strategy="ddp", log_every_n_steps=3, use_distributed_sampler=True
    )
    trainer.fit(Replay(stream(6), stream(4, seed=30)))
    torch.save({name: float(value) for name, value in trainer.callback_metrics.items()}, directory / f"rank{rank}.pt")
    # One rank's loss, or its gradient, is not finite: both stop at the same step.
    said = []
    for how in ("loss", "gradient"):
        two = make_trainer(directory / how, FiniteCheck(), devices=2, strategy="ddp", logger=False)
        try:
            two.fit(Diverging(how, at=2, rank=1))
        except NotFiniteError as problem:
            said.append(f"{two.global_step} {problem}")
    (directory / f"diverged{rank}.txt").write_text("\n".join(said))
    leave()
