"""A Hugging Face sequence classifier as a reward."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from vbon_lightning._visible import shorten
from vbon_lightning.data.conversations import Chat, Message
from vbon_lightning.models import (
    ModelSpec,
    check_no_missing_weights,
    check_vocabulary_fits,
    disable_dropout,
    load_tokenizer,
    locate,
    model_identity,
    parse_dtype,
)
from vbon_lightning.models.files import check_directory
from vbon_lightning.models.loading import check_finite
from vbon_lightning.models.plain_text import Hidden, PlainText
from vbon_lightning.models.tokenizer import opening_ids, shared_start
from vbon_lightning.rewards.base import RewardError, RewardModel, check_rewards, check_text, join_texts

if TYPE_CHECKING:
    from typing_extensions import Self


class ClassifierReward(RewardModel):
    """Score text by one label of a sequence classifier, or by a scalar reward model (one output).

    The model is loaded at the first call. A text's score does not depend on the other texts of its batch.

    Args:
        model: Hub name or local directory; may use ``~``, ``${VAR}`` and ``package:NAME/path/inside``.
        label: The label to score, by its index or by its name in the model's config. A model with one output
            has only that one.
        output: ``logit``: the label's logit. ``log_odds``: the logit minus the log-sum-exp of the other
            labels' logits, which is the logit of the label's probability. ``probability``: the softmax, or
            the sigmoid for a model with one output or independent labels.
        text: ``prompt_and_response`` to score the two concatenated, ``response`` to score the response alone.
        suffix: Put behind every text, finished or cut, such as ``<|endoftext|>`` for a decoder that was trained to be
            read at that token.
        rendered: Whether special tokens that prompts spell (``<|im_end|>``) are meant, as where a template rendered
            them. Those of responses never are.
        batch_size: Texts in one forward pass; texts of similar length go together.
        max_length: Longest text in tokens, the suffix included. Default: the longest the model takes. Of a longer text
            the prompt's start is left out (``cut_prompts`` counts them, and a run logs it). A response that is too long
            by itself loses its end (``cut_responses``) where ``max_length`` is given, and is an error otherwise.
        tokenizer: Hub name or local directory of the tokenizer. Default: the model's own.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``auto``.
        revision: Branch, tag or commit of a hub model.
        trust_remote_code: Run model code that comes with the checkpoint.
    """

    def __init__(
        self,
        model: str,
        label: int | str = 1,
        output: Literal["logit", "log_odds", "probability"] = "logit",
        text: Literal["prompt_and_response", "response"] = "prompt_and_response",
        batch_size: int = 32,
        max_length: int | None = None,
        tokenizer: str | None = None,
        dtype: str = "float32",
        revision: str | None = None,
        trust_remote_code: bool = False,
        suffix: str = "",
        rendered: bool = False,
    ) -> None:
        check_text(text)
        if output not in ("logit", "log_odds", "probability"):
            raise RewardError(f"`output` is {output!r}, expected 'logit', 'log_odds' or 'probability'")
        if batch_size < 1:
            raise RewardError(f"`batch_size` is {batch_size}, expected at least 1")
        if max_length is not None and max_length < 1:
            raise RewardError(f"`max_length` is {max_length}, expected at least 1")
        parse_dtype(dtype)
        self.model = model
        self.label = label
        self.output = output
        self.text = text
        self.batch_size = batch_size
        self.max_length = max_length
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.revision = revision
        self.trust_remote_code = trust_remote_code
        self.suffix = suffix
        self.rendered = rendered
        self.cut_prompts = self.cut_responses = 0
        """Texts that lost the start of their prompt, or the end of their response, so far."""
        self._device = torch.device("cpu")
        self._loaded: tuple[Any, PreTrainedTokenizerBase, int] | None = None
        self._plain: PlainText | None = None

    def __call__(
        self,
        prompts: Sequence[str],
        responses: Sequence[Sequence[str]],
        token_ids: Sequence[Sequence[Sequence[int]]] = (),
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> Tensor:
        """Score responses; see :meth:`RewardModel.__call__`."""
        del token_ids
        if self._loaded is None:
            self._loaded = self._load()
        if self._plain is None:
            self._plain = PlainText(self._loaded[1])
        said, reading = responses, _Reading(self._plain)
        if columns and "messages" in columns and self.text == "prompt_and_response":
            prompts, said, reading = self._in_its_own_words(columns["messages"], responses, reading)
        elif self.rendered and self.text == "prompt_and_response":
            (prompts, said), reading = _with_marks(prompts, responses, reading)
        texts = join_texts(prompts, said, self.text)
        count = len(responses[0]) if responses else 0
        if any(len(row) != count for row in responses):
            raise RewardError(f"every prompt needs the same number of responses: {[len(row) for row in responses]}")
        starts = [prompt if self.text == "prompt_and_response" else "" for prompt in prompts for _ in range(count)]
        scores = self._scores(texts, starts, count, reading).view(len(prompts), count)
        return check_rewards(scores, prompts, responses)

    reads_columns = True  # the conversation, where the prompts are some

    def _in_its_own_words(
        self, conversations: Sequence[Sequence[Message]], responses: Sequence[Sequence[str]], reading: _Reading
    ) -> tuple[list[str], list[list[str]], _Reading]:
        """Render conversations by the classifier's own template, each response as the assistant's turn.

        A classifier without a template, such as one of film reviews, reads what was said, a paragraph a message.
        """
        tokenizer = reading.plain.tokenizer
        if not getattr(tokenizer, "chat_template", None):
            said = ["".join(f"{one.get('content', '')}\n\n" for one in messages) for messages in conversations]
            return said, [list(row) for row in responses], reading
        chat = Chat(tokenizer)
        (conversations, responses), hidden = reading.plain.hide((conversations, responses))
        prompts = [chat.prompt(messages) for messages in conversations]
        answers = [
            [chat.response(messages, [{"role": "assistant", "content": text}]) for text in row]
            for messages, row in zip(conversations, responses, strict=True)
        ]
        return prompts, answers, reading._replace(spells="all", hidden=hidden)

    def identity(self) -> dict[str, str]:
        """Describe the reward by its arguments and its model's identity."""
        arguments = {
            "class": "ClassifierReward",
            "label": str(self.label),
            "output": self.output,
            "text": self.text,
            "max_length": str(self.max_length),
        }
        if self.suffix:
            arguments["suffix"] = self.suffix
        if self.rendered:
            arguments["rendered"] = "True"
        if self.text == "prompt_and_response":
            arguments["long_text"] = "the prompt loses its start"
        return arguments | {f"model.{key}": value for key, value in model_identity(self._spec()).items()}

    def to(self, device: torch.device | str) -> Self:
        """Move the classifier to a device, now or when it is loaded.

        Args:
            device: The device.
        """
        self._device = torch.device(device)
        if self._loaded is not None:
            self._loaded[0].to(self._device)
        return self

    def _spec(self) -> ModelSpec:
        return ModelSpec(
            name=self.model,
            tokenizer=self.tokenizer,
            dtype=self.dtype,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
        )

    def _load(self) -> tuple[Any, PreTrainedTokenizerBase, int]:
        name, _ = locate("model", self.model)
        if os.path.isdir(name):
            check_directory(name, None, "model")
        tokenizer = load_tokenizer(self._spec())
        try:
            model, info = AutoModelForSequenceClassification.from_pretrained(
                name,
                dtype=parse_dtype(self.dtype),
                trust_remote_code=self.trust_remote_code,
                output_loading_info=True,
                **({} if self.revision is None else {"revision": self.revision}),
            )
        except Exception as error:  # transformers raises many types here; every one means the same to a user
            reason = " ".join(str(error).split())[:400]
            raise RewardError(f"`model`: cannot load the sequence classifier {name!r}: {reason}") from error
        check_no_missing_weights(name, info)
        check_finite(name, model)
        # Padding goes to the right and a decoder is read at its last token before it, so both must mean the
        # same id.
        tokenizer.padding_side = "right"
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        model.config.pad_token_id = tokenizer.pad_token_id
        check_vocabulary_fits(model, tokenizer)
        disable_dropout(model)
        model.requires_grad_(False).eval().to(self._device)
        return model, tokenizer, _label_index(self.label, model.config, name)

    @torch.no_grad()
    def _scores(self, texts: list[str], starts: list[str], columns: int, reading: _Reading) -> Tensor:
        assert self._loaded is not None
        model, tokenizer, label = self._loaded
        if not texts:
            return torch.zeros(0, device=self._device)
        longest = _max_length(self.max_length, model.config, tokenizer)
        suffix = _suffix_ids(self.suffix, tokenizer, longest)
        if longest is not None:
            longest -= len(suffix)
        encoded = self._fitting(texts, starts, columns, reading, longest)
        # A decoder's tokenizer makes nothing of an empty text, and a model needs one token to read.
        blank = next(
            token
            for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
            if token is not None
        )
        encoded = [ids + suffix or [blank] for ids in encoded]
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]), reverse=True)
        scores = torch.empty(len(encoded), dtype=torch.float32, device=self._device)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            ids, mask = _pad([encoded[row] for row in rows], int(tokenizer.pad_token_id), self._device)
            # Rewards must not depend on the trainer's precision, or a table made elsewhere would not match.
            with torch.autocast(self._device.type, enabled=False):
                logits = model(input_ids=ids, attention_mask=mask).logits.float()
            scores[torch.tensor(rows, device=self._device)] = self._read(logits, label, model.config)
        return scores

    def _fitting(
        self,
        texts: list[str],
        starts: list[str],
        columns: int,
        reading: _Reading,
        longest: int | None,
    ) -> list[list[int]]:
        """Encode texts; where one is too long, what it starts with gives way to the rest."""
        encode = reading.encode
        encoded = encode(texts)
        long = [] if longest is None else [index for index, ids in enumerate(encoded) if len(ids) > longest]
        if longest is None or not long:
            return encoded
        known = self.cut_prompts + self.cut_responses
        opening = [] if reading.spells == "all" else opening_ids(reading.plain.tokenizer)
        prompts = dict.fromkeys(starts[index] for index in long)
        prompt_ids = dict(zip(prompts, encode(list(prompts)), strict=True))
        for index in long:
            ids, response = encoded[index], texts[index][len(starts[index]) :]
            first = len(opening) if ids[: len(opening)] == opening else 0
            spare = max(0, shared_start(prompt_ids[starts[index]], ids) - first)
            excess = len(ids) - longest
            if excess <= spare:
                encoded[index] = ids[:first] + ids[first + excess :]
                self.cut_prompts += 1
            elif self.max_length is not None:
                (encoded[index],) = encode([response], longest)
                self.cut_responses += 1
            else:
                raise RewardError(
                    f"row {index // columns}, response {index % columns} takes {len(ids) - spare} tokens of the reward "
                    f"model, which reads {longest}: lower data.max_new_tokens, take a reward model that reads more, or "
                    f"set `max_length` to cut responses; response {shorten(response.translate(reading.hidden))}"
                )
        if not known:  # said once; a run logs how many there are
            warnings.warn(
                f"{len(long)} of {len(texts)} texts are longer than the {longest} tokens that the reward model reads "
                f"and lose the start of their prompt, {self.cut_responses} of them also the end of their response",
                stacklevel=2,
            )
        return encoded

    def _read(self, logits: Tensor, label: int, config: Any) -> Tensor:
        chosen = logits[:, label]
        independent = logits.shape[1] == 1 or getattr(config, "problem_type", None) == "multi_label_classification"
        if self.output == "logit":
            return chosen
        if self.output == "probability":
            return chosen.sigmoid() if independent else logits.softmax(-1)[:, label]
        if independent:
            return chosen
        others = torch.cat([logits[:, :label], logits[:, label + 1 :]], dim=1)
        return chosen - others.logsumexp(-1)


