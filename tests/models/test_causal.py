"""Causal language models: they are what was saved, frozen or trained, in the precision asked for."""

from __future__ import annotations

import pytest
import torch

from tests import helpers
from tests.models.plain import logits
from vbon_lightning import models


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_directory_loads_what_was_saved(kind, tmp_path):
    directory = helpers.save_tiny_model(tmp_path, kind, seed=3)
    make = {"llama": helpers.tiny_llama, "gpt2": helpers.tiny_gpt2}[kind]
    loaded = models.load_causal_lm(directory, trainable=False)
    torch.testing.assert_close(logits(loaded), logits(make(259, seed=3)), rtol=0, atol=0)


def test_frozen_and_trainable(llama):
    frozen = models.load_causal_lm(llama, trainable=False)
    assert not frozen.training
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    trainable = models.load_causal_lm(llama, trainable=True)
    assert all(module.training for module in trainable.modules())
    assert all(parameter.requires_grad for parameter in trainable.parameters())


def test_dtype_is_float32_unless_asked(llama, tmp_path):
    half = models.load_causal_lm({"name": llama, "dtype": "bfloat16"}, trainable=False)
    assert half.dtype == torch.bfloat16
    models.save_pretrained(half, models.load_tokenizer(llama), tmp_path / "half")
    assert models.load_causal_lm(str(tmp_path / "half"), trainable=False).dtype == torch.float32
    auto = models.load_causal_lm({"name": str(tmp_path / "half"), "dtype": "auto"}, trainable=False)
    assert auto.dtype == torch.bfloat16


def test_attention_implementation(llama):
    eager = models.load_causal_lm({"name": llama, "attn_implementation": "eager"}, trainable=False)
    assert eager.config._attn_implementation == "eager"
