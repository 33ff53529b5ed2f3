"""Importable functions and classes as rewards."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vbon_lightning.rewards import CallableReward, RewardError, ThresholdReward, ask_reward

PROMPTS = ["x", "yy"]
RESPONSES = [["a", "bb"], ["ccc", ""]]
TOKENS = [[[1], [1, 2]], [[1, 2, 3], [2]]]

SOURCE = """
import torch

def lengths(prompts, responses, token_ids):
    return [[float(len(ids)) for ids in row] for row in token_ids]

def text_only(prompts, responses):
    return torch.tensor([[float(len(p) * len(r)) for r in row] for p, row in zip(prompts, responses)])

def scaled(prompts, responses, scale=2.0):
    return [[scale * len(r) for r in row] for row in responses]

def required(prompts, responses, scale):
    return [[scale * len(r) for r in row] for row in responses]

def with_both(prompts, responses, token_ids=None, *, scale):
    return [[scale * len(ids) for ids in row] for row in token_ids]

def by_position(prompts, responses, token_ids, /):
    return lengths(prompts, responses, token_ids)

def of_trl(prompts, completions, answer, **kwargs):
    return [float(a == r) for a, r in zip(answer, completions)]

def of_trl_with_an_argument(prompts, completions, answer, **kwargs):
    return [float(answer == r) for r in completions]

def all_of_trls(completions, completion_ids, prompts, **kwargs):
    seen.append((prompts, completions, completion_ids, kwargs))
    return [float(len(ids)) for ids in completion_ids]

def without_prompts(completions, level, trainer_state=None, bonus=0.0):
    return [float(level_) + bonus for level_ in level]

def nested(prompts, completions):
    return [[0.0] * 2] * 2

def nothing(prompts, completions):
    return None

async def awaited(prompts, completions, answer):
    return [float(a == r) for a, r in zip(answer, completions)]

def grouped(prompts, responses, answer, weight=1.0):
    return [[weight * (a == r) for r in row] for a, row in zip(answer, responses)]

def any_column(prompts, responses, **columns):
    seen.append(columns)
    return [[0.0 for _ in row] for row in responses]

seen = []

def anything(*texts, **options):
    return [[float(len(texts)) for _ in row] for row in texts[1]]

def nan_for_empty(prompts, responses):
    return [[float("nan") if not r else 1.0 for r in row] for row in responses]

class Counter:
    made = 0

    def __init__(self, letter="a"):
        self.letter = letter
        self.device = None
        type(self).made += 1

    def __call__(self, prompts, responses, token_ids):
        return [[float(r.count(self.letter)) for r in row] for row in responses]

    def to(self, device):
        self.device = device

    @staticmethod
    def zero(prompts, responses):
        return [[0.0 for _ in row] for row in responses]

number = 3
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    package = tmp_path / "reward_test_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "scores.py").write_text(SOURCE)
    (package / "broken.py").write_text("import no_such_module_here\n")
    (package / "failing.py").write_text("raise RuntimeError('at import')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.startswith("reward_test_package")]:
        del sys.modules[name]


def score(function: str, **arguments: object) -> list[list[float]]:
    reward = CallableReward(f"reward_test_package.scores.{function}", arguments)
    rewards = reward(PROMPTS, RESPONSES, TOKENS)
    assert rewards.dtype == torch.float32
    return rewards.tolist()


def test_functions_get_what_their_signature_asks_for():
    assert score("lengths") == [[1, 2], [3, 1]]
    assert score("text_only") == [[1, 2], [6, 0]]
    assert score("scaled") == [[2, 4], [6, 0]]  # its option is not taken for token ids
    assert score("scaled", scale=3) == [[3, 6], [9, 0]]
    assert score("required", scale=3) == [[3, 6], [9, 0]]
    assert score("with_both", scale=2) == [[2, 4], [6, 2]]
    assert score("by_position") == [[1, 2], [3, 1]]
    assert score("of_trl_with_an_argument", answer="a") == [[1, 0], [0, 0]]
    assert score("anything", option=1) == [[2, 2], [2, 2]]
    assert score("Counter.zero") == [[0, 0], [0, 0]]
    assert CallableReward("reward_test_package.scores:text_only")(PROMPTS, RESPONSES).tolist() == [
        [1, 2],
        [6, 0],
    ]


def test_a_class_is_made_once_with_its_arguments_and_moved():
    reward = CallableReward("reward_test_package.scores.Counter", {"letter": "b"}).to("cpu")
    assert reward(PROMPTS, RESPONSES, TOKENS).tolist() == [[0, 2], [0, 0]]
    reward(PROMPTS, RESPONSES, TOKENS)
    assert type(reward._target).made == 1
    assert reward._target.device == torch.device("cpu")
    with pytest.raises(RewardError, match="cannot make .*Counter with the arguments .*size"):
        score("Counter", size=1)


def test_bad_rewards_stop_with_the_texts():
    reward = CallableReward("reward_test_package.scores.nan_for_empty")
    with pytest.raises(RewardError, match="row 1, response 1 is nan .*prompt 'yy', response ''"):
        ask_reward(reward, PROMPTS, RESPONSES, TOKENS)
    assert reward(PROMPTS, RESPONSES, TOKENS).isnan().tolist() == [[False, False], [False, True]]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("no_such_package_here.score", "no module 'no_such_package_here'; is its folder on PYTHONPATH"),
        ("reward_test_package.scores.missing", "reward_test_package.scores has no 'missing'"),
        ("reward_test_package.missing.score", "reward_test_package has no 'missing.score'"),
        ("reward_test_package.broken.score", "broken failed: No module named 'no_such_module_here'"),
        ("reward_test_package.failing.score", "failing failed: RuntimeError"),
        ("reward_test_package.nothing:score", "No module named 'reward_test_package.nothing'"),
        ("reward_test_package.scores.number", "is not callable"),
        ("reward_test_package.scores.with_both", "with_both reads the column 'scale' .* came with none"),
        ("reward_test_package.scores.of_trl", "of_trl reads the column 'answer' .* came with none: name the parameter"),
        ("reward_test_package.scores.nested", "gets 4 of them, flat as TRL passes them, .* it returned 2"),
        ("reward_test_package.scores.nothing", "a number for each completion, as TRL has it; it returned NoneType"),
    ],
)
def test_import_errors_say_what_is_wrong(function, message):
    reward = CallableReward(function)
    with pytest.raises(RewardError, match=message):
        reward(PROMPTS, RESPONSES, TOKENS)


