"""Importable functions and classes as rewards."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vbon_lightning.rewards import CallableReward, RewardError

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
    return [[float(answer == r) for r in row] for row in completions]

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
    assert score("of_trl", answer="a") == [[1, 0], [0, 0]]
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
    with pytest.raises(RewardError, match="row 1, response 1 is nan .*prompt 'yy', response ''"):
        score("nan_for_empty")


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
        ("reward_test_package.scores.with_both", "missing a required.*'scale'"),
        ("reward_test_package.scores.of_trl", "missing a required.*'answer'.*to a parameter that is named `token_ids`"),
    ],
)
def test_import_errors_say_what_is_wrong(function, message):
    reward = CallableReward(function)
    with pytest.raises(RewardError, match=message):
        reward(PROMPTS, RESPONSES, TOKENS)


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
