"""The data module that every module shares: prompts, texts, reference rewards, and the models' names."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from vbon_lightning.actors import ActorSpec
from vbon_lightning.checks import check_same_settings, plain
from vbon_lightning.conversations import Chat, ConversationError
from vbon_lightning.encoding import (
    EncodedJudged,
    EncodedPrompt,
    EncodedText,
    collate_judged,
    collate_prompts,
    collate_texts,
    encode_comparisons,
    encode_labelled,
    encode_prompts,
    encode_texts,
    render_conversations,
)
from vbon_lightning.models import ModelSpec, load_tokenizer, named_token_ids
from vbon_lightning.paths import resolve_path
from vbon_lightning.reference_table import ReferenceTable
from vbon_lightning.rewards import RewardCalls, RewardModel
from vbon_lightning.sampler import ShardedSampler
from vbon_lightning.sources import TextRow, TextSource, read_rows
from vbon_lightning.types import JudgedBatch, PromptBatch, Responses, TableBatch, TextBatch

Split = Literal["train", "val", "test"]


class _Rows(Dataset):
    """Rows of a split; an index beyond the end is a row that only evens out the ranks."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def digest(self) -> str:
        """Hash of all rows."""
        return hashlib.sha256(repr([tuple(row) for row in self.rows]).encode()).hexdigest()[:16]

    def __getitem__(self, index: int) -> tuple[int, bool, Any]:
        return index % len(self.rows), index < len(self.rows), self.rows[index % len(self.rows)]


class _ResumableLoader(DataLoader):
    """A loader whose position lives in the module's batch counter, so that it keeps no state of its own."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Accept the empty state; the sampler asks the module where training is."""


