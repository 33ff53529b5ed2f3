"""Training of distributional value models."""

from __future__ import annotations

from typing import Any, cast

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vbon_lightning.actors import ActorSpec, check_value_model
from vbon_lightning.functional import RewardBins, bin_labels, forecast_head, reward_bins
from vbon_lightning.metrics import PREFIX_PLACES, ForecastSummary, PrefixForecast, prefix_nll
from vbon_lightning.models import (
    ValueModel,
    check_same_vocabulary,
    check_vocabulary_fits,
    load_tokenizer,
    load_value_model,
    new_value_model,
    vocabulary_size,
)
from vbon_lightning.models.spec import ModelSpec, as_spec
from vbon_lightning.models.value import is_value_model
from vbon_lightning.modules.base import LRSchedulerCallable, OptimizerCallable
from vbon_lightning.modules.offline import check_at_least_one, select_responses
from vbon_lightning.modules.supervised import SupervisedModule
from vbon_lightning.prefix_scorer import PrefixScorer
from vbon_lightning.sampling import pick_some
from vbon_lightning.sharding import spread_like
from vbon_lightning.types import TableBatch


class ValueModelling(SupervisedModule):
    r"""Learn, from the reference table, what reward a response will end with: a distributional value model.

    The model (in the literature also a prefix scorer) reads a prompt and a prefix of a response and predicts in which
    of K bins the final reward lies, :math:`p(k \mid x, y_{\le t})`, by plain cross-entropy: every response of the table
    labels each of its prefixes, the prompt alone included. The bins are quantiles of all rewards of the table. From it
    :class:`~vbon_lightning.prefix_scorer.PrefixScorer` computes Best-of-N's next-token distribution for every N. The
    export is a Hugging Face directory; name it as ``data.value_model``.

    Where validation says when to stop, give ``PolicyExport`` its ``best``: the last weights are not the best ones.

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
        self._has_new_head = False
        self._fingerprint: dict[str, Any] = {}
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self.forecast = PrefixForecast()
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
            # The penalty is no part of what made the table, but of the rewards that are learnt from it.
            self._fingerprint = data.fingerprint() | {"missing_eos_penalty": self.actor_spec.missing_eos_penalty}
        check_same_vocabulary(self.tokenizer, load_tokenizer(self.body))

    def configure_model(self) -> None:
        """Load the body and put a head of bins on it, once."""
        if self.policy is not None:
            return
        if self._bins is not None:
            self._take(self._new_model(self._bins, self.actor_spec.max_new_tokens, self._fingerprint))
            self._has_new_head = True
        elif is_value_model(self.body):
            self._take(load_value_model(self.body))  # evaluated on its own, by its own bins
        # Otherwise a checkpoint has to follow, which says its bins.

    def on_fit_start(self) -> None:
        """Check that the texts fit the model's context, and start a new head, unless a checkpoint brought one."""
        super().on_fit_start()
        data: Any = getattr(self.trainer, "datamodule", None)
        if self.policy is not None and hasattr(data, "table"):
            data.table().check_tokens(vocabulary_size(self.policy))
        if self._has_new_head and self.probe and self.trainer.ckpt_path is None:
            self._start_head()
        self._has_new_head = False

    def check_lengths(self, response_tokens: int) -> None:
        """Refuse to evaluate what is no value model, and texts that do not fit its context.

        Raises:
            ModelError: If there is neither a checkpoint nor a value model to evaluate.
        """
        if self.policy is None:
            self._take(load_value_model(self.body))  # which says what is wrong with it
        if self.trainer.state.fn != TrainerFn.FITTING:
            assert self.scorer is not None
            check_value_model(self.actor_spec, self.scorer, str(as_spec(self.body).name), seed=self.seed)
        super().check_lengths(response_tokens)

    def _new_model(self, bins: RewardBins, longest: int, fingerprint: dict[str, Any]) -> ValueModel:
        return new_value_model(
            self.body, bins, longest=longest, fingerprint=fingerprint, seed=self.seed, dropout=self.dropout
        )

    def _take(self, model: ValueModel) -> None:
        check_vocabulary_fits(model, self.tokenizer)
        self.policy, self.scorer = model, PrefixScorer(model)

    @torch.no_grad()
    def _start_head(self) -> None:
        """Give the head its start."""
        # Each rank has found the same, to rounding, and the ranks are to stay the same exactly.
        found = self.trainer.strategy.broadcast(self.call_whole("fit_head", self.probe))
        head = cast(ValueModel, self.policy).head
        for parameter, value in zip((head.weight, head.bias), found, strict=True):
            parameter.copy_(spread_like(parameter, value))

    def fit_head(self, texts: int) -> tuple[Tensor, Tensor]:
        """Return the weight and the bias of a head that is fitted to about so many whole responses."""
        model, bins = cast(ValueModel, self.policy), cast(RewardBins, self._bins)
        data: Any = getattr(self.trainer, "datamodule", None)
        prompts = data.prompts("train")
        step = max(1, len(prompts) * data.reference_rewards // texts)
        features, rewards, whole = [], [], []
        model.eval()  # without dropout
        for some in torch.arange(0, len(prompts), step).split(32):
            batch = data.table_batch([prompts[row] for row in some.tolist()])
            batch = self.transfer_batch_to_device(batch, self.device, 0)
            states = PrefixScorer(model).states(batch.prompts, batch.responses)
            mask = torch.nn.functional.pad(batch.responses.mask, (1, 0), value=True)
            place = torch.arange(mask.shape[-1], device=mask.device).expand(mask.shape)
            features.append(states[mask].cpu())
            rewards.append(_rewards(batch)[..., None].expand(mask.shape)[mask].cpu())
            whole.append((place == batch.responses.mask.sum(-1, keepdim=True))[mask].cpu())
        model.train()
        weight, bias = forecast_head(torch.cat(features), torch.cat(rewards), bins, fit=torch.cat(whole))
        return weight, bias

    # -- checkpoints -------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the bins, without which the weights mean nothing."""
        super().on_save_checkpoint(checkpoint)
        config = cast(ValueModel, self.policy).config
        checkpoint["vbon_lightning"]["value_model"] = {name: getattr(config, name) for name in _OF_THE_HEAD}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume a checkpoint of another run; one that is evaluated says itself what its bins are.

        Raises:
            ConfigMismatchError: Naming what differs.
            ValueError: If the checkpoint was not written by this package, or does not say its bins.
        """
        super().on_load_checkpoint(checkpoint)
        if self.resuming:
            return
        made_of = checkpoint["vbon_lightning"].get("value_model")
        if made_of is None:
            raise ValueError(
                "this checkpoint does not say which bins its value model has (it is an older one): evaluate the "
                "export instead, as `model.body`"
            )
        if self.policy is None or any(getattr(self.policy.config, name) != made_of[name] for name in _OF_THE_HEAD):
            bins = RewardBins(*(torch.tensor(made_of[name], dtype=torch.float64) for name in ("edges", "atoms")))
            model = self._new_model(bins, made_of["longest"], made_of["table"])
            torch.nn.Module.to(model, self.device)
            self._take(model)

    # -- training ----------------------------------------------------------------------------------

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
        log_probs, labels = self._predict(picked)
        mask = torch.nn.functional.pad(picked.responses.mask, (1, 0), value=True)
        # A mean over tokens would weigh responses differently on each rank: the mean of each response first.
        losses = prefix_nll(log_probs, labels)
        loss = (torch.where(mask, losses, 0.0).sum(-1) / mask.sum(-1)).mean()
        self.log("train/loss", loss.detach(), prog_bar=True)
        return {"loss": loss}

    def _predict(self, batch: TableBatch) -> tuple[Tensor, Tensor]:
        """Return the bins' log-probabilities ``[B, G, T + 1, K]`` and the labels ``[B, G]``."""
        assert self.scorer is not None
        self.scorer.to(self.device)
        log_probs = self.scorer.bin_log_probs(batch.prompts, batch.responses)
        return log_probs, bin_labels(_rewards(batch), self.scorer.bins.edges)

    # -- evaluation --------------------------------------------------------------------------------

    def count(self, batch: TableBatch) -> None:
        """Add up the cross-entropy, the CRPS and the calibration by place in the response."""
        log_probs, labels = self._predict(batch)
        self.forecast.update(log_probs, labels, batch.responses.mask, batch.prompts.valid)

    def counted(self) -> dict[str, Tensor]:
        """Return cross-entropy (nats), CRPS (in ranks) and calibration error by place, and the mean cross-entropy.

        Places that no rank has seen are left out.
        """
        summary: ForecastSummary = self.forecast.compute()
        seen = summary.prefixes > 0
        if not bool(seen.any()):
            return {}
        found = {"loss": summary.nll[seen].mean()}
        for number, place in enumerate(PREFIX_PLACES):
            if seen[number]:
                found[f"nll/{place}"] = summary.nll[number]
                found[f"crps/{place}"] = summary.crps[number]
                found[f"calibration_error/{place}"] = summary.calibration_error[number]
        return found


_OF_THE_HEAD = ("edges", "atoms", "longest", "table")
"""Entries of a value model's config that its body does not bring."""


def _rewards(batch: TableBatch) -> Tensor:
    rewards = batch.prompts.reference_rewards
    if rewards is None:
        raise ValueError("ValueModelling learns from cached responses, and the batch brings no rewards")
    return rewards
