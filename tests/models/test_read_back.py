"""An export that is not the model it was made of."""

from __future__ import annotations

import pytest
import torch

from vbon_lightning import models


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
