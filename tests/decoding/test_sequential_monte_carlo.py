"""Sequential Monte Carlo against all that two particles may become, and where it is something simpler."""

from __future__ import annotations

import math
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.decoding.setting import (
    OPTIONS,
    PROMPT,
    REMEDY,
    Continuations,
    Outcomes,
    Told,
    assert_distributed,
    decode,
    decode_apart,
    load,
    save_models,
    statistic,
)
from tests.decoding.setting import score as reward_of
from tests.models.setting import bins_after, new_model, scramble
from tests.sampling.test_decode import batch_of
from vbon_lightning.actors import Actors
from vbon_lightning.decoding import BestOfN, SequentialMonteCarlo, SoftBestOfN, sequential_monte_carlo
from vbon_lightning.functional import bon_bin_log_weights, edge_log_cdf, predicted_log_cdf
from vbon_lightning.prefix_scorer import PrefixScorer
from vbon_lightning.rewards import RewardCalls

LAMBDA = 0.4


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def actors(files: Path) -> Actors:
    found = load(files)
    found.value = PrefixScorer(scramble(new_model(str(files / "other"), longest=2)))
    return found


def expected_of(actors: Actors, twist: Any, *, resampling: str, threshold: float, length: int = 2) -> Outcomes:
    """Two particles, which may be resampled after each token but the last."""
    chances, psi = Continuations(actors.policy), cache(lambda response: math.exp(twist(response)))
    # A pair of particles, what their twists were when they were last resampled, and how likely that is.
    states: dict[Any, float] = {((), (), 1.0, 1.0): 1.0}
    for step in range(1, length + 1):
        grown: dict[Any, float] = {}
        for (left, right, *before), probability in states.items():
            for (one, its), (two, others) in product(chances.after(left, 1), chances.after(right, 1)):
                key = (one, two, *before)
                grown[key] = grown.get(key, 0.0) + probability * its * others
        if step == length:
            break
        states = {}
        for (one, two, *before), probability in grown.items():
            weights = [psi(one) / before[0], psi(two) / before[1]]
            share = weights[0] / sum(weights)
            if 1 / (share**2 + (1 - share) ** 2) >= threshold * 2 * (1 - 1e-9):
                ways = [((one, two, *before), 1.0)]
            else:  # how often the first particle goes on: as independent draws, or by one place for two even steps
                twice = share**2 if resampling == "multinomial" else max(0.0, 2 * share - 1)
                never = (1 - share) ** 2 if resampling == "multinomial" else max(0.0, 1 - 2 * share)
                pairs = [((one, one), twice), ((two, two), never), ((one, two), 1 - twice - never)]
                ways = [((*pair, *map(psi, pair)), chance) for pair, chance in pairs]
            for key, chance in ways:
                states[key] = states.get(key, 0.0) + probability * chance
    expected = Outcomes()
    for (one, two, *before), probability in grown.items():
        final = [psi(one) / before[0], psi(two) / before[1]]
        for response, weight in zip((one, two), final, strict=True):
            expected.add(response, probability * weight / sum(final))
    return expected


def by_reward(response: Any) -> float:
    return reward_of(response) / LAMBDA


@pytest.mark.parametrize("resampling", ["systematic", "multinomial"])
@pytest.mark.parametrize("threshold", [1.0, 0.75])
def test_its_distribution(resampling: Any, threshold: float, actors: Actors) -> None:
    decoder = SequentialMonteCarlo(2, temperature=LAMBDA, every=1, threshold=threshold, resampling=resampling)
    found = decode(decoder, actors, 2500)
    expected = expected_of(actors, by_reward, resampling=resampling, threshold=threshold)
    assert_distributed(found, expected)
    assert_distributed(decode_apart(decoder, actors, 2500), expected)
    assert statistic(found, expected_of(actors, by_reward, resampling=resampling, threshold=0.0)) > 1.5


def test_its_distribution_where_it_is_resampled_again(files: Path) -> None:
    """A particle's weight is what its twist has become since the last resampling."""
    actors = load(files, 3)
    found = decode(SequentialMonteCarlo(2, temperature=0.8, every=1, threshold=0.9), actors, 2500)
    expected = expected_of(actors, lambda one: reward_of(one) / 0.8, resampling="systematic", threshold=0.9, length=3)
    assert_distributed(found, expected)


