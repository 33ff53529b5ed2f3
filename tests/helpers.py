"""Small tokenizers and models, built offline with fixed seeds."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GenerationConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

PAD, BOS, EOS = 0, 1, 2
"""Ids of the special tokens of :func:`tiny_tokenizer`."""


def tiny_tokenizer(
    directory: str | os.PathLike[str] | None = None,
    *,
    alphabet: str | None = None,
    pad: bool = True,
    model_max_length: int = 64,
) -> PreTrainedTokenizerFast:
    """Make a tokenizer of one token a character, saved to a directory where one is given.

    Ids 0, 1, 2 are ``<pad>``, ``<s>``, ``</s>``. It adds no special tokens by itself.

    Args:
        directory: Where to save it, too.
        alphabet: The characters it knows, ids from 3 on (others are dropped); default: all 256 bytes, so that
            any text survives a round trip (259 tokens).
        pad: Whether it has a pad token; without one ``<pad>`` is an ordinary special token.
        model_max_length: The longest text it says a model takes.
    """
    characters = sorted(pre_tokenizers.ByteLevel.alphabet()) if alphabet is None else list(alphabet)
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *characters])}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    backend.add_special_tokens(["<pad>", "<s>", "</s>"])
    if alphabet is None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
    else:
        backend.decoder = decoders.Fuse()
    roles = {"bos_token": "<s>", "eos_token": "</s>"} | ({"pad_token": "<pad>"} if pad else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=model_max_length, **roles)
    if directory is not None:
        tokenizer.save_pretrained(directory)
    return tokenizer


def tiny_llama(vocab_size: int = 259, *, seed: int = 0, spread: float = 1.0, **config: Any) -> LlamaForCausalLM:
    """Make a one-layer Llama in float32 and evaluation mode.

    Args:
        vocab_size: Tokens.
        seed: Seed of its weights.
        spread: Factor on the output weights; large values make its distributions far from uniform.
        **config: Entries of ``LlamaConfig`` to set otherwise.
    """
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    }
    return _build(LlamaForCausalLM, LlamaConfig(vocab_size=vocab_size, **_special(sizes | config)), seed, spread)


def tiny_gpt2(vocab_size: int = 259, *, seed: int = 0, spread: float = 1.0, **config: Any) -> GPT2LMHeadModel:
    """Make a one-layer GPT-2 in float32 and evaluation mode; its dropout is transformers' default of 0.1.

    Args:
        vocab_size: Tokens.
        seed: Seed of its weights.
        spread: Factor on the output weights.
        **config: Entries of ``GPT2Config`` to set otherwise.
    """
    sizes: dict[str, Any] = {
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 64,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    }
    return _build(GPT2LMHeadModel, GPT2Config(vocab_size=vocab_size, **_special(sizes | config)), seed, spread)


def save_tiny_model(
    directory: str | os.PathLike[str],
    kind: str = "llama",
    *,
    alphabet: str | None = None,
    pad: bool = True,
    seed: int = 0,
    generation: dict[str, Any] | None = None,
    **arguments: Any,
) -> str:
    """Save a tiny causal language model with tokenizer and generation config, and return the directory.

    Args:
        directory: Where to.
        kind: ``llama`` or ``gpt2``.
        alphabet: As in :func:`tiny_tokenizer`.
        pad: As in :func:`tiny_tokenizer`.
        seed: Seed of its weights.
        generation: Entries of the generation config; default: EOS and pad.
        **arguments: Passed to :func:`tiny_llama` or :func:`tiny_gpt2`.
    """
    tokenizer = tiny_tokenizer(alphabet=alphabet, pad=pad)
    model = {"llama": tiny_llama, "gpt2": tiny_gpt2}[kind](len(tokenizer), seed=seed, **arguments)
    if generation is None:
        generation = {"eos_token_id": EOS, "pad_token_id": PAD, "bos_token_id": BOS}
    model.generation_config = GenerationConfig(**generation)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(Path(directory))


def save_tiny_classifier(
    directory: str | os.PathLike[str],
    kind: str = "bert",
    *,
    labels: tuple[str, ...] = ("NEGATIVE", "POSITIVE"),
    pad: bool = True,
    seed: int = 0,
    **config: Any,
) -> str:
    """Save a tiny sequence classifier with its tokenizer, and return the directory.

    Args:
        directory: Where to.
        kind: ``bert`` (an encoder) or ``gpt2`` (a decoder, read at its last token).
        labels: Names of the labels; one makes a scalar reward model.
        pad: Whether tokenizer and config name a pad token.
        seed: Seed of its weights.
        **config: Entries of the config to set otherwise.
    """
    tokenizer = tiny_tokenizer(pad=pad)
    entries: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
        "initializer_range": 0.2,
        "pad_token_id": PAD if pad else None,
    }
    if kind == "bert":
        sizes = {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
        }
        model: PreTrainedModel = _build(BertForSequenceClassification, BertConfig(**(entries | sizes | config)), seed)
    else:
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
        entries |= {"bos_token_id": BOS, "eos_token_id": EOS}
        model = _build(GPT2ForSequenceClassification, GPT2Config(**(entries | sizes | config)), seed)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(Path(directory))


def _special(entries: dict[str, Any]) -> dict[str, Any]:
    return {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD} | entries


def _build(kind: Any, config: Any, seed: int, spread: float = 1.0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = kind(config)
    if spread != 1.0:
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(spread)
    return model.float().eval()


def readable(value: object) -> str:
    """Name a parameter in a test's id, to be found again: without addresses, and backslashes of regular expressions."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value)).replace("\\", "")
