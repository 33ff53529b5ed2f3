"""What every module shares: loading, optimizer injection, policy-only checkpoints, and a guarded resume."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vbon_lightning.actors import Actors, ActorSpec
from vbon_lightning.callbacks import (
    BestOfNWinRate,
    CollapseWarning,
    KLMonitor,
    RewardMonitor,
    SampleTable,
    TensorBoardLayout,
)
from vbon_lightning.callbacks.defaults import GUARDS, missing_callbacks
from vbon_lightning.checkpoints import read_checkpoint
from vbon_lightning.checks import check_same_settings, check_without_effect, plain
from vbon_lightning.models import describe_ends, vocabulary_size
from vbon_lightning.sampling.request import check_context
from vbon_lightning.sharding import is_sharded, spread_state
from vbon_lightning.types import Rollout

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
    """Which batches the data module should bring: ``prompts``, ``text``, or ``responses``: prompts, and in training the
    reference table's responses to them."""
    needs_reference = True
    uses_reward = True
    """Whether the method's result depends on the reward that the data module names."""
    uses_value_model = False
    """Whether the method reads the value model that the data module names."""
    trains_policy = True
    mean_over: Literal["responses", "tokens"] = "responses"
    """What the loss of a batch is a mean over, on all ranks and all batches of an update."""
    watched_by: Sequence[type[Callback]] = (
        *GUARDS,
        CollapseWarning,
        KLMonitor,
        RewardMonitor,
        BestOfNWinRate,
        SampleTable,
        TensorBoardLayout,
    )
    """The callbacks that the module brings along, unless the Trainer has ones of its own."""

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
        """Training batches dealt to this rank since the start of training, earlier runs included."""
        self.updates = 0
        """Steps of the optimizer since the start of training, earlier runs included."""
        self.last_rollout: Rollout | None = None
        """What the last training step sampled, to name a response where the loss is not finite."""
        self._weights: list[Tensor | float] = []
        """What the batches count whose gradients are accumulated for the next update."""
        self._settings: dict[str, Any] = {}
        self._optimizer_settings: dict[str, Any] | None = None
        self._resumed_optimizer_settings: dict[str, Any] | None = None

    # -- settings ----------------------------------------------------------------------------------

    def record_settings(self, **settings: Any) -> None:
        """Record the plain settings that a checkpoint must agree with to be resumed.

        They are logged, and ``load_from_checkpoint(path, actors=...)`` passes them to the constructor.
        """
        self._settings = {"seed": self.seed, **settings}
        self.save_hyperparameters(self._settings)

    def configure_callbacks(self) -> list[Callback]:
        """Bring along what guards the run and watches its policy; what the Trainer was given comes first."""
        check_strategy(self.trainer.strategy)
        if not self._settings:
            raise ValueError(
                f"{type(self).__name__} records no settings: call self.record_settings(...) in its constructor with "
                "the options that it adds, so that they are logged and a resume with others is refused"
            )
        return missing_callbacks(self.trainer, self.watched_by)

    # -- models ------------------------------------------------------------------------------------

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
                self.actor_spec,
                seed=self.seed,
                trainable=self.trains_policy,
                reference=self.needs_reference,
                value=self.uses_value_model,
            )
            self.policy = self.actors.policy

    def call_whole(self, method: str, *given: Any) -> Any:
        """Call a method that runs the models outside a step; where they are sharded, all ranks must.

        Args:
            method: Name of one of this module's methods.
            *given: Its arguments, one at least: on a GPU torch's sharding fails at a call without any.
        """
        if not is_sharded(self):
            return getattr(self, method)(*given)
        strategy: Any = self.trainer.strategy
        return strategy._forward_redirection(strategy.model, self, method, *given)  # as Lightning calls steps

    @property
    def response_room(self) -> int:
        """Return how many tokens may follow a text of the data."""
        return self.loaded.max_new_tokens

    def check_lengths(self, response_tokens: int) -> None:
        """Refuse texts that do not fit the model's context, before the first batch.

        Args:
            response_tokens: Tokens that may follow a text.
        """
        longest = getattr(getattr(self.trainer, "datamodule", None), "longest", None)
        if longest is not None:
            for model in (self.policy, None if self.actors is None else self.actors.reference):
                if model is not None:
                    check_context(model, longest(), response_tokens)

    def on_fit_start(self) -> None:
        """Check that texts and responses fit the model's context, and say what ends a response."""
        self.check_lengths(self.response_room)
        self.check_ends()

    def check_ends(self) -> None:
        """Log what ends a response, and refuse a table whose responses go on behind it."""
        actors = self.actors
        if actors is None:
            return
        rank_zero_info(f"A response ends at {describe_ends(actors.tokenizer, actors.end_ids)}")
        data: Any = getattr(self.trainer, "datamodule", None)
        if self.needs_reference and getattr(data, "reference_table", None) is not None:
            data.table().check_tokens(vocabulary_size(actors.policy), actors.end_ids)

    def on_validation_start(self) -> None:
        """Check that the texts fit the model's context."""
        self.check_lengths(self.response_room)

    def on_test_start(self) -> None:
        """Check that the texts fit the model's context."""
        self.check_lengths(self.response_room)

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

    # -- optimisation ------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """Build the injected optimizer and scheduler over the trainable parameters.

        Raises:
            ConfigMismatchError: If a run is being resumed with another optimizer or scheduler.
        """
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not parameters:
            raise ValueError("the policy has no trainable parameters")
        optimizer = torch.optim.AdamW(parameters, lr=1e-4) if self._optimizer is None else self._optimizer(parameters)
        settings = {"optimizer": {"class": type(optimizer).__name__, **plain(optimizer.defaults)}}
        scheduler = None if self._lr_scheduler is None else self._lr_scheduler(optimizer)
        if scheduler is not None:
            # Its state before the first step is a function of its arguments.
            settings["lr_scheduler"] = {"class": type(scheduler).__name__, **plain(scheduler.state_dict())}
        self._optimizer_settings = settings
        self._check_optimizer()
        # Not a quotient of the batches: an epoch's end makes an update of what it leaves.
        optimizer.register_step_post_hook(lambda *_: self.after_update())
        if scheduler is None:
            return optimizer
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            monitor = getattr(scheduler, "monitor", None)
            if monitor is None:
                raise ValueError(
                    "ReduceLROnPlateau must be told what to watch: give lightning.pytorch.cli.ReduceLROnPlateau, which "
                    "takes a `monitor` such as val/reward"
                )
            # After each validation, which is where such metrics come from.
            watched = {"scheduler": scheduler, "interval": "epoch", "monitor": monitor, "reduce_on_plateau": True}
            return {"optimizer": optimizer, "lr_scheduler": watched}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def after_update(self) -> None:
        """Count a step of the optimizer."""
        self.updates += 1

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Count a batch for the update that it belongs to: all weigh the same, unless a step says otherwise."""
        self._weights.append(1.0)

    def weigh_batch(self, weight: Tensor) -> Tensor:
        """Say what the loss of this batch weighs in the update, where it is a mean over more or less than the others'.

        Args:
            weight: Scalar, over all ranks.

        Returns:
            The factor that this batch's mean loss is to be multiplied by: its weight over the update's first one.
        """
        self._weights[-1] = weight.detach()
        return weight / self._weights[0]

    def reward_logs(self, rollout: Rollout) -> dict[str, Tensor]:
        """Return what calling the reward came to, to be logged: responses without one, calls made again.

        Args:
            rollout: The rollout of a training step, all ranks'.
        """
        calls, logs = self.actor_spec.reward_calls, {}
        if calls.skips:
            logs["reward/missing"] = self._over_ranks(_missing(rollout))
        if calls.retries:
            logs["reward/retries"] = torch.tensor(float(self.loaded.record.retries))
        return logs

    def _sampling_logs(self, rollout: Rollout, *, new: bool) -> dict[str, Tensor]:
        """Return what the sampler and the reward have to say, of a new rollout or so far."""
        logs = self.reward_logs(rollout) if new else {}
        if new and self.loaded.sampler_mismatch is not None:
            logs["sampler_mismatch"] = torch.tensor(self.loaded.sampler_mismatch)
        for name in ("cut_prompts", "cut_responses"):
            if count := getattr(self.loaded.reward, name, 0):
                logs[f"reward_{name}"] = torch.tensor(float(count))
        return logs

    @property
    def _skips(self) -> bool:
        return self.actor_spec.reward_calls.skips

    def _share(self, mask: Tensor) -> Tensor:
        """Return what makes the mean over this rank's responses, or tokens, its part of the mean over all there are."""
        mine = (mask.sum() if self.mean_over == "tokens" else mask.any(-1).sum()).float()
        if self._trainer is None:
            return torch.ones_like(mine)
        total = self._over_ranks(mine).clamp(min=1)
        return mine * self.trainer.world_size / total * self.weigh_batch(total)

    def log_missing(self, rollout: Rollout, stage: str) -> None:
        """Log how many of an evaluation's responses have no reward, where these are left out.

        Args:
            rollout: The rollout of a step.
            stage: ``val`` or ``test``.
        """
        if self._skips:
            self.log(
                f"{stage}/reward/missing",
                _missing(rollout),
                on_step=False,
                on_epoch=True,
                reduce_fx="sum",
                sync_dist=True,
                batch_size=1,
            )

    def _over_ranks(self, part: Tensor) -> Tensor:
        if self._trainer is None:
            return part
        reduced: Tensor = self.trainer.strategy.reduce(part.clone(), reduce_op="sum")
        return reduced

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Make the mean of accumulated gradients the gradient of the mean over all their rows.

        Lightning divides each batch's loss by ``accumulate_grad_batches``, also where an epoch's end leaves fewer.
        """
        weights, self._weights = self._weights, []
        planned = self.trainer.accumulate_grad_batches
        if planned == 1 or not weights:
            return
        factor = planned * weights[0] / sum(weights)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

    def _check_optimizer(self) -> None:
        # A strategy may build the optimizer before or after it loads the checkpoint.
        if self._optimizer_settings is not None and self._resumed_optimizer_settings is not None:
            check_same_settings(self._resumed_optimizer_settings, self._optimizer_settings, what="optimizer")

    # -- checkpoints -------------------------------------------------------------------------------

    def _trainer_settings(self) -> dict[str, Any]:
        trainer = self.trainer
        return {
            "world_size": trainer.world_size,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "gradient_clip_val": trainer.gradient_clip_val,
            "precision": str(trainer.precision),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the position in the data, what a resumed run must agree with, and the random state."""
        if not self.actor_spec.policy_spec.trained_whole:
            # The base is frozen and named by its content: what is put on it or beside it is all there is to keep.
            trained = self._trained_names()
            for state in ("state_dict", "current_model_state"):  # the second is Lightning's weight averaging
                if state in checkpoint:
                    checkpoint[state] = {key: value for key, value in checkpoint[state].items() if key in trained}
        checkpoint["vbon_lightning"] = {
            "module": {"class": type(self).__name__, **self._settings},
            "models": self.actor_spec.identity(reward=self.uses_reward),
            "trainer": self._trainer_settings(),
            "optimizer": self._optimizer_settings,
            "batches_seen": self.batches_seen,
            "updates": self.updates,
            "random_state": torch.get_rng_state(),
        }

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a module as Lightning does, once the file is known to be a checkpoint that is whole.

        Args:
            checkpoint_path: A path, a URL or an open file.
            *args: As Lightning takes them.
            **kwargs: As Lightning takes them, and the constructor: ``actors`` above all.

        Raises:
            CheckpointError: Saying what is wrong with the file.
        """
        if isinstance(checkpoint_path, str | os.PathLike):
            read_checkpoint(os.fspath(checkpoint_path), weights_only=kwargs.get("weights_only"))
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume a checkpoint of another run; otherwise go on where it stopped.

        A checkpoint that is only evaluated (``vbon test``, ``load_from_checkpoint``) gives its weights and no more.

        Raises:
            ConfigMismatchError: Naming what differs.
            ValueError: If the checkpoint was not written by this package.
        """
        state = checkpoint.get("vbon_lightning")
        if state is None:
            raise ValueError(
                f"this checkpoint was not written by vbon_lightning: it cannot be loaded{self._checkpoint_name()}"
            )
        if not self.resuming:
            return
        if "optimizer_states" not in checkpoint:
            raise ValueError(
                "this checkpoint has weights only (ModelCheckpoint's save_weights_only): it cannot be resumed"
                + self._checkpoint_name()
            )
        module = {"class": type(self).__name__, **self._settings}
        check_same_settings(state["module"], module, what="module")
        check_same_settings(state["models"], self.actor_spec.identity(reward=self.uses_reward), what="model")
        check_same_settings(state["trainer"], self._trainer_settings(), what="trainer")
        self._resumed_optimizer_settings = state["optimizer"]
        self._check_optimizer()
        self.batches_seen = state["batches_seen"]
        # Older checkpoints leave the count to Lightning.
        self.updates = state["updates"] if "updates" in state else checkpoint["global_step"]
        torch.set_rng_state(state["random_state"].cpu())

    def _checkpoint_name(self) -> str:
        path = None if self._trainer is None else getattr(self._trainer, "ckpt_path", None)
        return "" if path is None else f" ({path})"

    def _trained_names(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    @property
    def resuming(self) -> bool:
        """Return whether a checkpoint that is loaded now is to be trained on."""
        return self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the policy strictly, whatever ``strict_loading`` says: a checkpoint without one is an error.

        Raises:
            ValueError: Naming the weights that are missing, superfluous or of another shape.
        """
        self.configure_model()
        if not self.actor_spec.policy_spec.trained_whole:
            trained = self._trained_names()
            frozen = {key: value for key, value in self.state_dict().items() if key not in trained}
            state_dict = frozen | dict(state_dict)
        try:
            return nn.Module.load_state_dict(self, spread_state(self, state_dict), strict=True, assign=assign)
        except RuntimeError as problem:
            raise ValueError(f"the checkpoint does not hold this policy's weights: {problem}") from problem


def check_strategy(strategy: Strategy) -> None:
    """Refuse the strategies of Lightning that spread a module's weights, which would be there in ``forward`` alone.

    Raises:
        ValueError: Naming the strategy, and the one that does.
    """
    if isinstance(strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
        raise ValueError(
            f"{type(strategy).__name__} cannot shard a policy that also samples: set trainer.strategy to fsdp, or to "
            "vbon_lightning.ShardedStrategy() in Python"
        )


def _missing(rollout: Rollout) -> Tensor:
    return (~rollout.judged & rollout.prompts.valid[:, None]).sum().float()


def check_log_ratio_floor(log_ratio_floor: float | None) -> None:
    """Refuse a floor of log-ratios that is not negative."""
    if log_ratio_floor is not None and not log_ratio_floor < 0:
        raise ValueError(f"model.log_ratio_floor must be negative (nats), got {log_ratio_floor}")


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Refuse a value that is none of those there are."""
    if value not in known:
        raise ValueError(f"model.{name} must be one of {', '.join(known)}; got {value!r}")


def check_unused(method: type, why: str, **options: Any) -> None:
    """Refuse options of a module that are not what they are by default where nothing reads them.

    Args:
        method: The module's class, whose defaults count, its own and those it inherits.
        why: The options that leave them without effect, as ``model.NAME=VALUE``.
        **options: Their values, by name.

    Raises:
        ValueError: As :func:`~vbon_lightning.checks.check_without_effect`.
    """
    check_without_effect(method, why, options, prefix="model.")


def check_not_negative(name: str, value: float) -> None:
    """Refuse a number that is not finite, or below zero."""
    if isinstance(value, bool) or not 0 <= value < math.inf:
        raise ValueError(f"model.{name} must be a number >= 0, got {value!r}")


def check_above_one(n: float) -> None:
    """Refuse an N of Best-of-N that is no number above 1."""
    if isinstance(n, bool) or not isinstance(n, int | float) or not 1 < n < math.inf:
        raise ValueError(f"model.n must be a number > 1 (Best-of-1 is the reference itself), got {n!r}")


def check_positive(name: str, value: float) -> None:
    """Refuse a number that is not finite and above zero."""
    if isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"model.{name} must be a number > 0, got {value!r}")
