"""A tilted policy's dial, set so that the N one asks for has Best-of-N's KL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from vbon_lightning.functional import bon_kl
from vbon_lightning.models import TiltedLM
from vbon_lightning.sampling import response_statistics
from vbon_lightning.types import PromptBatch

_STEP = 2**0.5


class DialCalibration(Callback):
    """At the end of training, measure a tilted policy's KL and let N mean Best-of-N's.

    A policy that fits its teacher imperfectly has less KL than Best-of-N at the N that it is dialled to, and less win
    rate. This samples it at rising N on training prompts, compares the exact KL with that of Best-of-N by the same
    prompts' cached rewards, and writes down which N to evaluate the tilt at (``calibration`` of the model's config):
    ``turn(8)``, ``vbon dial --n 8`` and ``dial: 8`` then give the policy that has Best-of-8's KL. No reward is called.
    With weights that are averaged, list it behind the callback that averages them.

    Args:
        n: The N to calibrate; between them it is interpolated.
        prompts: Training prompts to sample for, evenly spread over the split.
        samples: Responses a prompt.
        reach: Search up to this many times the largest of ``n``.
    """

    def __init__(self, n: Sequence[float] = (2, 4, 8, 16), prompts: int = 64, samples: int = 16, reach: float = 8.0):
        self.n = sorted(set(n))
        if not self.n or not 1 < self.n[0] <= self.n[-1] < math.inf:
            raise ValueError(f"DialCalibration's n must be finite numbers above 1, got {list(n)}")
        for name, value in (("prompts", prompts), ("samples", samples), ("reach", reach)):
            if value < 1:
                raise ValueError(f"DialCalibration's {name} must be at least 1, got {value}")
        self.prompts, self.samples, self.reach = prompts, samples, reach

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a run without what there is to calibrate by, before anything expensive."""
        if stage != "fit":
            return
        data: Any = getattr(trainer, "datamodule", None)
        if getattr(data, "reference_table", None) is None:
            raise ValueError(
                "DialCalibration compares with Best-of-N by cached rewards: name a table (data.reference_table)"
            )
        if (most := data.reference_rewards) < self.n[-1]:
            raise ValueError(
                f"DialCalibration's n goes up to {self.n[-1]:g}, but the reference table {data.reference_table} brings "
                f"{most} responses a prompt: lower it"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what has no dial.

        Raises:
            ValueError: If the policy is not a tilted one.
        """
        if not isinstance(pl_module.policy, TiltedLM):
            raise ValueError("DialCalibration is for tilted policies (`tilt` of data.policy): leave it out")

    @torch.no_grad()
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate; PolicyExport comes after it wherever it is listed."""
        policy, data = cast(TiltedLM, pl_module.policy), cast(Any, trainer).datamodule
        rows = data.prompts("train")
        rows = [rows[place * len(rows) // self.prompts] for place in range(min(self.prompts, len(rows)))]
        rewards = data.table_rewards(rows)
        wanted = {n: float(bon_kl(rewards, n=n).mean()) for n in self.n}
        batches = [
            pl_module.transfer_batch_to_device(
                data.prompt_batch(rows[at : at + data.batch_size], at), pl_module.device, 0
            )
            for at in range(0, len(rows), data.batch_size)
        ]
        n = policy.n
        policy.calibrate(None)
        tried, found = [1.0], [0.0]
        most = self.reach * self.n[-1]
        while found[-1] < wanted[self.n[-1]] and tried[-1] < most:
            tried.append(min(tried[-1] * _STEP, most))
            policy.turn(tried[-1])
            # Where the tilt's polynomial turns back, its KL says nothing new.
            found.append(max(found[-1], self._kl(pl_module, batches)))
        policy.turn(n)
        # Each rank has found the same, to rounding, by the same noise.
        pairs = trainer.strategy.broadcast(calibration_pairs(tried, found, wanted))
        reached = {n for n, _ in pairs}
        if missed := [f"{n:g}" for n in self.n if n not in reached]:
            rank_zero_warn(
                f"the policy does not reach the KL of Best-of-N for N = {', '.join(missed)}: dialled to "
                f"{tried[-1]:.3g} it has {found[-1]:.3f} nats. These N are extrapolated; train longer, or widen n_range"
            )
        policy.calibrate(pairs)
        rank_zero_info("Dial: " + ", ".join(f"N = {n:g} at {where:.3g}" for n, where in pairs))

    def _kl(self, pl_module: LightningModule, batches: list[PromptBatch]) -> float:
        actors, seed = cast(Any, pl_module.loaded), cast(int, pl_module.seed)
        actors.place()
        found = []
        for batch in batches:
            drawn = actors.sample(
                actors.policy, batch, num_samples=self.samples, seed=seed, stream="calibration", step=0
            )
            statistics = response_statistics(
                actors.policy, actors.as_reference, batch, drawn, temperature=actors.temperature
            )
            found.append(statistics.kl.double().sum(-1).flatten())
        return float(torch.cat(found).mean())


def calibration_pairs(tried: Sequence[float], kl: Sequence[float], wanted: dict[float, float]) -> list[list[float]]:
    """Return at which of the tried N the policy has the wanted KL.

    Between them the root of the KL is linear in log N, as it is near 1.

    Args:
        tried: Rising N, the first of them 1.
        kl: The KL at each, not falling, in nats.
        wanted: The KL that each N is to have, both rising.

    Returns:
        ``[N, where]`` each, for those that are reached; both rising.
    """
    pairs: list[list[float]] = []
    for n, target in sorted(wanted.items()):
        above = next((place for place, value in enumerate(kl) if value >= target > 0), None)
        if above is None or above == 0:
            continue
        low, high = math.sqrt(kl[above - 1]), math.sqrt(kl[above])
        share = (math.sqrt(target) - low) / (high - low)
        where = tried[above - 1] ** (1 - share) * tried[above] ** share
        if not pairs or where > pairs[-1][1]:
            pairs.append([float(n), where])
    return pairs
