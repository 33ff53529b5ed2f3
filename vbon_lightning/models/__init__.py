"""From plain data to Hugging Face models and tokenizers, and back to a directory."""

from vbon_lightning.models.causal import load_causal_lm
from vbon_lightning.models.classifiers import load_classifier
from vbon_lightning.models.errors import ModelError, told_of
from vbon_lightning.models.export import save_pretrained
from vbon_lightning.models.files import locate
from vbon_lightning.models.hub import HubError, HubTarget, as_hub_target
from vbon_lightning.models.identity import model_identity
from vbon_lightning.models.loading import check_no_missing_weights, disable_dropout
from vbon_lightning.models.read_back import ReadBackError
from vbon_lightning.models.saved import check_saved
from vbon_lightning.models.spec import ModelSpec, as_spec, parse_dtype
from vbon_lightning.models.tilted import TiltedConfig, TiltedLM, new_tilted_lm
from vbon_lightning.models.tokenizer import (
    check_same_vocabulary,
    check_vocabulary_fits,
    describe_ends,
    end_token_ids,
    load_tokenizer,
    named_token_ids,
    vocabulary_size,
)
from vbon_lightning.models.value import ValueModel, ValueModelConfig, load_value_model, new_value_model

__all__ = [
    "HubError",
    "HubTarget",
    "ModelError",
    "ModelSpec",
    "ReadBackError",
    "TiltedConfig",
    "TiltedLM",
    "ValueModel",
    "ValueModelConfig",
    "as_hub_target",
    "as_spec",
    "check_no_missing_weights",
    "check_same_vocabulary",
    "check_saved",
    "check_vocabulary_fits",
    "describe_ends",
    "disable_dropout",
    "end_token_ids",
    "load_causal_lm",
    "load_classifier",
    "load_tokenizer",
    "load_value_model",
    "locate",
    "model_identity",
    "named_token_ids",
    "new_tilted_lm",
    "new_value_model",
    "parse_dtype",
    "save_pretrained",
    "told_of",
    "vocabulary_size",
]
