"""The models that the benchmarks run, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vbon_lightning.models import ModelSpec, load_causal_lm, load_tokenizer, save_pretrained

DEMO = "package:vbon_lightning/assets/demo_lm"
"""The embedded model: 1.9 million parameters."""

LLAMA_10M: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 320,
    "intermediate_size": 864,
    "num_hidden_layers": 6,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
"""A new model of about 10 million parameters over the embedded tokenizer."""


def spec(name: str) -> ModelSpec:
    """Return ``demo`` (the embedded model) or ``10M`` (a new one)."""
    return ModelSpec(DEMO) if name == "demo" else ModelSpec(config=LLAMA_10M, tokenizer=DEMO)


def directory(name: str, root: Path) -> str:
    """Save a model where any library can load it, once, and return the directory."""
    path = root / f"model-{name}"
    if not path.exists():
        save_pretrained(load_causal_lm(spec(name), trainable=False), load_tokenizer(spec(name)), path)
    return str(path)
