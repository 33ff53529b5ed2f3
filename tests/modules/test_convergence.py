"""The policy goes where the maths says: all responses enumerated, the divergence computed exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import EOS, save_tiny_model
from tests.modules.setting import VowelReward, make_data, make_trainer
from vbon_lightning import DPO, KLRL, QRPO, AStarPO, BoNRegression, BoNSFT, ReferenceSampler, TextSource, VBoN
from vbon_lightning.modules import NSchedule

LENGTH, N, BETA, QUANTILE_BETA = 3, 4, 0.3, 0.2
PROMPTS = ["a", "b", "ce", "eb"]
REWARD = VowelReward()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("files")
    model = save_tiny_model(directory / "model", alphabet="abce", seed=3, spread=1.5)
    (directory / "prompts.txt").write_text("\n".join(PROMPTS * 15) + "\n")
    prompts = TextSource(path=str(directory / "prompts.txt"))
    return make_data(directory, policy=model, train=prompts, val=None, max_new_tokens=LENGTH, batch_size=4)


def responses(vocabulary: int) -> list[list[int]]:
    """List every response: ended by the EOS, or cut at the length limit."""
    done: list[list[int]] = []
    open_: list[list[int]] = [[]]
    for _ in range(LENGTH):
        longer = [[*start, token] for start in open_ for token in range(vocabulary)]
        done += [tokens for tokens in longer if tokens[-1] == EOS]
        open_ = [tokens for tokens in longer if tokens[-1] != EOS]
    return done + open_


@torch.no_grad()
def distribution(model: Any, prompt: list[int], every: list[list[int]]) -> Tensor:
    """Return the log-probability of every response, float64."""
    width = max(map(len, every))
    padded = torch.tensor([prompt + tokens + [0] * (width - len(tokens)) for tokens in every])
    log_p = model(input_ids=padded).logits.double().log_softmax(-1)[:, len(prompt) - 1 : -1]
    picked = log_p.gather(-1, padded[:, len(prompt) :, None])[..., 0]
    mask = torch.arange(width) < torch.tensor([len(tokens) for tokens in every])[:, None]
    return torch.where(mask, picked, 0.0).sum(-1)


def best_of_n(log_p: Tensor, rewards: Tensor) -> Tensor:
    """Return log pi_bon: the best of N draws, a draw among the best where several tie."""
    p = log_p.exp()
    below = torch.stack([p[rewards < reward].sum() for reward in rewards])
    same = torch.stack([p[rewards == reward].sum() for reward in rewards])
    return log_p - same.log() + ((below + same) ** N - below**N).log()


def tilted(log_p: Tensor, rewards: Tensor) -> Tensor:
    """Return log of pi_ref exp(r / beta) / Z."""
    return (log_p + rewards / BETA).log_softmax(-1)


def of_quantiles(log_p: Tensor, rewards: Tensor) -> Tensor:
    """Return log of pi_ref exp(q / beta) / Z, the tied quantiles' mean in place of exp(q / beta)."""
    p, scale = log_p.exp(), 1 / QUANTILE_BETA
    below = torch.stack([p[rewards < reward].sum() for reward in rewards])
    same = torch.stack([p[rewards == reward].sum() for reward in rewards])
    return (log_p - same.log() + (((below + same) * scale).exp() - (below * scale).exp()).log()).log_softmax(-1)


def divergence(module: Any, data: Any, optimum: Any) -> float:
    """Return KL(policy || optimum), mean over prompts."""
    every = responses(module.policy.config.vocab_size)
    texts = [module.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in every]
    total = 0.0
    for prompt in data.prompts("train")[: len(PROMPTS)]:
        rewards = REWARD([prompt.text], [texts], [every])[0].double()
        reference = distribution(module.actors.reference, prompt.tokens, every)
        assert float(reference.exp().sum()) == pytest.approx(1, abs=1e-6)
        policy = distribution(module.policy, prompt.tokens, every)
        total += float((policy.exp() * (policy - optimum(reference, rewards))).sum())
    return total / len(PROMPTS)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.02)


def decay(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, 60)


def trainer(directory: Path) -> Any:
    return make_trainer(directory, steps=60, callbacks=[], enable_checkpointing=False)


@pytest.mark.parametrize("kl_estimator", ["rao_blackwell", "sampled", "prefix_baseline"])
def test_vbon_reaches_best_of_n(kl_estimator: Any, data: Any, tmp_path: Path) -> None:
    reaches_best_of_n(data, tmp_path, kl_estimator=kl_estimator)


def test_vbon_whose_n_grows_reaches_best_of_the_last(data: Any, tmp_path: Path) -> None:
    reaches_best_of_n(data, tmp_path, n_schedule=NSchedule(start=1.5, updates=30))


def reaches_best_of_n(data: Any, directory: Path, **options: Any) -> None:
    module = VBoN(
        data.actors, n=N, samples_per_prompt=32, reference_samples=128, optimizer=adam, lr_scheduler=decay, **options
    )
    module.configure_model()
    before = divergence(module, data, best_of_n)
    trainer(directory).fit(module, data)
    after = divergence(module, data, best_of_n)
    assert before > 0.5
    assert after < 0.2 * before


