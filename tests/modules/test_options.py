"""Every option of a module changes what is learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.modules.setting import (
    SIBLINGS,
    make_data,
    make_files,
    make_module,
    make_table,
    make_trainer,
    prepared,
    weights,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_files(tmp_path_factory.mktemp("files"))
    make_table(directory)
    return directory


OPTIONS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # the kind of module, what both have, and what one of them has otherwise
    "n": ("vbon", {}, {"n": 8}),
    "bound": ("vbon", {}, {"bound": "lower"}),
    "cdf_estimator": ("vbon", {}, {"cdf_estimator": "laplace"}),
    "log_ratio_floor": ("vbon", {}, {"log_ratio_floor": -0.5}),
    "divergence, forward": ("vbon", {}, {"divergence": "forward"}),
    "divergence, jeffreys": ("vbon", {}, {"divergence": "jeffreys"}),
    "jeffreys_weight": ("vbon", {"divergence": "jeffreys"}, {"jeffreys_weight": 0.9}),
    "forward_responses": ("vbon", {"divergence": "forward"}, {"forward_responses": 3}),
    "anchor_every": ("klrl", {}, {"anchor_every": 2}),
    "anchor_rate": ("klrl", {}, {"anchor_rate": 0.2}),
    "BOND, second_term": ("bond", {}, {"second_term": False}),
    "BOND, anchor_every": ("bond", {}, {"anchor_every": 3}),
    "J-BOND, jeffreys_weight": ("jbond", {}, {"jeffreys_weight": 0.8}),
    "J-BOND, regularisation": ("jbond", {}, {"regularisation": 2.0}),
    "J-BOND, anchor_rate": ("jbond", {}, {"anchor_rate": 0.05}),
    "J-BOND, forward_responses": ("jbond", {"reference_samples": 4}, {"forward_responses": 2}),
    "WIND, beta": ("wind", {}, {"beta": 0.5}),
    "WIND, step_size": ("wind", {}, {"step_size": 3.0}),
    "WIND, fit": ("wind", {}, {"fit": "nce"}),
    "WIND, anchor_every": ("wind", {}, {"anchor_every": 1}),
    "reference_samples": ("vbon", {}, {"reference_samples": 8}),
    "samples_per_prompt": ("klrl", {}, {"samples_per_prompt": 5}),
    "beta": ("klrl", {}, {"beta": 0.3}),
    "kl_estimator, sampled": ("klrl", {}, {"kl_estimator": "sampled"}),
    "kl_estimator, prefix_baseline": ("klrl", {}, {"kl_estimator": "prefix_baseline"}),
    "normalise": ("klrl", {"kl_estimator": "sampled"}, {"normalise": True}),
    "estimator": ("ppo", {}, {"estimator": "clipped"}),
    "epochs_per_rollout": ("ppo", {}, {"epochs_per_rollout": 3}),
    "minibatches": ("ppo", {}, {"minibatches": 4}),
    "clip": ("ppo", {}, {"clip": 0.01}),
    "value_clip": ("ppo", {}, {"value_clip": 1e-4}),
    "value_coef": ("ppo", {}, {"value_coef": 0.1}),
    "gae_lambda": ("ppo", {}, {"gae_lambda": 0.2}),
    "seed": ("klrl", {}, {"seed": 7}),
    "DPO, beta": ("dpo", {}, {"beta": 0.7}),
    "DPO, loss": ("dpo", {}, {"loss": "bonbon"}),
    "DPO, alpha": ("dpo", {"loss": "bonbon"}, {"alpha": 0.5}),
    "DPO, pairs_per_prompt": ("dpo", {}, {"pairs_per_prompt": 3}),
    "QRPO, beta": ("qrpo", {}, {"beta": 0.3}),
    "QRPO, ties, upper": ("qrpo", {}, {"ties": "upper"}),
    "QRPO, ties, mid": ("qrpo", {}, {"ties": "mid"}),
    "QRPO, responses": ("qrpo", {}, {"responses": "policy"}),
    "QRPO, responses_per_prompt": ("qrpo", {}, {"responses_per_prompt": 4}),
    "A*-PO, beta1": ("astarpo", {}, {"beta1": 0.5}),
    "A*-PO, beta2": ("astarpo", {"beta1": 0.2}, {"beta2": 0.3}),
    "A*-PO, responses_per_prompt": ("astarpo", {}, {"responses_per_prompt": 1}),
    "Best-of-N regression, n": ("bonregression", {}, {"n": 2.5}),
    "Best-of-N regression, log_ratio_floor": ("bonregression", {}, {"log_ratio_floor": -1.0}),
    "Best-of-N regression, responses": ("bonregression", {}, {"responses": "policy"}),
    "BoN-SFT, n": ("bonsft", {}, {"n": 2}),
    "BoN-SFT, responses_per_prompt": ("bonsft", {}, {"responses_per_prompt": 2}),
    "BoN-SFT, selection": ("bonsft", {}, {"selection": "groups"}),
}


def learnt(kind: str, files: Path, directory: Path, options: dict[str, Any]) -> Tensor:
    """Return the policy after a few updates."""
    table = None if kind in ("ppo", "klrl") or "reference_samples" in options else str(files / "table")
    data = make_data(files, val=None, reference_table=table)
    defaults = {"reference_samples": 0} if kind == "vbon" else {}
    module = make_module(kind, data, **(defaults | options))
    make_trainer(directory, steps=5, callbacks=[], enable_checkpointing=False).fit(module, data)
    return torch.cat([value.flatten() for key, value in weights(module).items() if key.startswith("policy")])


@pytest.fixture(scope="module")
def plain(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what is learnt without an option, found once a setting."""
    found: dict[str, Tensor] = {}

    def get(kind: str, common: dict[str, Any]) -> Tensor:
        key = f"{kind} {common}"
        if key not in found:
            found[key] = learnt(kind, files, tmp_path_factory.mktemp("plain"), common)
        return found[key]

    return get


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_changes_what_is_learnt(name: str, plain: Any, files: Path, tmp_path: Path) -> None:
    kind, common, changes = OPTIONS[name]
    without = plain(kind, common)
    assert (learnt(kind, files, tmp_path, common | changes) - without).abs().max() > 1e-6, "the option changes nothing"


