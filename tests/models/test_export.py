"""Saving models: what transformers alone reads of an export, and that it is replaced whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import helpers
from tests.crashes import count_calls, killed_at, with_files_of
from tests.models.plain import logits
from vbon_lightning import models
from vbon_lightning.finite import NotFiniteError
from vbon_lightning.models import ModelError, export
from vbon_lightning.models.files import check_directory


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


def test_killed_at_every_call_or_out_of_room(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "check_read_back", lambda *_, **__: None)  # reads, and takes its time
    target, tokenizer = tmp_path / "export", models.load_tokenizer(llama)
    kinds = {seed: helpers.tiny_llama(seed=seed) for seed in (1, 2)}
    bits = {}

    def save(seed):
        models.save_pretrained(kinds[seed], tokenizer, target, texts={"README.md": f"seed {seed}"})

    def check():
        """Read what is there: it loads, its sums hold, and all is of one writing."""
        weights = (target / "model.safetensors").read_bytes()
        (seed,) = [seed for seed, known in bits.items() if known == weights]
        check_directory(str(target), None)
        assert (target / "README.md").read_text() == f"seed {seed}"
        assert {"config.json", "generation_config.json", "tokenizer.json"} <= {path.name for path in target.iterdir()}
        return seed

    for seed in (2, 1):
        save(seed)
        bits[seed] = (target / "model.safetensors").read_bytes()
    calls = count_calls(lambda: save(2), tmp_path)
    save(1)
    found = []
    for call in range(1, calls + 1):
        assert killed_at(call, lambda: save(2), tmp_path) == "died"
        found.append(check())
        if found[-1] == 2:
            save(1)
    assert found[0] == 1 and found[-1] == 2 and found == sorted(found)
    for size in (0, 100, 1000, 4000, len(bits[2]) - 1):
        for fatal, end in ((True, "died"), (False, "failed")):
            assert with_files_of(size, lambda: save(2), fatal=fatal) == end
            assert check() == 1
    save(2)
    assert check() == 2
    assert [path.name for path in tmp_path.iterdir()] == ["export"]  # what the dead left is gone


def test_weights_that_are_not_finite_are_not_saved(llama, tmp_path):
    model, tokenizer = helpers.tiny_llama(seed=1), models.load_tokenizer(llama)
    models.save_pretrained(model, tokenizer, tmp_path / "export")
    before = (tmp_path / "export" / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.lm_head.weight[2, 1] = 1e30
    with pytest.raises(NotFiniteError, match=r"not exported to .*lm_head\.weight holds NaN or infinity in float16"):
        models.save_pretrained(model, tokenizer, tmp_path / "export", dtype="float16")
    with torch.no_grad():
        model.lm_head.weight[2, 1] = torch.nan
    with pytest.raises(NotFiniteError, match=r"not exported to .*lm_head\.weight holds NaN or infinity;"):
        models.save_pretrained(model, tokenizer, tmp_path / "export")
    with torch.no_grad():
        model.lm_head.weight[2] = 1e38  # whose product with what it is given is no number any more
    with pytest.raises(NotFiniteError, match="weights are finite, and what it says of a few tokens is NaN"):
        models.save_pretrained(model, tokenizer, tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert (tmp_path / "export" / "model.safetensors").read_bytes() == before
