"""What a YAML file may say of a model, and what is refused."""

from __future__ import annotations

import pytest

from vbon_lightning import models
from vbon_lightning.models import ModelError, ModelSpec


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


def test_a_mapping_with_a_misspelt_field_is_no_name():
    with pytest.raises(ModelError, match=r"unknown model field in '\{nam: x\}': the fields are name, gguf_file"):
        models.as_spec("{nam: x}")
