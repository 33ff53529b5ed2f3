"""What learns from the reference table shares: its steps on cached responses, and its evaluation on sampled ones."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from vbon_lightning.actors import ActorSpec
from vbon_lightning.modules.base import LRSchedulerCallable, OptimizerCallable
from vbon_lightning.modules.sampled_evaluation import SampledEvaluation
from vbon_lightning.types import Responses, TableBatch


class FromTable(SampledEvaluation):
    """Learn from the M responses a prompt that the reference table holds, or from their rewards; a subclass says how.

    Args:
        actors: The policy, reference and reward, as the data module names them.
        eval_samples: Responses a prompt in validation and test.
        seed: Seeds what is picked from the table, sampling and the initialisation of a policy made from a config.
        optimizer: Builds the optimizer from parameters.
        lr_scheduler: Builds a learning-rate scheduler from the optimizer, stepped once an update.
    """

    batch_kind = "responses"

    def __init__(
        self,
        actors: ActorSpec,
        eval_samples: int = 8,
        seed: int = 0,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(actors, seed=seed, optimizer=optimizer, lr_scheduler=lr_scheduler)
        check_at_least_one("eval_samples", eval_samples)
        self.eval_samples = eval_samples

    @property
    def samples_needed(self) -> tuple[int, str]:
        """Return how many responses a prompt a step needs of the table, and the options that say so."""
        raise NotImplementedError(f"{type(self).__name__} must say how many of the table's responses it needs")

    def setup(self, stage: str) -> None:
        """Refuse to start without enough reference responses, before anything expensive."""
        name = type(self).__name__
        if self.actor_spec.reward is None:
            raise ValueError(f"{name} needs a reward: set `data.reward`")
        data: Any = getattr(self.trainer, "datamodule", None)
        if stage != "fit" or not hasattr(data, "table"):
            return
        cached = self.batch_kind == "responses"
        if data.reference_table is None:
            raise ValueError(
                f"{name} {'learns from cached responses' if cached else 'needs the rewards of cached responses'}: name "
                "a table (data.reference_table, made by `vbon predict`)"
            )
        table = data.table()
        needed, why = self.samples_needed
        if data.reference_rewards < needed:
            limit = "" if data.table_samples is None else ", as data.table_samples says"
            raise ValueError(
                f"the reference table {data.reference_table} brings M = {data.reference_rewards} responses a prompt"
                f"{limit}, fewer than the {needed} that {why} needs: sample more or lower it"
            )
        if cached and not table.knows_finished:
            rank_zero_warn(
                f"the reference table {data.reference_table} does not tell finished from truncated responses: they are "
                "learnt as they are, and a policy that sees no EOS behind them unlearns to stop"
            )

    # -- steps -------------------------------------------------------------------------------------

    def training_step(self, batch: TableBatch, batch_idx: int) -> dict[str, Any]:
        """Pick responses of the table and return the loss on them."""
        rewards = batch.prompts.reference_rewards
        if rewards is None:
            raise ValueError(f"{type(self).__name__} learns from cached responses, and the batch brings no rewards")
        return self.log_step(*self.learn(batch, rewards, self.next_step()))

    def next_step(self) -> int:
        """Count a batch, see that the models are where they should be, and return the number of the step."""
        step = self.batches_seen
        self.batches_seen += 1
        self.loaded.place()
        return step

    def log_step(self, loss: Tensor, logs: dict[str, Tensor]) -> dict[str, Any]:
        """Log what a step found and return its loss as Lightning takes it."""
        self.log_dict({f"train/{name}": value for name, value in {"loss": loss.detach(), **logs}.items()})
        return {"loss": loss}

    def learn(self, batch: TableBatch, rewards: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a step and what else to log.

        Args:
            batch: B prompts with M responses each.
            rewards: ``[B, M]``.
            step: The number of the step, for the noise.
        """
        raise NotImplementedError(f"{type(self).__name__} must say what it learns")


class OfflineBestOfN(FromTable):
    """Learn from the best of n of the M responses a prompt that the reference table holds; a subclass says how.

    Args:
        actors: The policy, reference and reward, as the data module names them.
        n: N of Best-of-N, an integer > 1 and at most M (a subclass may take any real number).
        **kwargs: What :class:`FromTable` takes.
    """

    def __init__(self, actors: ActorSpec, n: float = 4, **kwargs: Any) -> None:
        super().__init__(actors, **kwargs)
        self.check_n(n)
        self.n = n

    def check_n(self, n: float) -> None:
        """Refuse an n that the method cannot take: here one that is no integer above 1."""
        if isinstance(n, bool) or not isinstance(n, int) or n < 2:
            raise ValueError(
                f"model.n must be an integer > 1, got {n!r}: {type(self).__name__} takes the best of n of the table's "
                "responses"
            )

    @property
    def samples_needed(self) -> tuple[int, str]:
        """Return how many responses a prompt a step picks from, and the options that say so."""
        return int(self.n), f"model.n = {self.n}"


def select_responses(responses: Responses, index: Tensor) -> Responses:
    """Return some of each prompt's responses, without padding that all of them have.

    Args:
        responses: ``[B, M, T]``.
        index: ``[B, K]`` long, places among the M.
    """
    rows = torch.arange(len(index), device=index.device)[:, None]
    tokens, mask = responses.tokens[rows, index], responses.mask[rows, index]
    width = max(1, int(mask.sum(-1).max()))
    return Responses(tokens[..., :width], mask[..., :width])


def check_at_least_one(name: str, count: int) -> None:
    """Refuse a count below one."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"model.{name} must be an integer >= 1, got {count!r}")