class AlignmentDataModule(LightningDataModule):
    """Bring prompts, texts and reference rewards to SFT, vBoN, KL-constrained RL and the reference sampler.

    Modules that learn from rollouts get :class:`~vbon_lightning.types.PromptBatch`, supervised fine-tuning
    gets :class:`~vbon_lightning.types.TextBatch`, reward-model training :class:`~vbon_lightning.types.JudgedBatch`, and
    modules that learn from the reference table's responses train on :class:`~vbon_lightning.types.TableBatch`; which of
    them is asked of the module (``batch_kind``).

    Args:
        policy: The model to train: hub name, local directory, or a mapping (see ``ModelSpec``).
        reference: The model to stay close to and to take Best-of-N of; the policy's own start by default.
        reward: The reward model.
        reward_calls: How the reward is called: ``workers``, ``retries``, ``timeout_s``, ``on_missing`` and so on
            (docs/rewards.md).
        chat: How conversations are rendered: ``template`` (Jinja) in place of the tokenizer's own, ``system`` for those
            without a system message, and anything else for the template, such as ``enable_thinking``.
        reward_columns: Columns of the data set that the reward reads beside the prompt, such as the right answer; those
            that it names itself come without asking.
        value_model: The model of the reward to come that ``ValueModelling`` exported, for methods that use one.
        train: Where training text comes from.
        val: Where validation text comes from.
        test: Where held-out text for ``vbon test`` and ``vbon compare`` comes from.
        reference_table: Directory of the reference table: read when it is there, written by ``vbon predict``.
        table_samples: M, how many of the table's responses a prompt to use, the first ones; all by default.
        table_skip: Leave out so many of the table's responses a prompt before that. Where a policy is judged on the
            prompts that it learnt from, those that judge are to be others than those that taught: train with
            ``table_samples: 64``, compare with ``table_skip: 64``.
        table_seed: Seeds the table's responses; part of its fingerprint.
        table_splits: Splits whose prompts ``vbon predict`` fills into the table.
        max_new_tokens: Longest response, in tokens.
        temperature: Sampling temperature, > 0.
        missing_eos_penalty: Subtracted from the reward of responses that the length limit cut, in the table's
            rewards and in the policy's alike.
        sampler: How responses are sampled: ``eager`` (the decode loop), ``graph`` (the same samples in fixed shapes,
            replayed as a CUDA graph) or ``vllm`` (needs the extra ``vllm``). docs/sampling.md says more.
        max_rows: Most responses that are sampled at once, which bounds the memory; by default all of a batch.
        engine_options: Arguments of ``vllm.LLM``, such as ``gpu_memory_utilization``, for ``vllm``.
        end_tokens: Tokens that end a response, as the vocabulary writes them (``<|im_end|>``), beside those that always
            do: the tokenizer's EOS, which supervised fine-tuning teaches, and the generation config's.
        batch_size: Prompts (or texts) a step and rank.
        eval_batch_size: The same for validation, test and predict; ``batch_size`` by default.
        max_prompt_tokens: Longest prompt, in tokens.
        too_long: What to do with a longer one: ``error`` names its row, ``truncate_left`` keeps its end.
        max_text_tokens: Longest text for supervised fine-tuning and for reward models.
        long_text: What to do with a longer one: ``truncate`` drops its end (and the EOS with it), ``split``
            makes consecutive pieces of it, of which only the last has the EOS.
        num_workers: Loader processes.
        seed: Seeds the order of the training rows.
    """

    def __init__(
        self,
        policy: str | ModelSpec,
        reference: str | ModelSpec | None = None,
        reward: RewardModel | None = None,
        reward_columns: list[str] = [],  # noqa: B006 (never mutated)
        reward_calls: RewardCalls = RewardCalls(),  # noqa: B008 (frozen)
        chat: dict[str, Any] | None = None,
        value_model: str | ModelSpec | None = None,
        train: TextSource | None = None,
        val: TextSource | None = None,
        test: TextSource | None = None,
        reference_table: str | None = None,
        table_samples: int | None = None,
        table_skip: int = 0,
        table_seed: int = 0,
        table_splits: list[Split] = ["train", "val", "test"],  # noqa: B006 (never mutated; a tuple reads worse in YAML)
        max_new_tokens: int = 32,
        temperature: float = 1.0,
        missing_eos_penalty: float = 0.0,
        sampler: Literal["eager", "graph", "vllm"] = "eager",
        max_rows: int | None = None,
        engine_options: dict[str, Any] | None = None,
        end_tokens: list[str] = [],  # noqa: B006 (never mutated)
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_prompt_tokens: int | None = None,
        too_long: Literal["error", "truncate_left"] = "error",
        max_text_tokens: int | None = None,
        long_text: Literal["truncate", "split"] = "truncate",
        num_workers: int = 0,
        seed: int = 0,
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
        self.actors = ActorSpec(
            policy=policy,
            reference=reference,
            reward=reward,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            missing_eos_penalty=missing_eos_penalty,
            sampler=sampler,
            max_rows=max_rows,
            engine_options=engine_options,
            value_model=value_model,
            end_tokens=end_tokens,
            chat_template=(chat or {}).get("template"),
            reward_calls=reward_calls,
        )
        self.reward_columns, self.chat = list(reward_columns), dict(chat or {})
        self.judge_columns: list[str] = []
        self.sources: dict[str, TextSource | None] = {"train": train, "val": val, "test": test}
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
        self._rows: dict[tuple[str, str], _Rows] = {}
        self._table: ReferenceTable | None = None

    # -- what there is -----------------------------------------------------------------------------

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the policy's tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.actors.policy_spec)
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
            self._table = ReferenceTable.open(resolve_path(self.reference_table), fingerprint=self.fingerprint())
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
        return self.actors.table_fingerprint(seed=self.table_seed, model_seed=getattr(self._module, "seed", self.seed))

    def longest(self) -> int:
        """Return the most tokens that a prompt or text read so far has."""
        return max((len(row.tokens) for rows in self._rows.values() for row in rows.rows), default=0)

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

    def _split(self, split: str, kind: str) -> _Rows:
        if (split, kind) not in self._rows:
            source = self.sources[split]
            if source is None:
                raise ValueError(f"no {split} data: set `data.{split}`")
            beside = self.columns_read if kind == "prompts" else ()
            rows = read_rows(source, tuple(dict.fromkeys([*beside, *self.judge_columns])))
            if any(row.messages is not None for row in rows):
                rows = self._rendered(split, rows, kind)
            if kind == "prompts":
                encoded: Sequence[Any] = encode_prompts(
                    rows,
                    self.tokenizer,
                    source=source,
                    key_columns=beside,
                    max_tokens=self.max_prompt_tokens,
                    too_long=self.too_long,
                )
            elif kind == "labelled":
                encoded = encode_labelled(
                    rows,
                    self.tokenizer,
                    labels=getattr(self._module, "labels", ()),
                    max_tokens=self.max_text_tokens,
                    long_text=self.long_text,
                )
            elif kind == "comparisons":
                encoded = encode_comparisons(rows, self.tokenizer, max_tokens=self.max_text_tokens)
            else:
                encoded = encode_texts(
                    rows,
                    self.tokenizer,
                    ends=named_token_ids(self.tokenizer, self.actors.end_tokens),
                    max_tokens=self.max_text_tokens,
                    long_text=self.long_text,
                )
            self._rows[split, kind] = _Rows(encoded)
        return self._rows[split, kind]

    def _rendered(self, split: str, rows: list[TextRow], kind: str) -> list[TextRow]:
        if kind == "labelled":
            raise ValueError(f"data.{split}: labelled texts are plain texts, and these are conversations")
        try:
            chat = Chat(self.tokenizer, self.chat)
        except ConversationError as problem:
            raise ValueError(f"data.{split}: {problem}") from problem
        whose = "data.chat.template" if "template" in self.chat else "the tokenizer's chat template"
        rank_zero_info(f"data.{split}: {len(rows)} conversations, rendered by {whose}")
        return render_conversations(rows, chat, whole=kind == "text")

    # -- Lightning ---------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Read, tokenize and check everything a stage needs, before anything expensive starts."""
        if stage == "predict":
            return
        kind = self._batch_kind
        for split in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}[stage]:
            if self.sources[split] is None and (split, stage) == ("val", "fit"):
                continue
            rows = self._split(split, kind).rows
            world, _ = self._ranks()
            if split == "train" and len(rows) < self.batch_size * world:
                raise ValueError(
                    f"{len(rows)} training rows do not fill one batch of {self.batch_size} on {world} "
                    "rank(s): lower `data.batch_size` or widen `data.train`"
                )
            if self._reads_table:  # names a prompt that the table lacks
                self.table_rewards(rows)
            if self._brings_responses and split == "train":  # names one whose responses have no tokens
                for row in rows:
                    self.table().response_tokens(row.key, row.text)

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
            "train": None if source is None else plain(vars(source)),
            "batch_size": self.batch_size,
            "max_prompt_tokens": self.max_prompt_tokens,
            "too_long": self.too_long,
            "max_text_tokens": self.max_text_tokens,
            "long_text": self.long_text,
            "seed": self.seed,
            **({"chat": self.chat} if self.chat else {}),
        }
        if source is not None:
            settings["train_content"] = self._split("train", self._batch_kind).digest
        if self._reads_table:
            settings |= {"table_seed": self.table_seed, "reference rewards a prompt": self.reference_rewards}
            settings |= {"table_skip": self.table_skip} if self.table_skip else {}
        return settings

    def train_dataloader(self) -> DataLoader:
        """Deal shuffled training rows, each batch once for every update that is made on its rollout."""
        module: Any = self._module
        kind = self._batch_kind
        rows = self._split("train", kind)
        world, rank = self._ranks()
        sampler = ShardedSampler(
            len(rows),
            batch_size=self.batch_size,
            num_replicas=world,
            rank=rank,
            shuffle=True,
            seed=self.seed,
            drop_last=True,
            repeats=getattr(module, "updates_per_rollout", 1),
            position=(lambda: module.batches_seen) if hasattr(module, "batches_seen") else None,
        )
        if self._brings_responses:
            kind = "responses"
        return self._loader(_ResumableLoader, rows, kind, sampler, self.batch_size)

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

    def predict_dataloader(self) -> DataLoader:
        """Deal the prompts of ``table_splits`` that the reference table does not hold yet, each once."""
        prompts: dict[str, EncodedPrompt] = {}
        for split in self.table_splits:
            if self.sources[split] is not None:
                for prompt in self._split(split, "prompts").rows:
                    prompts.setdefault(prompt.key, prompt)
        if not prompts:
            raise ValueError(f"no prompts to sample from: set one of data.{', data.'.join(self.table_splits)}")
        module: Any = self._module
        done = module.finished_keys() if hasattr(module, "finished_keys") else set()
        rows = _Rows([prompt for key, prompt in prompts.items() if key not in done] or list(prompts.values())[:1])
        return self._loader(
            DataLoader, rows, "table", self._sampler(len(rows), self.eval_batch_size), self.eval_batch_size
        )

    def _sampler(self, size: int, batch_size: int) -> ShardedSampler:
        world, rank = self._ranks()
        return ShardedSampler(size, batch_size=batch_size, num_replicas=world, rank=rank)

    def _ranks(self) -> tuple[int, int]:
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def _loader(self, cls: type[DataLoader], rows: _Rows, kind: str, sampler: ShardedSampler, size: int) -> DataLoader:
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

    def prompt_batch(self, prompts: Sequence[EncodedPrompt], first: int = 0) -> PromptBatch:
        """Return given prompts without their rewards, numbered from ``first``: their numbers fix the sampling noise."""
        return self._collate_without_rewards([(first + place, True, row) for place, row in enumerate(prompts)])

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