def test_the_same_options_give_the_same_bits(plain: Any, files: Path, tmp_path: Path) -> None:
    assert torch.equal(learnt("vbon", files, tmp_path, {}), plain("vbon", {}))


OF_AN_UPDATE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # the same, of methods that need no trainer to be told apart
    "kl_estimator, k3": ("klrl", {}, {"kl_estimator": "k3"}),
    "n_schedule": ("vbon", {}, {"n_schedule": {"start": 1.5, "updates": 4, "shape": "linear"}}),
    "n_schedule, start": ("annealed", {}, {"n_schedule": {"start": 2.5, "updates": 4}}),
    "n_schedule, updates": ("annealed", {}, {"n_schedule": {"start": 1.5, "updates": 3}}),
    "n_schedule, shape": ("annealed", {}, {"n_schedule": {"start": 1.5, "updates": 4, "shape": "cosine"}}),
    "InfAlign, n": ("infalign", {}, {"n": 8}),
    "InfAlign, procedure": ("infalign", {}, {"procedure": "worst_of_n"}),
    "InfAlign, transform": ("infalign", {}, {"transform": "log"}),
    "InfAlign, slope": ("infalign", {}, {"slope": 3.0}),
    "InfAlign, beta": ("infalign", {}, {"beta": 0.3}),
    "InfAlign, ties": ("infalign", {}, {"ties": "average"}),
    "InfAlign, ties below": ("infalign", {}, {"ties": "below"}),
    "InfAlign, cdf_estimator": ("infalign", {}, {"cdf_estimator": "laplace"}),
    "max@k, k": ("maxatk", {}, {"k": 3}),
    "max@k, beta": ("maxatk", {}, {"beta": 0.0}),
    "max@k, form": ("maxatk", {}, {"form": "marginal"}),
    "max@k, plain form": ("maxatk", {}, {"form": "plain"}),
    "GRPO, beta": ("grpo", {}, {"beta": 0.0}),
    "GRPO, scale_rewards": ("grpo", {}, {"scale_rewards": False}),
    "GRPO, length_norm": ("grpo", {}, {"length_norm": "grpo"}),
    "GRPO, length_norm dr_grpo": ("grpo", {}, {"length_norm": "dr_grpo"}),
    "GRPO, clip_high": ("grpo", {"clip": 0.02}, {"clip_high": 0.3}),
    "GRPO, kl_estimator": ("grpo", {}, {"kl_estimator": "rao_blackwell"}),
    "RLOO, beta": ("rloo", {}, {"beta": 0.5}),
    "RLOO, kl_estimator": ("rloo", {}, {"kl_estimator": "k3"}),
    "PF-PPO, filter": ("pfppo", {}, {"filter": "best_worst"}),
    "PF-PPO, filter best": ("pfppo", {}, {"filter": "best"}),
    "PF-PPO, draws": ("pfppo", {}, {"draws": 1}),
    "PF-PPO, kl_estimator": ("pfppo", {}, {"kl_estimator": "rao_blackwell"}),
}


def updated(kind: str, files: Path, options: dict[str, Any]) -> Tensor:
    """Return the gradient of the second update of a method, on a second rollout or once more on the first."""
    uneven: dict[str, Any] = {"end_tokens": list("abcd"), "max_new_tokens": 6} if kind in SIBLINGS else {}
    data = make_data(files, val=None, **uneven)
    online = {} if kind in (*SIBLINGS, "klrl") else {"reference_samples": 16}
    module = prepared(kind, data, **(online | options))
    batch = data._collate_prompts([(i, True, row) for i, row in enumerate(data.prompts("train")[:4])])
    if module.updates_per_rollout == 1:
        module.batches_seen = module.updates = 2
        loss = module._on_policy_update(module._sample(batch, 1))[0]
    else:
        experience = module._collect(module._sample(batch, 0))[0]
        with torch.no_grad():
            for parameter in module.policy.parameters():
                parameter *= 1.1
        loss = module._minibatch_update(experience)[0]
    gradient = torch.autograd.grad(loss, list(module.policy.parameters()))
    return torch.cat([part.flatten() for part in gradient])


@pytest.mark.parametrize("name", OF_AN_UPDATE)
def test_every_option_changes_an_update(name: str, files: Path) -> None:
    kind, common, changes = OF_AN_UPDATE[name]
    without = updated(kind, files, common)
    assert torch.equal(updated(kind, files, common), without), "the same options give the same bits"
    assert (updated(kind, files, common | changes) - without).abs().max() > 1e-5, "the option changes nothing"
