"""Any importable function or class as a reward."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vbon_lightning.rewards.base import RewardError, RewardModel, check_rewards

if TYPE_CHECKING:
    from typing_extensions import Self


class CallableReward(RewardModel):
    """Score text by any importable function, or by an instance of any importable class.

    It is called as ``(prompts, responses, **arguments)``: ``prompts`` are B texts, ``responses`` B lists of G texts;
    the result is ``[B, G]`` numbers. A function with a parameter that is named ``token_ids`` gets these too, B lists of
    G lists of ids; no other parameter is taken for them. It is imported at the first call. The fingerprint of a
    reference table knows the function by its name and arguments only: when its code changes, make the table
    again.

    Args:
        function: Import path, ``package.module.attribute``.
        arguments: Keyword arguments, passed at every call; for a class, passed once to its constructor.
    """

    def __init__(self, function: str, arguments: dict[str, Any] | None = None) -> None:
        if "." not in function.strip(".") and ":" not in function:
            raise RewardError(f"`function` is {function!r}, expected an import path like package.module.attribute")
        self.function = function
        self.arguments = dict(arguments or {})
        self._device = torch.device("cpu")
        self._call: Callable[..., Any] | None = None
        self._target: Any = None

    def __call__(
        self,
        prompts: Sequence[str],
        responses: Sequence[Sequence[str]],
        token_ids: Sequence[Sequence[Sequence[int]]] = (),
    ) -> Tensor:
        """Score responses; see :meth:`RewardModel.__call__`."""
        if self._call is None:
            self._load()
        assert self._call is not None
        return check_rewards(self._call(prompts, responses, token_ids), prompts, responses)

    def identity(self) -> dict[str, str]:
        """Describe the reward by its import path and arguments."""
        arguments = json.dumps(self.arguments, sort_keys=True, default=str)
        return {"class": "CallableReward", "function": self.function, "arguments": arguments}

    def to(self, device: torch.device | str) -> Self:
        """Move to a device what has a ``to`` of its own.

        Args:
            device: The device.
        """
        self._device = torch.device(device)
        self._move()
        return self

    def _move(self) -> None:
        if hasattr(self._target, "to"):
            self._target.to(self._device)

    def _load(self) -> None:
        target = _import(self.function)
        arguments = self.arguments
        if isinstance(target, type):
            try:
                target = target(**arguments)
            except TypeError as error:
                raise RewardError(f"cannot make {self.function} with the arguments {arguments}: {error}") from error
            arguments = {}
        if not callable(target):
            raise RewardError(f"{self.function} is not callable: expected a function, or a class with __call__")
        place = _place_of_token_ids(target, arguments, self.function)

        def call(prompts: Any, responses: Any, token_ids: Any) -> Any:
            if place == "position":
                return target(prompts, responses, token_ids, **arguments)
            named = {"token_ids": token_ids} if place == "name" else {}
            return target(prompts, responses, **named, **arguments)

        self._call, self._target = call, target
        self._move()


def _import(path: str) -> Any:
    """Import ``package.module.attribute``, whose attribute may be nested."""
    module_path, _, attributes = path.partition(":")
    if attributes:
        return _attribute(_module(module_path, path), attributes.split("."), path)
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:cut])
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            # Only this very module may be absent; a missing import inside it is the user's to see.
            if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
                continue
            raise RewardError(f"cannot import {path!r}: importing {name} failed: {error}") from error
        except Exception as error:
            raise RewardError(f"cannot import {path!r}: importing {name} failed: {error!r}") from error
        return _attribute(module, parts[cut:], path)
    raise RewardError(f"cannot import {path!r}: there is no module {parts[0]!r}; is its folder on PYTHONPATH?")


def _module(name: str, path: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise RewardError(
            f"cannot import {path!r}: importing {name} failed: {error!r}; is it on PYTHONPATH?"
        ) from error


def _attribute(module: Any, names: Sequence[str], path: str) -> Any:
    found = module
    for name in names:
        if not hasattr(found, name):
            raise RewardError(f"cannot import {path!r}: {module.__name__} has no {'.'.join(names)!r}")
        found = getattr(found, name)
    return found


def _place_of_token_ids(
    target: Callable[..., Any], arguments: dict[str, Any], path: str
) -> Literal["position", "name", "nowhere"]:
    """Say how token ids are passed, and check that the call will fit."""
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # some builtins do not tell
        return "nowhere"
    found = signature.parameters.get("token_ids")
    place: Literal["position", "name", "nowhere"] = "nowhere"
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if found is not None and "token_ids" not in arguments and found.kind not in several:
        place = "position" if found.kind is found.POSITIONAL_ONLY else "name"
    positional = [None] * (3 if place == "position" else 2)
    named = {"token_ids": None} if place == "name" else {}
    try:
        signature.bind(*positional, **named, **arguments)
    except TypeError as error:
        raise RewardError(
            f"cannot call {path} as (prompts, responses, **{arguments}): {error}; its signature is {signature}. Token "
            "ids go to a parameter that is named `token_ids`, everything else comes from `arguments`"
        ) from error
    return place
