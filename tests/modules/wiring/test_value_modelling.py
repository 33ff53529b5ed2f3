"""Value models: what they learn from, what a new head starts at, what is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.setting import last_state
from tests.modules.fake import FakeTrainer, attach
from tests.modules.offline import table_batch, table_data
from tests.modules.setting import make_module
from vbon_lightning.metrics import PREFIX_PLACES, ForecastSummary
from vbon_lightning.models import ModelSpec
from vbon_lightning.modules import (
    value_modelling,
)


def test_what_a_value_model_learns_from(files: Path, spy: Any) -> None:
    data = table_data(files)
    module: Any = make_module("valuemodelling", data, body=ModelSpec(name=str(files / "llama")), seed=7)
    attach(module, FakeTrainer(datamodule=data))
    module.setup("fit")
    made = spy(value_modelling, "new_value_model")
    module.configure_model()
    ((args, options),) = made.calls
    assert args == (module.body, module._bins)
    assert options == {
        "longest": data.actors.max_new_tokens,
        "fingerprint": data.fingerprint() | {"missing_eos_penalty": 0.0},
        "seed": 7,
        "dropout": False,
    }
    module.configure_model()
    assert len(made.calls) == 1
    picked = spy(value_modelling, "pick_some")
    batch = table_batch(data)
    logged = attach(module, FakeTrainer(datamodule=data))
    loss = module.training_step(batch, 0)["loss"]
    module.training_step(batch, 1)
    for step in range(2):
        assert picked.calls[step] == (
            (batch.prompts.index.tolist(),),
            {"among": 16, "count": 3, "seed": 7, "stream": "pick", "step": step},
        )
    assert set(logged) == {"train/loss"}
    assert logged["train/loss"][1] == {"prog_bar": True}
    # Each response counts for one, whatever its length, and the loss is that of its prefixes' forecasts.
    index = picked.real(*picked.calls[0][0], **picked.calls[0][1])
    total, scorer = [], module.scorer
    rewards = batch.prompts.reference_rewards
    for row in range(4):
        for sample in index[row].tolist():
            kept = batch.responses.mask[row, sample]
            alone = batch.responses._replace(
                tokens=batch.responses.tokens[row : row + 1, sample : sample + 1, : int(kept.sum())],
                mask=kept[kept][None, None],
            )
            prompts = batch.prompts._replace(
                tokens=batch.prompts.tokens[row : row + 1], mask=batch.prompts.mask[row : row + 1]
            )
            label = int(torch.searchsorted(scorer.bins.edges, rewards[row, sample].double()))
            with torch.no_grad():
                total.append(-scorer.bin_log_probs(prompts, alone)[0, 0, :, label].mean().item())
    assert loss.item() == pytest.approx(sum(total) / len(total), rel=1e-4)


def test_places_that_one_prefix_was_seen_at_are_counted(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = make_module("valuemodelling", table_data(files), body=ModelSpec(name=str(files / "llama")))
    places = len(PREFIX_PLACES)
    numbers = torch.arange(1.0, places + 1)
    prefixes = torch.zeros(places)
    summary = ForecastSummary(nll=numbers, crps=10 * numbers, calibration_error=100 * numbers, prefixes=prefixes)
    monkeypatch.setattr(module.forecast, "compute", lambda: summary)
    assert module.counted() == {}
    prefixes[1], prefixes[2] = 1, 5
    found = {name: value.item() for name, value in module.counted().items()}
    expected = {"loss": 2.5}
    for number in (1, 2):
        for scale, name in ((1, "nll"), (10, "crps"), (100, "calibration_error")):
            expected[f"{name}/{PREFIX_PLACES[number]}"] = scale * (number + 1.0)
    assert found == expected


@pytest.mark.parametrize("probe", [4096, 40])
def test_what_a_new_head_is_fitted_to(probe: int, files: Path, spy: Any) -> None:
    data = table_data(files)
    body = ModelSpec(name=str(files / "llama"))
    module: Any = make_module("valuemodelling", data, body=body, probe=probe)
    broadcast: list[Any] = []
    trainer = FakeTrainer(datamodule=data)
    trainer.strategy.broadcast = lambda found: broadcast.append(found) or found
    attach(module, trainer)
    module.setup("fit")
    module.configure_model()
    fitted = spy(value_modelling, "forecast_head")
    module._start_head()
    (((features, rewards, bins), options),) = fitted.calls
    assert bins is module._bins
    prompts = data.prompts("train")
    step = max(1, len(prompts) * 16 // probe)
    assert step == (1 if probe > 1000 else 4)
    table, expected = data.table(), []
    for prompt in prompts[::step]:
        row = table.row(prompt.key, prompt.text)
        for tokens, reward in zip(row.response_tokens, row.rewards, strict=True):
            for length in range(len(tokens) + 1):
                state = last_state(module.policy.body, [*prompt.tokens, *tokens[:length]])
                expected.append((state, reward, length == len(tokens)))
    assert len(features) == len(rewards) == len(options["fit"]) == len(expected)
    torch.testing.assert_close(features, torch.stack([state for state, _, _ in expected]), rtol=1e-4, atol=1e-5)
    assert rewards.tolist() == pytest.approx([reward for _, reward, _ in expected])
    assert options["fit"].tolist() == [whole for _, _, whole in expected]
    weight, bias = broadcast[0]
    torch.testing.assert_close(module.policy.head.weight.double(), weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(module.policy.head.bias.double(), bias, rtol=1e-6, atol=1e-6)
    assert module.policy.training
