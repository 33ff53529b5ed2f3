"""The trained policy as a plain Hugging Face directory, with a model card."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path
from typing import cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vbon_lightning.callbacks.model_card import model_card
from vbon_lightning.models import save_pretrained


class PolicyExport(Callback):
    """Export the policy at the end of training as a plain Hugging Face directory.

    The directory holds the model, its tokenizer, a generation config with the sampling settings the policy
    was trained at, and a model card. It appears whole or not at all, and replaces an older one. With
    ``fast_dev_run`` nothing is written.

    Args:
        directory: Where to; ``export`` in the trainer's ``default_root_dir`` by default.
        every_validation: Also after each validation, replacing the export before.
        dtype: Precision of the exported weights, such as ``bfloat16``; the policy's own by default.
    """

    def __init__(self, directory: str | None = None, every_validation: bool = False, dtype: str | None = None) -> None:
        self.directory, self.every_validation, self.dtype = directory, every_validation, dtype
        self._target: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settle where to, before anything expensive."""
        fast: int = trainer.fast_dev_run  # type: ignore[attr-defined]
        self._target = None if fast else Path(self.directory or Path(trainer.default_root_dir, "export"))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export, where asked to, after a validation within training."""
        fitting = trainer.state.fn == TrainerFn.FITTING
        if self.every_validation and fitting and not trainer.sanity_checking:
            self._export(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export; once all callbacks have ended training, so that averaged weights are exported as such."""
        self._export(trainer, pl_module)

    def _export(self, trainer: Trainer, pl_module: LightningModule) -> None:
        target = self._target
        if target is None:
            return
        if trainer.is_global_zero:
            policy = cast(PreTrainedModel, pl_module.policy)
            tokenizer = cast(PreTrainedTokenizerBase, pl_module.tokenizer)
            settings = getattr(pl_module, "generation_settings", None) if policy.can_generate() else None
            target.parent.mkdir(parents=True, exist_ok=True)
            staged = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.staged")
            try:
                save_pretrained(
                    policy, tokenizer, staged, generation=settings() if callable(settings) else None, dtype=self.dtype
                )
                Path(staged, "README.md").write_text(model_card(trainer, pl_module), encoding="utf-8")
                replace_directory(staged, target)
            finally:
                shutil.rmtree(staged, ignore_errors=True)
            rank_zero_info(f"The policy was exported to {target}")
        trainer.strategy.barrier("policy export")


def replace_directory(staged: Path, target: Path) -> None:
    """Rename a complete directory to its final name; an older one there goes once the new one is there.

    Args:
        staged: The complete directory, beside the target.
        target: The name it should have.
    """
    if not target.exists():
        os.replace(staged, target)
        return
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.old")
    os.replace(target, old)
    try:
        os.replace(staged, target)
    except BaseException:
        os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)
