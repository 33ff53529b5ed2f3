"""Classifiers, as rewards are trained from them."""

from __future__ import annotations

import torch

from tests import helpers
from tests.models.plain import write_gguf
from vbon_lightning import models


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
