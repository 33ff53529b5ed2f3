"""Write what the reference sampler predicts into the reference table, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from vbon_lightning.paths import resolve_path
from vbon_lightning.reference_table import PromptLeases, ReferenceTable, TableRow, table_path, table_summary
from vbon_lightning.reference_table import ReferenceTableWriter as TableFiles


class ReferenceTableWriter(BasePredictionWriter):
    """Write each predicted batch to the data module's reference table as soon as it is there.

    A finished batch survives a kill; ``vbon predict`` goes on with the prompts that are missing, and with the responses
    that are missing to those of a smaller table. Any number of processes write side by side, each prompts that it took
    and nobody else has. ``ReferenceSampler`` brings this callback along.

    Args:
        lease_s: How long a process may stay silent before others take over the prompts that it had taken.
    """

    def __init__(self, lease_s: float = 60.0) -> None:
        super().__init__(write_interval="batch")
        self.lease_s = lease_s
        self._files: TableFiles | None = None
        self._leases: PromptLeases | None = None
        self._samples = 1
        self.table: ReferenceTable | None = None
        """The table as it was when it was opened; None if it held nothing."""
        self._finished: set[str] = set()
        self.taken: set[str] = set()
        """Keys of the prompts that are this process's to make."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the table, refusing one made with other models or settings, before anything is sampled."""
        if stage != "predict":
            return
        data = getattr(trainer, "datamodule", None)
        if data is None or getattr(data, "reference_table", None) is None:
            raise ValueError("`vbon predict` needs a place for the table: set data.reference_table to a directory")
        path = resolve_path(data.reference_table)
        if path.startswith("memory://"):
            rank_zero_warn(f"the reference table {path} is in the memory of this process, and gone when it ends")
        with data.actors.reference_checked():
            self._files = TableFiles(table_path(path), data.fingerprint())
        self.taken.clear()
        self._samples, self.table = getattr(pl_module, "samples", 1), None
        self._leases = PromptLeases(self._files.path / "leases", self._files.shard, seconds=self.lease_s)
        self._files.remove_leftovers(self._leases.sweep())
        # Every rank must deal out the same prompts, so all look before any writes.
        if self._files.finished_keys():
            self.table = ReferenceTable.open(self._files.path)
            self._samples = getattr(pl_module, "samples", self.table.most_samples)
            self._finished = self._finished_of(self.table, self._samples)
            for key, prompt in data.table_prompts().items():
                self.table.check_text(key, prompt.text)
        trainer.strategy.barrier("reference table opened")

    def _finished_of(self, table: ReferenceTable, samples: int) -> set[str]:
        """Return the prompts that a table has so many responses to, refusing to make rows of fewer than others have."""
        if (most := table.most_samples) > samples:
            raise ValueError(
                f"the reference table {table.path} holds {most} responses a prompt, and model.samples={samples} is "
                f"fewer: set it to {most} or more (more tops the table up). A training that is to use fewer "
                "says so with data.table_samples"
            )
        return {key for key in table.keys() if table.count(key) >= samples}  # noqa: SIM118

    def finished_keys(self) -> set[str]:
        """Return the prompts that the table held all responses to when somebody last looked."""
        return self._finished

    def take(self, keys: Iterable[str]) -> list[str]:
        """Take the prompts of a group that are neither in the table nor at work elsewhere.

        Args:
            keys: Keys of prompts.

        Returns:
            The keys of the prompts taken; none where another process is at the group.
        """
        assert self._files is not None
        assert self._leases is not None
        wanted = [key for key in keys if key not in self._finished]
        if not (taken := self._leases.take(wanted)):
            return []
        # Whoever had them until now may have written them in the meantime.
        self._finished = self._files.finished_keys(self._samples)
        self._leases.release(self._finished.intersection(taken))
        self.taken.update(set(taken) - self._finished)
        return [key for key in taken if key not in self._finished]

    def look_again(self) -> set[str]:
        """Return the prompts that the table holds now."""
        assert self._files is not None
        self._finished = self._files.finished_keys(self._samples)
        return self._finished

    def holders(self, keys: Iterable[str]) -> list[str]:
        """Return the names of other processes that took some of these prompts.

        Args:
            keys: Keys of prompts.
        """
        assert self._leases is not None
        return self._leases.holders(keys)

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one batch's rows."""
        self.write(prediction)

    def write(self, rows: list[TableRow]) -> None:
        """Write rows to the table, whose prompts are nobody's work from then on.

        Args:
            rows: The rows.
        """
        if self._files is not None and self._leases is not None and rows:
            self._files.write(rows)
            self._leases.release(row.key for row in rows)
            self.taken.difference_update(row.key for row in rows)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge this process's files and those of processes that died, and say what the table now holds."""
        if self._files is None or self._leases is None:
            return
        self._merge(self._files, self._leases)
        self._leases.close()
        trainer.strategy.barrier("reference table written")
        if trainer.is_global_zero:
            summary = table_summary(ReferenceTable.open(self._files.path))
            rank_zero_info(f"reference table {self._files.path}: " + ", ".join(f"{k} {v}" for k, v in summary.items()))

    def _merge(self, files: TableFiles, leases: PromptLeases) -> None:
        files.remove_leftovers(leases.sweep())
        abandoned = files.in_pieces() - leases.others()
        # One at a time: two would do the same work, though they would lose nothing.
        files.compact(abandoned if abandoned and leases.take(["merging"]) else ())

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let others have the prompts that were taken and will not be made."""
        self.teardown(trainer, pl_module, "predict")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let others have what was taken and not made."""
        if self._leases is not None:
            self._leases.close()
