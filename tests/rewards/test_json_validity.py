"""Responses that are JSON."""

from __future__ import annotations

import sys

import pytest

from vbon_lightning.rewards import JsonReward, RewardError, ask_reward

SCHEMA = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}


def scores(reward: JsonReward, responses: list[str]) -> list[float]:
    return ask_reward(reward, ["q"], [responses], [])[0].tolist()


def test_valid_json_and_nothing_else() -> None:
    responses = ['{"a": 1}', " [1, 2] ", "3", "{'a': 1}", '{"a": 1', "", "NaN", '{"a": 1} and more', "[" * 100_000]
    assert scores(JsonReward(), responses) == [1, 1, 1, 0, 0, 0, 0, 0, 0]


def test_a_schema() -> None:
    pytest.importorskip("jsonschema")
    assert scores(JsonReward(SCHEMA), ['{"a": 1}', '{"a": "1"}', "{}", "[]"]) == [1, 0, 0, 0]
    with pytest.raises(RewardError, match="`schema` is no JSON Schema: 'no type' is not valid"):
        JsonReward({"type": "no type"})
    assert JsonReward(SCHEMA).identity() != JsonReward().identity()


def test_a_fence_counts_where_it_may() -> None:
    fenced = '```json\n{"a": 1}\n```'
    assert scores(JsonReward(), [fenced]) == [0]
    assert scores(JsonReward(fenced=True), [fenced, '{"a": 1}', "```\nno\n```"]) == [1, 1, 0]


def test_a_schema_without_the_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema.exceptions", None)
    with pytest.raises(RewardError, match=r"needs the package jsonschema: pip install 'vbon_lightning\[verify\]'"):
        JsonReward(SCHEMA)
