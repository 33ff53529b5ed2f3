"""MaxAtK's update by hand, over all subsets, and what a weight of 0 spares."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.functional.test_max_at_k import by_subsets
from tests.models.setting import make_valued_files
from tests.modules.one_update import assert_same_gradient, move, set_up, token_log_probs
from tests.modules.setting import make_data, make_files, make_module, make_trainer
from tests.modules.wiring.setting import Spy
from vbon_lightning import MaxAtK
from vbon_lightning.models import ModelSpec

BETA = 0.3


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def valued_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_valued_files(tmp_path_factory.mktemp("valued"))


@pytest.mark.parametrize("form", ["plain", "marginal", "centred"])
def test_the_update_by_hand(form: str, files: Path) -> None:
    module, batch = set_up("maxatk", files, k=3, form=form, beta=BETA, kl_estimator="sampled", samples_per_prompt=5)
    loss, rollout, logs = module._on_policy_update(module._sample(batch, 0))
    live = token_log_probs(module.policy, rollout)
    with torch.no_grad():
        reference = token_log_probs(module.actors.reference, rollout)
    losses, best = [], []
    for row, rewards in enumerate(rollout.rewards.tolist()):
        kl = [float((p.detach() - q).sum()) for p, q in zip(live[row], reference[row], strict=True)]
        for place, gain in enumerate(by_subsets(rewards, 3, form)):
            others = [value for j, value in enumerate(kl) if j != place]
            losses.append(-(gain - BETA * (kl[place] - sum(others) / 4)) * live[row][place].sum())
        best += [max(subset) for subset in itertools.combinations(rewards, 3)]
    assert_same_gradient(module, loss, torch.stack(losses).mean())
    expected = sum(best) / len(best) - BETA * rollout.token_kl.sum(-1).mean()
    torch.testing.assert_close(logs["objective"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({"beta": 0.0}, 1),
        ({"beta": 0.3, "kl_estimator": "sampled"}, 1),
        ({"beta": 0.3, "kl_estimator": "k3"}, 1),
        ({"beta": 0.3}, 3),
    ],
    ids=["no KL", "sampled", "k3", "exact"],
)
def test_the_reference_is_run_again_only_for_the_exact_kl(
    options: dict[str, Any], passes: int, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, batch = set_up("maxatk", files, estimator="clipped", epochs_per_rollout=2, **options)
    asked = Spy(module.loaded.as_reference)
    monkeypatch.setattr(module.loaded, "as_reference", asked)
    (experience,) = module._collect(module._sample(batch, 0))
    assert len(asked.calls) == 1
    assert experience.rollout.token_kl.sum() > 1e-3, "it is logged, whatever it weighs"
    found = [module._minibatch_update(experience)[0]]
    move(module)
    found.append(module._minibatch_update(experience)[0])
    assert len(asked.calls) == passes
    # The loss is the one with the reference run again.
    live, _ = module._evaluate_responses(experience.rollout)
    torch.testing.assert_close(found[1], module._loss(experience, live, None)[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("changed", [{"lora": {"r": 2, "lora_alpha": 8}}, {"tilt": "value"}], ids=["LoRA", "tilted"])
def test_a_policy_that_stands_on_its_reference(changed: dict[str, Any], valued_files: Path, tmp_path: Path) -> None:
    if "tilt" in changed:
        changed = {"tilt": str(valued_files / "value")}
    data = make_data(valued_files, policy=ModelSpec(str(valued_files / "llama"), **changed), val=None)
    module: Any = make_module("maxatk", data, beta=0.0, estimator="clipped", epochs_per_rollout=2)
    make_trainer(tmp_path, steps=4, callbacks=[], enable_checkpointing=False).fit(module, data)
    assert module.last_rollout.token_kl.sum() > 0, "it has left its reference"


def test_without_the_kl_nothing_pulls_to_the_reference(files: Path) -> None:
    module, batch = set_up("maxatk", files, beta=0.0)
    scored = module._sample(batch, 0)
    loss = module._on_policy_update(scored._replace(rewards=torch.zeros_like(scored.rewards)))[0]
    assert not any(part.any() for part in torch.autograd.grad(loss, list(module.policy.parameters())))


def test_a_group_needs_as_many_as_the_form(files: Path) -> None:
    data = make_data(files)
    needed = {
        form: make_module("maxatk", data, k=3, form=form).fewest_judged for form in ("plain", "marginal", "centred")
    }
    assert needed == {"plain": 3, "marginal": 3, "centred": 4}
    assert make_module("maxatk", data, k=1, form="plain").fewest_judged == 2, "for the baseline of the KL"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "model.k must be an integer >= 1 for model.form=centred, got 0"),
        ({"k": 2.0}, "model.k must be an integer >= 1 for model.form=centred, got 2.0"),
        ({"k": 1, "form": "marginal"}, "model.k must be an integer >= 2 for model.form=marginal, got 1"),
        ({"form": "x"}, "model.form must be one of plain, marginal, centred; got 'x'"),
        ({"beta": -1.0}, "model.beta must be a number >= 0, got -1.0"),
        (
            {"k": 8},
            r"needs model.samples_per_prompt >= 9 for model.k=8, got 8: sample more, lower k, or set form to mar",
        ),
        ({"k": 9, "form": "plain"}, r"needs model.samples_per_prompt >= 9 for model.k=9, got 8: sample more, lower k$"),
        ({"estimator": "ppo"}, "MaxAtK compares the responses to a prompt with each other, and a critic cannot"),
        ({"value_model": True}, "MaxAtK has no use for a value model: set model.value_model to false"),
    ],
)
def test_options_that_make_no_sense(changes: dict[str, Any], message: str, files: Path) -> None:
    with pytest.raises(ValueError, match=message):
        MaxAtK(make_data(files).actors, **changes)


def test_a_value_model_is_not_read(files: Path) -> None:
    data = make_data(files, value_model=str(files / "llama"))
    assert not MaxAtK(data.actors).uses_value_model
    with pytest.raises(ValueError, match="^MaxAtK has no use for a value model: set model.value_model to false"):
        MaxAtK(data.actors, value_model=True)