@pytest.mark.parametrize("divergence_kind", ["forward", "jeffreys"])
def test_vbon_reaches_best_of_n_by_the_other_divergences(divergence_kind: Any, data: Any, tmp_path: Path) -> None:
    module = VBoN(
        data.actors, n=N, divergence=divergence_kind, samples_per_prompt=16, reference_samples=64, forward_responses=32,
        optimizer=adam, lr_scheduler=decay,
    )  # fmt: skip
    module.configure_model()
    before = divergence(module, data, best_of_n)
    trainer(tmp_path).fit(module, data)
    after = divergence(module, data, best_of_n)
    assert before > 0.5
    assert after < 0.2 * before


@pytest.mark.parametrize("estimator", ["reinforce", "clipped", "ppo"])
def test_klrl_reaches_the_tilted_reference(estimator: Any, data: Any, tmp_path: Path) -> None:
    several: dict[str, Any] = {} if estimator == "reinforce" else {"epochs_per_rollout": 2, "minibatches": 1}
    if estimator == "ppo":
        several["value_clip"] = 10.0
    module = KLRL(
        data.actors, beta=BETA, samples_per_prompt=32, estimator=estimator, optimizer=adam,
        lr_scheduler=decay, **several,
    )  # fmt: skip
    module.configure_model()
    before = divergence(module, data, tilted)
    trainer(tmp_path).fit(module, data)
    after = divergence(module, data, tilted)
    assert before > 0.3
    assert after < 0.2 * before
    # The other method's optimum is somewhere else.
    assert divergence(module, data, best_of_n) > after


@pytest.fixture(scope="module")
def table_data(data: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same data with a table of many responses, so that Best-of-N of them is Best-of-N."""
    directory = tmp_path_factory.mktemp("table")
    made = make_data(
        directory, policy=data.actors.policy, train=data.sources["train"], val=None, max_new_tokens=LENGTH,
        batch_size=4, reference_table=str(directory / "table"),
    )  # fmt: skip
    trainer(directory).predict(ReferenceSampler(made.actors, samples=1024), made, return_predictions=False)
    return made


@pytest.mark.parametrize("selection", ["weights", "groups"])
def test_bonsft_reaches_best_of_n(selection: Any, table_data: Any, tmp_path: Path) -> None:
    module = BoNSFT(
        table_data.actors, n=N, responses_per_prompt=32, selection=selection, optimizer=adam, lr_scheduler=decay
    )
    module.configure_model()
    before = divergence(module, table_data, best_of_n)
    trainer(tmp_path).fit(module, table_data)
    after = divergence(module, table_data, best_of_n)
    assert before > 0.5
    assert after < 0.2 * before


@pytest.mark.parametrize(
    ("cls", "options", "optimum"),
    [
        (QRPO, {"beta": QUANTILE_BETA, "responses": "table"}, of_quantiles),
        (BoNRegression, {"n": N, "log_ratio_floor": -6.0, "responses": "policy"}, best_of_n),
    ],
    ids=["qrpo", "bonregression"],
)
def test_regressions_reach_their_targets(
    cls: Any, options: dict[str, Any], optimum: Any, table_data: Any, tmp_path: Path
) -> None:
    """From the reference's responses it takes longer: what the policy comes to write is seldom among them."""
    module = cls(table_data.actors, responses_per_prompt=32, optimizer=adam, lr_scheduler=decay, **options)
    module.configure_model()
    before = divergence(module, table_data, optimum)
    trainer(tmp_path).fit(module, table_data)
    after = divergence(module, table_data, optimum)
    assert before > 0.5
    assert after < (0.2 if module.responses == "policy" else 0.5) * before


@pytest.mark.parametrize("beta1", [BETA, 3 * BETA], ids=["one temperature", "two"])
def test_astarpo_reaches_the_tilted_reference(beta1: float, table_data: Any, tmp_path: Path) -> None:
    module = AStarPO(
        table_data.actors, beta1=beta1, beta2=BETA, responses_per_prompt=32, optimizer=adam, lr_scheduler=decay
    )
    module.configure_model()
    before = divergence(module, table_data, tilted)
    trainer(tmp_path).fit(module, table_data)
    after = divergence(module, table_data, tilted)
    assert before > 0.3
    assert after < 0.2 * before
    assert divergence(module, table_data, best_of_n) > after


def expected_rewards(module: Any, data: Any) -> tuple[float, float, float]:
    """Return the exact expected reward of the reference, the policy and Best-of-N, mean over prompts."""
    every = responses(module.policy.config.vocab_size)
    texts = [module.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in every]
    total = torch.zeros(3, dtype=torch.float64)
    for prompt in data.prompts("train")[: len(PROMPTS)]:
        rewards = REWARD([prompt.text], [texts], [every])[0].double()
        reference = distribution(module.actors.reference, prompt.tokens, every)
        policy = distribution(module.policy, prompt.tokens, every)
        total += torch.stack([(p.exp() * rewards).sum() for p in (reference, policy, best_of_n(reference, rewards))])
    return tuple((total / len(PROMPTS)).tolist())


@pytest.mark.parametrize("loss", ["dpo", "bonbon"])
def test_pairs_raise_the_reward(loss: Any, table_data: Any, tmp_path: Path) -> None:
    own = {"beta": 0.3} if loss == "dpo" else {}
    module = DPO(table_data.actors, n=N, pairs_per_prompt=32, loss=loss, optimizer=adam, lr_scheduler=decay, **own)
    module.configure_model()
    reference, before, best = expected_rewards(module, table_data)
    assert before == pytest.approx(reference)
    trainer(tmp_path).fit(module, table_data)
    after = expected_rewards(module, table_data)[1]
    assert after > reference + 0.8 * (best - reference)
