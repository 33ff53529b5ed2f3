"""A run that collapses is warned of once, with its numbers; one that does not is not."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.callbacks.replay import Replay, make_trainer
from tests.rollouts import make_rollout
from vbon_lightning.callbacks import CollapseWarning
from vbon_lightning.types import Rollout


def rollout(kl: float = 1.0, *, same: bool = False, ending: bool = True, samples: int = 4) -> Rollout:
    """Make 4 prompts, one of them a filler, whose responses have a KL and are all one or not."""
    made = make_rollout(prompts=4, samples=samples, fillers=1)
    mask = torch.ones_like(made.completions.mask)
    tokens = torch.full_like(made.completions.tokens, 7) if same else made.completions.tokens
    done = made.completions._replace(mask=mask, tokens=tokens, finished=torch.full(mask.shape[:2], ending))
    token_kl = torch.full_like(made.token_kl, kl / mask.shape[-1])
    token_kl[-1] = torch.nan
    return made._replace(completions=done, token_kl=token_kl)


def said(
    directory: Path, train: list[Rollout] | None, val: list[Rollout] | None = None, epochs: int = 1, **options: Any
) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer(directory, CollapseWarning(**options), logger=False, max_epochs=epochs)
        trainer.fit(Replay(train, val, steps=2))
    return [str(one.message) for one in caught if "COLLAPSED" in str(one.message)]


def test_a_run_that_is_well(tmp_path: Path) -> None:
    assert not said(tmp_path, [rollout(99.0)] * 7, [rollout(99.0)] * 2)
    assert not said(tmp_path, [rollout(ending=False)] * 9)  # they are cut from the start on


def test_a_kl_above_the_bound(tmp_path: Path) -> None:
    (one,) = said(tmp_path, [rollout(1.0)] * 3 + [rollout(200.0)] * 9)
    # Of five, three at 200 and two at 1 are the first whose mean is above 100.
    assert one.startswith("THE RUN HAS COLLAPSED at step 6 (train): the policy is 120.4 nats a response from the ref")
    assert "(the bound is 100)" in one and "CollapseWarning's max_kl" in one
    assert said(tmp_path, [rollout(3.0)] * 5, max_kl=2.9)
    assert not said(tmp_path, [rollout(200.0)] * 5, max_kl=None)
    assert not said(tmp_path, [rollout(200.0)] * 5, enabled=False)


def test_responses_that_are_all_one(tmp_path: Path) -> None:
    (one,) = said(tmp_path, [rollout(same=True)] * 8)
    assert "(train): 0.0% of the prompts have two different responses (the bound is 2.0%)" in one
    assert not said(tmp_path, [rollout(same=True)] * 8, min_distinct=0.0)
    assert not said(tmp_path, [rollout(same=True, samples=1)] * 8)  # which cannot be compared
    assert not said(tmp_path, [rollout(same=True)] * 4 + [rollout()])
    assert said(tmp_path, [rollout(same=True)] * 4 + [rollout()], min_distinct=0.3)


def test_responses_that_no_longer_end(tmp_path: Path) -> None:
    runs = [rollout()] * 5 + [rollout(ending=False)] * 5
    (one,) = said(tmp_path, runs)
    assert "at step 10 (train): 0.0% of the responses end by themselves, and at the start 100.0% did" in one
    assert not said(tmp_path, runs, min_finished=0.0)
    assert not said(tmp_path, runs[:-1])
    assert said(tmp_path, runs[:-1], min_finished=0.5)
    few = [rollout(samples=1)] + [rollout(ending=False, samples=1)] * 30
    assert not said(tmp_path, few, rollouts=1)  # three responses: none of them may be chance


def test_how_many_rollouts_a_mean_is_over(tmp_path: Path) -> None:
    runs = [rollout(1.0), rollout(150.0), rollout(1.0), rollout(1.0), rollout(1.0), rollout(1.0)]
    assert not said(tmp_path, runs)
    (one,) = said(tmp_path, runs, rollouts=1)
    assert "at step 2 (train): the policy is 150 nats" in one
    # A run of fewer is judged as it ends.
    assert len(said(tmp_path, [rollout(150.0, same=True)] * 2)) == 2


def test_validations_count_by_themselves(tmp_path: Path) -> None:
    (one,) = said(tmp_path, None, [rollout(50.0), rollout(170.0)], epochs=3)
    assert one.startswith("THE RUN HAS COLLAPSED at step 2 (val): the policy is 110 nats")


@pytest.mark.parametrize(
    "option", [{"max_kl": 0}, {"min_distinct": 1.5}, {"min_finished": -0.1}, {"rollouts": 0}], ids=str
)
def test_bounds_that_mean_nothing(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"CollapseWarning's {next(iter(option))} must be"):
        CollapseWarning(**option)
