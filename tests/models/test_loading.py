"""What loading any model has in common: new weights, missing ones, dropout and GGUF files."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from tests import helpers
from tests.models.plain import logits, new_llama, write_gguf
from vbon_lightning import models
from vbon_lightning.models import ModelError


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("gpt2")
    return helpers.save_tiny_model(directory, "gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)


def test_new_model_is_seeded_and_leaves_the_global_random_state(llama):
    state = torch.get_rng_state()
    first = models.load_causal_lm(new_llama(llama), seed=1, trainable=False)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    again = models.load_causal_lm(new_llama(llama), seed=1, trainable=False)
    other = models.load_causal_lm(new_llama(llama), seed=2, trainable=False)
    assert torch.equal(logits(first), logits(again))
    assert not torch.equal(logits(first), logits(other))


def test_new_model_takes_vocabulary_and_special_tokens_from_the_tokenizer(tmp_path):
    helpers.tiny_tokenizer(tmp_path, alphabet="ab")
    spec = new_llama(str(tmp_path))
    model = models.load_causal_lm(spec, trainable=False)
    assert model.config.vocab_size == 5
    # GPT-2's own config says 50256, Llama's says 2 whatever the tokenizer.
    assert models.end_token_ids(model, models.load_tokenizer(spec)) == (helpers.EOS,)
    assert model.config.pad_token_id == helpers.PAD
    assert model.config.bos_token_id == helpers.BOS
    gpt2 = {
        "config": {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1},
        "tokenizer": str(tmp_path),
    }
    assert models.load_causal_lm(gpt2, trainable=False).generation_config.eos_token_id == helpers.EOS


def test_new_model_refuses_a_small_vocabulary_and_unknown_types(llama):
    with pytest.raises(ModelError, match="vocab_size 7, but its tokenizer has 259"):
        models.load_causal_lm(new_llama(llama, vocab_size=7), trainable=False)
    with pytest.raises(ModelError, match="refused by transformers.*no_such_type"):
        models.load_causal_lm(new_llama(llama, model_type="no_such_type"), trainable=False)


def test_dropout_is_off_in_training_mode(gpt2):
    kept = models.load_causal_lm(gpt2, trainable=True, dropout=True)
    assert not torch.equal(logits(kept), logits(kept))  # the test can see dropout
    model = models.load_causal_lm(gpt2, trainable=True)
    assert model.training
    assert torch.equal(logits(model), logits(model))
    assert torch.equal(logits(model), logits(models.load_causal_lm(gpt2, trainable=False)))


def test_functional_dropout_is_off_too():
    # Llama's attention reads a float attribute of the module; there is no nn.Dropout to find.
    model = helpers.tiny_llama(attention_dropout=0.9, attn_implementation="eager").train()
    assert not any(isinstance(module, nn.Dropout) for module in model.modules())
    assert not torch.equal(logits(model), logits(model))
    models.disable_dropout(model)
    assert torch.equal(logits(model), logits(model))
    assert torch.equal(logits(model), logits(model.eval()))
    assert model.config.attention_dropout == 0.0


def test_disable_dropout_leaves_other_numbers_alone():
    model = helpers.tiny_llama()
    before = {key: value for key, value in model.config.to_dict().items() if "drop" not in key}
    models.disable_dropout(model)
    assert {key: value for key, value in model.config.to_dict().items() if "drop" not in key} == before


def test_a_checkpoint_without_the_head_is_refused(tmp_path):
    # transformers would make the missing weights up and only warn.
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=259, is_decoder=True, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="lacks .* weights .*would be random"):
        models.load_causal_lm(str(tmp_path), trainable=False)


def test_gguf_loads_and_can_be_exported(llama, tmp_path):
    original = helpers.tiny_llama(seed=4)
    write_gguf(tmp_path / "tiny.gguf", original, original.config)
    spec = {"name": str(tmp_path), "gguf_file": "tiny.gguf", "tokenizer": llama}
    state = torch.get_rng_state()
    model = models.load_causal_lm(spec, trainable=True)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(logits(model), logits(original), rtol=0, atol=1e-6)
    assert "quantization_config" not in model.config.to_dict()
    models.save_pretrained(model, models.load_tokenizer(spec), tmp_path / "export")
    assert torch.equal(logits(models.load_causal_lm(str(tmp_path / "export"), trainable=False)), logits(model))
    # A path to the file itself says the same.
    direct = {"name": str(tmp_path / "tiny.gguf"), "tokenizer": llama}
    assert models.model_identity(direct) == models.model_identity(spec)
    assert torch.equal(logits(models.load_causal_lm(direct, trainable=False)), logits(model))
