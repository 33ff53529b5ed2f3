"""Fill the reference table: M responses a prompt from the reference, and their rewards."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from vbon_lightning._visible import shorten
from vbon_lightning.actors import Actors, ActorSpec
from vbon_lightning.callbacks.reference_table_writer import ReferenceTableWriter
from vbon_lightning.data.collating import batch_keys
from vbon_lightning.models import vocabulary_size
from vbon_lightning.modules.base import AlignmentModule, check_strategy
from vbon_lightning.paths import resolve_path
from vbon_lightning.reference_table import ReferenceTable, TableRow, joined_rows
from vbon_lightning.rewards import RewardError
from vbon_lightning.rewards.calls import PendingRewards, RewardCaller
from vbon_lightning.sampling import prompt_noise
from vbon_lightning.sampling.further import TooManyMissingError, replace_missing
from vbon_lightning.sharding import is_sharded, most
from vbon_lightning.types import PromptBatch, select_prompts


class _Sampled(NamedTuple):
    """A group's responses before they are scored; nothing of it is on the device any more."""

    keys: list[str]
    prompts: PromptBatch
    prompt_ids: list[list[int]]
    token_ids: list[list[list[int]]]
    responses: list[list[str]]
    finished: list[list[bool]]
    log_probs: list[list[float]]
    first: int = 0
    """The place of the first of these responses among their prompt's."""
    held: tuple[TableRow | None, ...] = ()
    """The prompts' rows in the table, where there are any: what they hold stays."""

    def of(self, rows: Sequence[int]) -> _Sampled:
        """Return the prompts at these places alone."""

        def picked(values: list[Any]) -> list[Any]:
            return [values[row] for row in rows]

        return _Sampled(
            picked(self.keys),
            select_prompts(self.prompts, list(rows)),
            picked(self.prompt_ids),
            picked(self.token_ids),
            picked(self.responses),
            picked(self.finished),
            picked(self.log_probs),
            self.first,
        )

    def rows(self, rewards: dict[int, list[float]]) -> list[TableRow]:
        """Return the rows of these responses, for the prompts whose rewards are given, by their place in the group."""
        return [
            TableRow(
                self.keys[row],
                self.prompts.text[row],
                self.prompt_ids[row],
                self.responses[row],
                self.token_ids[row],
                values,
                self.log_probs[row],
                self.finished[row],
            )
            for row, values in rewards.items()
        ]

    def topped_up(self, rows: dict[int, TableRow]) -> list[TableRow]:
        """Return the table's rows: of rows, by their place in the group, each with what the table has put before."""
        found = []
        for place, row in rows.items():
            held = self.held[place] if self.held else None
            found.append(row if held is None else joined_rows(held, row, self.first))
        return found


class _Asked(NamedTuple):
    """A group whose rewards are being found."""

    sampled: _Sampled
    rewards: PendingRewards


