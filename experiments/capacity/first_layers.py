"""Save a language model's first layers as a model of its own, a body that a large policy's value model can afford.

python experiments/capacity/first_layers.py runs/smollm2/sft/export 6 runs/smollm2/body
"""

from __future__ import annotations

import sys

from vbon_lightning.models import ModelSpec, load_causal_lm, load_tokenizer, save_pretrained


def main(source: str, layers: str, target: str) -> None:
    """Cut and save."""
    model = load_causal_lm(ModelSpec(source), trainable=False)
    body, count = model.base_model, int(layers)
    body.layers = body.layers[:count]
    model.config.num_hidden_layers = count
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:count]
    save_pretrained(model, load_tokenizer(source), target)


if __name__ == "__main__":
    main(*sys.argv[1:])
