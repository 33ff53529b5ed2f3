"""Right results, however they are written."""

from __future__ import annotations

import sys
import threading

import pytest

from vbon_lightning.rewards import MathReward, RewardError, ask_reward

pytest.importorskip("math_verify")


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        (42, ["The answer is \\boxed{42}.", "so it is 42", "42.0"], ["\\boxed{41}", "no idea", ""]),
        ("1/2", ["$\\frac{1}{2}$", "0.5", "\\boxed{\\frac12}"], ["2", "1/3"]),
        ("1,000", ["1000 apples"], ["100"]),
        ("$x^2 + 1$", ["\\boxed{1 + x^{2}}"], ["\\boxed{x^2}"]),
    ],
)
def test_results_are_compared_by_value(answer: object, right: list[str], wrong: list[str]) -> None:
    found = ask_reward(MathReward(), ["q"], [right + wrong], [], {"answer": [answer]})[0]
    assert found.tolist() == [1.0] * len(right) + [0.0] * len(wrong)


def test_it_works_in_a_thread_of_its_own() -> None:
    found: list[float] = []
    reward = MathReward("gold")
    assert reward.columns == ("gold",)
    thread = threading.Thread(target=lambda: found.append(reward.score("\\boxed{7}", 7)))
    thread.start()
    thread.join()
    assert found == [1.0]


def test_an_answer_that_cannot_be_read_is_named() -> None:
    with pytest.raises(RewardError, match=r"'who knows\?' \(column 'answer'\) is nothing that math-verify reads"):
        ask_reward(MathReward(), ["q"], [["1"]], [], {"answer": ["who knows?"]})


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(RewardError, match=r"needs the package math-verify: pip install 'vbon_lightning\[verify\]'"):
        MathReward()
