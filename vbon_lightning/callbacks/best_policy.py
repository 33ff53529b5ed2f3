"""The best checkpoint of a run: the highest win rate among those whose KL stays within a bound."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

_IS_COST = re.compile(r"nll|loss|perplexity|error|kl\b|kl_|tied|missing")
"""What the metrics are called (docs/metrics.md) that are better the lower they are."""


class BestPolicy(ModelCheckpoint):
    """Keep the checkpoint of the validation with the highest win rate whose KL to the reference is within a bound.

    Runs peak before they end, and a win rate can always be bought by more KL. Of validations that are equally good the
    first is kept. A resumed run goes on with what it knew. ``PolicyExport`` with ``best: true`` exports these weights.

    Args:
        max_kl: The most KL, in nats; no bound by default.
        monitor: What is to be as good as possible, such as ``val/reward`` where there is no win rate.
        mode: Whether ``max`` or ``min`` of it is best; by default the least of losses, perplexities, KL and ties, the
            most of everything else.
        kl: The metric that must stay within the bound.
        dirpath: Where to; ``checkpoints`` in the log directory by default.
        filename: Name of the file.
        save_top_k: How many of the best to keep.
        save_weights_only: Leave out what only a resumed run needs.
    """

    def __init__(
        self,
        max_kl: float | None = None,
        monitor: str = "val/win_rate",
        mode: Literal["max", "min"] | None = None,
        kl: str = "val/kl",
        dirpath: str | Path | None = None,
        filename: str | None = "best-{step}",
        save_top_k: int = 1,
        save_weights_only: bool = False,
    ) -> None:
        if max_kl is not None and not max_kl > 0:
            raise ValueError(f"BestPolicy's max_kl must be a positive number of nats, got {max_kl}")
        self.max_kl, self.kl = max_kl, kl
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            monitor=monitor,
            mode=mode or ("min" if _IS_COST.search(monitor) else "max"),
            save_top_k=save_top_k,
            save_weights_only=save_weights_only,
            # At the end of an epoch the last validation may be of weights that are gone.
            save_on_train_epoch_end=False,
        )

    @property
    def state_key(self) -> str:
        """Return the name of its state in a checkpoint: what was best under another bound is not taken over."""
        return self._generate_state_key(monitor=self.monitor, mode=self.mode, kl=self.kl, max_kl=self.max_kl)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a run without validation, before anything expensive.

        Raises:
            ValueError: If the data module has no validation data.
        """
        data: Any = getattr(trainer, "datamodule", None)
        if stage == "fit" and getattr(data, "sources", {"val": True}).get("val") is None:
            raise ValueError("BestPolicy compares validations, and there is no validation data: set data.val")
        super().setup(trainer, pl_module, stage)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the checkpoint of this validation, if it is the best.

        Raises:
            ValueError: If the metrics that it looks at were not logged; before training, where there is a sanity check.
        """
        if trainer.state.fn == TrainerFn.FITTING:
            for name in [self.monitor, *([] if self.max_kl is None else [self.kl])]:
                self._check_logged(str(name), trainer.callback_metrics)
        super().on_validation_end(trainer, pl_module)

    def _check_logged(self, name: str, found: Mapping[str, Tensor]) -> None:
        if name not in found:
            known = ", ".join(sorted(key for key in found if key.startswith("val/"))) or "no metrics of validations"
            raise ValueError(
                f"BestPolicy looks at {name}, which was not logged: there are {known}. A win rate needs reference "
                "rewards (data.reference_table or model.reference_samples)"
            )

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Return whether a validation is within the bound, and one of the best of those."""
        within = self.max_kl is None or bool(trainer.callback_metrics[self.kl] <= self.max_kl)
        if not trainer.strategy.reduce_boolean_decision(within) or (current is not None and bool(torch.isnan(current))):
            return False
        return super().check_monitor_top_k(trainer, current)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so where no validation was within the bound."""
        super().on_train_end(trainer, pl_module)
        if self.max_kl is not None and not self.best_model_path and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(f"BestPolicy kept no checkpoint: no validation had {self.kl} <= {self.max_kl:g}")
