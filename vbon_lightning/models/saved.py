"""What can be said of a saved model before it is loaded: its files are there, whole, and hold numbers."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open

from vbon_lightning.finite import first_not_finite
from vbon_lightning.models.errors import ModelError
from vbon_lightning.models.files import check_directory, locate, weight_files
from vbon_lightning.models.spec import ModelSpec, as_spec
from vbon_lightning.models.tilted import TiltedConfig

NOT_TILTED = "only a tilted policy can be dialled to an N, and {!r} is none: leave `dial` out"
"""What is said of a model that cannot be dialled, before it is loaded and when it is."""


def check_saved(model: str | ModelSpec) -> None:
    """Refuse a model whose files are missing, broken, or hold weights that are NaN or infinite, without loading it.

    One that is to be dialled must be a tilted one.

    Files of other formats than safetensors, and models of the hub, are looked at when they are loaded.

    Args:
        model: The model.

    Raises:
        ModelError: Naming the file, and the weight; or the model that cannot be dialled.
    """
    spec = as_spec(model)
    if spec.name is None:
        return
    place, gguf_file = locate("name", str(spec.name), spec.gguf_file)
    if gguf_file is not None or not os.path.isdir(place):
        return
    check_directory(place, gguf_file)
    if spec.dial is not None and spec.tilt is None and _kind(place) not in (None, TiltedConfig.model_type):
        raise ModelError(NOT_TILTED.format(spec.name))
    for path in weight_files(place):
        if path.suffix != ".safetensors":
            continue
        try:
            with safe_open(path, framework="pt") as file:
                for weight in file.keys():  # noqa: SIM118 (it is no mapping)
                    if first_not_finite([(weight, file.get_tensor(weight))]) is not None:
                        raise ModelError(
                            f"the weight {weight} in {path} holds NaN or infinity: it comes from "
                            "a run that diverged; export a good checkpoint, or name another model"
                        )
        except (SafetensorError, OSError) as problem:
            raise ModelError(f"{path} cannot be read: {problem}") from problem


def _kind(directory: str) -> str | None:
    """Return the type of model that a directory holds; None where only a base could say it."""
    path = Path(directory, "config.json")
    return json.loads(path.read_text(encoding="utf-8")).get("model_type") if path.is_file() else None
