"""A negative KL is warned of, chance is not."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from tests.callbacks.replay import Replay, make_trainer, stream
from tests.rollouts import make_rollout
from vbon_lightning.callbacks import KLMonitor
from vbon_lightning.types import Rollout


def with_kl(rollout: Rollout, exact: float, sampled: float) -> Rollout:
    mask = rollout.completions.mask
    return rollout._replace(
        token_kl=torch.where(mask, exact, 0.0),
        log_probs=torch.where(mask, rollout.reference_log_probs + sampled, 0.0),
    )


@pytest.mark.parametrize(
    ("exact", "sampled", "warns"),
    [(0.1, 0.1, False), (0.0, 0.0, False), (-1e-6, 0.0, False), (-0.01, 0.1, True), (0.1, -0.5, True)],
)
def test_negative_kl_is_warned_of_once(tmp_path: Path, exact: float, sampled: float, warns: bool) -> None:
    rollouts = [with_kl(rollout, exact, sampled) for rollout in stream(4)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(tmp_path, KLMonitor()).fit(Replay(rollouts, rollouts))
    about = [w for w in caught if "sampling and scoring disagree" in str(w.message)]
    assert len(about) == int(warns)


def test_a_noisy_sampled_kl_is_no_alarm(tmp_path: Path) -> None:
    """A mean log-ratio that is negative by chance, within three standard errors of zero."""
    rollout = make_rollout(prompts=2, samples=2, length=1)
    signs = torch.tensor([[1.0, -1.5], [1.0, -1.5]])[..., None]
    noisy = rollout._replace(log_probs=torch.where(rollout.completions.mask, rollout.reference_log_probs + signs, 0.0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(tmp_path, KLMonitor(), limit_val_batches=0).fit(Replay([noisy]))
    assert (noisy.log_probs - noisy.reference_log_probs).sum(-1).mean() < -1e-2
    assert not [w for w in caught if "disagree" in str(w.message)]
