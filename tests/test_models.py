"""Loading, identifying and saving models."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GenerationConfig,
    LlamaConfig,
)

from tests import helpers
from vbon_lightning import models
from vbon_lightning.models import ModelError, ModelSpec
from vbon_lightning.paths import PathError, looks_like_path, resolve_path

TOKENS = torch.tensor([[3, 40, 90, 200, 7]])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return helpers.save_tiny_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("gpt2")
    return helpers.save_tiny_model(directory, "gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)


# --- spec ---


def test_spec_from_name_mapping_and_spec():
    spec = ModelSpec(name="gpt2", dtype="bfloat16")
    assert models.as_spec("gpt2") == ModelSpec(name="gpt2")
    assert models.as_spec({"name": "gpt2", "dtype": "bfloat16"}) == spec
    assert models.as_spec(spec) is spec


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give the model's `name`"),
        ({"name": "gpt2", "config": {"model_type": "gpt2"}, "tokenizer": "gpt2"}, "not both"),
        ({"config": {"model_type": "gpt2"}}, "needs a `tokenizer`"),
        ({"config": {"n_embd": 8}, "tokenizer": "gpt2"}, "`model_type`"),
        ({"config": {"model_type": "gpt2"}, "tokenizer": "gpt2", "gguf_file": "a.gguf"}, "`gguf_file`"),
        ({"name": "gpt2", "dtpye": "float32"}, "unknown model field dtpye"),
        ({"name": "gpt2", "dtype": "float8"}, "unknown dtype 'float8'"),
    ],
)
def test_spec_refuses(fields, message):
    with pytest.raises(ModelError, match=message):
        models.as_spec(fields)


# --- loading ---


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


def new_llama(tokenizer: str, **entries: object) -> dict:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {"config": {"model_type": "llama"} | sizes | entries, "tokenizer": tokenizer}


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


# --- dropout ---


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


# --- end tokens and tokenizers ---


def test_end_token_ids():
    tokenizer = helpers.tiny_tokenizer()
    # What the generation config stops at, and what supervised fine-tuning teaches.
    assert models.end_token_ids(GenerationConfig(eos_token_id=7), tokenizer) == (7, helpers.EOS)
    assert models.end_token_ids(GenerationConfig(eos_token_id=[9, 7, 9]), tokenizer) == (9, 7, helpers.EOS)
    assert models.end_token_ids(GenerationConfig(), tokenizer) == (helpers.EOS,)
    model = helpers.tiny_llama()
    model.generation_config.eos_token_id = [2, 1]
    assert models.end_token_ids(model, tokenizer) == (2, 1)
    assert models.end_token_ids(model, tokenizer, ["a", "</s>"]) == (2, 1, tokenizer.get_vocab()["a"])
    with pytest.raises(ModelError, match=r"data.end_tokens: '<\|im_end\|>' is no token.*'</s>'"):
        models.end_token_ids(model, tokenizer, ["a", "<|im_end|>"])
    said = models.describe_ends(tokenizer, (1, 2))
    assert said == "<s> (1), </s> (2); SFT teaches </s>"
    model.generation_config.eos_token_id = 259
    with pytest.raises(ModelError, match="259 lies outside"):
        models.end_token_ids(model, tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="names an EOS token"):
        models.end_token_ids(GenerationConfig(), tokenizer)


def test_pad_token_falls_back_to_eos(tmp_path):
    helpers.tiny_tokenizer(tmp_path / "with", pad=True)
    helpers.tiny_tokenizer(tmp_path / "without", pad=False)
    assert models.load_tokenizer(str(tmp_path / "with")).pad_token_id == helpers.PAD
    assert models.load_tokenizer(str(tmp_path / "without")).pad_token_id == helpers.EOS
    bare = helpers.tiny_tokenizer(pad=False)
    bare.eos_token = None
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match="neither a pad token nor an EOS token"):
        models.load_tokenizer(str(tmp_path / "bare"))


def test_a_tokenizer_of_its_own(llama, tmp_path):
    helpers.tiny_tokenizer(tmp_path, alphabet="abc")
    assert len(models.load_tokenizer({"name": llama, "tokenizer": str(tmp_path)})) == 6
    assert len(models.load_tokenizer(llama)) == 259


def test_same_vocabulary(tmp_path):
    ours = helpers.tiny_tokenizer(alphabet="ab")
    models.check_same_vocabulary(ours, helpers.tiny_tokenizer(alphabet="ab", pad=False))
    with pytest.raises(ModelError, match="2 tokens differ.*'a' is 3 and 4"):
        models.check_same_vocabulary(ours, helpers.tiny_tokenizer(alphabet="ba"))
    with pytest.raises(ModelError, match="1 tokens differ.*'c' is None and 5"):
        models.check_same_vocabulary(ours, helpers.tiny_tokenizer(alphabet="abc"))
    other = helpers.tiny_tokenizer(alphabet="ab")
    other.eos_token = "<s>"
    with pytest.raises(ModelError, match="`eos_token_id` is 2 and 1"):
        models.check_same_vocabulary(ours, other)


# --- what is not there ---


@pytest.mark.parametrize("name", ["./runs/gone", "/no/such/place", "~/no-such-model", "runs/a/b", "gone/"])
def test_a_missing_path_is_no_hub_lookup(name, monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("asked the hub")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(ModelError, match="`name`: the directory .* does not exist"):
        models.load_causal_lm(name, trainable=False)
    with pytest.raises(ModelError, match="`name`: the directory .* does not exist"):
        models.load_tokenizer(name)
    with pytest.raises(ModelError, match="`tokenizer`: the directory .* does not exist"):
        models.load_tokenizer({"name": "gpt2", "tokenizer": name})


def test_a_name_that_is_nowhere(monkeypatch):
    def unreachable(*args: object, **kwargs: object) -> None:
        raise OSError("cannot connect")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", unreachable)
    with pytest.raises(ModelError, match="'runs/gone': no such directory here, and from the hub: OSError: cannot con"):
        models.load_causal_lm("runs/gone", trainable=False)


def test_incomplete_directories(llama, tmp_path):
    with pytest.raises(ModelError, match="holds no config.json"):
        models.load_causal_lm(str(tmp_path), trainable=False)
    with pytest.raises(ModelError, match="holds no tokenizer"):
        models.load_tokenizer(str(tmp_path))
    shutil.copy(Path(llama, "config.json"), tmp_path)
    with pytest.raises(ModelError, match="holds no weights"):
        models.load_causal_lm(str(tmp_path), trainable=False)
    (tmp_path / "tiny.gguf").touch()
    with pytest.raises(ModelError, match="it holds tiny.gguf, give `gguf_file`"):
        models.load_causal_lm(str(tmp_path), trainable=False)
    with pytest.raises(ModelError, match="holds no 'x.gguf'; its GGUF files: tiny.gguf"):
        models.load_causal_lm({"name": str(tmp_path), "gguf_file": "x.gguf"}, trainable=False)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelError, match="cannot load the model in the directory"):
        models.load_causal_lm(str(tmp_path), trainable=False)


def test_a_checkpoint_without_the_head_is_refused(tmp_path):
    # transformers would make the missing weights up and only warn.
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=259, is_decoder=True, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="lacks .* weights .*would be random"):
        models.load_causal_lm(str(tmp_path), trainable=False)


# --- paths ---


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    root = tmp_path / "site" / "vbon_test_package"
    root.mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('must not be imported')\n")
    monkeypatch.syspath_prepend(str(root.parent))
    return root


def test_package_paths(package):
    helpers.save_tiny_model(package / "weights" / "small", seed=5)
    name = "package:vbon_test_package/weights/small"
    assert resolve_path(name) == str(package / "weights" / "small")
    assert resolve_path("package:vbon_test_package") == str(package)
    assert torch.equal(logits(models.load_causal_lm(name, trainable=False)), logits(helpers.tiny_llama(seed=5)))
    assert len(models.load_tokenizer(name)) == 259
    assert models.model_identity(name) == models.model_identity(str(package / "weights" / "small"))
    assert "vbon_test_package" not in sys.modules
    with pytest.raises(ModelError, match="`name`: .*holds no 'weights/large'"):
        models.load_causal_lm("package:vbon_test_package/weights/large", trainable=False)
    with pytest.raises(PathError, match="'no_such_package_here', which is not installed"):
        resolve_path("package:no_such_package_here/x")
    with pytest.raises(PathError, match="without '..'"):
        resolve_path("package:vbon_test_package/../secrets")
    with pytest.raises(PathError, match="single module"):
        resolve_path("package:this/x")


def test_variables_and_home(monkeypatch):
    monkeypatch.setenv("MODELS", "/data/models")
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("NOWHERE", raising=False)
    assert resolve_path("${MODELS}/small") == "/data/models/small"
    assert resolve_path("~/small") == "/home/someone/small"
    assert resolve_path("owner/model") == "owner/model"
    with pytest.raises(PathError, match="variable NOWHERE is not set"):
        resolve_path("${NOWHERE}/small")
    with pytest.raises(ModelError, match="`name`: environment variable NOWHERE"):
        models.load_tokenizer("${NOWHERE}/small")


def test_what_looks_like_a_path():
    assert not any(map(looks_like_path, ["gpt2", "owner/model", "org/model-1.5B"]))
    assert all(map(looks_like_path, ["./gpt2", "../x", "/x", "~x/y", "a/b/c", "model/"]))


# --- identity ---


def test_identity_is_content_not_place(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "elsewhere")
    identity = models.model_identity(llama)
    assert all(isinstance(value, str) for value in identity.values())
    assert models.model_identity(str(tmp_path / "elsewhere")) == identity
    assert str(tmp_path) not in json.dumps(identity) and llama not in json.dumps(identity)


def test_identity_sees_weights_config_tokenizer_and_dtype(llama, tmp_path):
    copy = Path(shutil.copytree(llama, tmp_path / "copy"))
    identity = models.model_identity(str(copy))
    assert models.model_identity({"name": str(copy), "dtype": "bfloat16"}) != identity

    def differing() -> set[str]:
        now = models.model_identity(str(copy))
        return {key for key in identity if now[key] != identity[key]}

    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1  # same size: only the content tells
    (copy / "model.safetensors").write_bytes(weights)
    assert differing() == {"weights"}
    entries = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(entries | {"transformers_version": "0"}))
    assert differing() == {"weights"}
    (copy / "config.json").write_text(json.dumps(entries | {"rms_norm_eps": 0.5}))
    assert differing() == {"weights", "config"}
    helpers.tiny_tokenizer(copy, alphabet="abc")
    assert differing() == {"weights", "config", "tokenizer"}


def test_identity_of_hub_and_new_models(llama, monkeypatch):
    hub = models.model_identity({"name": "owner/model", "revision": "abc"})
    assert hub == {"name": "owner/model", "revision": "abc", "dtype": "float32"}
    assert models.model_identity("owner/model")["revision"] == "main"
    new = models.model_identity(new_llama(llama), seed=1)
    assert new != models.model_identity(new_llama(llama), seed=2)
    assert new != models.model_identity(new_llama(llama, rms_norm_eps=0.5), seed=1)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("loaded weights")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    models.model_identity(llama)


# --- saving ---


def test_save_round_trip(llama, tmp_path):
    model = models.load_causal_lm(llama, trainable=True)
    target = tmp_path / "runs" / "export"
    generation = {"do_sample": True, "temperature": 0.7, "max_new_tokens": 9, "eos_token_id": [2, 1]}
    models.save_pretrained(model, models.load_tokenizer(llama), target, generation=generation)
    # Plain transformers reads it: no code of this package is needed.
    loaded = AutoModelForCausalLM.from_pretrained(target)
    assert torch.equal(logits(loaded), logits(model.eval()))
    assert loaded.generation_config.temperature == 0.7
    assert loaded.generation_config.eos_token_id == [2, 1]
    assert AutoTokenizer.from_pretrained(target)("hé").input_ids == models.load_tokenizer(llama)("hé").input_ids
    assert [path.name for path in target.parent.iterdir()] == ["export"]
    assert model.generation_config.max_new_tokens is None  # the model at hand is not changed


def test_save_in_another_dtype(llama, tmp_path):
    model = models.load_causal_lm(llama, trainable=True)
    models.save_pretrained(model, models.load_tokenizer(llama), tmp_path / "half", dtype="bfloat16")
    assert model.dtype == torch.float32
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    for ours, theirs in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours.bfloat16(), theirs)


WARPERS: dict[str, Any] = {
    "do_sample": True,
    "temperature": 0.4,
    "top_k": 5,
    "top_p": 0.7,
    "min_p": 0.1,
    "typical_p": 0.8,
    "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.01,
    "repetition_penalty": 1.8,
    "encoder_repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "bad_words_ids": [[7]],
    "suppress_tokens": [8, 9],
    "begin_suppress_tokens": [10],
    "sequence_bias": [[[11], -5.0]],
    "forced_eos_token_id": 2,
    "exponential_decay_length_penalty": (1, 2.0),
    "min_length": 6,
    "min_new_tokens": 3,
    "renormalize_logits": True,
}


def test_generate_draws_from_the_exported_policy_whatever_its_base_asked_for(tmp_path: Path) -> None:
    """Chi-squared of 4,000 first tokens, and what a second one follows, against the exported logits."""
    model = helpers.tiny_llama(vocab_size=24, spread=3.0)
    model.generation_config.update(**WARPERS)
    settings = {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0, "max_new_tokens": 2, "eos_token_id": 2}
    tokenizer = helpers.tiny_tokenizer()
    models.save_pretrained(model, tokenizer, tmp_path / "export", generation=settings)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    prompt = torch.tensor([[5, 7, 5, 7]])
    expected = (model(prompt).logits[0, -1].detach().double() / 0.7).softmax(-1)
    torch.manual_seed(0)
    drawn = loaded.generate(prompt, num_return_sequences=4000, pad_token_id=0)[:, 4]
    counts = torch.bincount(drawn, minlength=24).double()
    kept = expected * 4000 >= 5
    observed = torch.cat([counts[kept], counts[~kept].sum()[None]])
    wanted = torch.cat([expected[kept], expected[~kept].sum()[None]]) * 4000
    chi_squared = float(((observed - wanted).square() / wanted).sum())
    assert chi_squared < float(scipy.stats.chi2.ppf(0.999, len(wanted) - 1))
    given = json.loads((tmp_path / "export" / "generation_config.json").read_text())
    own = {"bos_token_id", "pad_token_id", "_from_model_config", "transformers_version"}
    assert set(given) <= set(settings) | own, "nothing else is said"
    assert model.generation_config.repetition_penalty == 1.8, "the model at hand is not changed"


def test_save_replaces_whole_or_not_at_all(llama, tmp_path, monkeypatch):
    target = tmp_path / "export"
    tokenizer = models.load_tokenizer(llama)
    models.save_pretrained(helpers.tiny_llama(seed=1), tokenizer, target)
    (target / "stale.txt").touch()
    before = (target / "model.safetensors").read_bytes()
    with pytest.raises(ModelError, match="unknown generation entry temprature"):
        models.save_pretrained(helpers.tiny_llama(seed=2), tokenizer, target, generation={"temprature": 1.0})

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "save_pretrained", fail)
        with pytest.raises(OSError, match="disk full"):
            models.save_pretrained(helpers.tiny_llama(seed=2), tokenizer, target)
    assert (target / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    models.save_pretrained(helpers.tiny_llama(seed=2), tokenizer, target)
    assert (target / "model.safetensors").read_bytes() != before
    assert not (target / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


# --- GGUF ---


def write_gguf(path: Path, model: nn.Module, config: LlamaConfig) -> None:
    """Write a Llama to a GGUF file in float32, by the format's own writer."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_bos_token_id(helpers.BOS)
    writer.add_eos_token_id(helpers.EOS)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers.0.input_layernorm": "blk.0.attn_norm",
        "model.layers.0.post_attention_layernorm": "blk.0.ffn_norm",
        "model.layers.0.self_attn.q_proj": "blk.0.attn_q",
        "model.layers.0.self_attn.k_proj": "blk.0.attn_k",
        "model.layers.0.self_attn.v_proj": "blk.0.attn_v",
        "model.layers.0.self_attn.o_proj": "blk.0.attn_output",
        "model.layers.0.mlp.gate_proj": "blk.0.ffn_gate",
        "model.layers.0.mlp.up_proj": "blk.0.ffn_up",
        "model.layers.0.mlp.down_proj": "blk.0.ffn_down",
    }
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for key, value in model.state_dict().items():
        name = names[key.removesuffix(".weight")]
        array = value.numpy()
        for projection, count in heads.items():
            if projection in key:  # GGUF interleaves the halves that rotary embeddings turn
                array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(f"{name}.weight", array.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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


def test_a_classifier_from_gguf_can_be_exported(llama, tmp_path):
    original = helpers.tiny_llama(seed=4)
    write_gguf(tmp_path / "tiny.gguf", original, original.config)
    spec = {"name": str(tmp_path), "gguf_file": "tiny.gguf", "tokenizer": llama}
    state = torch.get_rng_state()
    model = models.load_classifier(spec, labels=["A", "B"], seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(model.model.state_dict(), original.model.state_dict())
    assert torch.equal(models.load_classifier(spec, labels=["A", "B"], seed=3).score.weight, model.score.weight)
    assert not torch.equal(models.load_classifier(spec, labels=["A", "B"], seed=4).score.weight, model.score.weight)
    models.save_pretrained(model, models.load_tokenizer(spec), tmp_path / "export")
    again = models.load_classifier(str(tmp_path / "export"), labels=["A", "B"])
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_identity_changes_with_the_end_tokens(tmp_path: Path) -> None:
    directory = helpers.save_tiny_model(tmp_path / "model", "llama")
    path = Path(directory, "generation_config.json")
    before = models.model_identity(str(directory))
    generation = json.loads(path.read_text())
    path.write_text(json.dumps(generation | {"eos_token_id": [1, 2]}))
    assert models.model_identity(str(directory)) != before


def test_a_mapping_with_a_misspelt_field_is_no_name():
    with pytest.raises(ModelError, match=r"unknown model field in '\{nam: x\}': the fields are name, gguf_file"):
        models.as_spec("{nam: x}")


def test_an_export_that_is_another_model_is_an_error_and_leaves_the_one_before(llama, tmp_path):
    before = models.load_causal_lm(llama, trainable=False)
    target = tmp_path / "export"
    models.save_pretrained(before, models.load_tokenizer(llama), target)
    model = models.load_causal_lm(llama, trainable=True)
    model.config.hidden_act = "relu"  # what is read again has it, the model in memory has not
    with pytest.raises(models.ReadBackError, match="the export is another model than the one that was trained"):
        models.save_pretrained(model, models.load_tokenizer(llama), target)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    tokens = torch.tensor([[1, 4, 5]])
    assert torch.equal(models.load_causal_lm(str(target), trainable=False)(tokens).logits, before(tokens).logits)
    assert model.training


def test_an_export_that_cannot_be_loaded_is_an_error(llama, tmp_path, monkeypatch):
    model = models.load_causal_lm(llama, trainable=False)
    monkeypatch.setattr(model, "state_dict", lambda: {"nothing": torch.zeros(1)})
    with pytest.raises(models.ReadBackError, match="lacks|cannot be loaded again"):
        models.save_pretrained(model, models.load_tokenizer(llama), tmp_path / "export", dtype="bfloat16")
    assert not list(tmp_path.iterdir())
