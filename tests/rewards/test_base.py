"""What every reward goes through."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch

from vbon_lightning.rewards import RewardCalls, RewardError, ask_reward, check_rewards, join_texts
from vbon_lightning.rewards.base import call_reward
from vbon_lightning.rewards.calls import CallRecord, RewardCaller

PROMPTS = ["one", "two"]
RESPONSES = [["a", "b", "c"], ["d", "e", "f" * 500]]


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda rows: torch.tensor(rows).double()])
def test_any_numbers_become_float32(kind):
    rewards = check_rewards(kind([[1, 2, 3], [4, 5, 6.5]]), PROMPTS, RESPONSES)
    assert rewards.dtype == torch.float32
    assert rewards.tolist() == [[1, 2, 3], [4, 5, 6.5]]


def test_no_gradient_gets_out():
    assert not check_rewards(torch.zeros(2, 3, requires_grad=True) * 2, PROMPTS, RESPONSES).requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e300])
@pytest.mark.parametrize("kind", [list, lambda rows: torch.tensor(rows, dtype=torch.float64)])
def test_a_reward_that_is_no_finite_number_names_its_texts(bad, kind):
    with pytest.raises(RewardError, match="row 1, response 2 is .*prompt 'two', response 'f+ ... f+'") as caught:
        check_rewards(kind([[1.0, 2.0, 3.0], [4.0, 5.0, bad]]), PROMPTS, RESPONSES)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([[1, 2, 3], [4, 1e300, 6]], r"row 1, response 1 is 1e\+300, too large for float32 \(at most 3\.4e\+38\)"),
        ([[1, 10**400, 3], [4, 5, 6]], "row 0, response 1 is an integer of 1329 bits, too large for float32.*'b'"),
        ([[1, 2, -(10**5000)], [4, 5, 6]], "row 0, response 2 is an integer of 16610 bits, too large"),
        ([[1, 2, 3]], "1 rows of rewards came for 2 prompts"),
        ([[1, 2, 3], [4, 5]], "row 1 has 2 rewards for 3 responses.*prompt 'two'"),
        ([1, 2], r"shape \[2\], expected \[B, G\] = \[2, 3\]"),
        (torch.zeros(3, 2), r"shape \[3, 2\], expected"),
        (torch.zeros(6), r"shape \[6\], expected"),
        (torch.zeros(2, 3, 1), r"shape \[2, 3, 1\], expected"),
        ([[1, 2, 3], [4, "x", 6]], "reward of row 1, response 1 is 'x', a str: .*prompt 'two', response 'e'"),
        ([[None, 2, 3], [4, 5, 6]], "reward of row 0, response 0 is 'None', a NoneType"),
        ([[1, 2, 3], [4, [5], 6]], "reward of row 1, response 1 is .* a list"),
        ([[1, 2, 3], None], "row 1 of the rewards is None .*prompt 'two'"),
        ([[1, 2, 3], "abc"], "row 1 of the rewards is a text"),
        ([[1, 2, 3], (x for x in (4, 5, 6))], "row 1 of the rewards is a generator"),
        (None, r"2 rows of 3, but the reward returned None \(does it end without a `return`\?\); row 0: prompt 'one'"),
        ("good", "returned a text"),
        (b"good", "returned a text"),
        ((row for row in [[1, 2, 3], [4, 5, 6]]), "returned a generator"),
    ],
)
def test_wrong_shapes_are_refused(rewards, message):
    with pytest.raises(RewardError, match=message):
        check_rewards(rewards, PROMPTS, RESPONSES)


def test_uneven_groups_are_refused():
    with pytest.raises(RewardError, match="same number of responses"):
        check_rewards([[1], [2, 3]], PROMPTS, [["a"], ["b", "c"]])
    with pytest.raises(RewardError, match="2 prompts came with 1 lists"):
        check_rewards([[1], [2]], PROMPTS, [["a"]])


def test_no_prompts():
    assert check_rewards([], [], []).shape == (0, 0)


def test_join_texts():
    assert join_texts(["x ", "y "], [["a", "b"], ["c", "d"]], "prompt_and_response") == [
        "x a",
        "x b",
        "y c",
        "y d",
    ]
    assert join_texts(["x ", "y "], [["a", "b"], ["c", "d"]], "response") == ["a", "b", "c", "d"]


# -- what somebody's own reward raises --


def fails_on_two(prompts, responses, token_ids):
    return [[{"one": 1.0}[prompt] for _ in row] for prompt, row in zip(prompts, responses, strict=True)]


def fails_together(prompts, responses, token_ids):
    if len(prompts) > 1:
        raise RuntimeError("too many at once")
    return [[0.0] * len(row) for row in responses]


async def asynchronous(prompts, responses, token_ids):
    return [[0.0] * len(row) for row in responses]


def test_an_exception_keeps_its_function_its_row_and_its_cause():
    message = (
        r"raised KeyError: 'two'; in <?\w*>? ?\(.*test_base.py, line \d+\); row 1: prompt 'two', first response 'd'.*"
    )
    with pytest.raises(RewardError, match="the reward function " + message + "VBON_TRACEBACK=1") as caught:
        ask_reward(fails_on_two, PROMPTS, RESPONSES, [])
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(RewardError, match="in fails_together .*; no row fails by itself"):
        ask_reward(fails_together, PROMPTS, RESPONSES, [])


def test_an_async_function_is_told_from_one():
    with pytest.raises(RewardError, match="returned a coroutine .*; row 0: prompt 'one'"):
        ask_reward(asynchronous, PROMPTS, RESPONSES, [])


def test_rewards_may_be_numbers_of_any_library():
    rows = [[np.float32(1), torch.tensor(2.0), True], np.array([4, 5, 6])]
    assert ask_reward(lambda *_: rows, PROMPTS, RESPONSES, []).tolist() == [[1, 2, 1], [4, 5, 6]]


class _Leaving(SystemExit):
    """A way out of somebody's own."""


