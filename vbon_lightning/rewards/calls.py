"""How a run calls its reward: several calls at once, again where one fails, and no longer than is asked."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

from vbon_lightning.rewards.base import RewardError, RewardFailure, call_reward, check_rewards, failing_row, place_of
from vbon_lightning.rewards.calling import Asked

PerCall = Literal["batch", "prompt", "response"]
OnMissing = Literal["stop", "skip"]
_T = TypeVar("_T")
_LONGEST_PAUSE = 60.0


@dataclass(frozen=True)
class RewardCalls:
    """How the reward is called, whichever it is: what it says is its own matter, how it is asked the run's.

    Args:
        workers: Calls made at once, each in a thread, for rewards that wait for something, such as a judge behind
            HTTP. With 2 or more, what one pass or batch is worth is also found while the next is sampled. The function
            must bear calls from several threads. Rewards and their order are those of one worker.
        retries: How often a call that raises or takes too long is made again before the run stops.
        timeout_s: Seconds after which a call counts as failed; None for no limit. A thread cannot be killed: a call
            that hangs is left behind and its answer thrown away.
        backoff_s: Seconds before the first repetition; doubled for each later one, up to a minute.
        per_call: What a call gets: the ``batch`` (a pass of it, where there are several), a ``prompt`` with its
            responses, or a ``response``. By default a response where the reward says that it judges each by itself, as
            ``ResponseReward`` does, otherwise a prompt; and the batch where none of the options above is used.
        on_missing: What to do with a response whose reward is None or NaN: ``stop`` the run, or ``skip``: leave it out
            of its group, count it, and draw another in its place where the number of responses is fixed.
    """

    workers: int = 1
    retries: int = 0
    timeout_s: float | None = None
    backoff_s: float = 1.0
    per_call: PerCall | None = None
    on_missing: OnMissing = "stop"

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense."""
        for name, count, least in (("workers", self.workers, 1), ("retries", self.retries, 0)):
            if isinstance(count, bool) or not isinstance(count, int) or count < least:
                raise RewardError(f"data.reward_calls.{name} must be an integer >= {least}, got {count!r}")
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise RewardError(f"data.reward_calls.timeout_s must be a number of seconds > 0, got {self.timeout_s!r}")
        if not self.backoff_s >= 0:
            raise RewardError(f"data.reward_calls.backoff_s must be a number of seconds >= 0, got {self.backoff_s!r}")
        for name, value, known in (
            ("per_call", self.per_call, (None, *get_args(PerCall))),
            ("on_missing", self.on_missing, get_args(OnMissing)),
        ):
            if value not in known:
                names = ", ".join(str(one) for one in known if one is not None)
                raise RewardError(f"data.reward_calls.{name} must be one of {names}; got {value!r}")

    @property
    def skips(self) -> bool:
        """Return whether a response without a reward is left out rather than the end of the run."""
        return self.on_missing == "skip"

    def unit(self, reward: Any) -> PerCall:
        """Return what a call to a reward gets."""
        if self.per_call is not None:
            return self.per_call
        if self.workers == 1 and not self.retries and self.timeout_s is None:
            return "batch"
        return "response" if getattr(reward, "judges_alone", False) else "prompt"


class Scored(NamedTuple):
    """What a reward said."""

    rewards: Tensor
    """``[B, G]`` float32; NaN where a response has none, if these are to be left out."""
    parts: dict[str, Tensor]
    """``[B, G]`` of each part of a reward that has several, by name."""


_COUNTING = threading.Lock()
"""One for all records, which are copied with the module that holds them; a lock cannot be."""


@dataclass
class CallRecord:
    """What calling the reward has come to in a run; each thing is said once in a warning, and counted."""

    retries: int = 0
    """Calls that were made again."""
    missing: int = 0
    """Responses that were left without a reward."""

    def retried(self, failure: RewardFailure, left: int) -> None:
        """Count a call that is about to be made again."""
        with _COUNTING:
            self.retries += 1
            first = self.retries == 1
        if first:
            warnings.warn(
                f"{failure}. It is asked again (data.reward_calls.retries), {left} more times at most; later failures "
                "are counted in silence",
                stacklevel=2,
            )

    def left_out(self, count: int, example: str) -> None:
        """Count responses without a reward.

        Args:
            count: How many.
            example: One of them, for the warning.
        """
        first = self.missing == 0
        self.missing += count
        if count and first:
            warnings.warn(
                f"the reward says None or NaN of {example}: such responses are left out (data.reward_calls.on_missing "
                "is skip) and counted",
                stacklevel=2,
            )


class _Piece(NamedTuple):
    """What one call gets: some rows, or one response of a row."""

    row: int
    column: int
    asked: Asked


