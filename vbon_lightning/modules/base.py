"""What every module shares: loading, optimizer injection, policy-only checkpoints, and a guarded resume."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vbon_lightning.actors import Actors, ActorSpec
from vbon_lightning.checks import check_same_settings

OptimizerCallable = Callable[[Iterable], Optimizer]
LRSchedulerCallable = Callable[[Optimizer], LRScheduler]


class AlignmentModule(LightningModule):
    """Load the actors, build the injected optimizer, and keep checkpoints to the policy.

    Args:
        actors: The policy, reference and reward, as the data module names them (``datamodule.actors``).
        seed: Seeds sampling and the initialisation of a policy made from a config.
        optimizer: Builds the optimizer from parameters; AdamW with learning rate 1e-4 by default.
        lr_scheduler: Builds a learning-rate scheduler from the optimizer, stepped once an update.
    """

    batch_kind = "prompts"
    """Which batches the data module should bring: ``prompts`` or ``text``."""
    needs_reference = True

    def __init__(
        self,
        actors: ActorSpec,
        seed: int = 0,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.actor_spec, self.seed = actors, seed
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        self.actors: Actors | None = None
        self.policy: PreTrainedModel | None = None
        self.batches_seen = 0
        self._settings: dict[str, Any] = {}

    # -- settings -----------------------------------------------------------------------------------------------

    def record_settings(self, **settings: Any) -> None:
        """Record the plain settings that a checkpoint must agree with to be resumed; they are logged as well."""
        self._settings = {"module": type(self).__name__, "seed": self.seed, **settings}
        self.save_hyperparameters(self._settings)

    # -- models -------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the policy's tokenizer."""
        return self.loaded.tokenizer

    @property
    def loaded(self) -> Actors:
        """Return the loaded actors.

        Raises:
            RuntimeError: Before ``configure_model`` has run.
        """
        if self.actors is None:
            raise RuntimeError("the models are not loaded yet: call configure_model() first (the Trainer does)")
        return self.actors

    def configure_model(self) -> None:
        """Load the models once."""
        if self.actors is None:
            self.actors = Actors.load(
                self.actor_spec, seed=self.seed, trainable=self.trains_policy, reference=self.needs_reference
            )
            self.policy = self.actors.policy

    trains_policy = True

    def generation_settings(self) -> dict[str, Any]:
        """Return what an exported generation config should say."""
        actors = self.loaded
        ends = list(actors.end_ids)
        return {
            "do_sample": True,
            "temperature": actors.temperature,
            "top_k": 0,
            "top_p": 1.0,
            "max_new_tokens": actors.max_new_tokens,
            "eos_token_id": ends[0] if len(ends) == 1 else ends,
        }

    # -- optimisation -------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """Build the injected optimizer and scheduler over the trainable parameters."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not parameters:
            raise ValueError("the policy has no trainable parameters")
        optimizer = torch.optim.AdamW(parameters, lr=1e-4) if self._optimizer is None else self._optimizer(parameters)
        if self._lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self._lr_scheduler(optimizer), "interval": "step"},
        }

    # -- checkpoints --------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the position in the data, the models' identity and the random state."""
        checkpoint["vbon_lightning"] = {
            "settings": self._settings,
            "actors": self.actor_spec.identity(),
            "batches_seen": self.batches_seen,
            "random_state": torch.get_rng_state(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another run; otherwise go on where it stopped.

        Raises:
            ConfigMismatchError: Naming what differs.
            ValueError: If the checkpoint was not written by this package.
        """
        state = checkpoint.get("vbon_lightning")
        if state is None:
            raise ValueError("this checkpoint was not written by vbon_lightning: it cannot be resumed")
        check_same_settings(state["settings"], self._settings, what="module")
        check_same_settings(state["actors"], self.actor_spec.identity(), what="model")
        self.batches_seen = state["batches_seen"]
        torch.set_rng_state(state["random_state"].cpu())

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the policy strictly, whatever ``strict_loading`` says: a checkpoint without one is an error."""
        self.configure_model()
        return nn.Module.load_state_dict(self, state_dict, strict=True, assign=assign)
