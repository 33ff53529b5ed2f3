"""Training against an anchor: a reference that follows the policy, and is state like it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from vbon_lightning.actors import ActorSpec, average_anchor, make_anchor, replace_anchor
from vbon_lightning.modules.base import AlignmentModule, LRSchedulerCallable, OptimizerCallable
from vbon_lightning.types import PromptBatch


class Anchored(AlignmentModule):
    """Let the reference of training move: replaced by the policy every so many updates, or averaged with it.

    The anchor is a sub-module without a gradient: in checkpoints, in no optimizer and in no process's traffic; every
    process moves its own by the same numbers. It starts as the reference. Validation and test compare the policy with
    the reference, which stays. Without either option there is no anchor, and the reference takes its place.

    Args:
        actors: The policy, reference and reward, as the data module names them.
        anchor_every: K, updates after which the anchor becomes the policy; 0 for never.
        anchor_rate: ``anchor <- (1 - rate) anchor + rate policy`` after each update; 0 for never.
        seed: Seeds sampling and the initialisation of a policy made from a config.
        optimizer: Builds the optimizer from parameters.
        lr_scheduler: Builds a learning-rate scheduler from the optimizer.
    """

    reads_reference_rewards: bool = False
    """Whether the method learns from rewards of the reference's, or the anchor's, responses."""

    reference_samples: int = 0
    """How many of these responses a prompt are sampled at every step; 0 where a table's are read."""

    def __init__(
        self,
        actors: ActorSpec,
        anchor_every: int = 0,
        anchor_rate: float = 0.0,
        *,
        seed: int = 0,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(actors, seed=seed, optimizer=optimizer, lr_scheduler=lr_scheduler)
        check_anchor(anchor_every, anchor_rate)
        self.anchor_every, self.anchor_rate = anchor_every, anchor_rate
        self.anchor: PreTrainedModel | None = None

    @property
    def anchor_moves(self) -> bool:
        """Return whether the reference of training is not that of evaluation."""
        return self.anchor_every > 0 or self.anchor_rate > 0

    @property
    def updates_per_rollout(self) -> int:
        """Return how many updates are made on one rollout."""
        return 1

    def record_settings(self, **settings: Any) -> None:
        """Record how the anchor moves, if it does."""
        moving = {"anchor_every": self.anchor_every, "anchor_rate": self.anchor_rate} if self.anchor_moves else {}
        super().record_settings(**(moving | settings))

    def setup(self, stage: str) -> None:
        """Refuse what does not go together with an anchor that moves, before anything expensive."""
        if stage != "fit" or not self.anchor_moves:
            return
        option = "model.anchor_every" if self.anchor_every else "model.anchor_rate"
        if self.uses_value_model:
            raise ValueError(
                f"a value model knows the rewards of the reference and not of an anchor that moves: set "
                f"model.value_model to false, or {option} to 0"
            )
        if self.reads_reference_rewards and not self.reference_samples:
            raise ValueError(
                f"{option} moves the anchor away from the reference whose rewards a table holds: set "
                "model.reference_samples to how many responses a prompt are sampled from the anchor at each step"
            )
        several = self.updates_per_rollout
        between = self.anchor_every and self.anchor_every % several == 0 and self.trainer.accumulate_grad_batches == 1
        if several > 1 and not between:
            raise ValueError(
                f"the anchor must not move amid the {several} updates of a rollout: set model.anchor_every to a "
                "multiple of them, without model.anchor_rate and trainer.accumulate_grad_batches"
            )
        if self.anchor_rate and str(self.trainer.precision) in ("bf16-true", "16-true"):
            raise ValueError(
                f"trainer.precision {self.trainer.precision} rounds an average away that moves by "
                f"{self.anchor_rate:g} a step: set it to bf16-mixed, or use model.anchor_every"
            )

    def configure_model(self) -> None:
        """Load the models, and copy the policy where the anchor moves."""
        super().configure_model()
        if self.anchor_moves and self.anchor is None:
            actors = self.loaded
            self.anchor = actors.anchor = make_anchor(actors.policy, actors.reference)
            narrow = [p.dtype for p in actors.policy.parameters() if p.requires_grad and torch.finfo(p.dtype).bits < 32]
            if self.anchor_rate and narrow:
                raise ValueError(
                    f"weights of {narrow[0]} round an average away that moves by {self.anchor_rate:g} a step: leave "
                    "the policy's dtype out, or use model.anchor_every"
                )

    def of_the_anchor(self, batch: PromptBatch) -> PromptBatch:
        """Return a batch of training without a table's rewards, where these are not the anchor's."""
        return batch._replace(reference_rewards=None) if self.anchor_moves else batch

    def after_update(self) -> None:
        """Also have the anchor follow."""
        super().after_update()
        if self.anchor is None:
            return
        assert self.policy is not None
        if self.anchor_rate:
            average_anchor(self.anchor, self.policy, self.anchor_rate)
        elif self.updates % self.anchor_every == 0:
            replace_anchor(self.anchor, self.policy)

    # -- checkpoints -------------------------------------------------------------------------------

    def _trained_names(self) -> set[str]:
        names = super()._trained_names()
        if self.anchor is None:
            return names
        return names | {"anchor." + name.removeprefix("policy.") for name in names if name.startswith("policy.")}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load policy and anchor; what is only evaluated needs no anchor, and takes a checkpoint with or without one.

        Raises:
            ValueError: Naming the weights that are missing, superfluous or of another shape.
        """
        if not self.resuming:
            self.configure_model()
            own = {name: value for name, value in self.state_dict().items() if name.startswith("anchor.")}
            given = {name: value for name, value in state_dict.items() if name in own or not name.startswith("anchor.")}
            state_dict = own | given
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


def check_anchor(anchor_every: int, anchor_rate: float) -> None:
    """Refuse an anchor that moves in two ways, or in none that makes sense.

    Raises:
        ValueError: Naming the option.
    """
    if isinstance(anchor_every, bool) or not isinstance(anchor_every, int) or anchor_every < 0:
        raise ValueError(f"model.anchor_every must be an integer >= 0, got {anchor_every!r}")
    if not 0 <= anchor_rate <= 1:
        raise ValueError(f"model.anchor_rate must be in [0, 1], got {anchor_rate}")
    if anchor_every and anchor_rate:
        raise ValueError(
            f"model.anchor_every={anchor_every} replaces the anchor and model.anchor_rate={anchor_rate:g} averages it, "
            "one of them perhaps by default: set model.anchor_rate to 0 to replace it, or model.anchor_every to 0 to "
            "average it"
        )