class ReferenceSampler(AlignmentModule):
    """Sample M responses a prompt from the reference and score them, for ``vbon predict``.

    Each prompt's noise comes from its own tokens and ``data.table_seed``, so that a table is the same however
    its making was interrupted or shared among processes. A table of fewer responses a prompt is topped up: what is
    there stays, and the table becomes the one that would have been made at once.

    Args:
        actors: The policy, reference and reward, as the data module names them.
        samples: M, responses a prompt; at least as many as the table has.
        rows_per_pass: Most responses decoded at once; bounds the memory.
        overlap_scoring: Score a group of prompts in threads of its own while the next is sampled; by default on CUDA
            and with several ``data.reward_calls.workers``, since on the CPU both may want the same cores. The table is
            the same. A reward must then not touch what sampling uses (its model, the tokenizer's settings).
        responses_from: Directory of a table of the same reference and sampling settings under another reward: its
            responses are scored, and nothing is sampled.
        lease_s: Where several `vbon predict` fill one table: how long one may be silent (it was killed, or its machine
            is gone) before the others make the prompts that it had taken. A running one speaks five times in that
            time, however long its prompts take.
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
        lease_s: float = 60.0,
        seed: int = 0,
    ) -> None:
        super().__init__(actors, seed=seed)
        if samples < 1 or rows_per_pass < 1:
            raise ValueError(f"model.samples and model.rows_per_pass must be >= 1, got {samples}, {rows_per_pass}")
        self.samples, self.rows_per_pass, self.overlap_scoring = samples, rows_per_pass, overlap_scoring
        self.responses_from = responses_from
        self._source: ReferenceTable | None = None
        self._caller: RewardCaller | None = None
        self._pending: _Asked | None = None
        if not lease_s > 0:
            raise ValueError(f"model.lease_s must be > 0, got {lease_s}")
        self.writer = ReferenceTableWriter(lease_s)
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
        check_strategy(self.trainer.strategy)
        return [self.writer]

    def finished_keys(self) -> set[str]:
        """Return the prompts that the table holds M responses to already."""
        return self.writer.finished_keys()

    def take(self, keys: list[str]) -> list[str]:
        """Take the prompts of a group that the table lacks, unless another process has; return their keys."""
        return self.writer.take(keys)

    def on_predict_start(self) -> None:
        """Check that prompts and responses fit the model's context, and that a table to take responses from fits."""
        self._stop_scoring(wait=False)  # of a run that was interrupted
        if self.responses_from is not None:
            self._source = self._open_source(resolve_path(self.responses_from))
            self._source.check_tokens(vocabulary_size(self.loaded.policy), self.loaded.end_ids)
            self._check_source(self._source)
        if self.writer.table is not None:
            self.writer.table.check_tokens(vocabulary_size(self.loaded.policy), self.loaded.end_ids)
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

    def _check_source(self, source: ReferenceTable) -> None:
        """Name a prompt that the table to take responses from lacks, or whose row there is another text's."""
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if datamodule is not None:
            done = self.finished_keys()
            for key, prompt in datamodule.table_prompts().items():
                if key not in done:
                    source.response_tokens(key, prompt.text)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[TableRow]:
        """Return the table rows that are ready: those of the batch or, where scoring overlaps, all but a group.

        The next batch returns that group, the last one all that is left. What is not returned is not in the table.
        """
        progress: Any = self.trainer.predict_loop.batch_progress
        return self.make_rows(batch, last=progress.is_last_batch)

    def on_predict_epoch_end(self) -> None:
        """Make what is left when nothing can be taken any more: wait for the others, and take over from the dead.

        A run that was limited to so many batches leaves it to the next.
        """
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        self.writer.write(self._finish_scoring())
        limit = self.trainer.limit_predict_batches
        if not (isinstance(limit, float) and limit == 1.0) or not hasattr(datamodule, "table_batches"):
            return
        batches, told = datamodule.table_batches(), 0
        any_batch = batches[0]
        while True:
            done = self.writer.look_again()
            batches = [batch for batch in batches if not done.issuperset(prompt.key for prompt in batch)]
            if not self._anywhere(bool(batches)):
                return
            mine = next((batch for batch in batches if self.take([prompt.key for prompt in batch])), None)
            if self._anywhere(mine is not None):
                # Where this process has none of it, it makes the passes of those who hold the reference with it.
                prompts = datamodule.prompt_batch(mine or any_batch, rows=len(any_batch))
                prompts = self.trainer.strategy.batch_to_device(prompts, self.device)
                with self.trainer.precision_plugin.predict_step_context():
                    self.writer.write(self.call_whole("make_rows", prompts))
            else:
                missing = [prompt.key for batch in batches for prompt in batch if prompt.key not in done]
                if len(missing) != told:
                    told = len(missing)
                    _say_waiting(told, self.writer.holders(missing), self.writer.lease_s)
                time.sleep(min(1.0, self.writer.lease_s / 10))

    def _anywhere(self, here: bool) -> bool:
        """Return whether something is so here or, where processes hold the reference together, on one of them."""
        return bool(most(int(here), self.device)) if self._is_shared else here

    def make_rows(self, batch: PromptBatch, last: bool = True) -> list[TableRow]:
        """Return the table rows that are ready, of the prompts that this process took; with the last batch all."""
        rows: list[TableRow] = []
        try:
            for group, keys, ours in self._groups(batch):
                sampled = self._sample(group, keys, ours)
                if not sampled.keys:
                    continue
                rows += self._finish_scoring()
                self._pending = _Asked(sampled, self._ask(sampled))
                if not self._overlaps:
                    rows += self._finish_scoring()
            if last:
                rows += self._finish_scoring()
        except RewardError:
            self.writer.write(rows + self._finished_rows())
            self._stop_scoring(wait=True)
            raise
        except BaseException:
            self._stop_scoring(wait=False)
            raise
        return rows

    @property
    def _overlaps(self) -> bool:
        if self.overlap_scoring is not None:
            return self.overlap_scoring
        return self.device.type == "cuda" or self.actor_spec.reward_calls.workers > 1

    def _ask(self, sampled: _Sampled) -> PendingRewards:
        """Have a group scored: at once where scoring overlaps, otherwise when the rewards are asked for."""
        if self._caller is None:
            self._caller = self.loaded.asking(ahead=self._overlaps)
        prompts = sampled.prompts
        return self._caller.start(prompts.text, sampled.responses, sampled.token_ids, prompts.beside)

    def _finish_scoring(self) -> list[TableRow]:
        """Return the rows of the group that is being scored, or raise what its reward raised."""
        if self._pending is None:
            return []
        sampled, pending = self._pending
        rewards = pending.result().rewards
        self.loaded.count_missing(rewards, sampled.prompts, sampled.responses)
        rows = self._filled(sampled, rewards.tolist())
        self._pending = None
        return rows

    def _filled(self, sampled: _Sampled, rewards: list[list[float]]) -> list[TableRow]:
        """Return the table's rows, each response without a reward replaced by a further draw.

        Raises:
            RewardError: If a prompt's responses have no reward, however many are drawn.
        """
        rows = sampled.rows(dict(enumerate(rewards)))

        def again(row: int, places: list[int], number: int) -> list[_Response]:
            prompt = _one_prompt(sampled.prompts, row, self.device)
            own = [sampled.first + place for place in places]
            drawn = self._draw(prompt, sampled.keys[row : row + 1], own, stream="table/further", step=number)
            found = self.loaded.score(prompt, drawn.responses, drawn.token_ids, torch.tensor(drawn.finished))
            return _responses_of(drawn.rows(dict(enumerate(found.tolist())))[0])

        def named(row: int) -> str:
            return f"the prompt {shorten(sampled.prompts.text[row])} of the reference table"

        try:
            filled, _ = replace_missing(
                [_responses_of(row) for row in rows],
                lambda one: math.isnan(one.reward),
                again,
                named,
                most=self.samples,
            )
        except TooManyMissingError as problem:
            raise RewardError(str(problem)) from problem
        replaced = [_with_responses(row, group) for row, group in zip(rows, filled, strict=True)]
        return sampled.topped_up(dict(enumerate(replaced)))

    def _finished_rows(self) -> list[TableRow]:
        """Return the rows of a group that broke off which have all of their rewards."""
        asked, self._pending = self._pending, None
        if asked is None:
            return []
        known = dict(asked.rewards.finished_rows())
        return asked.sampled.topped_up(dict(zip(known, asked.sampled.rows(known), strict=True)))

    def _stop_scoring(self, *, wait: bool) -> None:
        """Let the threads go, and forget what they have not finished."""
        caller, self._caller, self._pending = self._caller, None, None
        if caller is not None:
            caller.close(wait_for_calls=wait)

    def on_predict_end(self) -> None:
        """Let the scoring threads go, and say what calling the reward came to."""
        self._stop_scoring(wait=True)
        record = self.loaded.record
        if record.retries or record.missing:
            rank_zero_info(
                f"reward: {record.retries} calls made again; {record.missing} responses without a reward, replaced by "
                "further draws"
            )

    def _groups(self, batch: PromptBatch) -> Iterator[tuple[PromptBatch, list[str], list[int]]]:
        """Split a batch so that its samples fit a pass, leaving out groups of which nothing is to be made here.

        With each group come its prompts' keys, and the places in it of those that are this process's to make.
        """
        keys, valid = batch_keys(batch), batch.valid.tolist()
        ours = {place for place, key in enumerate(keys) if valid[place] and key in self.writer.taken}
        together = max(1, self.rows_per_pass // self.samples)
        for places in self._kinds(batch, keys, ours):
            for first in range(0, len(places), together):
                group = places[first : first + together]
                mine = [number for number, place in enumerate(group) if place in ours]
                if self._anywhere(bool(mine)):
                    some = select_prompts(batch, group)
                    width = int(some.mask.sum(-1).max())
                    some = some._replace(tokens=some.tokens[:, -width:], mask=some.mask[:, -width:])
                    yield some, [keys[place] for place in group], mine

    def _kinds(self, batch: PromptBatch, keys: Sequence[str], ours: Collection[int]) -> list[list[int]]:
        """Return the places in a batch of what may be sampled together, in lists."""
        if self._is_shared:  # the same passes on every process
            return [list(range(len(batch.text)))]
        if not self._in_blocks:  # padded as they would be whoever makes them, and whatever is made
            return [batch.valid.nonzero().squeeze(-1).tolist()]
        table = self.writer.table
        by_held: dict[int, list[int]] = {}
        for place in sorted(ours):
            by_held.setdefault(0 if table is None else table.count(keys[place]), []).append(place)
        return list(by_held.values())

    def _sample(
        self, prompts: PromptBatch, keys: list[str] | None = None, ours: Sequence[int] | None = None
    ) -> _Sampled:
        """Sample the responses that a group's prompts lack, and return those of the prompts at some places, or all."""
        self.loaded.place()
        keys, table = batch_keys(prompts) if keys is None else keys, self.writer.table
        ours = range(len(keys)) if ours is None else ours
        held: tuple[TableRow | None, ...] = ()
        if table is not None:
            held = tuple(table.row(keys[row], prompts.text[row]) if keys[row] in table else None for row in ours)
        first = min((0 if row is None else len(row.rewards) for row in held), default=0)
        if self._is_shared:  # as many responses on every process
            first = 0
        # Another process may have topped some up by now.
        places = range(min(first, self.samples - 1), self.samples)
        if self._source is not None:
            sampled = self._cached(self._source, prompts, keys, places)
        else:
            sampled = self._draw(prompts, keys, places, stream="table", step=0)
        sampled = sampled if len(ours) == len(keys) else sampled.of(ours)
        return sampled._replace(first=places.start, held=held)

    def _draw(
        self, prompts: PromptBatch, keys: list[str], places: Sequence[int], *, stream: str, step: int
    ) -> _Sampled:
        """Sample the responses that stand at some places among those of a prompt."""
        noise = prompt_noise(
            keys,
            num_samples=_block(places[-1], self.rows_per_pass).stop,
            length=self.loaded.max_new_tokens,
            seed=self._table_seed,
            stream=stream,
            step=step,
        )
        if not self._in_blocks:
            return self._sampled(prompts, keys, *self._in_passes(prompts, noise[:, list(places)]))
        blocks = sorted({_block(place, self.rows_per_pass) for place in places}, key=lambda block: block.start)
        drawn = [place for block in blocks for place in block]
        wanted = [drawn.index(place) for place in places]
        found: tuple[list[Any], ...] = ([], [], [])
        for row in range(len(keys)):
            prompt = _one_prompt(prompts, row, self.device)
            parts = [self._in_passes(prompt, noise[row : row + 1, block.start : block.stop]) for block in blocks]
            for column, by_block in zip(found, zip(*parts, strict=True), strict=True):
                values = [value for (block,) in by_block for value in block]
                column.append([values[place] for place in wanted])
        return self._sampled(prompts, keys, *found)

    @property
    def _in_blocks(self) -> bool:
        """Whether each prompt is sampled by itself, in blocks that do not depend on M or on what else is to be sampled.

        Matrix products round by their shape, and a token may hang on the last digit: this way it is the same however a
        table is made. On a GPU it would take too long.
        """
        return self.device.type == "cpu" and not self._is_shared

    @property
    def _is_shared(self) -> bool:
        """Whether processes hold the reference together."""
        return self.actors is not None and is_sharded(self.loaded.policy)

    def _in_passes(
        self, prompts: PromptBatch, noise: Tensor
    ) -> tuple[list[list[list[int]]], list[list[bool]], list[list[float]]]:
        """Return the token ids of the responses, whether they finished, and their log-probabilities: ``[B][G]``."""
        actors = self.loaded
        passes = [
            actors.sampler(actors.policy, actors.request(prompts, part))
            for part in noise.split(self.rows_per_pass, dim=1)
        ]
        by_pass = [actors.token_ids(part) for part in passes]
        token_ids = [[ids for part in by_pass for ids in part[row]] for row in range(len(noise))]
        finished = torch.cat([part.finished for part in passes], dim=1).tolist()
        log_probs = torch.cat([part.log_probs.sum(-1) for part in passes], dim=1).tolist()
        return token_ids, finished, log_probs

    def _cached(self, table: ReferenceTable, prompts: PromptBatch, keys: list[str], places: range) -> _Sampled:
        asked = slice(places.start, places.stop)
        found = [table.response_tokens(key, text) for key, text in zip(keys, prompts.text, strict=True)]
        return self._sampled(
            prompts,
            keys,
            token_ids=[[ids.tolist() for ids in row.tokens.split(row.lengths.tolist())[asked]] for row in found],
            finished=table.finished_matrix(keys, prompts.text)[:, asked].tolist(),
            log_probs=table.log_probs_matrix(keys, prompts.text)[:, asked].tolist(),
        )

    def _sampled(
        self,
        prompts: PromptBatch,
        keys: list[str],
        token_ids: list[list[list[int]]],
        finished: list[list[bool]],
        log_probs: list[list[float]],
    ) -> _Sampled:
        prompts = prompts._replace(tokens=prompts.tokens.cpu(), mask=prompts.mask.cpu(), valid=prompts.valid.cpu())
        return _Sampled(
            keys=keys,
            prompts=prompts,
            prompt_ids=[row[keep].tolist() for row, keep in zip(prompts.tokens, prompts.mask, strict=True)],
            token_ids=token_ids,
            responses=self.loaded.decode(token_ids, prompts),
            finished=finished,
            log_probs=log_probs,
        )

    @property
    def _table_seed(self) -> int:
        return int(getattr(getattr(self.trainer, "datamodule", None), "table_seed", 0))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse checkpoints: the sampler has nothing to restore."""
        raise ValueError("`vbon predict` samples from data.reference and takes no --ckpt_path")


def _say_waiting(prompts: int, holders: list[str], lease_s: float) -> None:
    rank_zero_info(
        f"waiting for {prompts} prompt{'s' * (prompts > 1)} that {', '.join(holders) or 'another process'} took: what "
        f"a process that died did not write is free {lease_s:g} s after it was last heard of"
    )


class _Response(NamedTuple):
    """One response of a row of the table."""

    text: str
    tokens: list[int]
    reward: float
    log_prob: float
    finished: bool


def _responses_of(row: TableRow) -> list[_Response]:
    columns = (row.responses, row.response_tokens, row.rewards, row.log_probs or [], row.finished or [])
    return [_Response(*values) for values in zip(*columns, strict=True)]


def _with_responses(row: TableRow, responses: list[_Response]) -> TableRow:
    texts, tokens, rewards, log_probs, finished = (list(values) for values in zip(*responses, strict=True))
    return row._replace(
        responses=texts, response_tokens=tokens, rewards=rewards, log_probs=log_probs, finished=finished
    )


def _block(place: int, most: int) -> range:
    """Return the places among a prompt's responses that are sampled with one of them: 16, 48, then 64, or ``most``."""
    start, stop = (0, 16) if place < 16 else (max(16, place // 64 * 64), place // 64 * 64 + 64)
    first = start + (place - start) // most * most
    return range(first, min(first + most, stop))


def _one_prompt(prompts: PromptBatch, row: int, device: torch.device) -> PromptBatch:
    """Return one of the prompts without padding, which would change the last digits."""
    found = select_prompts(prompts, [row])
    width = int(found.mask.sum())
    return found._replace(tokens=found.tokens[:, -width:].to(device), mask=found.mask[:, -width:].to(device))