CALLS: list[dict[str, Any]] = [
    {},
    {"workers": 3},
    {"timeout_s": 20.0},
    {"workers": 2, "retries": 1, "backoff_s": 0.0},
]


def asked(reward: Any, calls: dict[str, Any]) -> None:
    with RewardCaller(reward, RewardCalls(**calls), CallRecord(), ahead=False) as caller:
        caller.start(PROMPTS, RESPONSES, [[[1]] * 3] * 2).result()


@pytest.mark.filterwarnings("ignore:the reward function raised")  # where it is asked again
@pytest.mark.parametrize("kind", [SystemExit, _Leaving, asyncio.CancelledError, RuntimeError])
@pytest.mark.parametrize("calls", CALLS)
def test_a_reward_that_ends_the_program_is_an_error_that_names_it(kind: Any, calls: dict[str, Any]) -> None:
    def leaves(prompts: Any, responses: Any, token_ids: Any) -> Any:
        raise kind(3)

    with pytest.raises(RewardError, match=rf"the reward function raised {kind.__name__}: 3; in leaves .*; row"):
        asked(leaves, calls)


@pytest.mark.parametrize("calls", CALLS)
def test_an_interrupt_stays_one(calls: dict[str, Any]) -> None:
    def interrupted(prompts: Any, responses: Any, token_ids: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asked(interrupted, calls)


def test_what_a_reward_changes_in_place_is_its_own() -> None:
    def meddles(prompts: Any, responses: Any, token_ids: Any, answers: Any) -> torch.Tensor:
        prompts[0] = responses[0][0] = "changed"
        token_ids[0][0][0] = 7
        token_ids[0][1].append(8)
        answers[0]["right"] = False
        return torch.tensor([[1.0, 2.0]])

    class Meddles:
        columns = ("answers",)

        def __call__(self, prompts: Any, responses: Any, token_ids: Any, columns: Any) -> torch.Tensor:
            return meddles(prompts, responses, token_ids, columns["answers"])

    def given() -> tuple[Any, ...]:
        return ["p"], [["a", "b"]], [[[1], [2, 3]]], {"answers": [{"right": True}]}

    asked = given()
    rewards, _ = call_reward(Meddles(), *asked)
    assert rewards.tolist() == [[1.0, 2.0]]
    assert asked == given()
