"""What a reward model is, and the check that every reward goes through."""

from __future__ import annotations

import copy
import inspect
import math
import numbers
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vbon_lightning._visible import shorten, visible

if TYPE_CHECKING:
    from typing_extensions import Self

Text = Literal["prompt_and_response", "response"]
"""Which text a reward model reads."""


class RewardError(ValueError):
    """A reward that cannot be used, or a reward model that cannot be set up."""


class RewardFailure(RewardError):
    """A reward that raised something, or gave no answer in time: to ask again may help."""


class RewardModel(ABC):
    """Base of the reward models here; any object with ``__call__`` and ``identity`` will do.

    A reward model is no ``nn.Module``, so that its weights stay out of checkpoints and of the optimizer.

    One that judges by more than the texts, such as by the right answer, names the columns of the data set that it needs
    in ``columns`` and is called with a fourth argument, ``columns``: B values of each of them, and of each of
    ``data.reward_columns``, by name.
    """

    columns: Sequence[str] = ()
    """Columns of the data set that the reward cannot do without."""
    reads_columns: bool = False
    """Whether it is called with ``columns``, the values of the prompts' rows; so is one that names ``columns``."""
    judges_alone: bool = False
    """Whether a response's reward is the same in any company, so that each may be asked for by itself."""

    @abstractmethod
    def __call__(
        self,
        prompts: Sequence[str],
        responses: Sequence[Sequence[str]],
        token_ids: Sequence[Sequence[Sequence[int]]],
    ) -> Tensor:
        """Score responses.

        Args:
            prompts: B prompts as text.
            responses: B lists of G responses as text.
            token_ids: B lists of G lists of response token ids, EOS included.

        Returns:
            ``[B, G]`` float32 rewards, higher is better.
        """

    @abstractmethod
    def identity(self) -> dict[str, str]:
        """Describe the reward in plain text, for fingerprints: equal where the rewards are equal."""

    def to(self, device: torch.device | str) -> Self:
        """Move to a device; does nothing unless a subclass says otherwise.

        Args:
            device: The device.
        """
        del device
        return self


def ask_reward(
    reward: Callable[..., Any],
    prompts: Sequence[str],
    responses: Sequence[Sequence[str]],
    token_ids: Sequence[Sequence[Sequence[int]]],
    columns: Mapping[str, Sequence[Any]] | None = None,
    *,
    abstains: bool = False,
) -> Tensor:
    """Score responses by any reward and check what it says.

    Args:
        reward: The reward.
        prompts: B prompts.
        responses: B lists of G responses.
        token_ids: B lists of G lists of response token ids.
        columns: B values of each column of the data set that came along.
        abstains: Whether the reward may say None, or NaN, of a response that it does not apply to.

    Returns:
        ``[B, G]`` float32, as :func:`check_rewards` returns them.

    Raises:
        RewardError: If the reward raises anything: it names the function, its line and the first row that it fails on
            by itself, and has the error as its cause. Or if what it returns is refused.
    """
    try:
        return call_reward(reward, prompts, responses, token_ids, columns, abstains=abstains)[0]
    except RewardFailure as failure:
        place = failing_row(reward, prompts, responses, token_ids, columns or {})
        raise RewardFailure(f"{failure}{place}. VBON_TRACEBACK=1 shows the way there") from failure.__cause__


