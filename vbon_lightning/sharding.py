"""Models whose weights are spread over processes: each holds a part of every matrix.

A layer's are put together for the time that it runs: fully sharded data parallelism, torch's ``fully_shard``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

_SHARDED: WeakSet[nn.Module] = WeakSet()


def is_sharded(model: nn.Module) -> bool:
    """Return whether a model's weights are spread over processes."""
    return model in _SHARDED


def is_part(value: Any) -> bool:
    """Return whether a tensor is one of which each process holds a part."""
    return hasattr(value, "full_tensor")


def shard(root: nn.Module, mesh: Any, *, param_dtype: torch.dtype | None = None) -> None:
    """Spread the weights of a module over processes, in place.

    A layer's weights are put together while it runs. Those of no layer (embeddings, output head) are while ``root``
    runs: every pass of a part of it must happen within a call of ``root``, and every process must make the same passes.

    Args:
        root: A module, on the CPU; its parts are moved to the mesh's device one by one.
        mesh: The processes, a ``torch.distributed.DeviceMesh``.
        param_dtype: Precision in which weights are put together and computed with; their own by default. Gradients are
            added up in float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype,
        reduce_dtype=None if param_dtype is None else torch.float32,
        cast_forward_inputs=False,  # a batch holds rewards, too
    )
    for layer in _layers(root):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    _SHARDED.update(root.modules())


def _layers(root: nn.Module) -> list[nn.Module]:
    """Return the layers of all models in a module: what their outermost lists hold.

    But for what shares weights, and for single matrices, which others may read without calling them.
    """
    owners: dict[nn.Parameter, int] = {}
    for _, module in root.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners[parameter] = owners.get(parameter, 0) + 1
    found: list[nn.Module] = []

    def search(module: nn.Module) -> None:
        for child in module.children():
            if not isinstance(module, nn.ModuleList):
                search(child)
            elif any(child.children()) and all(owners[parameter] == 1 for parameter in child.parameters()):
                found.append(child)

    search(root)
    return found


def forget_passes(root: nn.Module) -> None:
    """Forget passes that no gradient is taken of: torch keeps their order for a backward pass, which would never come.

    Args:
        root: A module that was given to :func:`shard`.
    """
    state: Any = root._get_fsdp_state()  # type: ignore[operator]
    state._comm_ctx.post_forward_order.clear()
    for part in state._state_ctx.all_states:
        for group in getattr(part, "_fsdp_param_groups", None) or [part._fsdp_param_group]:
            if group is not None:
                group._post_forward_indices.clear()


# -- whole again -------------------------------------------------------------------------------------


def whole(value: Any, *, keep: bool = True) -> Any:
    """Put together the tensors of a state that are spread over processes, on the CPU; all processes must call it.

    Args:
        value: A tensor, or a mapping or list that holds some, also deeper down.
        keep: Whether this process needs the result; its tensors are empty otherwise.
    """
    if is_part(value):
        full = value.detach().full_tensor()
        return full.to("cpu", copy=True) if keep else full.new_empty(0, device="cpu")
    if isinstance(value, Mapping):
        return {key: whole(part, keep=keep) for key, part in value.items()}
    if isinstance(value, list):
        return [whole(part, keep=keep) for part in value]
    return value


def spread_like(like: Any, value: Any) -> Any:
    """Return this process's part of a whole tensor, as another tensor is spread; anything else as it is."""
    if not is_part(like) or is_part(value) or getattr(value, "shape", None) != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    # Every process has the whole tensor: nothing need be sent.
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def spread_state(module: nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a state of whole tensors as a module takes it, whose own may be spread over processes."""
    if not is_sharded(module):
        return state
    own = module.state_dict()
    return {name: spread_like(own.get(name), value) for name, value in state.items()}


# -- plain models ------------------------------------------------------------------------------------

_OUTLINES: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()


def remember_outline(model: nn.Module) -> None:
    """Keep what a model is made of, without its weights, before these are spread: see :func:`plain_copy`."""
    empty = {id(parameter): _like(parameter, parameter.to("meta")) for parameter in model.parameters()}
    configs = {id(part): part for part in vars(model).values() if hasattr(part, "to_dict")}  # they may change
    _OUTLINES[model] = copy.deepcopy(model, empty | configs)


def plain_copy(model: Model) -> Model | None:
    """Put a sharded model together on the CPU of the first process; all processes must call it.

    Args:
        model: A model; one that is not sharded is returned as it is.

    Returns:
        The model, or None on the other processes.
    """
    if not is_sharded(model):
        return model
    first = torch.distributed.get_rank() == 0
    weights = {name: whole(parameter, keep=first) for name, parameter in model.named_parameters()}
    if not first:
        return None
    outline: Any = _OUTLINES[model]
    filled = {id(parameter): _like(parameter, weights[name]) for name, parameter in outline.named_parameters()}
    copied: Model = copy.deepcopy(outline, filled)
    buffers = dict(model.named_buffers())
    for name, buffer in copied.named_buffers():
        buffer.copy_(buffers[name])
    return copied.train(model.training)


def _like(parameter: nn.Parameter, value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach(), requires_grad=parameter.requires_grad)


# -- in step -----------------------------------------------------------------------------------------


def most(count: int, device: torch.device) -> int:
    """Return the largest of the processes' counts."""
    found = torch.tensor(count, device=device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return int(found)


class Lockstep:
    """Keep processes at one number of forward passes, where they hold a model together.

    Args:
        model: The model; one that is not sharded waits for nobody.
    """

    def __init__(self, model: nn.Module) -> None:
        self.together = is_sharded(model)

    def rows_to_run(self, running: Tensor) -> Tensor | None:
        """Return the rows of the next pass, or None where no process has any.

        A process that has none itself runs its first row again while others have some; nothing comes of it.

        Args:
            running: ``[N]`` indices of rows that are not finished.
        """
        if not self.together:
            return running if len(running) else None
        if not most(len(running), running.device):
            return None
        return running if len(running) else running.new_zeros(1)