class _Reading(NamedTuple):
    """How texts become tokens."""

    plain: PlainText
    spells: Literal["none", "some", "all"] = "none"
    """Which of their special tokens they spell: none, those of a prompt, or, where a chat template wrote them, all."""
    hidden: Hidden = {}
    """What private characters in them stand for, where special tokens are meant and these are not."""

    def encode(self, texts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        if self.spells == "none":
            return self.plain.encode_texts(texts, max_length=max_length)
        if self.spells == "some":
            return self.plain.encode_marked_texts(texts, [self.hidden] * len(texts), max_length=max_length)
        return [self.plain.encode_hidden(text, self.hidden).ids[:max_length] for text in texts]


def _with_marks(
    prompts: Sequence[str], responses: Sequence[Sequence[str]], reading: _Reading
) -> tuple[tuple[Sequence[str], Sequence[Sequence[str]]], _Reading]:
    """Hide the special tokens of responses, so that those of prompts can be meant."""
    counts = [len(row) for row in responses]
    texts = [*prompts, *(text for row in responses for text in row)]
    spans = [[] if place < len(prompts) else [(0, len(text))] for place, text in enumerate(texts)]
    found, hidden = reading.plain.hide_within(texts, spans)
    each = iter(found[len(prompts) :])
    said = [[next(each) for _ in range(count)] for count in counts]
    return (found[: len(prompts)], said), reading._replace(spells="some", hidden=hidden)


def _pad(rows: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = (torch.arange(width) < lengths[:, None]).long()
    return ids.to(device), mask.to(device)


def _max_length(given: int | None, config: Any, tokenizer: PreTrainedTokenizerBase) -> int | None:
    # Tokenizers that know no limit say so by a huge number.
    limits = [tokenizer.model_max_length] if tokenizer.model_max_length < 10**9 else []
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions:
        # RoBERTa's kin number positions from the pad token's id on.
        offset = tokenizer.pad_token_id + 1 if "roberta" in str(config.model_type) else 0
        limits.append(positions - offset)
    longest = min(limits, default=None)
    if given is not None and longest is not None and given > longest:
        raise RewardError(f"`max_length` is {given}, but the classifier takes at most {longest} tokens")
    return given or longest


def _suffix_ids(suffix: str, tokenizer: PreTrainedTokenizerBase, longest: int | None) -> list[int]:
    if not suffix:
        return []
    ids: list[int] = tokenizer(suffix, add_special_tokens=False)["input_ids"]
    if not ids:
        raise RewardError(f"`suffix` {suffix!r} has no tokens")
    # A decoder is read at its last token that is not the pad token.
    if ids[-1] == tokenizer.pad_token_id:
        raise RewardError(
            f"`suffix` {suffix!r} ends in the tokenizer's pad token, which a classifier does not read: give a "
            "`tokenizer` with a pad token of its own"
        )
    if longest is not None and len(ids) >= longest:
        raise RewardError(f"`suffix` {suffix!r} has {len(ids)} tokens, which leaves no room for text in {longest}")
    return ids


def _label_index(label: int | str, config: Any, name: str) -> int:
    names = {int(index): str(text) for index, text in (config.id2label or {}).items()}
    count = int(config.num_labels)
    if isinstance(label, str):
        found = [index for index, text in names.items() if text == label]
        found = found or [index for index, text in names.items() if text.lower() == label.lower()]
        if len(found) != 1:
            raise RewardError(f"`label`: {name!r} has no label {label!r}; it has {', '.join(names.values())}")
        return found[0]
    if count == 1 and label in (0, 1):
        return 0
    if not 0 <= label < count:
        raise RewardError(f"`label` is {label}, but {name!r} has {count} labels, 0 to {count - 1}: {names}")
    return label