def call_reward(
    reward: Callable[..., Any],
    prompts: Sequence[str],
    responses: Sequence[Sequence[str]],
    token_ids: Sequence[Sequence[Sequence[int]]],
    columns: Mapping[str, Sequence[Any]] | None = None,
    *,
    abstains: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Call a reward once: :func:`ask_reward` without a word on which row is to blame.

    Args:
        reward: The reward; it gets copies of what follows.
        prompts: B prompts.
        responses: B lists of G responses.
        token_ids: B lists of G lists of response token ids.
        columns: B values of each column of the data set that came along.
        abstains: Whether the reward may say None, or NaN.

    Returns:
        ``[B, G]`` float32, and the same of each part of a reward that has several, by name.

    Raises:
        RewardFailure: If the reward raises anything.
        RewardError: If what it returns is refused.
    """
    # Copies: what a user's function changes in place must not be trained on, or written to a table.
    beside = copy.deepcopy(_beside(reward, columns or {}))
    given = list(prompts), [list(group) for group in responses], [[list(ids) for ids in group] for group in token_ids]
    parts: dict[str, Tensor] = {}
    try:
        if hasattr(reward, "with_parts"):
            found, parts = reward.with_parts(*given, **beside)
        else:
            found = reward(*given, **beside)
    except (RewardError, KeyboardInterrupt):
        raise
    except BaseException as error:  # whatever a user's function raises, and where it calls sys.exit too
        raise RewardFailure(
            f"the reward {_name(reward)} raised {type(error).__name__}: {visible(str(error))}; in {_innermost(error)}"
        ) from error
    return check_rewards(found, prompts, responses, abstains=abstains), parts


def _beside(reward: Any, columns: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    needed = tuple(getattr(reward, "columns", ()))
    check_columns(_name(reward), needed, columns)
    return {"columns": columns} if needed or getattr(reward, "reads_columns", False) else {}


def _name(reward: Any) -> str:
    return str(getattr(reward, "function", type(reward).__name__))


def check_columns(what: str, needed: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> None:
    """Raise RewardError unless all columns that a reward needs came along.

    Args:
        what: The reward's name.
        needed: The columns.
        columns: Those that came, by name.
    """
    for name in needed:
        if name not in columns:
            raise RewardError(
                f"the reward {what} reads the column {name!r} of the data set, and the prompts came with "
                f"{', '.join(map(repr, columns)) or 'none'}: name the parameter as a column is named, or fill it by "
                "`arguments`"
            )


def _innermost(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.name} ({frame.filename}, line {frame.lineno})"


def failing_row(
    reward: Callable[..., Any],
    prompts: Sequence[str],
    responses: Sequence[Sequence[str]],
    token_ids: Sequence[Sequence[Sequence[int]]],
    columns: Mapping[str, Sequence[Any]],
) -> str:
    """Say which row a reward fails on when it is asked for each by itself, for a message.

    Args:
        reward: The reward.
        prompts: B prompts.
        responses: B lists of G responses.
        token_ids: B lists of G lists of response token ids.
        columns: B values of each column.
    """
    for row, (prompt, texts) in enumerate(zip(prompts, responses, strict=False)):
        own = {name: values[row : row + 1] for name, values in columns.items()}
        try:
            reward([prompt], [texts], list(token_ids)[row : row + 1], **_beside(reward, own))
        except KeyboardInterrupt:
            raise
        except BaseException:  # as in call_reward
            return place_of(row, prompt, texts)
    return "; no row fails by itself"


def place_of(row: int, prompt: str, responses: Sequence[str], response: int | None = None) -> str:
    """Name a row, or one response of it, for a message.

    Args:
        row: The row's place in the batch.
        prompt: Its prompt.
        responses: Its responses, or the one that is meant.
        response: That one's place; None for the whole row.
    """
    first = shorten(responses[0]) if responses else "none"
    if response is None:
        return f"; row {row}: prompt {shorten(prompt)}, first response {first}"
    return f"; row {row}, response {response}: prompt {shorten(prompt)}, response {first}"


def check_rewards(
    rewards: Any, prompts: Sequence[str], responses: Sequence[Sequence[str]], *, abstains: bool = False
) -> Tensor:
    """Check rewards for shape and finiteness, and return them as a float32 tensor.

    Args:
        rewards: ``[B, G]`` numbers: a tensor, an array or nested lists.
        prompts: B prompts.
        responses: B lists of G responses.
        abstains: Whether None and NaN are taken, as NaN, for responses that the reward does not apply to.

    Returns:
        ``[B, G]`` float32, without a gradient, on the device the rewards came on.

    Raises:
        RewardError: If the shape is not ``[B, G]``, or a reward is NaN or infinite; it names the row, the
            prompt and the response.
    """
    if len(responses) != len(prompts):
        raise RewardError(f"{len(prompts)} prompts came with {len(responses)} lists of responses: expected one each")
    sizes = {len(row) for row in responses}
    if len(sizes) > 1:
        raise RewardError(f"every prompt needs the same number of responses, but they have {sorted(sizes)}")
    if why := _NO_NUMBERS.get(_kind_of(rewards)):
        raise RewardError(
            f"rewards should be [B, G] numbers, {len(prompts)} rows of {max(sizes, default=0)}, but the reward "
            f"returned {why}; row 0: prompt {shorten(prompts[0]) if prompts else 'none'}"
        )
    if not isinstance(rewards, Tensor):
        rewards = _without_none(rewards) if abstains else rewards
        _check_lists(rewards, prompts, responses)
        try:
            rewards = torch.as_tensor(rewards, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise RewardError(
                f"rewards should be [B, G] numbers, but they are {type(rewards).__name__}: {error}"
            ) from error
    given, rewards = rewards.detach(), rewards.detach().to(torch.float32)
    if not prompts:
        return rewards.reshape(0, rewards.shape[1] if rewards.ndim == 2 else 0)
    expected = (len(prompts), sizes.pop())
    if tuple(rewards.shape) != expected:
        raise RewardError(
            f"rewards have shape {list(rewards.shape)}, expected [B, G] = {list(expected)}: "
            "one number for each response of each prompt"
        )
    finite = torch.isfinite(rewards) | (rewards.isnan() if abstains else torch.zeros_like(rewards, dtype=torch.bool))
    if not finite.all():
        row, column = (int(index) for index in (~finite).nonzero()[0])
        value = float(given[row, column])
        large = (
            f", too large for float32 (at most {torch.finfo(torch.float32).max:.1e})" if math.isfinite(value) else ""
        )
        raise RewardError(
            f"the reward of row {row}, response {column} is {value}{large} "
            f"({int((~finite).sum())} such rewards in this batch): a reward must be a finite number "
            "(data.reward_calls.on_missing: skip leaves out responses of which it says None or NaN); "
            f"prompt {shorten(prompts[row])}, response {shorten(responses[row][column])}"
        )
    return rewards


def join_texts(prompts: Sequence[str], responses: Sequence[Sequence[str]], text: Text) -> list[str]:
    """Return the B * G texts to score, row by row.

    Args:
        prompts: B prompts.
        responses: B lists of G responses.
        text: ``prompt_and_response`` for the two concatenated as they are, ``response`` for the response
            alone.
    """
    if len(responses) != len(prompts):
        raise RewardError(f"{len(prompts)} prompts came with {len(responses)} lists of responses: expected one each")
    if text == "response":
        return [response for row in responses for response in row]
    return [prompt + response for prompt, row in zip(prompts, responses, strict=True) for response in row]


def check_text(text: str) -> None:
    """Check a ``text`` argument.

    Args:
        text: The argument.

    Raises:
        RewardError: If it is not one of :data:`Text`.
    """
    if text not in ("prompt_and_response", "response"):
        raise RewardError(f"`text` is {text!r}, expected 'prompt_and_response' or 'response'")


def _without_none(rewards: Any) -> Any:
    """Return nested lists with NaN for each None."""
    if not isinstance(rewards, list | tuple):
        return rewards
    return [
        [math.nan if value is None else value for value in row] if isinstance(row, list | tuple) else row
        for row in rewards
    ]


def _check_lists(rewards: Any, prompts: Sequence[str], responses: Sequence[Sequence[str]]) -> None:
    # Lists of unequal lengths would fail in torch without saying whose they are.
    if not isinstance(rewards, (list, tuple)):
        return
    if len(rewards) != len(prompts):
        raise RewardError(f"{len(rewards)} rows of rewards came for {len(prompts)} prompts: expected one row each")
    for index, (row, prompt, texts) in enumerate(zip(rewards, prompts, responses, strict=True)):
        of = f"prompt {shorten(prompt)}, first response {shorten(texts[0]) if texts else 'none'}"
        if why := _NO_NUMBERS.get(_kind_of(row)):
            raise RewardError(f"row {index} of the rewards is {why}: expected {len(texts)} numbers; {of}")
        if isinstance(row, (list, tuple)) and len(row) != len(texts):
            raise RewardError(f"row {index} has {len(row)} rewards for {len(texts)} responses: expected one each; {of}")
        for column, value in enumerate(row if isinstance(row, (list, tuple)) else ()):
            if not _is_number(value):
                raise RewardError(
                    f"the reward of row {index}, response {column} is {shorten(str(value))}, a {type(value).__name__}: "
                    f"it must be a number; prompt {shorten(prompt)}, response {shorten(texts[column])}"
                )
            if isinstance(value, int) and value.bit_length() > _MOST_BITS:
                raise RewardError(
                    f"the reward of row {index}, response {column} is an integer of {value.bit_length()} bits, too "
                    f"large for float32: it must be a finite number; prompt {shorten(prompt)}, response "
                    f"{shorten(texts[column])}"
                )


_MOST_BITS = 1023
"""Of an integer that fits into a float64."""

_NO_NUMBERS = {
    "none": "None (does it end without a `return`?)",
    "text": "a text",
    "generator": "a generator, which can be read once only (return a list)",
    "coroutine": "a coroutine (an async function, which nobody awaits: give a plain one, such as one that calls "
    "asyncio.run)",
}


def _kind_of(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, str | bytes):
        return "text"
    if inspect.isawaitable(value):
        if inspect.iscoroutine(value):
            value.close()
        return "coroutine"
    return "generator" if inspect.isgenerator(value) or inspect.isasyncgen(value) else "numbers"


def _is_number(value: Any) -> bool:
    """Return whether a value is a number, or an array or tensor of one."""
    return isinstance(value, numbers.Real) or getattr(value, "ndim", None) == 0