class FirstToken(Told):
    """Rewards a response by how it begins."""

    def __call__(self, prompts: Any, responses: Any, token_ids: Any) -> torch.Tensor:
        return super().__call__(prompts, responses, [[ids[:1] for ids in rows] for rows in token_ids])


def test_after_a_resampling_weights_begin_anew(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where later tokens change no reward there is nothing to resample for a second time."""
    weighed, streams = list[torch.Tensor](), set()
    real_noise = sequential_monte_carlo.prompt_noise

    def watched(function: Any) -> Any:
        return lambda log_weights: (weighed.append(log_weights), function(log_weights))[1]

    def noise(*given: Any, stream: str, **options: Any) -> torch.Tensor:
        streams.add(stream)
        return real_noise(*given, stream=stream, **options)

    for name in ("effective_samples", "particle_weights"):
        monkeypatch.setattr(sequential_monte_carlo, name, watched(getattr(sequential_monte_carlo, name)))
    monkeypatch.setattr(sequential_monte_carlo, "prompt_noise", noise)
    decode(SequentialMonteCarlo(2, every=1, threshold=1.0), load(files, 3, reward=FirstToken()), 50)
    apart = [bool((logs[..., 0] != logs[..., 1]).any()) for logs in weighed]
    assert apart == [True, True, False, False, False], "whether to resample and by what weights, and which to return"
    assert streams == {"test/resampling", "test/choice"}


@pytest.mark.parametrize("amortised", [False, True])
def test_its_distribution_by_a_value_model(amortised: bool, actors: Actors) -> None:
    scorer: Any = actors.value
    rewards = torch.tensor([[-0.2, 0.3, 1.0, 2.2]])
    at_start = bins_after(scorer.model, PROMPT, [])
    log_cdf = predicted_log_cdf(at_start[None]) if amortised else edge_log_cdf(rewards, scorer.bins.edges)
    weights = bon_bin_log_weights(log_cdf, n=16.0)[0]

    @cache
    def twist(response: Any) -> float:
        return float((bins_after(scorer.model, PROMPT, list(response)) + weights).logsumexp(0))

    decoder = SequentialMonteCarlo(2, twist="value", aim=16, every=1, threshold=1.0, amortised=amortised)
    batch = batch_of([PROMPT])._replace(reference_rewards=rewards)
    actors.reward.asked.clear()  # type: ignore[union-attr]
    found = decoder(actors, batch, num_samples=3000, **OPTIONS)
    assert actors.reward.asked == []  # type: ignore[union-attr]
    expected = expected_of(actors, twist, resampling="systematic", threshold=1.0)
    assert_distributed(found, expected)
    assert statistic(found, dict(Continuations(actors.policy).after((), 2))) > 1.5
    assert found.cost.reward_calls == 0
    first = len(PROMPT) + 6000
    assert first + len(PROMPT) + 6000 < found.cost.value_tokens <= first + len(PROMPT) + 12000


def test_reading_the_prompt_to_predict_its_rewards_is_counted(actors: Actors) -> None:
    batch = batch_of([PROMPT])._replace(reference_rewards=torch.tensor([[-0.2, 0.3, 1.0, 2.2]]))
    known, predicted = (
        SequentialMonteCarlo(1, twist="value", amortised=amortised)(actors, batch, num_samples=5, **OPTIONS).cost
        for amortised in (False, True)
    )
    assert predicted.value_tokens == known.value_tokens + len(PROMPT)


def test_what_the_value_model_aims_at_and_reads(actors: Actors) -> None:
    tables = [torch.tensor([rewards]) for rewards in ([-0.2, 0.3, 1.0, 2.2], [2.0, 2.1, 2.2, 9.0])]

    def tokens(table: int, **options: Any) -> torch.Tensor:
        batch = batch_of([PROMPT])._replace(reference_rewards=tables[table])
        decoder = SequentialMonteCarlo(3, twist="value", every=1, threshold=1.0, **options)
        return decoder(actors, batch, num_samples=200, **OPTIONS).tokens

    assert torch.equal(tokens(0), tokens(0, aim=3)) and not torch.equal(tokens(0), tokens(0, aim=64))
    assert not torch.equal(tokens(0), tokens(1))
    assert torch.equal(tokens(0, amortised=True), tokens(1, amortised=True)), "which reads no table"
    assert not torch.equal(tokens(0), tokens(0, amortised=True))


def test_many_particles_come_to_the_tilted_reference(actors: Actors) -> None:
    tilted = Outcomes()
    for response, probability in Continuations(actors.policy).after((), 2):
        tilted.add(response, probability * math.exp(reward_of(response)))
    expected = {response: share / sum(tilted.values()) for response, share in tilted.items()}
    assert_distributed(decode(SequentialMonteCarlo(24, every=1, threshold=1.0), actors, 800), expected)
    assert statistic(decode(SequentialMonteCarlo(1), actors, 800), expected) > 1.5


@pytest.mark.parametrize(
    "options",
    [{"n": 1}, {"n": 4, "temperature": math.inf}, {"n": 5, "temperature": math.inf, "threshold": 1.0}],
    ids=str,
)
def test_one_particle_or_no_twist_is_a_sample(options: dict[str, Any], files: Path) -> None:
    actors = load(files, 4)
    n = options["n"]
    found = decode(
        SequentialMonteCarlo(**({"threshold": 0.9} | options), every=1, resampling="multinomial"), actors, 60
    )
    drawn = actors.sample(actors.policy, batch_of([PROMPT]), num_samples=60 * n, **OPTIONS)
    width = found.tokens.shape[-1]
    groups = drawn.tokens[..., :width].view(60, n, width)
    assert (groups == found.tokens[0, :, None]).all(-1).any(-1).all()
    same = decode(SoftBestOfN(n, math.inf), actors, 60)
    assert torch.equal(same.tokens, found.tokens)
    assert n > 1 or found.cost.reward_calls == 60, "one is not judged on the way"


def test_without_resampling_it_is_soft_best_of_n(files: Path) -> None:
    actors = load(files, 4)
    ours = decode(SequentialMonteCarlo(4, temperature=LAMBDA, threshold=0.0), actors, 60)
    theirs = decode(SoftBestOfN(4, LAMBDA), actors, 60)
    for name in ("tokens", "mask", "finished", "rewards"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert ours.cost[:3] == theirs.cost[:3] and ours.kl_bound == theirs.kl_bound
    assert not torch.equal(ours.tokens, decode(BestOfN(4), actors, 60).tokens)


def test_what_it_costs(files: Path) -> None:
    """Each token once, and a reward for every particle that has changed at each resampling."""
    actors: Any = load(files, 5)
    found = decode(SequentialMonteCarlo(3, temperature=1e9, every=2), actors, 8)  # never due: all weigh the same
    drawn = actors.sample(actors.policy, batch_of([PROMPT]), num_samples=24, **OPTIONS)
    lengths = drawn.mask.sum(-1).flatten()
    assert found.cost.generated_tokens == int(lengths.sum())
    ended = drawn.finished.flatten()
    again = [24 - int((ended & (lengths <= length)).sum()) for length in (2, 4)]
    assert found.cost.reward_calls == len(actors.reward.asked) == 24 + sum(again)
    assert found.kl_bound == pytest.approx(3 * math.log(3))


def test_an_interval_at_which_nothing_is_judged(actors: Actors) -> None:
    message = r"^every is 4, and a response has at most 2 tokens: .*, or ask for one of n by its weight, which is thres"
    with pytest.raises(ValueError, match=message):
        decode(SequentialMonteCarlo(4), actors, 1)


@pytest.mark.filterwarnings("ignore:the reward says None")
def test_a_particle_without_a_reward_does_not_go_on(files: Path) -> None:
    actors = load(files, 3, reward=Told(silent=[3, 4]), reward_calls=RewardCalls(on_missing="skip"))
    found = decode(SequentialMonteCarlo(2, every=1, threshold=1.0), actors, 200)
    drawn = actors.sample(actors.policy, batch_of([PROMPT]), num_samples=400, **OPTIONS)
    hopeless = (drawn.tokens[0, :, 0] >= 3).view(200, 2).all(-1)
    assert 0 < int(hopeless.sum()) < 200
    assert torch.equal(found.tokens[0, :, 0] >= 3, hopeless)
    assert found.rewards is not None and torch.equal(found.rewards.isnan()[0], hopeless)


def test_what_is_not_said() -> None:
    default = SequentialMonteCarlo()
    assert (default.n, default.twist, default.temperature, default.aim) == (8, "reward", 1.0, None)
    assert (default.every, default.threshold, default.resampling) == (4, 0.5, "systematic")
    assert default.amortised is False and default.rows == 8
    for options, needs in (
        ({}, (True, False, False)),
        ({"twist": "value"}, (False, True, True)),
        ({"twist": "value", "amortised": True}, (False, True, False)),
    ):
        one = SequentialMonteCarlo(**options)  # type: ignore[arg-type]
        assert (one.needs_reward, one.needs_value_model, one.reads_table) == needs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must be an integer >= 1, got 0"),
        ({"every": 0}, "every must be an integer >= 1, got 0"),
        ({"twist": "luck"}, "twist must be reward or value, got 'luck'"),
        ({"resampling": "none"}, "resampling must be systematic or multinomial, got 'none'"),
        ({"temperature": 0.0}, "temperature must be greater than 0, got 0.0"),
        ({"aim": 1}, "aim must be greater than 1, got 1"),
        ({"threshold": 1.5}, "threshold must be at most 1, got 1.5"),
        ({"threshold": -1}, "threshold must be at least 0, got -1"),
        ({"n": 4, "threshold": 0.25}, "threshold=0.25 of n=4 is at most one particle, and there are never fewer: .*"),
        ({"twist": "value", "temperature": 0.5}, f"temperature=0.5 has no effect with twist=value: {REMEDY}"),
        ({"aim": 4}, f"aim=4 has no effect with twist=reward: {REMEDY}"),
        ({"amortised": True}, f"amortised=True has no effect with twist=reward: {REMEDY}"),
        ({"threshold": 0, "every": 2}, f"every=2 has no effect with threshold=0: {REMEDY}"),
        (
            {"threshold": 0.0, "resampling": "multinomial"},
            f"resampling=multinomial has no effect with threshold=0: {REMEDY}",
        ),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        SequentialMonteCarlo(**options)


def test_the_least_threshold_and_one_particle_are_taken() -> None:
    assert SequentialMonteCarlo(4, threshold=0.26).threshold == 0.26
    assert SequentialMonteCarlo(1, threshold=0.5).n == 1, "a plain sample, whatever else is asked for"


def test_what_does_not_fit_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ValueError, match=r"^data\.max_rows is 4, and SequentialMonteCarlo makes a response of 8 rows"):
        SequentialMonteCarlo(8).check_fits(longest=16, max_rows=4)
    SequentialMonteCarlo(8).check_fits(longest=16, max_rows=8)
    with pytest.raises(ValueError, match="^every is 4, and a response has at most 4 tokens"):
        SequentialMonteCarlo(2, threshold=0.9).check_fits(longest=4, max_rows=None)


def test_particles_that_weigh_the_same_are_not_resampled(files: Path) -> None:
    """Not even at the highest threshold: rounding alone makes them no less than all."""
    actors = load(files, 4, reward=Same())
    found = decode(SequentialMonteCarlo(3, every=1, threshold=1.0, resampling="multinomial"), actors, 60)
    never = decode(SequentialMonteCarlo(3, threshold=0.0), actors, 60)
    assert torch.equal(found.tokens, never.tokens)


class Same(Told):
    """Gives all responses, whole or not, one reward."""

    def __call__(self, prompts: Any, responses: Any, token_ids: Any) -> torch.Tensor:
        return torch.full_like(super().__call__(prompts, responses, token_ids), 0.3)


def test_a_plain_sample_has_no_kl(actors: Actors) -> None:
    for temperature, bound in ((math.inf, 0.0), (1e9, 2 * math.log(4))):
        decoder = SequentialMonteCarlo(4, temperature=temperature, every=1)
        found = decoder(actors, batch_of([PROMPT]), num_samples=2, **OPTIONS)
        assert found.kl_bound == bound
        assert (found.cost.reward_calls == 8) == (bound == 0), "whole responses alone, which are to have their rewards"
