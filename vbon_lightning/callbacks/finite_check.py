"""A run that diverges ends at the step where it does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from vbon_lightning.callbacks.late_numbers import LateNumbers
from vbon_lightning.finite import NotFiniteError, first_not_finite, has_numbers, largest
from vbon_lightning.types import Rollout

LEAST_SCALE = 1e-4
"""The loss scale of 16-bit training below which no gradient is ever finite: it starts at 65536."""


class _Step(NamedTuple):
    number: int
    names: list[str]
    """Those of the parameters that have a gradient."""
    module: LightningModule
    batch: Any


class FiniteCheck(Callback):
    """Stop at the first loss or gradient that is NaN or infinite, with the step's number and where it comes from.

    On a CPU it stops before the weights take the step. On a GPU the numbers are read a step later, for nothing to wait
    for the device, and always before a checkpoint is written or a validation begins. All ranks stop at the same step.
    In 16-bit training with a loss scale (``16-mixed``) gradients overflow now and then, and the scaler leaves those
    steps out: only the loss is looked at, and a scale that has shrunk away.

    Args:
        enabled: False to do nothing, in place of the callback that a module brings along.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._losses: list[Tensor] = []
        self._batch: Any = None
        self._late: LateNumbers[_Step] = LateNumbers(_judge)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._losses = []
        self._late.forget()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch, to name its prompts."""
        self._batch = batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the loss of a batch until the update; alone on a CPU look at it at once."""
        if not self.enabled:
            return
        loss = loss.detach().float()
        self._losses.append(loss)
        if self._is_alone(trainer, loss) and not loss.isfinite():
            _judge(loss.view(1), _Step(trainer.global_step + 1, [], pl_module, self._batch))

    def _is_alone(self, trainer: Trainer, loss: Tensor) -> bool:
        # Other ranks would wait for this one's gradients for ever: with them all stop at the update.
        return trainer.world_size == 1 and loss.device.type == "cpu"

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look at the losses and gradients of an update.

        Raises:
            NotFiniteError: If one is NaN or infinite.
        """
        losses, self._losses = self._losses, []
        if not self.enabled or not losses:
            return
        named = [] if _scaler_of(trainer) is not None else list(_gradients(pl_module, optimizer))
        sizes = [torch.stack(losses).sum().view(1)]
        if named:
            sizes.append(largest([gradient for _, gradient in named]))
        numbers = torch.cat([part.to(sizes[0].device) for part in sizes])
        if trainer.world_size > 1:
            # What is not finite on one rank is not in the mean.
            numbers = trainer.strategy.reduce(numbers, reduce_op="mean")
        note = _Step(trainer.global_step + 1, [name for name, _ in named], pl_module, self._batch)
        self._late.put(numbers, note)

    def _settle(self, trainer: Trainer) -> None:
        if not self.enabled:
            return
        self._late.settle()
        scaler = _scaler_of(trainer)
        if scaler is not None and scaler.is_enabled() and scaler.get_scale() < LEAST_SCALE:
            raise NotFiniteError(
                f"training stopped at step {trainer.global_step}: the gradients are not finite at any loss scale (it "
                f"has shrunk to {scaler.get_scale():.3g}), and no step is taken; {_ADVICE}"
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read what has not been read."""
        self._settle(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read what has not been read."""
        self._settle(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read what has not been read, before anything is exported."""
        self._settle(trainer)
        self._batch = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Read what has not been read: a checkpoint of a run that diverged is not written."""
        self._settle(trainer)


def _scaler_of(trainer: Trainer) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)


def _gradients(pl_module: LightningModule, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    learnt = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in pl_module.named_parameters():
        if id(parameter) in learnt and parameter.grad is not None and has_numbers(parameter.grad):
            yield name, parameter.grad


_ADVICE = (
    "the last checkpoint and export stay as they are. Lower the learning rate, or clip gradients "
    "(trainer.gradient_clip_val)"
)


def _judge(numbers: Tensor, step: _Step) -> None:
    """Raise NotFiniteError unless the sum of the losses, and then each gradient's size, is finite."""
    if bool(numbers.isfinite().all()):
        return
    loss, sizes = float(numbers[0]), numbers[1:]
    if not numbers[0].isfinite():
        what = f"the loss is {loss}{_cause(step.module, step.batch)}"
    else:
        bad = [name for name, finite in zip(step.names, sizes.isfinite().tolist(), strict=True) if not finite]
        more = f" and of {len(bad) - 1} more parameters" if len(bad) > 1 else ""
        what = f"the gradient of {bad[0]}{more} holds NaN or infinity, where the loss is {loss:.4g}"
        what += _bad_weight(step.module)
    raise NotFiniteError(f"training stopped at step {step.number}: {what}; {_ADVICE}")


def _cause(module: LightningModule, batch: Any) -> str:
    """Say where a loss that is not finite comes from, as far as that can be seen."""
    if found := _bad_weight(module):
        return found
    rollout = getattr(module, "last_rollout", None)
    if rollout is not None and (response := _bad_response(rollout)) is not None:
        return f": {response} are not finite"
    texts = getattr(getattr(batch, "prompts", batch), "text", None)
    return f", in the batch of the prompt {texts[0]!r}" if texts else ""


def _bad_weight(module: LightningModule) -> str:
    actors = getattr(module, "actors", None)
    models: list[tuple[str, Any]] = [("", module)]
    models += [(f"{role} model's ", getattr(actors, role, None)) for role in ("reference", "value")]
    for whose, model in models:
        if isinstance(model, nn.Module):
            bad = first_not_finite(model.named_parameters())
            if bad is not None:
                return f": the {whose}weight {bad} holds NaN or infinity"
    return ""


def _bad_response(rollout: Rollout) -> str | None:
    """Name the first response of which something is not finite, and what."""
    for name in ("rewards", "reference_log_probs", "log_probs", "token_kl", "reference_rewards"):
        values = getattr(rollout, name)
        if values is None:
            continue
        finite = values.isfinite() | ~rollout.prompts.valid.view(-1, *[1] * (values.dim() - 1))
        if name == "rewards":
            finite = finite | values.isnan()  # which stands for none
        if bool(finite.all()):
            continue
        row, place = (~finite).nonzero()[0].tolist()[:2]
        said = f"the {name.replace('_', ' ')} of the prompt {rollout.prompts.text[row]!r}"
        return said if name == "reference_rewards" else f"{said}, response {rollout.responses[row][place]!r}"
    return None
