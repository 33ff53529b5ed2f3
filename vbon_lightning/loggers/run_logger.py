"""TensorBoard's logger with short names of runs, and metrics beside the hyper-parameters."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

COMPARED = ("val/reward", "val/kl", "val/win_rate", "train/reward", "train/kl", "train/win_rate")
"""What stands beside the hyper-parameters in HPARAMS: the last value of each that a run has."""


class RunLogger(TensorBoardLogger):
    """Log to TensorBoard under the run's own name: ``runs/demo/vbon`` is shown as ``vbon`` by ``--logdir runs/demo``.

    The first run in a directory writes right into it; a later one goes to ``version_1``, ``version_2``, ... below it,
    so that no two runs share a curve. A resumed run goes on where its checkpoint lies. A run that failed before it had
    anything to log or to keep leaves nothing behind. HPARAMS has the last rewards, KL and win rates beside the
    hyper-parameters. ``vbon fit`` logs by it unless it is given a logger.

    Args:
        save_dir: The run's directory.
        resumed_from: The checkpoint of the run that is resumed, or ``last`` for the newest run in the directory.
        method: What the run's method is called in HPARAMS, beside its name.
        compared: Metrics to show in HPARAMS.
        **kwargs: What ``TensorBoardLogger`` takes, but its name.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        resumed_from: str | os.PathLike[str] | None = None,
        method: str | None = None,
        compared: Sequence[str] = COMPARED,
        **kwargs: Any,
    ) -> None:
        self.compared = list(compared)
        self.shown = {"policy": Path(save_dir).name, **({} if method is None else {"method": method})}
        given: dict[str, Any] = {"version": run_version(Path(save_dir), resumed_from), "default_hp_metric": False}
        super().__init__(save_dir=Path(save_dir), name="", **(given | kwargs))
        self._has_begun = False

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers; the epoch, which Lightning adds to them, does not get the first of all charts."""
        self._has_begun = True
        super().log_metrics({_EPOCH if name == "epoch" else name: value for name, value in metrics.items()}, step)

    @rank_zero_only
    def log_hyperparams(
        self,
        params: dict[str, Any] | Namespace,
        metrics: dict[str, Any] | None = None,
        step: int | None = None,
    ) -> None:
        """Log hyper-parameters, and name the metrics that are to stand beside them."""
        super().log_hyperparams(params, metrics, step)
        if not metrics:
            from torch.utils.tensorboard.summary import hparams  # slow to import

            shown = self.shown | {
                name: value if isinstance(value, bool | int | float | str) else str(value)
                for name, value in dict(self.hparams).items()
                if value is not None
            }
            for summary in hparams(shown, dict.fromkeys(self.compared, 0.0)):
                self.experiment.file_writer.add_summary(summary)

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Note that the run has something to keep."""
        self._has_begun = True

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the log; where the run failed as it was set up, as if it had not been: the next takes its place."""
        writer: Any = None if self._experiment is None else self._experiment.file_writer
        events = None if writer is None else Path(writer.event_writer._file_name)
        super().finalize(status)
        if status == "failed" and not self._has_begun and events is not None:
            events.unlink(missing_ok=True)
            if not any(events.parent.glob(f"{_EVENTS}*")):
                (events.parent / self.NAME_HPARAMS_FILE).unlink(missing_ok=True)
                with suppress(OSError):  # something else lies there
                    events.parent.rmdir()


_EPOCH, _EVENTS = "trainer/epoch", "events.out.tfevents."


def run_version(directory: Path, resumed_from: str | os.PathLike[str] | None = None) -> str:
    """Return where below its directory a run logs: nowhere below, or ``version_N`` where another run was before it.

    Args:
        directory: The run's directory.
        resumed_from: The checkpoint that is resumed; where it lies in this directory, so does the run. ``last`` is of
            the newest run.
    """
    taken = [""] if any(directory.glob(f"{_EVENTS}*")) else []
    numbers = sorted(
        int(path.name.removeprefix("version_"))
        for path in directory.glob("version_*")
        if path.name.removeprefix("version_").isdigit()
    )
    taken += [f"version_{number}" for number in numbers]
    if resumed_from in ("last", "best"):
        return taken[-1] if taken else ""
    if resumed_from is not None:
        home = Path(resumed_from).absolute().parent.parent
        of_runs = {directory.absolute() / name: name for name in ["", *taken]}
        if home in of_runs:
            return of_runs[home]
    return f"version_{numbers[-1] + 1 if numbers else 1}" if taken else ""
