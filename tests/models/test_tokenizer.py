"""Tokenizers, and the tokens that end a response."""

from __future__ import annotations

import re
import shutil

import pytest
from transformers import GenerationConfig

from tests import helpers
from vbon_lightning import models
from vbon_lightning.models import ModelError


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


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("tokenizer.json", "{}", "is no tokenizer: it says nothing of a `model`"),
        ("tokenizer.json", '{"version', "is broken, it is no JSON"),
        ("tokenizer_config.json", "[1]", "is broken: it holds no mapping but a list"),
        ("config.json", "{nonsense", "is broken, it is no JSON"),
    ],
)
def test_the_file_that_keeps_a_tokenizer_from_loading_is_named(name, content, problem, llama, tmp_path):
    shutil.copytree(llama, tmp_path / "copy")
    (tmp_path / "copy" / name).write_text(content)
    with pytest.raises(ModelError, match=rf"^`name`: '.*/copy/{re.escape(name)}' {problem}") as raised:
        models.load_tokenizer(str(tmp_path / "copy"))
    assert "\n" not in str(raised.value)


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
