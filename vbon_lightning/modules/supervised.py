"""What SFT and reward modelling share: they learn from text that is given, and count as they evaluate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from vbon_lightning.callbacks import TensorBoardLayout
from vbon_lightning.callbacks.defaults import GUARDS
from vbon_lightning.modules.base import AlignmentModule
from vbon_lightning.sampling import noise_seed


class SupervisedModule(AlignmentModule):
    """Evaluate with torchmetrics, over all ranks and each row once; a subclass says what it counts."""

    needs_reference = False
    uses_reward = False
    watched_by = (*GUARDS, TensorBoardLayout)  # no response is sampled

    @property
    def response_room(self) -> int:
        """Return 0: nothing is sampled."""
        return 0

    def on_validation_start(self) -> None:
        """Check that the texts fit the model's context, and start counting anew."""
        super().on_validation_start()
        self._start_counting()

    def on_test_start(self) -> None:
        """Check that the texts fit the model's context, and start counting anew."""
        super().on_test_start()
        self._start_counting()

    def begin_batch(self) -> None:
        """Count a training batch and seed its dropout by (seed, rank, batch): a resumed run continues the stream."""
        torch.manual_seed(noise_seed(self.seed, "dropout", self.global_rank, self.batches_seen))
        self.batches_seen += 1

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Count a batch."""
        self.count(batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Count a batch."""
        self.count(batch)

    def on_validation_epoch_end(self) -> None:
        """Log what was counted."""
        self._log_epoch("val")

    def on_test_epoch_end(self) -> None:
        """Log what was counted."""
        self._log_epoch("test")

    def count(self, batch: Any) -> None:
        """Update the metrics."""
        raise NotImplementedError(f"{type(self).__name__} must say what it counts")

    def counted(self) -> dict[str, Tensor]:
        """Return what the metrics say, by the names it is logged under."""
        raise NotImplementedError(f"{type(self).__name__} must say what it counts")

    def _start_counting(self) -> None:
        # An evaluation before left the metrics in inference mode, where fit may not write.
        for part in self.children():
            if isinstance(part, Metric):
                part.reset()

    def _log_epoch(self, stage: str) -> None:
        values = {f"{stage}/{name}": value for name, value in self.counted().items()}
        self._start_counting()
        self.log_dict(values, prog_bar=True)
