"""Any importable function or class as a reward."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vbon_lightning.rewards.base import RewardError, RewardModel, check_columns, check_rewards
from vbon_lightning.rewards.calling import Asked, Convention, call_flat, call_grouped, convention_of

if TYPE_CHECKING:
    from typing_extensions import Self


class CallableReward(RewardModel):
    """Score text by any importable function, or by an instance of any importable class.

    It is called as ``(prompts, responses, **arguments)``: ``prompts`` are B texts, ``responses`` B lists of G texts;
    the result is ``[B, G]`` numbers. A function with a parameter that is named ``token_ids`` gets these too, B lists of
    G lists of ids. Its other parameters are filled with the columns of the data set of the same name, B values each
    (those without a default must be there), and ``**kwargs`` with all of ``data.reward_columns``.

    A function with a parameter ``completions`` is called as TRL calls it: everything by name and flat, a prompt, a
    completion and a value of each column for each of the N = B G responses (``completion_ids`` for their token ids);
    the result is N numbers. Coroutines are awaited.

    The function is imported when it is first asked which columns it reads. The fingerprint of a reference table knows
    it by its name and arguments only: when its code changes, make the table again.

    Args:
        function: Import path, ``package.module.attribute``; in Python the function itself, if it can be imported by its
            name.
        arguments: Keyword arguments, passed at every call; for a class, passed once to its constructor.
    """

    def __init__(self, function: str, arguments: dict[str, Any] | None = None) -> None:
        if callable(function):
            function = _name_of(function)
        if "." not in function.strip(".") and ":" not in function:
            raise RewardError(f"`function` is {function!r}, expected an import path like package.module.attribute")
        self.function = function
        self.arguments = dict(arguments or {})
        self._device = torch.device("cpu")
        self._convention: Convention | None = None
        self._target: Any = None
        self._passed: dict[str, Any] = {}

    reads_columns = True

    @property
    def columns(self) -> Sequence[str]:  # type: ignore[override]
        """Return the columns of the data set that the function cannot do without."""
        return self._loaded().required

    def __call__(
        self,
        prompts: Sequence[str],
        responses: Sequence[Sequence[str]],
        token_ids: Sequence[Sequence[Sequence[int]]] = (),
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> Tensor:
        """Score responses; see :meth:`RewardModel.__call__`."""
        how = self._loaded()
        check_columns(self.function, how.required, columns or {})
        call = call_flat if how.layout == "flat" else call_grouped
        # Lists of its own: what the function changes in them is not what its rewards are held against.
        asked = Asked(list(prompts), [list(group) for group in responses], token_ids, columns or {})
        found = call(self._target, how, self._passed, asked)
        return check_rewards(found, prompts, responses, abstains=True)  # which whoever asks may take, or refuse

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

    def _loaded(self) -> Convention:
        if self._convention is None:
            self._convention = self._load()
        return self._convention

    def _load(self) -> Convention:
        target = _import(self.function)
        arguments = self.arguments
        if isinstance(target, type):
            try:
                target = target(**arguments)
            except (TypeError, SystemExit) as error:
                raise RewardError(f"cannot make {self.function} with the arguments {arguments}: {error!r}") from error
            arguments = {}
        if not callable(target):
            raise RewardError(f"{self.function} is not callable: expected a function, or a class with __call__")
        how = convention_of(target, arguments, self.function)
        self._target, self._passed = target, arguments
        self._move()
        return how


def _name_of(function: Callable[..., Any]) -> str:
    """Return the import path of a function, by which a table's fingerprint knows it."""
    path = f"{getattr(function, '__module__', None)}:{getattr(function, '__qualname__', None)}"
    try:
        found = _import(path)
    except RewardError:
        found = None
    if found is not function:
        raise RewardError(
            f"a reward is known by the name under which it is imported, and {path.replace(':', '.')} does not lead to "
            "what was given: put the function at the top level of a module, and give it from there"
        )
    return path.replace(":", ".")


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
        except (Exception, SystemExit) as error:
            raise RewardError(f"cannot import {path!r}: importing {name} failed: {error!r}") from error
        return _attribute(module, parts[cut:], path)
    raise RewardError(f"cannot import {path!r}: there is no module {parts[0]!r}; is its folder on PYTHONPATH?")


def _module(name: str, path: str) -> Any:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
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
