"""Write what the reference sampler predicts into the reference table, batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from vbon_lightning.paths import resolve_path
from vbon_lightning.reference_table import ReferenceTable, TableRow, table_summary
from vbon_lightning.reference_table import ReferenceTableWriter as TableFiles


class ReferenceTableWriter(BasePredictionWriter):
    """Write each predicted batch to the data module's reference table as soon as it is there.

    A finished batch survives a kill; ``vbon predict`` goes on with the prompts that are missing, and with the responses
    that are missing to those of a smaller table. Processes write side by side. ``ReferenceSampler`` brings this
    callback along.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")
        self._files: TableFiles | None = None
        self._path: Path | None = None
        self.table: ReferenceTable | None = None
        """The table as it was when it was opened; None if it held nothing."""
        self._finished: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the table, refusing one made with other models or settings, before anything is sampled."""
        if stage != "predict":
            return
        data = getattr(trainer, "datamodule", None)
        if data is None or getattr(data, "reference_table", None) is None:
            raise ValueError("`vbon predict` needs a place for the table: set data.reference_table to a directory")
        self._path = Path(resolve_path(data.reference_table))
        self._files = TableFiles(self._path, data.fingerprint(), shard=f"rank{trainer.global_rank}")
        # Every rank must deal out the same prompts, so all look before any writes.
        if self._files.finished_keys():
            self.table = ReferenceTable.open(self._path)
            self._finished = self._finished_of(self.table, getattr(pl_module, "samples", self.table.most_samples))
            for key, prompt in data.table_prompts().items():
                self.table.check_text(key, prompt.text)
        trainer.strategy.barrier("reference table opened")

    def _finished_of(self, table: ReferenceTable, samples: int) -> set[str]:
        """Return the prompts that a table has so many responses to, refusing to make rows of fewer than others have."""
        if (most := table.most_samples) > samples:
            raise ValueError(
                f"the reference table {self._path} holds {most} responses a prompt, and model.samples={samples} is "
                f"fewer: set it to {most} or more (more tops the table up). A training that is to use fewer "
                "says so with data.table_samples"
            )
        return {key for key in table.keys() if table.count(key) >= samples}  # noqa: SIM118

    def finished_keys(self) -> set[str]:
        """Return the prompts that the table held all responses to when it was opened."""
        return self._finished

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
        """Write rows to the table.

        Args:
            rows: The rows.
        """
        if self._files is not None and rows:
            self._files.write(rows)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge this process's files, and say what the table now holds."""
        if self._files is None or self._path is None:
            return
        self._files.compact()
        trainer.strategy.barrier("reference table written")
        if trainer.is_global_zero:
            summary = table_summary(ReferenceTable.open(self._path))
            rank_zero_info(f"reference table {self._path}: " + ", ".join(f"{k} {v}" for k, v in summary.items()))
