"""A step of a regression written out: the log-ratios of its responses by hand, and what else it knows of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.modules.fake import FakeTrainer, attach
from tests.modules.offline import by_hand, table_batch, table_data
from tests.modules.setting import prepared
from vbon_lightning.sampling import pick_some
from vbon_lightning.types import Responses, TableBatch


class Step(NamedTuple):
    """A step of a module that is away from its reference, on four prompts."""

    module: Any
    loss: Tensor
    logged: dict[str, float]
    log_ratio: Tensor
    """``[4, 3]``, by hand, differentiable."""
    rewards: list[list[float]]
    """Of each prompt the rewards of the responses learnt."""
    others: list[list[list[float]]]
    """Of each of these the reference rewards but for its own."""
    table: list[list[float]]
    """Of each prompt the 16 reference rewards."""


def step_of(kind: str, files: Path, **options: Any) -> Step:
    """Make the fourth step of a run."""
    data = table_data(files)
    module, batch = prepared(kind, data, **options), table_batch(data)
    module.batches_seen = 3
    logged = attach(module, FakeTrainer())
    table = batch.prompts.reference_rewards
    if module.responses == "policy":
        outputs = module.training_step(batch.prompts, 0)
        rollout = outputs["rollout"]
        learnt, rewards = Responses(rollout.completions.tokens, rollout.completions.mask), rollout.rewards
        others = [[row] * rewards.shape[1] for row in table.tolist()]
    else:
        outputs = module.training_step(batch, 0)
        among = {"among": 16, "count": module.responses_per_prompt, "seed": module.seed, "stream": "pick", "step": 3}
        index = pick_some(batch.prompts.index.tolist(), **among)
        assert len({place for row in index.tolist() for place in row}) > 3, "not the same of every prompt"
        rows = torch.arange(4)[:, None]
        learnt = Responses(batch.responses.tokens[rows, index], batch.responses.mask[rows, index])
        rewards = table.gather(1, index)
        others = [
            [row[:place] + row[place + 1 :] for place in places]
            for row, places in zip(table.tolist(), index.tolist(), strict=True)
        ]
    shown = TableBatch(batch.prompts, learnt)
    places = [(row, column) for row in range(4) for column in range(rewards.shape[1])]
    ours = torch.stack([by_hand(module.policy, shown, *place) for place in places])
    with torch.no_grad():
        theirs = torch.stack([by_hand(module.actors.reference, shown, *place) for place in places])
    values = {name: value for name, (value, _) in logged.items()}
    return Step(module, outputs["loss"], values, (ours - theirs).view(4, -1), rewards.tolist(), others, table.tolist())
