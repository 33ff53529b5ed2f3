"""How a reward is called: in pieces, at once, again, in time; and what is done where it says nothing."""

from __future__ import annotations

import itertools
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from vbon_lightning.rewards import (
    CallableReward,
    ExactMatchReward,
    RewardCalls,
    RewardError,
    RewardFailure,
    RewardModel,
    ThresholdReward,
    WeightedReward,
    ask_reward,
)
from vbon_lightning.rewards.calls import CallRecord, RewardCaller, Scored, in_these_modes, within

PROMPTS = ["p", "qq", "rrr"]
RESPONSES = [["a", "bb", "ccc"], ["dd", "", "e"], ["ffff", "g", "hh"]]
TOKENS = [[[7] * len(text) for text in row] for row in RESPONSES]
COLUMNS = {"answer": ["bb", "e", "g"]}
SOON = 30.0
"""Seconds after which a test that waits for another thread gives up."""


class Telling(RewardModel):
    """Says what ``of`` says of each response, and notes what each call got."""

    def __init__(self, of: Callable[[str, str], float | None], *, alone: bool = False) -> None:
        self.of, self.judges_alone = of, alone
        self.got: list[list[list[str]]] = []
        self.threads: set[threading.Thread] = set()

    def __call__(self, prompts: Sequence[str], responses: Any, token_ids: Any) -> Any:
        self.got.append([list(row) for row in responses])
        self.threads.add(threading.current_thread())
        return [[self.of(prompt, text) for text in row] for prompt, row in zip(prompts, responses, strict=True)]

    def identity(self) -> dict[str, str]:
        return {"class": "Telling"}


def length(prompt: str, response: str) -> float:
    return float(len(prompt) * 10 + len(response))


def grouped(prompts: Any, responses: Any, token_ids: Any, answer: Any) -> Any:
    """Judge each by its group's mean: the group must stay together."""
    return [
        [len(ids) - sum(map(len, group)) / len(group) + (text == right) for ids, text in zip(group, row, strict=True)]
        for group, row, right in zip(token_ids, responses, answer, strict=True)
    ]


def flat(prompts: Any, completions: Any, answer: Any, **kwargs: Any) -> list[float]:
    return [float(len(text) + (text == right)) for text, right in zip(completions, answer, strict=True)]


