"""Supervised fine-tuning."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics import MeanMetric

from vbon_lightning.actors import Actors, ActorSpec
from vbon_lightning.modules.base import LRSchedulerCallable, OptimizerCallable
from vbon_lightning.modules.supervised import SupervisedModule
from vbon_lightning.sampling import text_log_probs
from vbon_lightning.types import TextBatch


class SFT(SupervisedModule):
    r"""Fit the policy to text, or to responses given prompts, the EOS included.

    The loss is :math:`-\sum_t \log \pi(y_t \mid y_{<t}) / \#\text{tokens}`, the count taken over all ranks and all
    batches whose gradients are accumulated, so that it does not depend on how they are split.

    Args:
        actors: The policy, as the data module names it.
        dropout: Keep the dropout the model's own config asks for.
        seed: Seeds dropout and the initialisation of a policy made from a config.
        optimizer: Builds the optimizer from parameters.
        lr_scheduler: Builds a learning-rate scheduler from the optimizer, stepped once an update.
    """

    batch_kind = "text"

    def __init__(
        self,
        actors: ActorSpec,
        dropout: bool = True,
        seed: int = 0,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(actors, seed=seed, optimizer=optimizer, lr_scheduler=lr_scheduler)
        self.dropout = dropout
        self.nll = MeanMetric()
        self.record_settings(dropout=dropout)

    def configure_model(self) -> None:
        """Load the policy, with its dropout where wanted."""
        if self.actors is None:
            self.actors = Actors.load(self.actor_spec, seed=self.seed, reference=False, keep_dropout=self.dropout)
            self.policy = self.actors.policy
            self.policy.train()

    def training_step(self, batch: TextBatch, batch_idx: int) -> dict[str, Any]:
        """Return the mean negative log-likelihood of the tokens to be learnt, in nats."""
        self.begin_batch()
        total, count = self._negative_log_likelihood(batch)
        all_tokens = self.trainer.strategy.reduce(count.clone(), reduce_op="sum")  # works in place
        loss = total * self.trainer.world_size / all_tokens.clamp(min=1)
        if self.trainer.accumulate_grad_batches > 1:
            loss = loss * self.weigh_batch(all_tokens.clamp(min=1))
        self.log("train/nll", (total / count.clamp(min=1)).detach(), prog_bar=True)
        return {"loss": loss}

    def count(self, batch: TextBatch) -> None:
        """Add up the negative log-likelihood of the tokens to be learnt."""
        total, count = self._negative_log_likelihood(batch)
        self.nll.update(total / count.clamp(min=1), weight=count)

    def counted(self) -> dict[str, Tensor]:
        """Return the mean negative log-likelihood and the perplexity."""
        nll = self.nll.compute()
        return {"nll": nll, "perplexity": nll.exp()}

    def _negative_log_likelihood(self, batch: TextBatch) -> tuple[Tensor, Tensor]:
        """Return the summed negative log-likelihood and the number of tokens it is over."""
        counted = batch.loss_mask & batch.valid[:, None]
        log_probs = text_log_probs(self.loaded.policy, batch.tokens, batch.mask, counted)
        return -log_probs.sum(), counted[:, 1:].sum()
