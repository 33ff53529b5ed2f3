"""A tilted policy's dial: what it is set to, that it gives the KL it promises, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models.setting import make_valued_files
from tests.modules.setting import make_data, make_module, make_trainer
from vbon_lightning import AlignmentDataModule
from vbon_lightning.callbacks import DialCalibration, PolicyExport
from vbon_lightning.callbacks.dial_calibration import calibration_pairs
from vbon_lightning.models import ModelSpec, TiltedLM, load_causal_lm


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_valued_files(tmp_path_factory.mktemp("files"))


def valued_data(files: Path, **changes: Any) -> AlignmentDataModule:
    value = str(files / "value")
    policy = {"name": str(files / "llama"), "tilt": value}
    arguments = {"policy": policy, "reference_table": str(files / "table"), "value_model": value}
    return make_data(files, **(arguments | changes))


def fit(
    files: Path,
    directory: Path,
    calibration: DialCalibration,
    *,
    export_first: bool = False,
    steps: int = 20,
    **changes: Any,
) -> Any:
    data = valued_data(files, **changes)
    module: Any = make_module("distillation", data, n_range=[1.5, 6.0])
    callbacks = [PolicyExport(str(directory / "export")), calibration]
    trainer = make_trainer(directory, *(callbacks if export_first else callbacks[::-1]), steps=steps)
    trainer.fit(module, data)
    return module, data


def measured_kl(module: Any, data: AlignmentDataModule) -> float:
    """Return the policy's exact KL, by samples that the calibration has not seen."""
    prompts = data.table_batch(data.prompts("train")).prompts
    rollout = module.loaded.rollout(prompts, num_samples=512, seed=7, stream="test", step=0)
    return float(rollout.token_kl.sum(-1).mean())


