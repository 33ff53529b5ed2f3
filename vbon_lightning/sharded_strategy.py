"""Training a policy that one device cannot hold: ``--trainer.strategy fsdp``."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer
from transformers import PreTrainedModel

from vbon_lightning.callbacks import DialCalibration
from vbon_lightning.sampling.scoring import try_out
from vbon_lightning.sharding import forget_passes, remember_outline, shard, spread_like, whole

PRECISIONS = ("32-true", "64-true", "bf16-true", "16-true", "bf16-mixed")
"""Lightning's precisions that a sharded policy may have."""


class ShardedStrategy(DDPStrategy):
    """Data parallelism in which each process holds a part of every weight: of the policy, reference and optimizer.

    It is torch's ``fully_shard`` (FSDP2), on GPUs or, to try it, on CPUs. Lightning's own ``FSDPStrategy`` and
    ``ModelParallelStrategy`` expect a module whose ``forward`` is all there is, and a GPU; here a step also samples
    from the policy, a token at a time, and every process then makes as many passes as the one with the longest
    response. Checkpoints are those of one process or of ``ddp``, one file with the whole weights, and resume there.

    Args:
        replicas: How many groups of processes hold a whole each, neighbours together: the number of machines, where
            weights should be put together within a machine and only gradients travel between them.
        process_group_backend: ``nccl`` or ``gloo``; by default what the device takes.
        timeout_minutes: How long processes wait for each other before they fail, > 0.
    """

    def __init__(
        self, replicas: int = 1, process_group_backend: str | None = None, timeout_minutes: float = 30.0
    ) -> None:
        if replicas < 1:
            raise ValueError(f"replicas of ShardedStrategy must be at least 1, got {replicas}")
        if not timeout_minutes > 0:
            raise ValueError(f"timeout_minutes of ShardedStrategy must be positive, got {timeout_minutes}")
        self.replicas = replicas
        super().__init__(process_group_backend=process_group_backend, timeout=timedelta(minutes=timeout_minutes))

    def setup_environment(self) -> None:
        """Refuse what cannot be sharded, before processes wait for each other and models are loaded."""
        module = self.lightning_module
        assert module is not None
        check_can_shard(module, module.trainer)
        self.forbid_saving_in_a_signal()
        processes = self.num_nodes * self.num_processes
        if processes % self.replicas:
            raise ValueError(f"replicas={self.replicas} of ShardedStrategy does not divide the {processes} processes")
        super().setup_environment()

    def forbid_saving_in_a_signal(self) -> None:
        """Leave Slurm's requeue signal alone: all processes save together, and it finds each at another pass."""
        if isinstance(self.cluster_environment, SLURMEnvironment) and self.cluster_environment.auto_requeue:
            self.cluster_environment.auto_requeue = False
            rank_zero_info("a sharded policy is not saved at Slurm's signal: docs/scaling.md requeues another way")

    def setup(self, trainer: Trainer) -> None:
        """Shard the models, then make the optimizer of what this process holds."""
        module, accelerator = self.lightning_module, self.accelerator
        assert module is not None
        assert accelerator is not None
        accelerator.setup(trainer)
        step = module.__dict__.get("_sharded_step")
        if step is None:
            step = module.__dict__["_sharded_step"] = self._shard(module)
        self.model = step
        # Weights that are put together in inference mode could not be trained.
        for loop in (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop):
            loop.inference_mode = False
        trainer.predict_loop.inference_mode = False
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if fitting:
            _optimizers_to_device(self.optimizers, self.root_device)

    def _shard(self, module: Any) -> _Step:
        self.precision_plugin.convert_module(module)
        actors: Any = module.actors
        reference = None
        if actors is not None:
            actors.place()  # in the policy's precision
            reference = actors.reference
        policy: Any = module.policy
        if any(getattr(part, "layerdrop", 0) for part in policy.modules()):
            raise ValueError(
                "trainer.strategy fsdp cannot leave out layers at random, as this policy's `layerdrop` does: set "
                "model.dropout to false"
            )
        remember_outline(policy)
        for model in (policy, reference):
            if isinstance(model, PreTrainedModel):
                try_out(model)
        # All but the policy, which no device may hold whole.
        module.policy = None
        module.to(self.root_device)
        module.policy = policy
        step = _Step(module, reference)
        sizes = {"replicate": self.replicas, "shard": self.world_size // self.replicas}
        if self.replicas == 1:
            del sizes["replicate"]
        mesh = init_device_mesh(self.root_device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        mixed = self.precision_plugin.precision == "bf16-mixed"
        shard(step, mesh, param_dtype=torch.bfloat16 if mixed else None)
        return step

    def teardown(self) -> None:
        """End, as Lightning's other sharding strategies do, without moving the weights to the CPU."""
        self.model = self.lightning_module
        for part in (self.cluster_environment, self.precision_plugin, self.accelerator, self.checkpoint_io):
            assert part is not None
            part.teardown()

    # -- checkpoints -------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the whole weights, on the first process; all must call it."""
        assert self.lightning_module is not None
        return self._whole(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimizer's whole state, on the first process; all must call it."""
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return self._whole(inner.state_dict())

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give the optimizer this process's part of a whole state."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            places = [place for group in saved["param_groups"] for place in group["params"]]
            state = {
                place: {name: spread_like(parameter, value) for name, value in saved["state"][place].items()}
                for place, parameter in zip(places, parameters, strict=True)
                if place in saved["state"]
            }
            optimizer.load_state_dict({**saved, "state": state})

    def _whole(self, state: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = whole(state, keep=self.is_global_zero)
        return found


class _Step(nn.Module):
    """What a call of a LightningModule's steps puts together, the frozen reference included.

    Lightning calls ``training_step`` and its like through the ``forward`` of what wraps the module.
    """

    def __init__(self, module: LightningModule, reference: nn.Module | None) -> None:
        super().__init__()
        self.module, self.reference = module, reference

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = self.module(*args, **kwargs)
        if not torch.is_grad_enabled():
            forget_passes(self)
        return found


def check_can_shard(module: LightningModule, trainer: Trainer) -> None:
    """Refuse options that do not go together with a sharded policy, each in one line.

    Raises:
        ValueError: Naming the option.
    """
    if not hasattr(fsdp, "fully_shard"):
        raise ValueError(f"trainer.strategy fsdp needs torch 2.6 or newer, and this is {torch.__version__}")
    spec: Any = getattr(module, "actor_spec", None)
    if spec is None:
        raise ValueError(f"trainer.strategy fsdp shards this package's modules, and {type(module).__name__} is none")
    if trainer.precision not in PRECISIONS:
        known = ", ".join(PRECISIONS)
        raise ValueError(f"trainer.strategy fsdp takes trainer.precision {known}; got {trainer.precision}")
    if spec.sampler != "eager":
        raise ValueError(
            f"trainer.strategy fsdp samples with data.sampler eager, not {spec.sampler}: every process takes part in "
            "each token of a sharded policy"
        )
    if getattr(module, "anchor_moves", False):
        raise ValueError(
            "trainer.strategy fsdp keeps no anchor, a second copy of what is trained: set model.anchor_every and "
            "model.anchor_rate to 0, or use ddp"
        )
    _check_callbacks(trainer)
    _check_further_draws(module, trainer, spec)


def _check_callbacks(trainer: Trainer) -> None:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            raise ValueError(
                f"trainer.strategy fsdp keeps no averaged copy of the weights: leave out {type(callback).__name__}"
            )
        if isinstance(callback, DialCalibration):
            raise ValueError(
                "trainer.strategy fsdp has no DialCalibration, which samples between steps: leave it out, and run it "
                "on the export"
            )


def _check_further_draws(module: LightningModule, trainer: Trainer, spec: Any) -> None:
    data: Any = getattr(trainer, "datamodule", None)
    fills_table = trainer.state.fn == TrainerFn.PREDICTING
    online = getattr(module, "reference_samples", 0) > 0 and getattr(data, "reference_table", None) is None
    if spec.reward_calls.skips and (fills_table or online):
        raise ValueError(
            "trainer.strategy fsdp cannot draw further reference responses for those without a reward, since processes "
            "would need different numbers: set data.reward_calls.on_missing to error, or train on a reference table"
        )
