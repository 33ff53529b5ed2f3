"""Fill the reference table: M responses a prompt from the reference, and their rewards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback

from vbon_lightning.actors import Actors, ActorSpec
from vbon_lightning.callbacks.reference_table_writer import ReferenceTableWriter
from vbon_lightning.modules.base import AlignmentModule
from vbon_lightning.reference_table import TableRow, prompt_key
from vbon_lightning.sampling import prompt_noise, sample_completions
from vbon_lightning.types import PromptBatch


class ReferenceSampler(AlignmentModule):
    """Sample M responses a prompt from the reference and score them, for ``vbon predict``.

    Each prompt's noise comes from its own tokens and ``data.table_seed``, so that a table is the same however
    its making was interrupted or shared among processes.

    Args:
        actors: The policy, reference and reward, as the data module names them.
        samples: M, responses a prompt.
        rows_per_pass: Most responses decoded at once; bounds the memory.
        seed: Initialises a reference made from a config; the responses come from ``data.table_seed``.
    """

    trains_policy = False
    needs_reference = False

    def __init__(self, actors: ActorSpec, samples: int = 256, rows_per_pass: int = 1024, seed: int = 0) -> None:
        super().__init__(actors, seed=seed)
        if samples < 1 or rows_per_pass < 1:
            raise ValueError(f"model.samples and model.rows_per_pass must be >= 1, got {samples}, {rows_per_pass}")
        self.samples, self.rows_per_pass = samples, rows_per_pass
        self.writer = ReferenceTableWriter()
        self.record_settings(samples=samples)

    def configure_model(self) -> None:
        """Load the reference; the policy is not needed."""
        if self.actors is None:
            spec = self.actor_spec
            only_reference = ActorSpec(
                policy=spec.reference_spec,
                reward=spec.reward,
                max_new_tokens=spec.max_new_tokens,
                temperature=spec.temperature,
            )
            self.actors = Actors.load(only_reference, seed=self.seed, trainable=False, reference=False)
            self.policy = self.actors.policy

    def configure_callbacks(self) -> list[Callback]:
        """Bring the writer along, so that no sampled table is ever lost."""
        return [self.writer]

    def finished_keys(self) -> set[str]:
        """Return the prompts the table holds already."""
        return self.writer.finished_keys()

    def on_predict_start(self) -> None:
        """Check that prompts and responses fit the model's context."""
        self.check_lengths(self.loaded.max_new_tokens)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[TableRow]:
        """Return a table row for each prompt."""
        rows: list[TableRow] = []
        for group in self._groups(batch):
            rows += self._rows(group)
        return rows

    def _groups(self, batch: PromptBatch) -> Iterator[PromptBatch]:
        """Split a batch so that its samples fit a pass, leaving out the rows that only even out the ranks."""
        kept = batch.valid.nonzero().squeeze(-1)
        for rows in kept.split(max(1, self.rows_per_pass // self.samples)):
            width = int(batch.mask[rows].sum(-1).max())
            yield PromptBatch(
                batch.index[rows],
                batch.valid[rows],
                batch.tokens[rows, -width:],
                batch.mask[rows, -width:],
                [batch.text[row] for row in rows.tolist()],
            )

    def _rows(self, prompts: PromptBatch) -> list[TableRow]:
        actors = self.loaded
        actors.place()
        ids = [row[keep].tolist() for row, keep in zip(prompts.tokens, prompts.mask, strict=True)]
        keys = [prompt_key(tokens) for tokens in ids]
        noise = prompt_noise(
            keys,
            num_samples=self.samples,
            length=actors.max_new_tokens,
            seed=self._table_seed,
            stream="table",
            step=0,
        )
        passes = [
            sample_completions(
                actors.policy,
                prompts.tokens,
                prompts.mask,
                part,
                end_ids=actors.end_ids,
                pad_id=actors.end_ids[0],
                temperature=actors.temperature,
            )
            for part in noise.split(self.rows_per_pass, dim=1)
        ]
        by_pass = [actors.token_ids(part) for part in passes]
        token_ids = [[ids for part in by_pass for ids in part[row]] for row in range(len(keys))]
        finished = torch.cat([part.finished for part in passes], dim=1)
        log_probs = torch.cat([part.log_probs.sum(-1) for part in passes], dim=1)
        responses = actors.decode(token_ids, prompts)
        rewards = actors.score(prompts.text, responses, token_ids, finished)
        return [
            TableRow(*fields)
            for fields in zip(
                keys,
                prompts.text,
                ids,
                responses,
                token_ids,
                rewards.tolist(),
                log_probs.tolist(),
                finished.tolist(),
                strict=True,
            )
        ]

    @property
    def _table_seed(self) -> int:
        return int(getattr(getattr(self.trainer, "datamodule", None), "table_seed", 0))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse checkpoints: the sampler has nothing to restore."""
        raise ValueError("`vbon predict` samples from data.reference and takes no --ckpt_path")
