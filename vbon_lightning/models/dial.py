r"""One policy for every N: weights that move along a polynomial in log N.

A dialled model has the weights :math:`\theta(N) = \theta_0 + \sum_{j=1}^{J} (\log N / \log N_0)^j \Delta_j`: at N = 1
it is what it started from, and for each N a plain model of the same shape, which costs what that costs. The deltas are
all there is to train. Tied weights stay tied.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from vbon_lightning.models.errors import ModelError

SCALE = math.log(8.0)
"""log N_0, the N at which every power is 1."""

DIRECTORY = "dial"
"""Where an export keeps the deltas, beside a plain model for one N."""


class _Setting:
    """The N that all weights of a model share."""

    def __init__(self, degree: int) -> None:
        self.degree, self.n = degree, 1.0

    @property
    def powers(self) -> list[float]:
        return dial_powers(self.n, self.degree)


class _Dial(nn.Module):
    """Add the deltas of one weight."""

    def __init__(self, weight: Tensor, setting: _Setting) -> None:
        super().__init__()
        self.deltas = nn.Parameter(torch.zeros(setting.degree, *weight.shape, dtype=weight.dtype, device=weight.device))
        self._setting = [setting]  # in a list: deepcopy of a module then keeps one setting for all

    def forward(self, original: Tensor) -> Tensor:
        powers = torch.tensor(self._setting[0].powers, dtype=self.deltas.dtype, device=self.deltas.device)
        return original + torch.tensordot(powers, self.deltas, dims=1)


def dial_powers(n: float, degree: int) -> list[float]:
    """Return ``(log n / log N_0)^j`` for j = 1..degree.

    Raises:
        ModelError: If ``n`` is below 1.
    """
    if not 1 <= n < math.inf:
        raise ModelError(f"a policy is dialled to a finite N >= 1, got {n}")
    return [(math.log(n) / SCALE) ** power for power in range(1, degree + 1)]


def add_dial(model: PreTrainedModel, *, degree: int) -> None:
    """Give every weight of a model its deltas, in place; only they require a gradient afterwards.

    Args:
        model: A model without adapters.
        degree: J of the polynomial in log N, at least 1.

    Raises:
        ModelError: If the model has a dial already, or the degree is below 1.
    """
    if has_dial(model):
        raise ModelError("the model has a dial already")
    if degree < 1:
        raise ModelError(f"the dial's degree must be at least 1, got {degree}")
    setting = _Setting(degree)
    dials: dict[int, _Dial] = {}
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
    ]
    for module, name, parameter in places:
        dial = dials.setdefault(id(parameter), _Dial(parameter, setting))  # one for each of tied weights
        parametrize.register_parametrization(module, name, dial, unsafe=True)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key.endswith(".deltas"))
    holder: Any = model
    holder._vbon_dial = [setting]


def has_dial(model: nn.Module) -> bool:
    """Return whether a model is dialled."""
    return hasattr(model, "_vbon_dial")


def dial_degree(model: nn.Module) -> int:
    """Return J of a dialled model."""
    return _setting(model).degree


def set_dial(model: nn.Module, n: float) -> None:
    """Dial a model to an N.

    Raises:
        ModelError: If the model has no dial, or n is below 1.
    """
    dial_powers(n, 1)
    _setting(model).n = float(n)


def dialled_n(model: nn.Module) -> float:
    """Return the N that a model is dialled to."""
    return _setting(model).n


@contextmanager
def dialled(model: nn.Module, n: float) -> Iterator[None]:
    """Dial a model to an N for a while, each weight computed once."""
    before = dialled_n(model)
    set_dial(model, n)
    try:
        with parametrize.cached():
            for _ in dialled_weights(model):  # now, not within the first pass without gradients
                pass
            yield
    finally:
        set_dial(model, before)


def dialled_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Give the weights that a model has at the N it is dialled to, by the plain model's names."""
    for path, module in model.named_modules():
        for name in getattr(module, "parametrizations", {}):
            yield f"{path}.{name}" if path else name, getattr(module, name)


@torch.no_grad()
def plain_copy(model: PreTrainedModel, n: float) -> PreTrainedModel:
    """Return a plain model with the weights for one N: it has no dial any more."""
    state: dict[str, Tensor] = {}
    with dialled(model, n):
        state |= dict(dialled_weights(model))
        state |= dict(model.named_buffers())
        # A new model, not a copy without its dial: copies share the classes that a dial has changed.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            plain: Any = type(model)(copy.deepcopy(model.config))
        plain.to(dtype=model.dtype).load_state_dict(state, strict=False)
    plain.generation_config = copy.deepcopy(model.generation_config)
    found: PreTrainedModel = plain.to(model.device).train(model.training)
    return found


def save_dial(model: PreTrainedModel, directory: Path, *, n: float) -> None:
    """Write the deltas beside a plain model's weights for N = n.

    Args:
        model: The dialled model.
        directory: Where to; made.
        n: The N of the plain model that they are to be added to.
    """
    directory.mkdir()
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        for key, chain in getattr(module, "parametrizations", {}).items():
            dial: Any = chain[0]
            if id(dial) not in seen:
                seen.add(id(dial))
                found[f"{name}.{key}"] = dial.deltas.detach().contiguous().cpu()
    save_file(found, directory / "deltas.safetensors", metadata={"format": "pt"})
    entries = {"n": n, "degree": dial_degree(model), "scale": SCALE}
    (directory / "dial.json").write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@torch.no_grad()
def turn(model: PreTrainedModel, directory: Path, n: float) -> None:
    """Turn a plain model, as exported for one N, to another, in place.

    Args:
        model: The model of the export.
        directory: The export's directory of deltas.
        n: The N.

    Raises:
        ModelError: If the export has no dial, or it is another model's.
    """
    if not (directory / "dial.json").is_file():
        raise ModelError(f"{str(directory.parent)!r} is no dialled policy: it has no {DIRECTORY!r} directory")
    entries = json.loads((directory / "dial.json").read_text(encoding="utf-8"))
    deltas = load_file(directory / "deltas.safetensors")
    steps = [
        new - old
        for new, old in zip(
            dial_powers(n, entries["degree"]), dial_powers(entries["n"], entries["degree"]), strict=True
        )
    ]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, delta in deltas.items():
        if name not in parameters or parameters[name].shape != delta.shape[1:]:
            raise ModelError(f"the dial in {str(directory)!r} is another model's: it moves {name}, which this lacks")
        weight = parameters[name]
        weight.add_(torch.tensordot(torch.tensor(steps), delta.float(), dims=1).to(weight))


def _setting(model: nn.Module) -> _Setting:
    if not has_dial(model):
        raise ModelError("the model has no dial")
    holder: Any = model._vbon_dial
    setting: _Setting = holder[0]
    return setting
