"""Training of reward models."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy
from transformers import PreTrainedTokenizerBase

from vbon_lightning.actors import ActorSpec
from vbon_lightning.functional import bradley_terry_loss
from vbon_lightning.models import check_vocabulary_fits, load_classifier
from vbon_lightning.modules.base import LRSchedulerCallable, OptimizerCallable, check_unused
from vbon_lightning.modules.supervised import SupervisedModule
from vbon_lightning.types import JudgedBatch


class RewardModelling(SupervisedModule):
    r"""Train a reward: a classifier of labelled texts, or a scalar that ranks preferred responses first.

    With ``objective="classification"`` the loss is the cross-entropy of the labels (``data.train.label_column``); with
    ``objective="preference"`` it is :math:`-\log \sigma(r(x, y_w) - r(x, y_l))`, the Bradley-Terry likelihood of pairs
    (``response_column`` is preferred to ``rejected_column``). ``data.policy`` names the model whose body the reward
    starts from: a language model, an encoder, or a classifier to be trained on. The export is a Hugging Face sequence
    classifier, which :class:`~vbon_lightning.rewards.ClassifierReward` loads.

    Args:
        actors: The model, as the data module names it (``data.policy``).
        objective: ``classification`` or ``preference``.
        labels: Names of the labels by index, for classification; labels in the data are indices or these names.
        centre: Weight of the squared sum of a pair's rewards, which draws them to mean zero; for preferences.
        dropout: Keep the dropout the model's own config asks for.
        seed: Seeds dropout and the new head.
        optimizer: Builds the optimizer from parameters.
        lr_scheduler: Builds a learning-rate scheduler from the optimizer, stepped once an update.
    """

    def __init__(
        self,
        actors: ActorSpec,
        objective: Literal["classification", "preference"] = "classification",
        labels: list[str] = ["NEGATIVE", "POSITIVE"],  # noqa: B006 (never mutated)
        centre: float = 0.0,
        dropout: bool = True,
        seed: int = 0,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(actors, seed=seed, optimizer=optimizer, lr_scheduler=lr_scheduler)
        if objective not in ("classification", "preference"):
            raise ValueError(f"model.objective must be classification or preference, got {objective!r}")
        if objective == "classification" and (len(labels) < 2 or len(set(labels)) < len(labels)):
            raise ValueError(f"model.labels must name at least two different labels, got {labels}")
        if not centre >= 0:
            raise ValueError(f"model.centre must be >= 0, got {centre}")
        if objective == "classification":
            check_unused(type(self), "model.objective=classification", centre=centre)
        self.objective, self.centre, self.dropout = objective, centre, dropout
        self.compares = objective == "preference"
        self.labels = ["REWARD"] if self.compares else list(labels)
        self.loss_mean = MeanMetric()
        self.accuracy = (
            BinaryAccuracy() if self.compares else MulticlassAccuracy(num_classes=len(self.labels), average="micro")
        )
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self.record_settings(objective=objective, labels=labels, centre=centre, dropout=dropout)

    @property
    def batch_kind(self) -> str:  # type: ignore[override]
        """Return which batches the data module should bring."""
        return "comparisons" if self.compares else "labelled"

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the reward model's tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = self.actor_spec.load_tokenizer()
        return self._tokenizer

    def configure_model(self) -> None:
        """Load the body and put a head on it, once."""
        if self.policy is None:
            self.policy = load_classifier(
                self.actor_spec.policy_spec, labels=self.labels, seed=self.seed, dropout=self.dropout
            )
            check_vocabulary_fits(self.policy, self.tokenizer)

    def training_step(self, batch: JudgedBatch, batch_idx: int) -> dict[str, Any]:
        """Return the mean loss over the batch, in nats."""
        self.begin_batch()
        scores = self.scores(batch)
        loss = self._losses(scores, batch).mean()
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log("train/accuracy", self._right(scores.detach(), batch).float().mean(), prog_bar=True)
        return {"loss": loss}

    def scores(self, batch: JudgedBatch) -> Tensor:
        """Return the model's logits ``[B, K, labels]`` in float32; one pass over all texts."""
        assert self.policy is not None
        rows, texts, length = batch.tokens.shape
        logits = self.policy(
            input_ids=batch.tokens.view(rows * texts, length),
            attention_mask=batch.mask.view(rows * texts, length).long(),
        ).logits
        return logits.float().view(rows, texts, -1)

    def _losses(self, scores: Tensor, batch: JudgedBatch) -> Tensor:
        """Return a loss a row, ``[B]``."""
        if batch.labels is None:
            return bradley_terry_loss(scores[:, 0, 0], scores[:, 1, 0], centre=self.centre)
        return torch.nn.functional.cross_entropy(scores[:, 0], batch.labels, reduction="none")

    def _right(self, scores: Tensor, batch: JudgedBatch) -> Tensor:
        if batch.labels is None:
            return scores[:, 0, 0] > scores[:, 1, 0]
        return scores[:, 0].argmax(-1) == batch.labels

    def count(self, batch: JudgedBatch) -> None:
        """Add up losses and right answers."""
        scores = self.scores(batch)
        kept = batch.valid
        self.loss_mean.update(self._losses(scores, batch)[kept])
        if batch.labels is None:
            right = self._right(scores, batch)[kept].long()
            self.accuracy.update(right, torch.ones_like(right))
        else:
            self.accuracy.update(scores[kept, 0], batch.labels[kept])

    def counted(self) -> dict[str, Tensor]:
        """Return the mean loss and the accuracy."""
        return {"loss": self.loss_mean.compute(), "accuracy": self.accuracy.compute()}
