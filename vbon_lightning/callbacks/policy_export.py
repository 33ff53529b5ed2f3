"""The trained policy as a plain Hugging Face directory, with a model card."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vbon_lightning.callbacks.model_card import BestWeights, model_card
from vbon_lightning.checkpoints import read_checkpoint
from vbon_lightning.models import HubError, HubTarget, ReadBackError, as_hub_target, save_pretrained
from vbon_lightning.sharding import is_part, is_sharded, plain_copy
from vbon_lightning.staging import check_writable, clear_leftovers
from vbon_lightning.whole_files import atomic_file


class PolicyExport(Callback):
    """Export the policy at the end of training as a plain Hugging Face directory.

    The directory holds the model, its tokenizer, a generation config with the sampling settings the policy
    was trained at, and a model card. It is read again and compared with the policy, appears whole or not at all, and
    replaces an older one. With ``fast_dev_run`` nothing is written.

    With ``push_to_hub`` it is uploaded, too, once training has ended and the directory is whole. Token and repository
    are checked before the first step; an upload that fails ends the run with an error that names the directory.

    Args:
        directory: Where to; ``export`` in the trainer's ``default_root_dir`` by default.
        every_validation: Also after each validation, replacing the export before.
        dtype: Precision of the exported weights, such as ``bfloat16``; the policy's own by default.
        best: At the end of training, export the weights of the best checkpoint instead of the last ones: of the first
            ``ModelCheckpoint`` that has a ``monitor``. The policy itself stays as it is.
        push_to_hub: Repository of the Hugging Face Hub, ``organisation/name``, or a mapping: ``repo_id``, ``private``,
            ``revision``, ``commit_message``. The token is that of ``HF_TOKEN`` or of ``hf auth login``.
    """

    def __init__(
        self,
        directory: str | None = None,
        every_validation: bool = False,
        dtype: str | None = None,
        best: bool = False,
        push_to_hub: str | HubTarget | None = None,
    ) -> None:
        self.push_to_hub = as_hub_target(push_to_hub)
        self.directory, self.every_validation, self.dtype, self.best = directory, every_validation, dtype, best
        self._target: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settle where to and, if asked for the best, that there will be one, before anything expensive."""
        fast: int = trainer.fast_dev_run  # type: ignore[attr-defined]
        self._target = None if fast else Path(self.directory or Path(trainer.default_root_dir, "export"))
        if self.best and stage == "fit" and not fast and _monitor_of(trainer) is None:
            raise ValueError(
                "PolicyExport has `best`, but no ModelCheckpoint says which checkpoint is the best: add BestPolicy, "
                "or one with a `monitor`, such as val/loss"
            )
        if self._target is not None and stage == "fit" and trainer.is_global_zero:
            check_writable(self._target, "the export")
            clear_leftovers(self._target.parent, self._target.name)  # of a run that was killed as it exported
        if self.push_to_hub is not None and stage == "fit" and not fast:
            _on_rank_zero(trainer, self.push_to_hub.prepare)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export, where asked to, after a validation within training."""
        fitting = trainer.state.fn == TrainerFn.FITTING
        if self.every_validation and fitting and not trainer.sanity_checking:
            self._export(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export; once all callbacks have ended training, so that averaged weights are exported as such."""
        checkpoint = _monitor_of(trainer) if self.best else None
        if checkpoint is not None and not checkpoint.best_model_path:
            rank_zero_warn(f"no checkpoint was kept by {checkpoint.monitor!r}: the last weights are exported")
            checkpoint = None
        self._export(trainer, pl_module, checkpoint)
        if self.push_to_hub is not None and self._target is not None:
            hub, target = self.push_to_hub, self._target
            message = f"{type(pl_module).__name__} after {trainer.global_step} steps"
            _on_rank_zero(trainer, lambda: rank_zero_info(f"It is at {hub.upload(target, message=message)}"))

    def _export(self, trainer: Trainer, pl_module: LightningModule, checkpoint: ModelCheckpoint | None = None) -> None:
        if self._target is None:
            return
        # A sharded policy is put together by all, and written by one.
        if trainer.is_global_zero or is_sharded(pl_module):
            with nullcontext() if checkpoint is None else _weights_of(checkpoint, pl_module) as best:
                policy = plain_copy(cast(PreTrainedModel, pl_module.policy))
                if policy is not None:
                    self._write(trainer, pl_module, policy, self._target, best)
        trainer.strategy.barrier("policy export")

    def _write(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        policy: PreTrainedModel,
        target: Path,
        best: BestWeights | None,
    ) -> None:
        tokenizer = cast(PreTrainedTokenizerBase, pl_module.tokenizer)
        settings = getattr(pl_module, "generation_settings", None) if policy.can_generate() else None
        name = None if self.push_to_hub is None else self.push_to_hub.repo_id
        try:
            save_pretrained(
                policy,
                tokenizer,
                target,
                generation=settings() if callable(settings) else None,
                dtype=self.dtype,
                texts={"README.md": model_card(trainer, pl_module, best, name)},
            )
        except ReadBackError as error:
            kept = target.with_name(f"{target.name}.state_dict.pt")
            with atomic_file(kept) as stream:
                torch.save({f"policy.{name}": value for name, value in policy.state_dict().items()}, stream)
            raise ReadBackError(f"{error}; the policy's weights are in {kept}, and checkpoints stay") from error
        rank_zero_info(f"The policy was exported to {target}")


def _on_rank_zero(trainer: Trainer, do: Callable[[], None]) -> None:
    """Do something that may fail on one rank, and fail on all if it does: the others would wait for ever."""
    problem = None
    if trainer.is_global_zero:
        try:
            do()
        except HubError as error:
            problem = error
    problem = trainer.strategy.broadcast(problem)
    if problem is not None:
        raise problem


def _monitor_of(trainer: Trainer) -> ModelCheckpoint | None:
    """Return the callback that knows the best checkpoint, if there is one."""
    kept = [part for part in trainer.checkpoint_callbacks if isinstance(part, ModelCheckpoint)]
    return next((part for part in kept if part.monitor is not None and part.save_top_k != 0), None)


@contextmanager
def _weights_of(checkpoint: ModelCheckpoint, pl_module: LightningModule) -> Iterator[BestWeights]:
    """Give the module the weights of the best checkpoint for a while."""
    # Written by this run, and may hold whatever its callbacks keep.
    content = read_checkpoint(checkpoint.best_model_path, weights_only=False)
    own = {name: _kept(value.detach()) for name, value in pl_module.state_dict().items()}
    score = checkpoint.best_model_score
    try:
        pl_module.load_state_dict(content["state_dict"])
        yield BestWeights(content["global_step"], str(checkpoint.monitor), float("nan" if score is None else score))
    finally:
        pl_module.load_state_dict(own)


def _kept(value: Tensor) -> Tensor:
    # A part of a sharded weight is small, and stays where its parts are.
    return value.clone() if is_part(value) else value.to("cpu", copy=True)
