"""Validation and test sample from the policy, as much and by the noise that the module says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vbon_lightning.actors import ActorSpec
from vbon_lightning.modules import DPO, VBoN

SPEC = ActorSpec("x")


@pytest.mark.parametrize(
    ("module", "asked"),
    [
        (VBoN(SPEC, eval_samples=3, reference_samples=7, seed=5), {"num_samples": 3, "reference_samples": 7}),
        (DPO(SPEC, eval_samples=6, seed=5), {"num_samples": 6, "reference_samples": 0}),
    ],
    ids=["on policy", "from the table"],
)
def test_what_a_step_samples(module: Any, asked: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    given, missing = list[Any](), list[Any]()

    def rollout(batch: str, **how: Any) -> str:
        given.append((batch, how))
        return f"rollout of {batch}"

    monkeypatch.setattr(type(module), "loaded", SimpleNamespace(rollout=rollout))
    monkeypatch.setattr(module, "log_missing", lambda *told: missing.append(told))
    assert module.validation_step("one", 3) == {"rollout": "rollout of one"}
    assert module.test_step("two", 4) == {"rollout": "rollout of two"}
    same = {"seed": 5, "step": 0, **asked}
    assert given == [("one", {"stream": "val", **same}), ("two", {"stream": "test", **same})]
    assert missing == [("rollout of one", "val"), ("rollout of two", "test")]
