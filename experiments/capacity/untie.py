"""Save a copy of a language model whose output embedding is a matrix of its own.

python experiments/capacity/untie.py runs/sentiment/sft/export runs/capacity/untied
"""

from __future__ import annotations

import sys

from torch import nn

from vbon_lightning.models import ModelSpec, load_causal_lm, load_tokenizer, save_pretrained


def main(source: str, target: str) -> None:
    """Untie and save."""
    model = load_causal_lm(ModelSpec(source), trainable=False)
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    save_pretrained(model, load_tokenizer(source), target)


if __name__ == "__main__":
    main(*sys.argv[1:])
