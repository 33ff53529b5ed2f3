"""The data module that every module shares: prompts, texts, reference rewards, and the models' names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple, get_args

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, DistributedSampler
from transformers import PreTrainedTokenizerBase

from vbon_lightning._visible import visible
from vbon_lightning.actors import ActorSpec
from vbon_lightning.checks import check_same_settings, plain
from vbon_lightning.data.collating import collate_judged, collate_prompts, collate_texts
from vbon_lightning.data.conversations import MESSAGES, ConversationError
from vbon_lightning.data.dealing import BatchTaker, ResumableLoader, RowDealer, Rows, StreamedRows
from vbon_lightning.data.duplicates import distinct_prompts
from vbon_lightning.data.encoding import EncodedJudged, EncodedPrompt, EncodedText
from vbon_lightning.data.preparing import prepare_rows
from vbon_lightning.data.sources import TextRow, TextSource, find_columns, read_rows, stream_rows
from vbon_lightning.paths import resolve_path
from vbon_lightning.reference_table import ReferenceTable
from vbon_lightning.sharding import is_sharded
from vbon_lightning.types import JudgedBatch, PromptBatch, Responses, TableBatch, TextBatch

Split = Literal["train", "val", "test"]


class AlignmentDataModule(LightningDataModule):
    """Bring prompts, texts and reference rewards to SFT, vBoN, KL-constrained RL and the reference sampler.

    Modules that learn from rollouts get :class:`~vbon_lightning.types.PromptBatch`, supervised fine-tuning
    gets :class:`~vbon_lightning.types.TextBatch`, reward-model training :class:`~vbon_lightning.types.JudgedBatch`, and
    modules that learn from the reference table's responses train on :class:`~vbon_lightning.types.TableBatch`; which of
    them is asked of the module (``batch_kind``).

    Args:
        train: Where training text comes from: a source, or, in Python, a ``datasets.Dataset`` or a list of mappings.
        val: Where validation text comes from.
        test: Where held-out text for ``vbon test`` and ``vbon compare`` comes from.
        reward_columns: Columns of the data set that the reward reads beside the prompt, such as the right answer; those
            that it names itself come without asking.
        reference_table: Directory of the reference table, or its URL in a store that ``fsspec`` knows (``s3://``): read
            when it is there, written by ``vbon predict``, of which several may run at the same time.
        table_samples: M, how many of the table's responses a prompt to use, the first ones; all by default.
        table_skip: Leave out so many of the table's responses a prompt before that. Where a policy is judged on the
            prompts that it learnt from, those that judge are to be others than those that taught: train with
            ``table_samples: 64``, compare with ``table_skip: 64``.
        table_seed: Seeds the table's responses; part of its fingerprint.
        table_splits: Splits whose prompts ``vbon predict`` fills into the table.
        batch_size: Prompts (or texts) a step and rank.
        eval_batch_size: The same for validation, test and predict; ``batch_size`` by default.
        max_prompt_tokens: Longest prompt, in tokens.
        too_long: What to do with a longer one: ``error`` names its row, ``truncate_left`` keeps its end.
        max_text_tokens: Longest text for supervised fine-tuning and for reward models.
        long_text: What to do with a longer one: ``truncate`` drops its end (and the EOS with it), ``split``
            makes consecutive pieces of it, of which only the last has the EOS.
        num_workers: Loader processes.
        seed: Seeds the order of the training rows.
        **actors: The models, the reward and how responses are sampled: what
            :class:`~vbon_lightning.actors.ActorSpec` takes, ``policy`` first.
    """

    def __init__(
        self,
        train: TextSource | list[dict[str, Any]] | None = None,
        val: TextSource | list[dict[str, Any]] | None = None,
        test: TextSource | list[dict[str, Any]] | None = None,
        reward_columns: list[str] = [],  # noqa: B006 (never mutated)
        reference_table: str | None = None,
        table_samples: int | None = None,
        table_skip: int = 0,
        table_seed: int = 0,
        table_splits: list[Split] = ["train", "val", "test"],  # noqa: B006 (never mutated; a tuple reads worse in YAML)
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_prompt_tokens: int | None = None,
        too_long: Literal["error", "truncate_left"] = "error",
        max_text_tokens: int | None = None,
        long_text: Literal["truncate", "split"] = "truncate",
        num_workers: int = 0,
        seed: int = 0,
        **actors: Any,
    ) -> None:
        super().__init__()
        for name, size in (
            ("batch_size", batch_size),
            ("eval_batch_size", eval_batch_size),
            ("table_samples", table_samples),
        ):
            if size is not None and size < 1:
                raise ValueError(f"data.{name} must be at least 1, got {size}")
        for name, value, known in (
            ("too_long", too_long, ("error", "truncate_left")),
            ("long_text", long_text, ("truncate", "split")),
            *(("table_splits", split, get_args(Split)) for split in table_splits),
        ):
            if value not in known:
                raise ValueError(f"data.{name} must be one of {', '.join(known)}; got {value!r}")
        self.actors = ActorSpec(**actors)
        self.reward_columns = list(reward_columns)
        self.judge_columns: list[str] = []
        given = {"train": train, "val": val, "test": test}
        self.sources = {name: None if rows is None else TextSource.of(rows) for name, rows in given.items()}
        if table_skip < 0:
            raise ValueError(f"data.table_skip must be at least 0, got {table_skip}")
        self.reference_table, self.table_samples, self.table_skip = reference_table, table_samples, table_skip
        self.table_seed, self.table_splits = table_seed, list(table_splits)
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.max_prompt_tokens, self.too_long = max_prompt_tokens, too_long
        self.max_text_tokens, self.long_text = max_text_tokens, long_text
        self.num_workers, self.seed = num_workers, seed
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._rows: dict[tuple[str, str], Rows] = {}
        self._table: ReferenceTable | None = None
        self._stream_digest = ""

    # -- what there is -----------------------------------------------------------------------------

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the policy's tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = self.actors.load_tokenizer()
        return self._tokenizer

    def prompts(self, split: Split) -> list[EncodedPrompt]:
        """Return a split's prompts as token ids and text."""
        return list(self._split(split, "prompts").rows)

    def table(self) -> ReferenceTable:
        """Open the reference table, refusing one made with other models or sampling settings.

        Raises:
            ValueError: If no table is named or it does not exist.
            FingerprintMismatch: If it was made otherwise.
        """
        if self.reference_table is None:
            raise ValueError("no reference table: set `data.reference_table` and make it with `vbon predict`")
        if self._table is None:
            path = resolve_path(self.reference_table)
            with self.actors.reference_checked():
                if self.trainer is None:  # a run without a precision of its own takes the table's
                    table = ReferenceTable.open(path)
                    known = {name: table.fingerprint[name] for name in ("precision",) if name in table.fingerprint}
                    table.check(self.fingerprint() | known)
                else:
                    table = ReferenceTable.open(path, fingerprint=self.fingerprint())
            if len(table) > 0 and table.samples < table.most_samples:
                rank_zero_warn(
                    f"the reference table {self.reference_table} holds {table.samples} to {table.most_samples} "
                    f"responses a prompt: the first {table.samples} are used. `vbon predict` with model.samples="
                    f"{table.most_samples} brings all of its prompts to as many"
                )
            self._table = table
        return self._table

    @property
    def reference_rewards(self) -> int:
        """Return M, the number of reference rewards a prompt that the table brings to training.

        Raises:
            ValueError: If ``table_skip`` and ``table_samples`` ask for more than the table holds.
        """
        held, skipped = self.table().samples, self.table_skip
        wanted = max(1, held - skipped) if self.table_samples is None else self.table_samples
        if skipped + wanted > held:
            behind = f" behind data.table_skip={skipped}" if skipped else ""
            raise ValueError(
                f"data.table_samples={wanted}{behind}, but the reference table {self.reference_table} holds "
                f"{held} responses a prompt: lower it, or make a larger table with `vbon predict`"
            )
        return wanted

    @property
    def table_columns(self) -> slice:
        """Return which of the table's responses a prompt are used."""
        return slice(self.table_skip, self.table_skip + self.reference_rewards)

    @property
    def columns_read(self) -> tuple[str, ...]:
        """Return the columns of the data set that the reward reads beside the prompt."""
        return tuple(dict.fromkeys([*getattr(self.actors.reward, "columns", ()), *self.reward_columns]))

    def fingerprint(self) -> dict[str, Any]:
        """Return what the table's responses and rewards depend on."""
        return self.actors.table_fingerprint(
            seed=self.table_seed,
            model_seed=getattr(self._module, "seed", self.seed),
            precision=str(getattr(self.trainer, "precision", "32-true")),
        )

    def longest(self) -> int:
        """Return the most tokens that a prompt or text read so far has."""
        known = max((len(row.tokens) for rows in self._rows.values() for row in rows.rows), default=0)
        if not self._streams("train"):
            return known
        return max(known, (self.max_prompt_tokens if self._batch_kind == "prompts" else self.max_text_tokens) or 0)

    @property
    def _module(self) -> LightningModule | None:
        return None if self.trainer is None else self.trainer.lightning_module

    @property
    def _batch_kind(self) -> str:
        kind = getattr(self._module, "batch_kind", "prompts")
        return "prompts" if kind == "responses" else kind  # the same rows; in training the responses come along

    @property
    def _brings_responses(self) -> bool:
        return getattr(self._module, "batch_kind", None) == "responses" and self.reference_table is not None

    @property
    def _reads_table(self) -> bool:
        """Whether prompts come with the table's rewards: one is named, and the module does not sample afresh."""
        online = getattr(self._module, "reference_samples", 0)
        return self._batch_kind == "prompts" and self.reference_table is not None and not online

    def _split(self, split: str, kind: str) -> Rows:
        if (split, kind) not in self._rows:
            source = self._source(split)
            found = find_columns(source)
            rows = read_rows(found, self._columns(kind))
            self._rows[split, kind] = Rows(self._prepared(split, kind, rows))
            if kind == "prompts" and self.reference_table is not None:
                self._distinct(self._rows[split, kind].rows)
            self._say_what_was_found(split, source, found, rows, kind)
        return self._rows[split, kind]

    def _source(self, split: str) -> TextSource:
        source = self.sources[split]
        if source is None:
            raise ValueError(f"no {split} data: set `data.{split}`")
        return source

    def _columns(self, kind: str) -> tuple[str, ...]:
        """Return the columns to read beside the text."""
        return tuple(dict.fromkeys([*(self.columns_read if kind == "prompts" else ()), *self.judge_columns]))

    def _prepared(self, split: str, kind: Any, rows: Sequence[TextRow]) -> list[Any]:
        try:
            return prepare_rows(
                rows,
                kind,
                self.tokenizer,
                chat=self.actors.chat,
                source=self.sources[split],
                key_columns=self.columns_read if kind == "prompts" else (),
                end_tokens=self.actors.end_tokens,
                labels=getattr(self._module, "labels", ()),
                max_prompt_tokens=self.max_prompt_tokens,
                too_long=self.too_long,
                max_text_tokens=self.max_text_tokens,
                long_text=self.long_text,
            )
        except ConversationError as problem:
            raise ValueError(f"data.{split}: {problem}") from problem

    def _say_what_was_found(
        self, split: str, source: TextSource, found: TextSource, rows: Sequence[TextRow], kind: str
    ) -> None:
        """Log which columns were taken where none was named, and what renders conversations."""
        names = ("column", "response_column", "rejected_column")
        news = [f"{name}={getattr(found, name)}" for name in names if getattr(found, name) != getattr(source, name)]
        if rows[0].messages is not None:
            whose = "data.chat.template" if "template" in self.actors.chat else "the tokenizer's chat template"
            news.append(f"conversations, rendered by {whose}")
            if kind == "prompts" and rows[0].answer is None and rows[0].messages[-1]["role"] == "assistant":
                news.append("without the assistant's turn that they end with, which is the policy's to write")
        if news:
            rank_zero_info(visible(f"data.{split}: {', '.join(news)}"))

    def _stream(self, kind: str) -> Iterator[Any]:
        """Read the training rows one by one, encoded."""
        rows = stream_rows(self._source("train"), self._columns(kind))
        while some := list(islice(rows, 256)):
            yield from self._prepared("train", kind, some)

    def _check_stream(self, kind: str) -> None:
        """Look at the beginning of streamed training rows; the others are looked at when their turn comes."""
        if self.num_workers:
            raise ValueError("data.num_workers must be 0 where data.train is streamed: its position is kept in here")
        if kind != "prompts" and self.max_text_tokens is None:
            raise ValueError("streamed texts have no longest one that could be known: set data.max_text_tokens")
        source = self._source("train")
        found = find_columns(source)
        first = list(islice(stream_rows(found, self._columns(kind)), self.batch_size * self._ranks()[0]))
        self._check_enough(len(first))
        prepared = self._prepared("train", kind, first)
        self._stream_digest = Rows(prepared).digest
        self._check_table_has(prepared, responses=self._brings_responses)
        self._say_what_was_found("train", source, found, first, kind)

    def _check_enough(self, rows: int) -> None:
        world, _ = self._ranks()
        if rows < self.batch_size * world:
            raise ValueError(
                f"{rows} training rows do not fill one batch of {self.batch_size} on {world} "
                "rank(s): lower `data.batch_size` or widen `data.train`"
            )

    def _streams(self, split: str) -> bool:
        """Whether a split's rows are read while training goes on."""
        source = self.sources[split]
        return split == "train" and source is not None and source.streaming

    # -- Lightning ---------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Read, tokenize and check everything a stage needs, before anything expensive starts."""
        if stage == "predict":
            return
        kind = self._batch_kind
        for split in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}[stage]:
            if self.sources[split] is None and (split, stage) == ("val", "fit"):
                continue
            if self._streams(split):
                self._check_stream(kind)
                continue
            rows = self._split(split, kind).rows
            if split == "train":
                self._check_enough(len(rows))
            self._check_table_has(rows, responses=self._brings_responses and split == "train")

    def _check_table_has(self, rows: Sequence[EncodedPrompt], *, responses: bool) -> None:
        """Name a prompt that the table lacks, one whose row is another's or, if needed, whose responses lack tokens."""
        if self._reads_table:
            self.table_rewards(rows)
        if responses:
            for row in rows:
                self.table().response_tokens(row.key, row.text)

    def _distinct(self, prompts: Iterable[EncodedPrompt]) -> dict[str, EncodedPrompt]:
        """Return the first prompt of each key, refusing another text of the same tokens."""
        reward = self.actors.reward
        reads = getattr(reward, "reads_columns", False) or MESSAGES in self.columns_read
        return distinct_prompts(prompts, messages=reads)

    def state_dict(self) -> dict[str, Any]:
        """Return what decides the order and content of batches, to be compared when a run is resumed."""
        return self._settings()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to resume a run on other data.

        Raises:
            ConfigMismatchError: Naming what differs.
        """
        if self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING:
            check_same_settings(state_dict, self._settings(), what="data")

    def _settings(self) -> dict[str, Any]:
        source = self.sources["train"]
        settings: dict[str, Any] = {
            "train": None if source is None else plain(source.settings()),
            "batch_size": self.batch_size,
            "max_prompt_tokens": self.max_prompt_tokens,
            "too_long": self.too_long,
            "max_text_tokens": self.max_text_tokens,
            "long_text": self.long_text,
            "seed": self.seed,
            **({"chat": self.actors.chat} if self.actors.chat else {}),
        }
        if source is not None:
            streamed = self._streams("train")
            settings["train_content"] = (
                self._stream_digest if streamed else self._split("train", self._batch_kind).digest
            )
        if self._reads_table:
            settings |= {"table_seed": self.table_seed, "reference rewards a prompt": self.reference_rewards}
            settings |= {"table_skip": self.table_skip} if self.table_skip else {}
        return settings

    def train_dataloader(self) -> DataLoader:
        """Deal shuffled training rows, each batch once for every update that is made on its rollout."""
        module: Any = self._module
        kind = self._batch_kind
        world, rank = self._ranks()
        dealt: dict[str, Any] = {
            "batch_size": self.batch_size,
            "num_replicas": world,
            "rank": rank,
            "seed": self.seed,
            "repeats": getattr(module, "updates_per_rollout", 1),
        }
        if hasattr(module, "batches_seen"):
            dealt["position"] = lambda: module.batches_seen
        brought = "responses" if self._brings_responses else kind
        if self._streams("train"):
            buffer = self._source("train").buffer_size
            streamed = StreamedRows(lambda: self._stream(kind), buffer=buffer, **dealt)
            return self._loader(ResumableLoader, streamed, brought, None, self.batch_size)
        rows = self._split("train", kind)
        dealer = RowDealer(len(rows), shuffle=True, drop_last=True, **dealt)
        return self._loader(ResumableLoader, rows, brought, dealer, self.batch_size)

    def val_dataloader(self) -> DataLoader | list:
        """Deal the validation rows in order; nothing where there is no validation split."""
        return [] if self.sources["val"] is None else self.split_dataloader("val")

    def test_dataloader(self) -> DataLoader:
        """Deal the test rows in order."""
        return self.split_dataloader("test")

    def split_dataloader(self, split: Split) -> DataLoader:
        """Deal any split's rows in order, each once, without a Trainer."""
        kind = self._batch_kind
        rows = self._split(split, kind)
        if self._brings_responses and getattr(self._module, "evaluates_responses", False):
            kind = "responses"
        return self._loader(
            DataLoader, rows, kind, self._sampler(len(rows), self.eval_batch_size), self.eval_batch_size
        )

    def table_prompts(self) -> dict[str, EncodedPrompt]:
        """Return the prompts of ``table_splits`` by their keys, each once.

        Raises:
            PromptError: Naming two that would share a row of the table.
        """
        named = [split for split in self.table_splits if self.sources[split] is not None]
        return self._distinct(row for split in named for row in self._split(split, "prompts").rows)

    def predict_dataloader(self) -> DataLoader:
        """Deal the prompts of ``table_splits`` that the reference table does not hold yet, each to one process."""
        batches = self.table_batches()
        module: Any = self._module
        done = module.finished_keys() if hasattr(module, "finished_keys") else set()
        take = getattr(module, "take", bool)  # any other module makes them all
        keys = [[prompt.key for prompt in batch] for batch in batches]
        together = module is not None and is_sharded(module)
        # Ranks that must make the same passes deal out all: what is done may change between their looks.
        wanted = [number for number, members in enumerate(keys) if together or not done.issuperset(members)]
        rows, size = Rows([prompt for batch in batches for prompt in batch]), self.eval_batch_size
        world, rank = self._ranks()
        sampler: DistributedSampler = self._sampler(1, size)  # one that is done, for Lightning wants something
        if wanted:
            sampler = BatchTaker(
                wanted,
                lambda rows: bool(take(keys[rows.start // size] if rows.start < size * len(keys) else [])),
                batch_size=size,
                num_replicas=world,
                rank=rank,
                together=together,
            )
        return self._loader(DataLoader, rows, "table", sampler, size)

    def table_batches(self) -> list[list[EncodedPrompt]]:
        """Return :meth:`table_prompts` in the groups in which they are sampled, whatever is done of them."""
        prompts = list(self.table_prompts().values())
        if not prompts:
            raise ValueError(f"no prompts to sample from: set one of data.{', data.'.join(self.table_splits)}")
        return [prompts[first : first + self.eval_batch_size] for first in range(0, len(prompts), self.eval_batch_size)]

    def _sampler(self, size: int, batch_size: int) -> RowDealer:
        world, rank = self._ranks()
        return RowDealer(size, batch_size=batch_size, num_replicas=world, rank=rank)

    def _ranks(self) -> tuple[int, int]:
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def _loader(
        self, cls: type[DataLoader], rows: Rows | StreamedRows, kind: str, sampler: DistributedSampler | None, size: int
    ) -> DataLoader:
        collate: dict[str, Callable[[list[Any]], NamedTuple]] = {
            "text": self._collate_texts,
            "labelled": self._collate_judged,
            "comparisons": self._collate_judged,
            "prompts": self._collate_prompts,
            "responses": self._collate_responses,
            "table": self._collate_without_rewards,
        }
        return cls(
            rows,
            batch_size=size,
            sampler=sampler,
            collate_fn=collate[kind],
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return 0 if pad is None else int(pad)

    def _collate_texts(self, items: list[tuple[int, bool, EncodedText]]) -> TextBatch:
        return collate_texts(items, pad_id=self._pad_id())

    def _collate_judged(self, items: list[tuple[int, bool, EncodedJudged]]) -> JudgedBatch:
        return collate_judged(items, pad_id=self._pad_id())

    def _collate_without_rewards(self, items: list[tuple[int, bool, EncodedPrompt]]) -> PromptBatch:
        return collate_prompts(items, pad_id=self._pad_id())

    def _collate_prompts(self, items: list[tuple[int, bool, EncodedPrompt]]) -> PromptBatch:
        batch = self._collate_without_rewards(items)
        if not self._reads_table:
            return batch
        return batch._replace(reference_rewards=self.table_rewards([row for _, _, row in items]))

    def _collate_responses(self, items: list[tuple[int, bool, EncodedPrompt]]) -> TableBatch:
        keys, texts = [row.key for _, _, row in items], [row.text for _, _, row in items]
        tokens, mask = self.table().response_matrix(keys, texts, pad_id=self._pad_id())
        used = self.table_columns
        return TableBatch(self._collate_prompts(items), Responses(tokens[:, used], mask[:, used]))

    def prompt_batch(self, prompts: Sequence[EncodedPrompt], first: int = 0, rows: int = 0) -> PromptBatch:
        """Return given prompts without their rewards, numbered from ``first``: their numbers fix the sampling noise.

        Fewer than so many rows are filled up with such that do not count.
        """
        numbered = [(first + place, True, row) for place, row in enumerate(prompts)]
        return self._collate_without_rewards([*numbered, *[(first, False, prompts[0])] * (rows - len(prompts))])

    def table_batch(self, prompts: Sequence[EncodedPrompt]) -> TableBatch:
        """Return given prompts of the training split with the table's responses to them."""
        return self._collate_responses([(place, True, row) for place, row in enumerate(prompts)])

    def table_rewards(self, prompts: Sequence[EncodedPrompt]) -> torch.Tensor:
        """Return the table's rewards ``[B, M]`` of given prompts, the missing-EOS penalty subtracted."""
        table = self.table()
        keys, texts = [row.key for row in prompts], [row.text for row in prompts]
        used = self.table_columns
        rewards = table.rewards_matrix(keys, texts)[:, used]
        if self.actors.missing_eos_penalty:
            finished = table.finished_matrix(keys, texts)[:, used]
            rewards = rewards - self.actors.missing_eos_penalty * (1.0 - finished.float())
        return rewards


__all__ = ["AlignmentDataModule", "Split"]
