"""vBoN's own target by hand, noise that differs from rollout to rollout, and options that change what they say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from tests.modules.setting import make_data, make_files, make_module, make_table, make_trainer, weights

N = 4


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_files(tmp_path_factory.mktemp("files"))
    make_table(directory)
    return directory


def rolled(files: Path, kind: str = "vbon", **options: Any) -> tuple[Any, Any]:
    """Return a module whose policy has left its reference, and a rollout of it."""
    data = make_data(files, val=None, reference_table=str(files / "table"))
    module: Any = make_module(kind, data, **({"reference_samples": 0, "n": N} | options))
    module.configure_model()
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.policy.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise))
    batch = data.table_batch(data.prompts("train")[:4]).prompts
    return module, module.loaded.rollout(batch, num_samples=8, seed=1, stream="a", step=0)


ESTIMATES = {
    "jeffreys": lambda k, m: (k + 0.5) / (m + 1),
    "add_one": lambda k, m: min(1.0, (k + 1) / (m + 1)),
    "laplace": lambda k, m: (k + 1) / (m + 2),
}


def log_ratio_by_hand(reward: float, references: list[float], log_reference: float, estimator: str) -> float:
    """log(pi_bon / ref) of one response, F_lt and F_le consistent with its own probability."""
    estimate, count, own = ESTIMATES[estimator], len(references), math.exp(log_reference)
    low = min(estimate(sum(other < reward for other in references), count), 1 - own)
    high = min(1.0, max(estimate(sum(other <= reward for other in references), count), low + own))
    return math.log((high**N - low**N) / (high - low))


@pytest.mark.parametrize("floor", [None, -1.0])
@pytest.mark.parametrize("estimator", ESTIMATES)
def test_the_target_by_hand(estimator: str, floor: float | None, files: Path) -> None:
    module, rollout = rolled(files, cdf_estimator=estimator, log_ratio_floor=floor)
    target = module.target(rollout)
    assert target.kl_coef == pytest.approx(1 / (N - 1))
    mask = rollout.completions.mask
    for row, references in enumerate(rollout.reference_rewards.tolist()):
        for sample, reward in enumerate(rollout.rewards[row].tolist()):
            log_reference = rollout.reference_log_probs[row, sample][mask[row, sample]].double().sum().item()
            expected = log_ratio_by_hand(reward, references, log_reference, estimator)
            expected = (expected if floor is None else max(expected, floor)) / (N - 1)
            assert target.score[row, sample].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    lowest = target.score.min().item() * (N - 1)
    assert lowest == pytest.approx(-1.0) if floor is not None else lowest < -1.5


def test_the_target_is_of_the_reference_and_not_of_the_policy(files: Path) -> None:
    module, rollout = rolled(files)
    assert (rollout.log_probs - rollout.reference_log_probs).abs().max() > 0.1
    score = module.target(rollout).score
    other_policy = rollout._replace(log_probs=rollout.log_probs - 1.0, token_kl=rollout.token_kl + 1.0)
    assert torch.equal(module.target(other_policy).score, score)
    likelier = rollout._replace(reference_log_probs=rollout.reference_log_probs * 0.1)
    assert not torch.equal(module.target(likelier).score, score)


class Draws(Callback):
    """Keep what each training step samples."""

    def __init__(self) -> None:
        self.tokens: list[Tensor] = []
        self.advantages: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.tokens.append(outputs["rollout"].completions.tokens[batch.index.argsort()])


@pytest.mark.parametrize("kind", ["vbon", "klrl"])
def test_every_rollout_has_noise_of_its_own(kind: str, files: Path, tmp_path: Path) -> None:
    draws = Draws()
    data = make_data(files, val=None, batch_size=10)  # all prompts at every step
    still = make_module(kind, data, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0), lr_scheduler=None)
    make_trainer(tmp_path, draws, steps=3).fit(still, data)
    for first, second in ((0, 1), (1, 2), (0, 2)):
        width = min(draws.tokens[first].shape[-1], draws.tokens[second].shape[-1])
        same = (draws.tokens[first][..., :width] == draws.tokens[second][..., :width]).all(-1)
        assert same.float().mean() < 0.5, "the policy stood still, so only the noise can differ"


OPTIONS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # the kind of module, what both have, and what one of them has otherwise
    "n": ("vbon", {}, {"n": 8}),
    "bound": ("vbon", {}, {"bound": "lower"}),
    "cdf_estimator": ("vbon", {}, {"cdf_estimator": "laplace"}),
    "log_ratio_floor": ("vbon", {}, {"log_ratio_floor": -0.5}),
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