class RewardCaller:
    """Ask a reward as :class:`RewardCalls` has it; a context, which lets its threads go when it is left.

    Left by an exception it waits for no call: those that run end by themselves, and no further one begins.

    Args:
        reward: The reward.
        calls: How it is called.
        record: Counts what happens.
        ahead: Begin before the answers are asked for, in a thread also where there is one worker.
    """

    def __init__(self, reward: Callable[..., Any], calls: RewardCalls, record: CallRecord, *, ahead: bool) -> None:
        self.reward, self.calls, self.record = reward, calls, record
        self._stopped = threading.Event()
        self._pool: ThreadPoolExecutor | None = None
        if ahead or calls.workers > 1:
            self._pool = ThreadPoolExecutor(calls.workers, thread_name_prefix="scoring")

    def __enter__(self) -> RewardCaller:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Let the threads go."""
        self.close(wait_for_calls=kind is None)

    def close(self, *, wait_for_calls: bool) -> None:
        """Let the threads go.

        Args:
            wait_for_calls: Whether to wait until the calls that run have ended.
        """
        self._stopped.set()
        if self._pool is not None:
            self._pool.shutdown(wait=wait_for_calls, cancel_futures=True)

    def start(
        self,
        prompts: Sequence[str],
        responses: Sequence[Sequence[str]],
        token_ids: Sequence[Sequence[Sequence[int]]],
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> PendingRewards:
        """Have responses scored; where there are threads this returns at once.

        Args:
            prompts: B prompts.
            responses: B lists of G responses.
            token_ids: B lists of G lists of response token ids.
            columns: B values of each column of the data set that came along.
        """
        getattr(self.reward, "columns", ())  # a function is imported here, once, and not by several threads
        unit = self.calls.unit(self.reward)
        pieces = list(_pieces(unit, Asked(prompts, responses, token_ids, columns or {})))
        ask = in_these_modes(self._ask)
        if self._pool is None:
            return PendingRewards(self, prompts, responses, pieces, [lambda one=one: ask(one) for one in pieces])  # type: ignore[misc]
        with single_precision() as changed:
            futures = [self._pool.submit(ask, piece) for piece in pieces]
            if changed:  # which is every thread's, and must last as long as the calls
                wait(futures)
        return PendingRewards(self, prompts, responses, pieces, [one.result for one in futures], futures)

    def _ask(self, piece: _Piece) -> Scored:
        """Make one call, and make it again where it fails.

        Raises:
            RewardFailure: After the last retry; it names the row.
            RewardError: If what the reward says is no reward.
        """
        for attempt in range(self.calls.retries + 1):
            try:
                return within(lambda: self._call(piece), self.calls.timeout_s)
            except RewardFailure as failure:
                left = self.calls.retries - attempt
                pause = min(self.calls.backoff_s * 2**attempt, _LONGEST_PAUSE)
                if left:
                    self.record.retried(failure, left)
                if not left or self._stopped.wait(pause):
                    raise RewardFailure(self._described(failure, piece)) from failure.__cause__
            except RewardError as error:  # not for another try: what it returns, or needs, is wrong
                raise RewardError(f"{error}{self._where(piece)}") from error.__cause__
        raise AssertionError("a call ends in an answer or an error")

    def _call(self, piece: _Piece) -> Scored:
        return Scored(*call_reward(self.reward, *piece.asked, abstains=True))

    def _where(self, piece: _Piece) -> str:
        """Say which row, or response, of the batch a call was for; nothing where it was for the whole batch."""
        unit = self.calls.unit(self.reward)
        if unit == "batch":
            return ""
        response = f", response {piece.column}" if unit == "response" else ""
        return f" (in the call for row {piece.row}{response})"

    def _described(self, failure: RewardFailure, piece: _Piece) -> str:
        unit, asked = self.calls.unit(self.reward), piece.asked
        if unit != "batch":
            response = piece.column if unit == "response" else None
            place = place_of(piece.row, asked.prompts[0], asked.responses[0], response)
        elif self.calls.timeout_s is None:
            place = failing_row(self.reward, *asked)
        else:  # to ask for each row by itself might hang
            place = f"; rows 0 to {len(asked.prompts) - 1}"
        again = f"; asked {self.calls.retries + 1} times" if self.calls.retries else ""
        return f"{failure}{place}{again}. VBON_TRACEBACK=1 shows the way there"


class PendingRewards:
    """Rewards of a batch that are being found; :class:`RewardCaller` makes it."""

    def __init__(
        self,
        caller: RewardCaller,
        prompts: Sequence[str],
        responses: Sequence[Sequence[str]],
        pieces: list[_Piece],
        answers: list[Callable[[], Scored]],
        futures: Sequence[Future[Scored]] = (),
    ) -> None:
        self._caller, self._prompts, self._responses = caller, prompts, responses
        self._pieces, self._answers, self._futures = pieces, answers, futures
        self._found: dict[int, Scored] = {}

    def result(self) -> Scored:
        """Wait for all answers and put them in their order.

        Raises:
            RewardError: What the first row that failed raised; or where a reward is missing and that is to stop.
        """
        with single_precision():
            for place, answer in enumerate(self._answers):
                if place not in self._found:
                    self._found[place] = answer()
        scored = self._joined()
        skips = self._caller.calls.skips
        return scored._replace(rewards=check_rewards(scored.rewards, self._prompts, self._responses, abstains=skips))

    def finished_rows(self) -> list[tuple[int, list[float]]]:
        """Return the rows that have all of their rewards, with these, after an error; no new call is begun."""
        for one in self._futures:
            one.cancel()
        for place, one in enumerate(self._futures):
            if not one.cancelled() and one.exception() is None:
                self._found[place] = one.result()
        done: dict[int, list[float]] = {}
        for place, scored in sorted(self._found.items()):
            for row, values in enumerate(scored.rewards.tolist(), start=self._pieces[place].row):
                done.setdefault(row, []).extend(values)
        whole = [(row, values) for row, values in sorted(done.items()) if len(values) == len(self._responses[row])]
        return [(row, values) for row, values in whole if not any(value != value for value in values)]

    def _joined(self) -> Scored:
        found = [self._found[place] for place in range(len(self._pieces))]
        if len(found) == 1:
            return found[0]

        def put_together(values: list[Tensor]) -> Tensor:
            whole = values[0].new_empty(len(self._prompts), len(self._responses[0]))
            for piece, value in zip(self._pieces, values, strict=True):
                rows, columns = value.shape
                whole[piece.row : piece.row + rows, piece.column : piece.column + columns] = value
            return whole

        parts = {name: put_together([one.parts[name] for one in found]) for name in found[0].parts}
        return Scored(put_together([one.rewards for one in found]), parts)


def _pieces(unit: PerCall, asked: Asked) -> Iterator[_Piece]:
    prompts, responses, token_ids, columns = asked
    if unit == "batch" or not prompts or len(responses) != len(prompts) or not all(responses):
        yield _Piece(0, 0, asked)
        return
    for row, prompt in enumerate(prompts):
        beside = {name: values[row : row + 1] for name, values in columns.items()}
        ids = [list(group) for group in token_ids[row : row + 1]]
        if unit == "prompt":
            yield _Piece(row, 0, Asked([prompt], [responses[row]], ids, beside))
            continue
        for column, response in enumerate(responses[row]):
            own = [group[column : column + 1] for group in ids]
            yield _Piece(row, column, Asked([prompt], [[response]], own, beside))


def within(call: Callable[[], _T], seconds: float | None) -> _T:
    """Return what a call comes to, if it does so in time; otherwise it is left behind in a thread of its own.

    Args:
        call: The call.
        seconds: How long to wait; None for as long as it takes, in this thread.

    Raises:
        RewardFailure: If it takes longer.
    """
    if seconds is None:
        return call()
    found: Future[_T] = Future()
    there = in_these_modes(call)

    def run() -> None:
        try:
            found.set_result(there())
        except BaseException as error:  # it is the caller's
            found.set_exception(error)

    threading.Thread(target=run, name="reward", daemon=True).start()
    try:
        return found.result(timeout=seconds)
    except FutureTimeout:
        if found.done():  # by its own timeout, or just now
            return found.result()
        raise RewardFailure(f"the reward gave no answer within {seconds:g} s (data.reward_calls.timeout_s)") from None


@contextmanager
def single_precision() -> Iterator[bool]:
    """Make float32 the default type for a while; give whether that changed anything.

    Lightning's bf16-true makes bfloat16 the default type within a step, in which near rewards would tie.
    """
    before = torch.get_default_dtype()
    changed = before != torch.float32
    if changed:
        torch.set_default_dtype(torch.float32)
    try:
        yield changed
    finally:
        if changed:
            torch.set_default_dtype(before)


def in_these_modes(work: Callable[..., _T]) -> Callable[..., _T]:
    """Return work that, in another thread, computes as it would in this one: torch keeps these modes a thread."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    casts = {kind: torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)}
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def there(*arguments: Any) -> _T:
        with ExitStack() as modes:
            # One after the other: to make some of these is to enter them.
            modes.enter_context(torch.inference_mode(inference))
            modes.enter_context(torch.set_grad_enabled(grad))
            if device is not None:
                modes.enter_context(torch.cuda.device(device))
            for kind, dtype in casts.items():
                modes.enter_context(torch.autocast(kind, dtype=dtype))
            return work(*arguments)

    return there