def best_of_n_kl(rewards: torch.Tensor, n: float) -> float:
    """Return Best-of-N's KL, from the probability of each reward that the cached responses have."""
    found = []
    for row in rewards.tolist():
        levels = sorted(set(row))
        share = [row.count(level) / len(row) for level in levels]
        at = [sum(share[: place + 1]) for place in range(len(levels))]
        best = [high**n - low**n for low, high in zip([0.0, *at[:-1]], at, strict=True)]
        found.append(sum(p * math.log(p / q) for p, q in zip(best, share, strict=True) if p > 0))
    return sum(found) / len(found)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_policy_then_has_the_kl_of_best_of_n(temperature: float, files: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {}
    if temperature != 1:
        directory = tmp_path / "files"
        files = make_valued_files(directory, temperature=temperature)
        changes["temperature"] = temperature
    module, data = fit(files, tmp_path / "run", DialCalibration([2, 4], prompts=10, samples=128), **changes)
    rewards = data.table_rewards(data.prompts("train"))
    policy: TiltedLM = module.policy
    assert policy.n == 4  # as it was
    pairs = policy.config.calibration
    assert [n for n, _ in pairs] == [2, 4]
    for n in (2, 4):
        policy.turn(n)
        expected = best_of_n_kl(rewards, n)
        assert expected > 0.1
        assert measured_kl(module, data) == pytest.approx(expected, rel=0.06)
    assert max(abs(math.log(where / n)) for n, where in pairs) > 0.1  # without calibration it is far from it


def test_the_export_carries_it_wherever_it_is_listed(files: Path, tmp_path: Path) -> None:
    exports = []
    for first in (True, False):
        calibration = DialCalibration([2, 4], prompts=3, samples=8)
        module, _ = fit(files, tmp_path / str(first), calibration, export_first=first)
        exports.append(tmp_path / str(first) / "export")
        for n in (2.0, 3.0, 6.5):
            module.policy.turn(n)
            loaded = load_causal_lm(ModelSpec(str(exports[-1]), dial=n), trainable=False)
            other = AutoModelForCausalLM.from_pretrained(exports[-1])
            other.turn(n)
            tokens = torch.tensor([[3, 4, 5, 6]])
            with torch.no_grad():
                expected = module.policy(input_ids=tokens).logits
                torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(other(input_ids=tokens).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_calibrated_policy_is_calibrated_afresh(files: Path, tmp_path: Path) -> None:
    calibration = DialCalibration([2, 4], prompts=10, samples=32)
    module, _ = fit(files, tmp_path, calibration)
    first = module.policy.config.calibration
    calibration.on_train_end(module.trainer, module)
    for pair, again in zip(first, module.policy.config.calibration, strict=True):
        assert again == pytest.approx(pair)


def test_how_many_prompts_and_samples_are_what_is_sampled(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vbon_lightning.actors import Actors

    seen: list[tuple[float, list[int], int]] = []
    sample = Actors.sample

    def watched(self: Actors, policy: Any, prompts: Any, **given: Any) -> Any:
        if given["stream"] == "calibration":
            seen.append((policy.n, prompts.index.tolist(), given["num_samples"]))
        return sample(self, policy, prompts, **given)

    monkeypatch.setattr(Actors, "sample", watched)
    fit(files, tmp_path, DialCalibration([2], prompts=6, samples=5))
    assert {count for _, _, count in seen} == {5}
    per_n: dict[float, list[int]] = {}
    for n, index, _ in seen:
        per_n.setdefault(n, []).extend(index)
    assert all(rows == list(range(6)) for rows in per_n.values())
    assert len(per_n) > 1


def test_what_is_not_reached_is_said(files: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"does not reach the KL of Best-of-N for N = 16: dialled to"):
        module, _ = fit(files, tmp_path, DialCalibration([2, 16], prompts=4, samples=8, reach=1.0), steps=4)
    assert [n for n, _ in module.policy.config.calibration] == [2]


def test_calibration_is_linear_in_the_logarithms(files: Path) -> None:
    policy: Any = load_causal_lm(ModelSpec(str(files / "llama"), tilt=str(files / "value")), trainable=False)
    policy.calibrate([[2, 4], [8, 32]])
    expected = {1.0: 1.0, 2**0.5: 2.0, 2.0: 4.0, 4.0: 4 * 8**0.5, 8.0: 32.0, 64.0: 32.0 ** (math.log(64) / math.log(8))}
    for n, where in expected.items():
        policy.turn(n)
        assert policy.log_strength == pytest.approx(math.log(where))
    policy.calibrate(None)
    policy.turn(5)
    assert policy.log_strength == pytest.approx(math.log(5))


@pytest.mark.parametrize(
    "pairs", [[[1, 2]], [[2, 1]], [[2, 4], [3, 4]], [[4, 4], [2, 8]], [[2, 4, 5]], [[2, math.inf]]]
)
def test_pairs_that_do_not_rise_are_refused(pairs: list[list[float]], files: Path) -> None:
    policy: Any = load_causal_lm(ModelSpec(str(files / "llama"), tilt=str(files / "value")), trainable=False)
    with pytest.raises(ValueError, match="both increasing"):
        policy.calibrate(pairs)


def test_pairs_of_a_curve() -> None:
    tried, kl = [1.0, 2.0, 4.0, 8.0], [0.0, 0.16, 0.16, 0.64]
    found = calibration_pairs(tried, kl, {2.0: 0.04, 3.0: 0.36, 9.0: 0.9})
    assert found == [[2.0, pytest.approx(2**0.5)], [3.0, pytest.approx(4 * 2**0.5)]]
    assert calibration_pairs(tried, kl, {2.0: 0.0}) == []  # all rewards tie: Best-of-N is the reference


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"n": [1.0]}, {}, "finite numbers above 1"),
        ({"n": []}, {}, "finite numbers above 1"),
        ({"prompts": 0}, {}, "prompts must be at least 1"),
        ({"samples": 0}, {}, "samples must be at least 1"),
        ({"reach": 0.5}, {}, "reach must be at least 1"),
        ({"n": [2, 17]}, {}, "goes up to 17, but the reference table .* brings 16 responses a prompt"),
    ],
)
def test_bad_options_are_refused(
    options: dict[str, Any], changes: dict[str, Any], message: str, files: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(files, tmp_path, DialCalibration(**options), **changes)


def test_what_there_is_nothing_to_calibrate_by_is_refused(files: Path, tmp_path: Path) -> None:
    data = make_data(files)
    with pytest.raises(ValueError, match="name a table"):
        make_trainer(tmp_path, DialCalibration()).fit(make_module("vbon", data), data)


def test_a_plain_policy_is_refused_before_it_is_trained(files: Path, tmp_path: Path) -> None:
    data = valued_data(files, policy=str(files / "llama"))
    module: Any = make_module("distillation", data)
    with pytest.raises(ValueError, match="is for tilted policies"):
        make_trainer(tmp_path, DialCalibration([2])).fit(module, data)
    assert module.global_step == 0
