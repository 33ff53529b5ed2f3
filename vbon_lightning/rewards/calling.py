"""How a user's reward function is called: what its signature asks for, in this library's layout or in TRL's."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from vbon_lightning.rewards.base import RewardError

_SEVERAL = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_OF_TRL = ("prompts", "completions", "completion_ids")
_TRLS_TRAINER = ("trainer_state", "log_extra", "log_metric")
"""What TRL's trainers hand to a reward beside the texts, and nobody has here."""


class Convention(NamedTuple):
    """What a function is called with."""

    layout: Literal["grouped", "flat"]
    """``grouped``: B prompts and B lists of G responses; ``flat``: TRL's, a prompt and a completion for each of N."""
    token_ids: Literal["position", "name", "nowhere"]
    """How the responses' token ids are passed."""
    required: tuple[str, ...]
    """Columns of the data set that it cannot do without: parameters without a default that nothing else fills."""
    optional: tuple[str, ...] | None
    """Other columns that it takes if they are there; None for any, by ``**kwargs``."""
    takes_prompts: bool = True
    """Whether it wants the prompts: one of TRL's may do without."""

    def columns(self, given: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
        """Return those of the given columns that the function takes."""
        taken = given if self.optional is None else (*self.required, *self.optional)
        return {name: given[name] for name in taken if name in given}


def convention_of(target: Callable[..., Any], arguments: Mapping[str, Any], path: str) -> Convention:
    """Read from a signature how a reward function is to be called.

    A parameter named ``completions`` makes it one of TRL's, which gets everything by name and flat: N prompts, N
    completions, N values of each column. Any other gets ``(prompts, responses)`` by position, grouped. Parameters that
    are left are columns of the data set.

    Args:
        target: The function.
        arguments: Keyword arguments that are passed at every call.
        path: What to call it in messages.

    Raises:
        RewardError: If no such call fits.
    """
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # some builtins do not tell
        return Convention("grouped", "nowhere", (), ())
    parameters = signature.parameters
    by_name = [p for p in parameters.values() if p.kind not in (*_SEVERAL, inspect.Parameter.POSITIONAL_ONLY)]
    flat = any(parameter.name == "completions" for parameter in by_name)
    ids = "completion_ids" if flat else "token_ids"
    found = parameters.get(ids)
    token_ids: Literal["position", "name", "nowhere"] = "nowhere"
    if found is not None and ids not in arguments and found.kind not in _SEVERAL:
        token_ids = "position" if found.kind is found.POSITIONAL_ONLY else "name"
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    texts = set(_OF_TRL) if flat else {parameter.name for parameter in _first_two(parameters.values())}
    left = [p for p in by_name if p.name not in texts | {ids} and p.name not in arguments]
    required = tuple(p.name for p in left if p.default is p.empty and p.name not in _TRLS_TRAINER)
    optional = tuple(p.name for p in left if p.default is not p.empty)
    fixed = [None] * (0 if flat else 3 if token_ids == "position" else 2)
    named: dict[str, Any] = {name: None for name in _OF_TRL[:2] if flat and (anything or name in parameters)}
    named |= {ids: None} if token_ids == "name" else {}
    try:
        signature.bind(*fixed, **named, **dict.fromkeys(required), **arguments)
    except TypeError as error:
        layout = "prompts=..., completions=..." if flat else "prompts, responses"
        raise RewardError(
            f"cannot call {path} as ({layout}, **{dict(arguments)}): {error}; its signature is {signature}. Token "
            f"ids go to a parameter that is named `{ids}`, columns of the data set to those that are named like them, "
            "everything else comes from `arguments`"
        ) from error
    return Convention(
        "flat" if flat else "grouped",
        token_ids,
        required,
        None if anything else optional,
        takes_prompts=not flat or "prompts" in named,
    )


def _first_two(parameters: Any) -> Iterator[inspect.Parameter]:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = [parameter for parameter in parameters if parameter.kind in positional]
    return iter(found[:2])


class Asked(NamedTuple):
    """What a reward is asked to judge."""

    prompts: Sequence[Any]
    """B prompts: texts, or conversations."""
    responses: Sequence[Sequence[str]]
    """B lists of G responses."""
    token_ids: Sequence[Sequence[Sequence[int]]]
    """B lists of G lists of token ids."""
    columns: Mapping[str, Sequence[Any]]
    """B values of each column that came along."""


def call_grouped(
    target: Callable[..., Any],
    how: Convention,
    arguments: Mapping[str, Any],
    asked: Asked,
) -> Any:
    """Call a function with B prompts and B lists of G responses; it answers for B lists of G."""
    place = [asked.token_ids] if how.token_ids == "position" else []
    named = {"token_ids": asked.token_ids} if how.token_ids == "name" else {}
    beside = how.columns(asked.columns)
    return awaited(target(asked.prompts, asked.responses, *place, **named, **beside, **arguments))


def call_flat(
    target: Callable[..., Any],
    how: Convention,
    arguments: Mapping[str, Any],
    asked: Asked,
) -> list[list[Any]]:
    """Call a function of TRL's with N = B G prompts and completions, and bring its N answers back to B lists of G.

    Raises:
        RewardError: If it does not return one answer a completion.
    """
    prompts, responses, token_ids, columns = asked
    counts = [len(row) for row in responses]

    def repeated(values: Sequence[Any]) -> list[Any]:
        return [value for value, count in zip(values, counts, strict=True) for _ in range(count)]

    texts: list[Any] = [text for row in responses for text in row]
    if "messages" in columns:  # as TRL has conversations
        prompts, texts = columns["messages"], [[{"role": "assistant", "content": text}] for text in texts]
    named: dict[str, Any] = {"completions": texts} | ({"prompts": repeated(prompts)} if how.takes_prompts else {})
    if how.token_ids == "name":
        named["completion_ids"] = [ids for row in token_ids for ids in row]
    beside = {name: repeated(values) for name, values in how.columns(columns).items()}
    found = awaited(target(**named, **beside, **arguments))
    try:
        answers = list(found)
    except TypeError as error:
        raise RewardError(
            f"a reward with a parameter `completions` returns a list with a number for each completion, as TRL has it; "
            f"it returned {type(found).__name__}"
        ) from error
    if len(answers) != sum(counts):
        raise RewardError(
            f"a reward with a parameter `completions` gets {sum(counts)} of them, flat as TRL passes them, and must "
            f"return as many numbers; it returned {len(answers)}"
        )
    each = iter(answers)
    return [[next(each) for _ in range(count)] for count in counts]


def awaited(value: Any) -> Any:
    """Return what a coroutine comes to, in an event loop of its own; anything else as it is."""
    if not inspect.iscoroutine(value):
        return value
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_await(value))
    # A notebook's loop is running: another thread has none.
    found: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(asyncio.run(_await(value)))
        except BaseException as error:  # it is the caller's
            failed.append(error)

    thread = threading.Thread(target=run, name="reward")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]


async def _await(value: Awaitable[Any]) -> Any:
    return await value
