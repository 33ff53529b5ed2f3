"""Fill the reference table: M responses a prompt from the reference, and their rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback

from vbon_lightning.actors import Actors, ActorSpec
from vbon_lightning.callbacks.reference_table_writer import ReferenceTableWriter
from vbon_lightning.data.collating import batch_keys
from vbon_lightning.modules.base import AlignmentModule
from vbon_lightning.paths import resolve_path
from vbon_lightning.reference_table import ReferenceTable, TableRow
from vbon_lightning.sampling import prompt_noise
from vbon_lightning.types import PromptBatch, select_prompts


class _Sampled(NamedTuple):
    """A group's responses before they are scored; nothing of it is on the device any more."""

    keys: list[str]
    prompts: PromptBatch
    prompt_ids: list[list[int]]
    token_ids: list[list[list[int]]]
    finished: torch.Tensor
    log_probs: list[list[float]]


class ReferenceSampler(AlignmentModule):
    """Sample M responses a prompt from the reference and score them, for ``vbon predict``.

    Each prompt's noise comes from its own tokens and ``data.table_seed``, so that a table is the same however
    its making was interrupted or shared among processes.

    Args:
        actors: The policy, reference and reward, as the data module names them.
        samples: M, responses a prompt.
        rows_per_pass: Most responses decoded at once; bounds the memory.
        overlap_scoring: Score a group of prompts in a thread of its own while the next is sampled; by default on
            CUDA only, since on the CPU both want the same cores. The table is the same. A reward must then not touch
            what sampling uses (its model, the tokenizer's settings).
        responses_from: Directory of a table of the same reference and sampling settings under another reward: its
            responses are scored, and nothing is sampled.
        seed: Initialises a reference made from a config; the responses come from ``data.table_seed``.
    """

    trains_policy = False
    needs_reference = False

    def __init__(
        self,
        actors: ActorSpec,
        samples: int = 256,
        rows_per_pass: int = 1024,
        overlap_scoring: bool | None = None,
        responses_from: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(actors, seed=seed)
        if samples < 1 or rows_per_pass < 1:
            raise ValueError(f"model.samples and model.rows_per_pass must be >= 1, got {samples}, {rows_per_pass}")
        self.samples, self.rows_per_pass, self.overlap_scoring = samples, rows_per_pass, overlap_scoring
        self.responses_from = responses_from
        self._source: ReferenceTable | None = None
        self._scorer: ThreadPoolExecutor | None = None
        self._pending: Future[list[TableRow]] | None = None
        self.writer = ReferenceTableWriter()
        self.record_settings(samples=samples)

    def configure_model(self) -> None:
        """Load the reference; the policy is not needed."""
        if self.actors is None:
            # Finished responses are told in the table, so that a penalty may be chosen later.
            only_reference = self.actor_spec.replaced(
                policy=self.actor_spec.reference_spec, reference=None, missing_eos_penalty=0.0, value_model=None
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
        """Check that prompts and responses fit the model's context, and that a table to take responses from fits."""
        self._stop_scoring()  # of a run that was interrupted
        if self.responses_from is not None:
            self._source = self._open_source(resolve_path(self.responses_from))
        self.check_lengths(self.response_room)

    def _open_source(self, path: str) -> ReferenceTable:
        """Open the table to take responses from, refusing one that differs in more than the reward.

        Raises:
            FingerprintMismatch: Naming what differs.
            ValueError: If it has fewer responses a prompt than are asked for.
        """
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        table = ReferenceTable.open(path)
        if datamodule is not None:
            table.check(datamodule.fingerprint() | {"reward": table.fingerprint.get("reward")})
        if table.samples < self.samples:
            raise ValueError(
                f"model.responses_from: the table {path} has {table.samples} responses a prompt, fewer than "
                f"model.samples={self.samples}: lower model.samples"
            )
        return table

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[TableRow]:
        """Return the table rows that are ready: those of the batch or, where scoring overlaps, all but a group.

        The next batch returns that group, the last one all that is left. What is not returned is not in the table.
        """
        overlap = self.device.type == "cuda" if self.overlap_scoring is None else self.overlap_scoring
        rows: list[TableRow] = []
        try:
            for group in self._groups(batch):
                sampled = self._sample(group)
                rows += self._finish_scoring()
                if overlap:
                    self._start_scoring(sampled)
                else:
                    rows += self._score(sampled)
            progress: Any = self.trainer.predict_loop.batch_progress
            if progress.is_last_batch:
                rows += self._finish_scoring()
        except BaseException:
            self._stop_scoring()
            raise
        return rows

    def _start_scoring(self, sampled: _Sampled) -> None:
        if self._scorer is None:
            self._scorer = ThreadPoolExecutor(1, thread_name_prefix="scoring")
        self._pending = self._scorer.submit(_as_here(self._score, self.device), sampled)

    def _finish_scoring(self) -> list[TableRow]:
        """Return the rows of the group that is being scored, or raise what its reward raised."""
        pending, self._pending = self._pending, None
        return [] if pending is None else pending.result()

    def _stop_scoring(self) -> None:
        """Let the thread go, and forget what it has not finished."""
        scorer, self._scorer, self._pending = self._scorer, None, None
        if scorer is not None:
            scorer.shutdown(wait=False, cancel_futures=True)

    def on_predict_end(self) -> None:
        """Let the scoring thread go."""
        self._stop_scoring()

    def _groups(self, batch: PromptBatch) -> Iterator[PromptBatch]:
        """Split a batch so that its samples fit a pass, leaving out rows that even out the ranks and those done."""
        done = self.finished_keys()
        keys = batch_keys(batch) if done else batch.text
        missing = [valid and key not in done for key, valid in zip(keys, batch.valid.tolist(), strict=True)]
        kept = torch.tensor(missing, device=batch.tokens.device).nonzero().squeeze(-1)
        if not len(kept):
            return
        for rows in kept.split(max(1, self.rows_per_pass // self.samples)):
            width = int(batch.mask[rows].sum(-1).max())
            some = select_prompts(batch, rows.tolist())
            yield some._replace(tokens=some.tokens[:, -width:], mask=some.mask[:, -width:])

    def _sample(self, prompts: PromptBatch) -> _Sampled:
        actors = self.loaded
        actors.place()
        ids = [row[keep].tolist() for row, keep in zip(prompts.tokens, prompts.mask, strict=True)]
        keys = batch_keys(prompts)
        if self._source is not None:
            return self._cached(self._source, prompts, keys, ids)
        noise = prompt_noise(
            keys,
            num_samples=self.samples,
            length=actors.max_new_tokens,
            seed=self._table_seed,
            stream="table",
            step=0,
        )
        passes = [
            actors.sampler(
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
        return _Sampled(
            keys=keys,
            prompts=prompts._replace(tokens=prompts.tokens.cpu(), mask=prompts.mask.cpu()),
            prompt_ids=ids,
            token_ids=[[ids for part in by_pass for ids in part[row]] for row in range(len(keys))],
            finished=torch.cat([part.finished for part in passes], dim=1).cpu(),
            log_probs=torch.cat([part.log_probs.sum(-1) for part in passes], dim=1).tolist(),
        )

    def _cached(self, table: ReferenceTable, prompts: PromptBatch, keys: list[str], ids: list[list[int]]) -> _Sampled:
        found = [table.response_tokens(key, text) for key, text in zip(keys, prompts.text, strict=True)]
        return _Sampled(
            keys=keys,
            prompts=prompts._replace(tokens=prompts.tokens.cpu(), mask=prompts.mask.cpu()),
            prompt_ids=ids,
            token_ids=[
                [ids.tolist() for ids in row.tokens.split(row.lengths.tolist())[: self.samples]] for row in found
            ],
            finished=table.finished_matrix(keys, prompts.text)[:, : self.samples],
            log_probs=table.log_probs_matrix(keys, prompts.text)[:, : self.samples].tolist(),
        )

    def _score(self, sampled: _Sampled) -> list[TableRow]:
        actors, prompts = self.loaded, sampled.prompts
        responses = actors.decode(sampled.token_ids, prompts)
        rewards = actors.score(prompts, responses, sampled.token_ids, sampled.finished)
        return [
            TableRow(*fields)
            for fields in zip(
                sampled.keys,
                prompts.text,
                sampled.prompt_ids,
                responses,
                sampled.token_ids,
                rewards.tolist(),
                sampled.log_probs,
                sampled.finished.tolist(),
                strict=True,
            )
        ]

    @property
    def _table_seed(self) -> int:
        return int(getattr(getattr(self.trainer, "datamodule", None), "table_seed", 0))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse checkpoints: the sampler has nothing to restore."""
        raise ValueError("`vbon predict` samples from data.reference and takes no --ckpt_path")


def _as_here(work: Callable[[_Sampled], list[TableRow]], device: torch.device) -> Callable[[_Sampled], list[TableRow]]:
    """Return work that, in another thread, computes as it would in this one: torch keeps these modes a thread."""
    inference, kind = torch.is_inference_mode_enabled(), device.type
    casts = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    def there(sampled: _Sampled) -> list[TableRow]:
        with ExitStack() as modes:
            entered: list[AbstractContextManager[Any]] = [torch.inference_mode(inference)]
            if kind == "cuda":
                entered.append(torch.cuda.device(device))
            if casts is not None:
                entered.append(torch.autocast(kind, dtype=casts))
            for mode in entered:
                modes.enter_context(mode)
            return work(sampled)

    return there