async def awaited(prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
    return [float(len(prompt) + len(text)) for prompt, text in zip(prompts, completions, strict=True)]


def function(name: str) -> CallableReward:
    return CallableReward(f"{__name__}.{name}")


def ask(reward: Any, record: CallRecord | None = None, *, ahead: bool = False, **calls: Any) -> Scored:
    options = RewardCalls(**({"backoff_s": 0.0} | calls))
    with RewardCaller(reward, options, record or CallRecord(), ahead=ahead) as caller:
        return caller.start(PROMPTS, RESPONSES, TOKENS, COLUMNS).result()


REWARDS: dict[str, Callable[[], Any]] = {
    "model": lambda: Telling(length),
    "grouped": lambda: function("grouped"),
    "flat": lambda: function("flat"),
    "coroutine": lambda: function("awaited"),
    "response": lambda: ExactMatchReward("answer"),
    "threshold": lambda: ThresholdReward(function("flat"), 2.0),
    "weighted": lambda: WeightedReward({"right": ExactMatchReward("answer"), "flat": function("flat")}, {"flat": 0.5}),
}


@pytest.mark.parametrize(
    "calls", [{}, {"workers": 4}, {"retries": 1}, {"timeout_s": SOON}, {"workers": 2, "timeout_s": SOON}]
)
@pytest.mark.parametrize("kind", list(REWARDS))
def test_rewards_and_their_order_are_those_of_one_call(kind: str, calls: dict[str, Any]) -> None:
    reward = REWARDS[kind]()
    whole = ask_reward(reward, PROMPTS, RESPONSES, TOKENS, COLUMNS)
    assert len(whole.unique()) > 1
    found = ask(reward, **calls)
    assert torch.equal(found.rewards, whole)
    if kind == "weighted":
        for name, part in reward.with_parts(PROMPTS, RESPONSES, TOKENS, COLUMNS)[1].items():
            assert torch.equal(found.parts[name], part)
        assert list(found.parts) == ["right", "flat"]
    else:
        assert found.parts == {}


@pytest.mark.parametrize(
    ("alone", "calls", "sizes"),
    [
        (False, {}, [(3, 3)]),
        (True, {"on_missing": "skip"}, [(3, 3)]),
        (False, {"workers": 2}, [(1, 3)] * 3),
        (False, {"retries": 1}, [(1, 3)] * 3),
        (True, {"workers": 2}, [(1, 1)] * 9),
        (True, {"timeout_s": SOON}, [(1, 1)] * 9),
        (False, {"workers": 2, "per_call": "batch"}, [(3, 3)]),
        (False, {"per_call": "response"}, [(1, 1)] * 9),
        (True, {"workers": 2, "per_call": "prompt"}, [(1, 3)] * 3),
    ],
)
def test_what_a_call_gets(alone: bool, calls: dict[str, Any], sizes: list[tuple[int, int]]) -> None:
    reward = Telling(length, alone=alone)
    assert torch.equal(ask(reward, **calls).rewards, ask(Telling(length)).rewards)
    assert [(len(call), len(call[0])) for call in reward.got] == sizes


def test_who_judges_each_response_by_itself() -> None:
    one, other = ExactMatchReward("answer"), function("flat")
    assert one.judges_alone and not other.judges_alone
    assert WeightedReward({"one": one}).judges_alone and not WeightedReward({"one": one, "other": other}).judges_alone
    assert ThresholdReward(one).judges_alone and not ThresholdReward(other).judges_alone


def test_so_many_calls_are_made_at_once() -> None:
    together = threading.Barrier(3)

    def meeting(prompt: str, response: str) -> float:
        if response == RESPONSES[PROMPTS.index(prompt)][0]:
            together.wait(SOON)  # no call ends before all three have begun
        return 1.0

    assert ask(Telling(meeting), workers=3).rewards.sum() == 9


def test_no_more_calls_are_made_at_once_than_asked_for() -> None:
    running, most, lock = [0], [0], threading.Lock()

    def counting(prompt: str, response: str) -> float:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        threading.Event().wait(0.01)
        with lock:
            running[0] -= 1
        return 0.0

    ask(Telling(counting), workers=2, per_call="response")
    assert most[0] <= 2


@pytest.mark.parametrize("workers", [1, 2])
def test_it_begins_before_the_answers_are_asked_for(workers: int) -> None:
    begun, go = threading.Event(), threading.Event()

    def waiting(prompt: str, response: str) -> float:
        begun.set()
        assert go.wait(SOON)
        return 2.0

    with RewardCaller(Telling(waiting), RewardCalls(workers=workers), CallRecord(), ahead=True) as caller:
        pending = caller.start(PROMPTS, RESPONSES, TOKENS)
        assert begun.wait(SOON)
        go.set()
        assert pending.result().rewards.eq(2).all()


def test_without_need_there_is_no_thread() -> None:
    reward = Telling(length)
    ask(reward)
    assert reward.threads == {threading.main_thread()}


def failing(times: int, at: str = "e") -> Callable[[str, str], float]:
    """Raise at one response so often."""
    left = [times]

    def of(prompt: str, response: str) -> float:
        if response == at and left[0]:
            left[0] -= 1
            raise ConnectionError("the judge is out")
        return length(prompt, response)

    return of


@pytest.mark.parametrize("calls", [{"per_call": "batch"}, {"workers": 3}, {"per_call": "response"}])
def test_a_call_that_fails_is_made_again(calls: dict[str, Any]) -> None:
    record = CallRecord()
    with pytest.warns(UserWarning, match="raised ConnectionError: the judge is out.* asked again") as told:
        found = ask(Telling(failing(2)), record, retries=2, **calls)
    assert torch.equal(found.rewards, ask(Telling(length)).rewards)
    assert record.retries == 2
    assert len(told) == 1, "it is said once"


@pytest.mark.parametrize(
    ("calls", "place"),
    [
        ({"per_call": "batch"}, r"; row 1: prompt 'qq', first response 'dd'"),
        ({"workers": 2}, r"; row 1: prompt 'qq', first response 'dd'"),
        ({"per_call": "response"}, r"; row 1, response 2: prompt 'qq', response 'e'"),
        ({"per_call": "batch", "timeout_s": SOON}, "; rows 0 to 2"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*asked again")
def test_after_the_last_retry_the_error_names_the_row(calls: dict[str, Any], place: str) -> None:
    record = CallRecord()
    message = rf"Telling raised ConnectionError: the judge is out; in of .*{place}; asked 4 times\. VBON_TRACEBACK"
    with pytest.raises(RewardFailure, match=message) as caught:
        ask(Telling(failing(99)), record, retries=3, **calls)
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert record.retries == 3


def test_pauses_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(threading.Event, "wait", lambda self, seconds=None: bool(waited.append(seconds)))
    with pytest.warns(UserWarning, match="asked again"), pytest.raises(RewardFailure):
        ask(Telling(failing(99)), retries=8, backoff_s=0.5)
    assert waited == [0.5, 1, 2, 4, 8, 16, 32, 60]


def test_a_part_of_a_weighted_reward_is_asked_again_and_named() -> None:
    reward = WeightedReward({"judge": Telling(failing(1)), "right": ExactMatchReward("answer")})
    with pytest.warns(UserWarning, match="the judge is out"):
        assert torch.equal(ask(reward, retries=1).rewards, ask_reward(reward, PROMPTS, RESPONSES, TOKENS, COLUMNS))
    with pytest.raises(RewardFailure, match="the judge is out; in of .*; row 1: prompt 'qq'"):
        ask(WeightedReward({"judge": Telling(failing(99))}), workers=2)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_no_reward_is_not_asked_for_again(workers: int) -> None:
    reward = Telling(lambda prompt, response: "good")  # type: ignore[arg-type, return-value]
    with pytest.raises(RewardError, match=r"'good', a str.*\(in the call for row 0\)"):
        ask(reward, retries=5, workers=workers, per_call="prompt")
    assert len(reward.got) <= 3
    with pytest.raises(RewardError, match="reads the column 'other'"):
        ask(ExactMatchReward("other"), retries=5, workers=workers)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_call_that_hangs_is_given_up(workers: int) -> None:
    never, hung = threading.Event(), [0]

    def hanging(prompt: str, response: str) -> float:
        if response == "e" and hung[0] < 2:
            hung[0] += 1
            never.wait(SOON)
        return length(prompt, response)

    record = CallRecord()
    message = r"no answer within 0.05 s \(data.reward_calls.timeout_s\)"
    try:
        with pytest.raises(RewardFailure, match=message + "; row 1: prompt 'qq'"):
            ask(Telling(hanging), record, timeout_s=0.05, workers=workers)
        with pytest.warns(UserWarning, match=message):
            found = ask(Telling(hanging), record, timeout_s=0.05, retries=1, workers=workers)
    finally:
        never.set()
    assert torch.equal(found.rewards, ask(Telling(length)).rewards)
    assert record.retries == 1


def test_an_error_of_the_call_itself_is_its_own() -> None:
    def raising() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        within(raising, SOON)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("nothing", [None, math.nan])
def test_a_missing_reward_stops_unless_it_is_skipped(nothing: float | None, workers: int) -> None:
    reward = Telling(lambda prompt, response: nothing if response == "e" else 1.0)
    with pytest.raises(RewardError, match=r"the reward of row 1, response 2 is nan .*on_missing: skip"):
        ask(reward, workers=workers)
    found = ask(reward, workers=workers, on_missing="skip").rewards
    assert found.isnan().nonzero().tolist() == [[1, 2]]
    with pytest.raises(RewardError, match="row 0, response 0 is inf"):
        ask(Telling(lambda prompt, response: math.inf), workers=workers, on_missing="skip")


def test_a_weighted_reward_is_missing_where_no_part_applies() -> None:
    some = Telling(lambda prompt, response: None if response in ("e", "g") else 1.0)
    other = Telling(lambda prompt, response: None if response != "g" else 3.0)
    found = ask(WeightedReward({"some": some, "other": other}), workers=2, on_missing="skip").rewards
    assert found.isnan().nonzero().tolist() == [[1, 2]]
    assert found[2, 1] == 3
    assert ask(ThresholdReward(some), on_missing="skip").rewards.isnan().nonzero().tolist() == [[1, 2], [2, 1]]


def test_what_is_finished_is_known_after_an_error() -> None:
    others, failed = threading.Event(), failing(99)

    def after_the_others(prompt: str, response: str) -> float:
        if response == "e":
            assert others.wait(SOON)
        elif response == "hh":
            others.set()
        return failed(prompt, response)

    with RewardCaller(Telling(after_the_others), RewardCalls(workers=3), CallRecord(), ahead=False) as caller:
        pending = caller.start(PROMPTS, RESPONSES, TOKENS)
        with pytest.raises(RewardFailure):
            pending.result()
        assert pending.finished_rows() == [(0, [11, 12, 13]), (2, [34, 31, 32])]
    nothing = Telling(lambda prompt, response: None if prompt == "p" else 1.0)
    with RewardCaller(nothing, RewardCalls(per_call="response"), CallRecord(), ahead=False) as caller:
        pending = caller.start(PROMPTS, RESPONSES, TOKENS)
        with pytest.raises(RewardError, match="row 0, response 0 is nan"):
            pending.result()
        assert [row for row, _ in pending.finished_rows()] == [1, 2]


def test_after_an_error_no_further_call_begins() -> None:
    go, begun = threading.Event(), threading.Event()

    def holding(prompt: str, response: str) -> float:
        if prompt == "p":
            raise ConnectionError("out")
        begun.set()
        assert go.wait(SOON)
        return 1.0

    reward = Telling(holding)
    with RewardCaller(reward, RewardCalls(per_call="prompt"), CallRecord(), ahead=True) as caller:
        pending = caller.start(PROMPTS, RESPONSES, TOKENS)
        with pytest.raises(RewardFailure, match="row 0"):
            pending.result()
        assert begun.wait(SOON)
        threading.Timer(0.1, go.set).start()
        assert [row for row, _ in pending.finished_rows()] == [1], "what runs is waited for"
    assert len(reward.got) == 2


@pytest.mark.parametrize("broken", [False, True])
def test_no_thread_is_left(broken: bool) -> None:
    reward = Telling(failing(99 if broken else 0))
    if broken:
        with pytest.raises(RewardFailure):
            ask(reward, workers=3, timeout_s=SOON)
    else:
        ask(reward, workers=3, timeout_s=SOON)
    for thread in reward.threads:
        thread.join(SOON)
    assert not any(thread.is_alive() for thread in reward.threads)


def test_an_interrupt_ends_the_waiting_and_begins_no_further_call() -> None:
    waiting, go, calls_made = threading.Event(), threading.Event(), itertools.count()
    main = threading.get_ident()

    def interrupting(prompt: str, response: str) -> float:
        assert waiting.wait(SOON)
        if next(calls_made) == 0:
            time.sleep(0.3)  # until it waits
            signal.pthread_kill(main, signal.SIGINT)
        go.wait(SOON)
        return 0.0

    reward = Telling(interrupting)
    calls = RewardCalls(workers=2, per_call="response")

    def run() -> None:
        with RewardCaller(reward, calls, CallRecord(), ahead=False) as caller:
            pending = caller.start(PROMPTS, RESPONSES, TOKENS)
            waiting.set()
            pending.result()

    # Where the tests run in the background of a shell, interrupts are ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run()
    finally:
        signal.signal(signal.SIGINT, before)
        go.set()
    for thread in reward.threads:
        thread.join(SOON)
    assert len(reward.got) <= 2


@pytest.mark.parametrize("calls", [{}, {"workers": 2}, {"timeout_s": SOON}])
def test_rewards_are_made_in_single_precision(calls: dict[str, Any]) -> None:
    class Tensors(Telling):
        def __call__(self, prompts: Any, responses: Any, token_ids: Any) -> Any:
            super().__call__(prompts, responses, token_ids)
            assert torch.is_inference_mode_enabled()
            return torch.tensor([[1 + 1e-5] * len(row) for row in responses])

    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.inference_mode():
            found = ask(Tensors(length), ahead=bool(calls), **calls).rewards
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert found[0, 0] > 1


def test_work_elsewhere_has_the_modes_of_here() -> None:
    def modes() -> Any:
        casts = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        return torch.is_inference_mode_enabled(), torch.is_grad_enabled(), *casts

    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.float16):
        there = in_these_modes(modes)
    with torch.no_grad():
        without = in_these_modes(modes)
    assert there() == (True, False, True, torch.float16)
    assert without()[:3] == (False, False, False)
    assert in_these_modes(modes)()[:3] == (False, True, False)


def test_calls_that_run_ahead_are_made_in_single_precision_too() -> None:
    done = threading.Event()

    class Late(Telling):
        def __call__(self, prompts: Any, responses: Any, token_ids: Any) -> Any:
            time.sleep(0.05)  # until `start` has returned, if it does not wait
            found = torch.tensor([[1 + 1e-5] * len(row) for row in responses])
            done.set()
            return found

    torch.set_default_dtype(torch.bfloat16)
    try:
        with RewardCaller(Late(length), RewardCalls(per_call="batch"), CallRecord(), ahead=True) as caller:
            pending = caller.start(PROMPTS, RESPONSES, TOKENS)
            assert done.wait(SOON)
            assert pending.result().rewards[0, 0] > 1
    finally:
        torch.set_default_dtype(torch.float32)


def test_missing_rewards_are_told_once_and_counted() -> None:
    record = CallRecord()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for count in (0, 2, 3):
            record.left_out(count, "response 'x'")
    assert record.missing == 5
    (only,) = told
    assert "None or NaN of response 'x'" in str(only.message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "data.reward_calls.workers must be an integer >= 1, got 0"),
        ({"workers": True}, "data.reward_calls.workers must be an integer >= 1, got True"),
        ({"retries": -1}, "data.reward_calls.retries must be an integer >= 0, got -1"),
        ({"timeout_s": 0}, "data.reward_calls.timeout_s must be a number of seconds > 0, got 0"),
        ({"backoff_s": -1.0}, "data.reward_calls.backoff_s must be a number of seconds >= 0"),
        ({"per_call": "row"}, "data.reward_calls.per_call must be one of batch, prompt, response; got 'row'"),
        ({"on_missing": "zero"}, "data.reward_calls.on_missing must be one of stop, skip; got 'zero'"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        RewardCalls(**options)


def test_an_empty_batch() -> None:
    for calls in ({}, {"workers": 2}):
        with RewardCaller(Telling(length), RewardCalls(**calls), CallRecord(), ahead=False) as caller:
            assert caller.start([], [], []).result().rewards.shape == (0, 0)
            assert caller.start(["p"], [[]], [[]]).result().rewards.shape == (1, 0)