def appending(prompts, responses):
    responses[0].append("more")
    prompts[0] = "changed"
    return [[1.0, 2.0], [3.0, 4.0]] if len(prompts) == 2 else [[0.0] * 3]


def test_rewards_are_held_against_what_was_asked_and_not_what_a_function_made_of_it():
    reward = CallableReward(f"{__name__}.appending")
    assert reward(["xx", "yy"], [["a", "b"], ["c", "d"]]).tolist() == [[1.0, 2.0], [3.0, 4.0]]
    with pytest.raises(RewardError, match="row 0 has 3 rewards for 2 responses.*prompt 'xx'"):
        reward(["xx"], [["a", "b"]])


def test_a_function_needs_a_path():
    with pytest.raises(RewardError, match="'score', expected an import path"):
        CallableReward("score")


def test_identity_needs_no_import():
    identity = CallableReward("no_such_package_here.score", {"b": 1, "a": [2]}).identity()
    assert identity == {
        "class": "CallableReward",
        "function": "no_such_package_here.score",
        "arguments": '{"a": [2], "b": 1}',
    }


def columns_score(function: str, columns: dict[str, list[object]], **arguments: object) -> list[list[float]]:
    reward = CallableReward(f"reward_test_package.scores.{function}", arguments)
    return ask_reward(reward, PROMPTS, RESPONSES, TOKENS, columns).tolist()


def test_columns_of_the_data_set_go_to_the_parameters_of_their_names():
    answers = {"answer": ["bb", "ccc"]}
    assert columns_score("grouped", answers) == [[0, 1], [1, 0]]
    assert columns_score("grouped", answers | {"weight": 3}, weight=2.0) == [[0, 2], [2, 0]]
    assert columns_score("grouped", answers, weight=2.0) == [[0, 2], [2, 0]]
    assert CallableReward("reward_test_package.scores.grouped").columns == ("answer",)
    assert CallableReward("reward_test_package.scores.grouped", {"answer": "a"}).columns == ()
    assert CallableReward("reward_test_package.scores.text_only").columns == ()
    columns_score("any_column", answers | {"level": [1, 2]})
    assert sys.modules["reward_test_package.scores"].seen == [answers | {"level": [1, 2]}]
    assert columns_score("text_only", answers) == [[1, 2], [6, 0]]  # which asks for none


def test_trls_functions_work_as_they_are_written():
    answers = {"answer": ["bb", "ccc"]}
    assert columns_score("of_trl", answers) == [[0, 1], [1, 0]]
    assert columns_score("awaited", answers) == [[0, 1], [1, 0]]
    assert CallableReward("reward_test_package.scores.of_trl").columns == ("answer",)
    assert columns_score("all_of_trls", answers) == [[1, 2], [3, 1]]
    assert sys.modules["reward_test_package.scores"].seen == [
        (
            ["x", "x", "yy", "yy"],
            ["a", "bb", "ccc", ""],
            [[1], [1, 2], [1, 2, 3], [2]],
            {"answer": ["bb", "bb", "ccc", "ccc"]},
        )
    ]
    assert columns_score("without_prompts", {"level": [1, 2]}) == [[1, 1], [2, 2]]
    assert columns_score("without_prompts", {"level": [1, 2]}, bonus=0.5) == [[1.5, 1.5], [2.5, 2.5]]


def test_a_coroutine_is_awaited_where_a_loop_is_running():
    async def notebook() -> list[list[float]]:
        return columns_score("awaited", {"answer": ["bb", "ccc"]})

    assert asyncio.run(notebook()) == [[0, 1], [1, 0]]


def test_a_threshold_passes_columns_on():
    reward = ThresholdReward(CallableReward("reward_test_package.scores.grouped"), 0.5)
    assert reward.columns == ("answer",)
    assert ask_reward(reward, PROMPTS, RESPONSES, TOKENS, {"answer": ["bb", "ccc"]}).tolist() == [[0, 1], [1, 0]]
    with pytest.raises(RewardError, match="reads the column 'answer' of the data set, and the prompts came with 'b'"):
        ask_reward(reward, PROMPTS, RESPONSES, TOKENS, {"b": [1, 2]})


def test_a_function_is_as_good_as_its_name() -> None:
    import tests.rewards.test_function as here

    assert (
        CallableReward(here.given_by_itself).identity()
        == CallableReward("tests.rewards.test_function.given_by_itself").identity()
    )
    assert CallableReward(here.given_by_itself)(["a"], [["bc"]]).tolist() == [[2.0]]
    for lost in (lambda prompts, responses: None, print):
        if lost is print:
            assert CallableReward(lost).function == "builtins.print"
            continue
        with pytest.raises(RewardError, match="known by the name under which it is imported"):
            CallableReward(lost)  # type: ignore[arg-type]


def given_by_itself(prompts: list[str], responses: list[list[str]]) -> list[list[float]]:
    return [[float(len(text)) for text in row] for row in responses]
