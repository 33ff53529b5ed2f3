"""Training of distributional value models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import BinaryCalibrationError
from transformers import PreTrainedTokenizerBase

from vbon_lightning.actors import ActorSpec
from vbon_lightning.functional import (
    RewardBins,
    bin_labels,
    forecast_head,
    ranked_probability_score,
    reward_bins,
)
from vbon_lightning.models import (
    ValueModel,
    check_same_vocabulary,
    load_tokenizer,
    load_value_model,
    new_value_model,
)
from vbon_lightning.models.spec import ModelSpec, as_spec
from vbon_lightning.modules.base import LRSchedulerCallable, OptimizerCallable
from vbon_lightning.modules.offline import check_at_least_one, select_responses
from vbon_lightning.modules.supervised import SupervisedModule
from vbon_lightning.prefix_scorer import PrefixScorer
from vbon_lightning.sampling import pick_some
from vbon_lightning.types import TableBatch

STAGES = ("prompt", "early", "middle", "late", "end")
"""Where in a response a prediction is made: before it, in its first, second or last third, or at its end."""


class ValueModelling(SupervisedModule):
    r"""Learn, from the reference table, what reward a response will end with: a distributional value model.

    The model (in the literature also a prefix scorer) reads a prompt and a prefix of a response and predicts in which
    of K bins the final reward lies, :math:`p(k \mid x, y_{\le t})`, by plain cross-entropy: every response of the table
    labels each of its prefixes, the prompt alone included. The bins are quantiles of all rewards of the table. From it
    :class:`~vbon_lightning.prefix_scorer.PrefixScorer` computes Best-of-N's next-token distribution for every N. The
    export is a Hugging Face token classifier; name it as ``data.value_model``.

    Args:
        actors: The policy, reference and reward, as the data module names them.
        body: The model whose body to start from: the reference by default. The export of a reward model with the
            policy's tokenizer is a better start where there is one.
        bins: K, the most bins; rewards that tie share one.
        atoms: Quantiles of the reward kept of each bin, for KL-constrained RL.
        responses_per_prompt: Responses a prompt and step, picked at random from the table's.
        probe: Start the head from a regression of the reward on the body's last states, over about this many of the
            table's responses; 0 starts from bins that are all alike.
        dropout: Keep the dropout that the model's own config asks for.
        seed: Seeds what is picked, dropout and a new head.
        optimizer: Builds the optimizer from parameters.
        lr_scheduler: Builds a learning-rate scheduler from the optimizer, stepped once an update.
    """

    batch_kind = "responses"
    evaluates_responses = True

    def __init__(
        self,
        actors: ActorSpec,
        body: str | ModelSpec | None = None,
        bins: int = 32,
        atoms: int = 16,
        responses_per_prompt: int = 8,
        probe: int = 4096,
        dropout: bool = False,
        seed: int = 0,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(actors, seed=seed, optimizer=optimizer, lr_scheduler=lr_scheduler)
        for name, count, least in (("bins", bins, 2), ("atoms", atoms, 2), ("probe", probe, 0)):
            if count < least:
                raise ValueError(f"model.{name} must be at least {least}, got {count}")
        check_at_least_one("responses_per_prompt", responses_per_prompt)
        self.body = actors.reference_spec if body is None else as_spec(body)
        self.bin_count, self.atoms, self.responses_per_prompt, self.dropout = bins, atoms, responses_per_prompt, dropout
        self.probe = probe
        self.scorer: PrefixScorer | None = None
        self._bins: RewardBins | None = None
        self._fingerprint: dict[str, Any] = {}
        self._tokenizer: PreTrainedTokenizerBase | None = None
        kinds: dict[str, Callable[[], Metric]] = {
            "nll": MeanMetric,
            "crps": MeanMetric,
            "calibration_error": partial(BinaryCalibrationError, n_bins=10),
        }
        self.metrics = torch.nn.ModuleDict({f"{kind}/{stage}": kinds[kind]() for kind in kinds for stage in STAGES})
        self.record_settings(
            bins=bins, atoms=atoms, responses_per_prompt=responses_per_prompt, probe=probe, dropout=dropout
        )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the policy's tokenizer, which the value model reads too."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.actor_spec.policy_spec)
        return self._tokenizer

    @property
    def response_room(self) -> int:
        """Return the longest response."""
        return self.actor_spec.max_new_tokens

    def setup(self, stage: str) -> None:
        """Cut the table's rewards into bins, before anything expensive."""
        if self.actor_spec.reward is None:
            raise ValueError("ValueModelling needs a reward: set `data.reward`")
        data: Any = getattr(self.trainer, "datamodule", None)
        if data is None or not hasattr(data, "table"):
            raise ValueError("ValueModelling learns from a reference table: fit it with an AlignmentDataModule")
        if data.reference_table is None:
            raise ValueError(
                "ValueModelling learns from cached responses: name a table (data.reference_table, made by `vbon "
                "predict`)"
            )
        if stage == "fit":
            if data.reference_rewards < self.responses_per_prompt:
                raise ValueError(
                    f"model.responses_per_prompt = {self.responses_per_prompt}, but the reference table "
                    f"{data.reference_table} brings {data.reference_rewards} responses a prompt: lower it"
                )
            self._bins = reward_bins(data.table_rewards(data.prompts("train")), bins=self.bin_count, atoms=self.atoms)
            self._fingerprint = data.fingerprint()
        check_same_vocabulary(self.tokenizer, load_tokenizer(self.body))

    def configure_model(self) -> None:
        """Load the body and put a head of bins on it, once."""
        if self.policy is not None:
            return
        if self._bins is None:
            # Evaluated on its own: the body is a trained value model.
            self.policy = load_value_model(self.body)
        else:
            model = new_value_model(
                self.body,
                self._bins,
                longest=self.actor_spec.max_new_tokens,
                fingerprint=self._fingerprint,
                seed=self.seed,
                dropout=self.dropout,
            )
            if self.probe:
                self._start_head(model)
            self.policy = model
        self.scorer = PrefixScorer(cast(ValueModel, self.policy))

    @torch.no_grad()
    def _start_head(self, model: ValueModel) -> None:
        """Fit the head to whole responses."""
        data: Any = getattr(self.trainer, "datamodule", None)
        prompts = data.prompts("train")
        step = max(1, len(prompts) * data.reference_rewards // self.probe)
        features, rewards, whole = [], [], []
        for some in torch.arange(0, len(prompts), step).split(32):
            batch = data.table_batch([prompts[row] for row in some.tolist()])
            states = PrefixScorer(model).states(batch.prompts, batch.responses)
            mask = torch.nn.functional.pad(batch.responses.mask, (1, 0), value=True)
            place = torch.arange(mask.shape[-1], device=mask.device).expand(mask.shape)
            features.append(states[mask])
            rewards.append(_rewards(batch)[..., None].expand(mask.shape)[mask])
            whole.append((place == batch.responses.mask.sum(-1, keepdim=True))[mask])
        assert self._bins is not None
        weight, bias = forecast_head(torch.cat(features), torch.cat(rewards), self._bins, fit=torch.cat(whole))
        model.head.weight.copy_(weight)
        model.head.bias.copy_(bias)

    def training_step(self, batch: TableBatch, batch_idx: int) -> dict[str, Any]:
        """Return the mean cross-entropy of the picked responses' prefixes, in nats."""
        step = self.batches_seen
        self.begin_batch()
        rewards = _rewards(batch)
        index = pick_some(
            batch.prompts.index.tolist(),
            among=rewards.shape[1],
            count=self.responses_per_prompt,
            seed=self.seed,
            stream="pick",
            step=step,
        ).to(rewards.device)
        picked = batch._replace(
            prompts=batch.prompts._replace(reference_rewards=rewards.gather(1, index)),
            responses=select_responses(batch.responses, index),
        )
        log_probs, labels, mask = self._predict(picked)
        # A mean over tokens would weigh responses differently on each rank: the mean of each response first.
        losses = _cross_entropy(log_probs, labels)
        loss = (torch.where(mask, losses, 0.0).sum(-1) / mask.sum(-1)).mean()
        self.log("train/loss", loss.detach(), prog_bar=True)
        return {"loss": loss}

    def _predict(self, batch: TableBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the bins' log-probabilities ``[B, G, T + 1, K]``, labels ``[B, G]`` and which prefixes there are."""
        assert self.scorer is not None
        self.scorer.to(self.device)
        log_probs = self.scorer.bin_log_probs(batch.prompts, batch.responses)
        labels = bin_labels(_rewards(batch), self.scorer.bins.edges)
        mask = torch.nn.functional.pad(batch.responses.mask, (1, 0), value=True)
        return log_probs, labels, mask

    def count(self, batch: TableBatch) -> None:
        """Add up the cross-entropy, the CRPS and the calibration by place in the response."""
        log_probs, labels, mask = self._predict(batch)
        losses = _cross_entropy(log_probs, labels)
        every = labels[..., None].expand(losses.shape)
        scores = ranked_probability_score(log_probs, every)
        # The event that the reward is in the upper half of the bins.
        half = log_probs.shape[-1] // 2
        upper = log_probs[..., half:].logsumexp(-1).exp().clamp(0, 1)
        mask = mask & batch.prompts.valid[:, None, None]
        length = batch.responses.mask.sum(-1, keepdim=True)
        place = torch.arange(mask.shape[-1], device=mask.device).expand(mask.shape)
        third = (3 * (place - 1) // length.clamp(min=1)).clamp(0, 2)
        stages = torch.where(place == 0, 0, torch.where(place == length, 4, 1 + third))
        for number, stage in enumerate(STAGES):
            here = mask & (stages == number)
            if bool(here.any()):
                self._metric(f"nll/{stage}").update(losses[here])
                self._metric(f"crps/{stage}").update(scores[here])
                self._metric(f"calibration_error/{stage}").update(upper[here], (every[here] >= half).long())

    def _metric(self, name: str) -> Metric:
        return cast(Metric, self.metrics[name])

    def counted(self) -> dict[str, Tensor]:
        """Return cross-entropy (nats), CRPS (in ranks) and calibration error by place, and the mean cross-entropy."""
        found = {name: self._metric(name).compute() for name in self.metrics if self._metric(name).update_count}
        places = [value for name, value in found.items() if name.startswith("nll/")]
        return {"loss": torch.stack(places).mean(), **found}

    def _start_counting(self) -> None:
        for name in self.metrics:
            self._metric(name).reset()


def _rewards(batch: TableBatch) -> Tensor:
    rewards = batch.prompts.reference_rewards
    if rewards is None:
        raise ValueError("ValueModelling learns from cached responses, and the batch brings no rewards")
    return rewards


def _cross_entropy(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Return ``[B, G, T + 1]`` nats: every prefix has its response's label."""
    index = labels[..., None, None].expand(*log_probs.shape[:-1], 1)
    return -log_probs.gather(-1, index).squeeze(-1)
