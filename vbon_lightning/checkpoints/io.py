"""How checkpoints are written and read."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from vbon_lightning.checkpoints.sealing import CheckpointError, check_seal, write_sealed
from vbon_lightning.finite import NotFiniteError, first_not_finite
from vbon_lightning.staging import lock, partial_path
from vbon_lightning.whole_files import atomic_file

_WEIGHTS = ("state_dict", "current_model_state")  # the second is that of Lightning's weight averaging


class WholeCheckpointIO(TorchCheckpointIO):
    """Write checkpoints beside their place and rename them once they are on the disk, with a digest; check it to read.

    A checkpoint is there whole or not at all, whatever kills its writer; the older one stays until then. One whose
    weights are not finite is not written. ``vbon fit`` and every module bring it along, unless the Trainer has a
    plugin of its own.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save a checkpoint.

        Args:
            checkpoint: What the Trainer or the strategy gathered.
            path: Where to, a path or a URL.
            storage_options: Not taken.

        Raises:
            NotFiniteError: If a weight is NaN or infinite.
            OSError: If it cannot be written; an older checkpoint of that name stays.
            TypeError: If ``storage_options`` are given.
        """
        if storage_options is not None:
            raise TypeError("WholeCheckpointIO takes no storage_options")
        check_finite_weights(checkpoint, f"the checkpoint {path} is not written")
        files = get_filesystem(path)
        if not isinstance(files, LocalFileSystem):
            whole = io.BytesIO()
            write_sealed(checkpoint, whole)
            files.makedirs(files._parent(str(path)), exist_ok=True)
            files.pipe(str(path), whole.getvalue())  # in one piece, as object stores have it
            return
        target = Path(files._strip_protocol(str(path)))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with atomic_file(target, partial_path(target)) as stream:
                lock(stream.fileno())
                write_sealed(checkpoint, stream)
        except OSError as problem:
            raise OSError(
                problem.errno, f"the checkpoint {target} cannot be written ({problem.strerror or problem})"
            ) from problem

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint: :func:`read_checkpoint`."""
        return read_checkpoint(path, map_location=map_location, weights_only=weights_only)


def read_checkpoint(path: str | Path, *, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
    """Read a checkpoint and check that it is one, that it is whole, and that its weights are finite.

    Args:
        path: A path or a URL.
        map_location: As ``torch.load`` takes it.
        weights_only: As ``torch.load`` takes it.

    Raises:
        CheckpointError: Saying what is wrong with the file.
        NotFiniteError: If a weight is NaN or infinite.
        FileNotFoundError: If there is none.
    """
    files = get_filesystem(path)
    if files.isdir(str(path)):
        kept = sorted(
            (name for name in files.find(str(path)) if name.endswith(".ckpt")), key=lambda name: files.modified(name)
        )
        hint = f"give a file of it, such as {kept[-1]}" if kept else "there is none in it"
        raise CheckpointError(
            f"{path} is a directory, and no checkpoint: {hint}; an exported model is named as `data.policy`"
        )
    if not files.exists(str(path)):
        raise FileNotFoundError(f"there is no checkpoint {path}")
    with files.open(str(path), "rb") as stream:
        sealed = check_seal(stream, str(path))
        try:
            content = torch.load(stream, map_location=map_location, weights_only=weights_only)
        except Exception as problem:  # torch raises many types here; every one means the same to a user
            reason = " ".join(str(problem).split())[:200]
            if isinstance(problem, UnpicklingError) and "weights_only" in str(problem):
                reason = (
                    "it holds more than tensors and plain values, and what else such a file holds may run when it is "
                    "read. Checkpoints of vbon_lightning hold none of it: is this another program's?"
                )
            raise CheckpointError(f"{path} cannot be read as a checkpoint: {reason}") from problem
    if not isinstance(content, Mapping) or not {"state_dict", "pytorch-lightning_version"} <= content.keys():
        raise CheckpointError(f"{path} is no checkpoint of a run: it holds {_describe(content)}")
    if not sealed:
        rank_zero_info(f"The checkpoint {path} has no digest: its parts' own check sums were compared")
    check_finite_weights(content, f"the checkpoint {path} cannot be used")
    return dict(content)


def check_finite_weights(checkpoint: Mapping[str, Any], so: str) -> None:
    """Refuse a checkpoint with weights that are NaN or infinite.

    Args:
        checkpoint: What it holds.
        so: What comes of it, for the message.

    Raises:
        NotFiniteError: Naming the first such weight.
    """
    for state in _WEIGHTS:
        weights = checkpoint.get(state)
        if isinstance(weights, Mapping):
            bad = first_not_finite((str(name), value) for name, value in weights.items() if isinstance(value, Tensor))
            if bad is not None:
                step = checkpoint.get("global_step")
                raise NotFiniteError(f"{so}: after step {step} its weight {bad} holds NaN or infinity")


def _describe(content: Any) -> str:
    if isinstance(content, Mapping) and content and all(isinstance(value, Tensor) for value in content.values()):
        return "bare weights (a state_dict), without the state of a run"
    if isinstance(content, Mapping):
        return f"a mapping of {', '.join(repr(key) for key in list(content)[:5]) or 'nothing'}"
    return f"a {type(content).__name__}"
