"""Comparing settings."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from vbon_lightning.checks import (
    ConfigMismatchError,
    check_same_settings,
    check_without_effect,
    differences,
    is_plain,
    plain,
)


def test_equal_settings_have_no_differences() -> None:
    settings = {"n": 4, "data": {"path": "a", "rows": [1, 2]}, "none": None}
    assert differences(settings, json.loads(json.dumps(settings))) == {}
    check_same_settings(settings, dict(settings), what="module")


def test_differences_name_nested_keys_and_both_values() -> None:
    old = {"a": {"b": 1, "c": 2}, "d": 1, "gone": 0}
    new = {"a": {"b": 1, "c": 3}, "d": None, "new": "x"}
    assert differences(old, new) == {
        "a.c": (2, 3),
        "d": (1, None),
        "gone": (0, "(absent)"),
        "new": ("(absent)", "x"),
    }
    with pytest.raises(ConfigMismatchError, match=r"(?s)a\.c: checkpoint has 2, this run has 3\n.*gone: checkpoint"):
        check_same_settings(old, new, what="module")


def test_a_mapping_differs_from_a_value() -> None:
    assert differences({"a": {"b": 1}}, {"a": 1}) == {"a": ({"b": 1}, 1)}


def test_a_mapping_that_one_side_lacks_is_named_field_by_field() -> None:
    assert differences({}, {"a": {"b": 1}}) == {"a.b": ("(absent)", 1)}
    assert differences({"a": {}}, {}) == {"a": ({}, "(absent)")}


def test_the_error_names_all_and_says_what_to_do() -> None:
    with pytest.raises(ConfigMismatchError, match=r"(?s)module settings.*m: .*n: .*--ckpt_path"):
        check_same_settings({"n": 1, "m": 1}, {"n": 2, "m": 2}, what="module")


def test_plain_keeps_what_compares() -> None:
    settings = {"lr": 0.1, "betas": (0.9, 0.95), "foreach": None, "fn": print, "t": torch.ones(1), "l": [print, 1]}
    assert plain(settings) == {"lr": 0.1, "betas": [0.9, 0.95], "foreach": None, "l": [1]}


@pytest.mark.parametrize(
    ("value", "is_it"),
    [
        (1, True),
        (None, True),
        ([1, ("a", {"b": 2.0})], True),
        (print, False),
        ([1, print], False),
        ({"a": [print]}, False),
    ],
)
def test_what_is_kept_whole(value: Any, is_it: bool) -> None:
    assert is_plain(value) is is_it
    assert (plain([value]) == json.loads(json.dumps([value], default=str))) is is_it


class Base:
    def __init__(self, width: int = 2, depth: int | None = None) -> None: ...


class Derived(Base):
    def __init__(self, depth: int = 5, **others: int) -> None: ...


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"width": 2, "depth": 5}, None),
        ({"width": 3}, "at.width=3"),
        ({"depth": None}, "at.depth=None"),  # by the nearest class that has it
        ({"width": 2, "depth": 6}, "at.depth=6"),
    ],
)
def test_options_without_effect_are_measured_by_their_defaults(options: dict[str, int], refused: str | None) -> None:
    if refused is None:
        check_without_effect(Derived, "flat", options, prefix="at.")
        return
    with pytest.raises(ValueError, match=f"^{refused} has no effect with flat: leave it out, or set that otherwise$"):
        check_without_effect(Derived, "flat", options, prefix="at.")


def test_options_that_a_user_names_plainly() -> None:
    with pytest.raises(ValueError, match="^width=1 has no effect with flat"):
        check_without_effect(Base, "flat", {"width": 1})
