"""Best-of-N token by token, against a decoder that runs every prefix and candidate by itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from tests.helpers import EOS
from tests.models.setting import save_value_model
from tests.modules.setting import VowelReward, make_data, make_files
from tests.sampling.test_decode import batch_of
from tests.sampling.test_distilling import teacher_by_hand, worth
from vbon_lightning.actors import Actors, ActorSpec
from vbon_lightning.decoding import Decoded, ValueGuided, value_guided
from vbon_lightning.functional import bon_bin_log_weights, draw_candidates, edge_log_cdf, predicted_log_cdf
from vbon_lightning.sampling import decode, lookahead, prompt_noise
from vbon_lightning.sampling.distilling import CandidateRequest
from vbon_lightning.sampling.plain import runs_plain
from vbon_lightning.types import Completions, PromptBatch

PROMPTS = [[3, 4, 5], [6], [7, 8, 3, 4]]
REWARDS = torch.tensor([[-0.2, 0.3, 1.0, 2.2], [0.0, 0.1, 0.2, 0.3], [1.0, 1.0, 2.0, 3.0]])
OPTIONS: dict[str, Any] = {"seed": 3, "stream": "test", "step": 2}
LENGTH, TEMPERATURE, SAMPLES = 6, 0.8, 5
SETTING = {"max_new_tokens": LENGTH, "temperature": TEMPERATURE}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_files(tmp_path_factory.mktemp("files"))
    for body in ("llama", "gpt2"):
        save_value_model(make_data(directory, **SETTING), directory / f"value of {body}", body=str(directory / body))
    return directory


def load(files: Path, value: str | None = "value of gpt2", **changes: Any) -> Actors:
    spec: dict[str, Any] = {
        "policy": str(files / "gpt2"),
        "reference": str(files / "llama"),
        "reward": VowelReward(),
        "value_model": None if value is None else str(files / value),
    }
    return Actors.load(ActorSpec(**(spec | SETTING | changes)), value=True, trainable=False)


@pytest.fixture(scope="module")
def actors(files: Path) -> Actors:
    return load(files)


def prompts_of(rows: list[list[int]] = PROMPTS, *, rewards: bool = True) -> PromptBatch:
    """Make a batch whose prompts keep their numbers, whichever of them are in it."""
    places = [PROMPTS.index(row) for row in rows]
    batch = batch_of(rows)._replace(index=torch.tensor(places))
    return batch._replace(reference_rewards=REWARDS[places]) if rewards else batch


def rows_of(found: Decoded) -> list[list[tuple[list[int], list[float], bool]]]:
    """Return tokens, KL and whether it finished of each response."""
    assert found.token_kl is not None
    assert not found.token_kl[~found.mask].any()
    return [
        [
            (tokens[mask].tolist(), kl[mask].tolist(), bool(finished))
            for tokens, mask, kl, finished in zip(*group, strict=True)
        ]
        for group in zip(found.tokens, found.mask, found.token_kl, found.finished, strict=True)
    ]


def log_weights(actors: Actors, place: int, n: float, amortised: bool) -> Tensor:
    scorer = actors.value
    assert scorer is not None
    if amortised:
        log_cdf = predicted_log_cdf(scorer.prompt_log_probs(prompts_of([PROMPTS[place]])))
    else:
        log_cdf = edge_log_cdf(REWARDS[place : place + 1], scorer.bins.edges)
    return bon_bin_log_weights(log_cdf, n=n)[0]


def teacher(actors: Actors, prompt: list[int], response: list[int], weights: Tensor, top: int) -> Tensor:
    """Return the decoder's next-token distribution by hand, ``[V]``."""
    request = CandidateRequest(top=top, draws=0)
    options = {"temperature": TEMPERATURE}
    return teacher_by_hand(actors.reference, actors.value, prompt, response, weights, request, **options).teacher


@torch.no_grad()
def plain(actors: Actors, tokens: list[int]) -> Tensor:
    """Return the reference's own next-token distribution, ``[V]``."""
    reference: Any = actors.reference
    return (reference(input_ids=torch.tensor([tokens])).logits[0, -1].double() / TEMPERATURE).softmax(-1)


def decode_by_hand(
    actors: Actors, place: int, uniforms: Tensor, weights: Tensor, top: int
) -> tuple[list[int], list[float], bool]:
    tokens: list[int] = []
    divergences = []
    for uniform in uniforms.tolist():
        reference = plain(actors, PROMPTS[place] + tokens).log()
        guided = teacher(actors, PROMPTS[place], tokens, weights, top)
        divergences.append(float((guided * (guided.log() - reference)).sum()))
        tokens.append(int((guided.cumsum(0) <= uniform).sum()))
        if tokens[-1] == EOS:
            return tokens, divergences, True
    return tokens, divergences, False


@pytest.mark.parametrize("value", ["value of gpt2", "value of llama"])
@pytest.mark.parametrize(("top", "n", "amortised"), [(11, 4.0, False), (16, 2.5, True), (4, 4.0, False), (2, 8, True)])
def test_equals_slow_decoding(value: str, top: int, n: float, amortised: bool, files: Path) -> None:
    actors = load(files, value)
    found = ValueGuided(n=n, top=top, draws=0, amortised=amortised)(
        actors, prompts_of(), num_samples=SAMPLES, **OPTIONS
    )
    noise = prompt_noise([0, 1, 2], num_samples=SAMPLES, length=LENGTH, **OPTIONS)
    for place, group in enumerate(rows_of(found)):
        weights = log_weights(actors, place, n, amortised)
        for sample, (tokens, kl, finished) in enumerate(group):
            expected = decode_by_hand(actors, place, noise[place, sample], weights, top)
            assert (tokens, finished) == (expected[0], expected[2])
            assert kl == pytest.approx(expected[1], abs=1e-4)
    assert amortised or found.finished.any()
    assert found.token_kl is not None
    assert found.token_kl.max() > 0.05


@pytest.mark.parametrize("top", [11, 3])
def test_the_first_two_tokens_are_drawn_from_the_tilted_reference(top: int, actors: Actors) -> None:
    samples, prompt = 4000, PROMPTS[2]
    actors.max_new_tokens = 2
    try:
        found = ValueGuided(n=4, top=top, draws=0)(actors, prompts_of([prompt]), num_samples=samples, **OPTIONS)
    finally:
        actors.max_new_tokens = LENGTH
    weights = log_weights(actors, 2, 4, False)
    first = teacher(actors, prompt, [], weights, top)
    second = torch.stack([teacher(actors, prompt, [token], weights, top) for token in range(11)])
    expected = first[:, None] * second * samples
    counts = torch.zeros(11, 11)
    for tokens in found.tokens[0].tolist():
        if tokens[0] != EOS:
            counts[tokens[0], tokens[1]] += 1
    firsts = torch.bincount(found.tokens[0, :, 0], minlength=11)
    for seen, wanted in ((firsts, first * samples), (counts, expected)):
        likely = wanted > 5
        if seen is counts:
            likely[EOS] = False
        statistic = float(((seen - wanted).square() / wanted)[likely].sum())
        assert statistic < chi2.ppf(0.999, int(likely.sum()))
    # Which the reference's own samples are not.
    others = plain(actors, prompt) * samples
    assert float(((firsts - others).square() / others).sum()) > 100


def test_near_one_it_is_the_reference(actors: Actors) -> None:
    found = ValueGuided(n=1 + 1e-9, draws=0)(actors, prompts_of(), num_samples=40, **OPTIONS)
    assert actors.reference is not None
    drawn = actors.sample(actors.reference, prompts_of(), num_samples=40, **OPTIONS)
    assert actors.token_ids(found) == actors.token_ids(drawn)
    assert torch.equal(found.finished, drawn.finished)
    assert found.token_kl is not None
    assert found.token_kl.max() < 1e-5


@pytest.mark.parametrize("change", [{"seed": 4}, {"stream": "other"}, {"step": 3}], ids=str)
def test_what_the_noise_depends_on(change: dict[str, Any], actors: Actors) -> None:
    decoder = ValueGuided(n=4)
    one, same = (decoder(actors, prompts_of(), num_samples=SAMPLES, **OPTIONS) for _ in range(2))
    other = decoder(actors, prompts_of(), num_samples=SAMPLES, **(OPTIONS | change))
    assert torch.equal(one.tokens, same.tokens)
    assert actors.token_ids(one) != actors.token_ids(other)


@pytest.mark.parametrize("rewards", [False, True], ids=["amortised", "table"])
def test_neighbours_and_padding_do_not_matter(rewards: bool, actors: Actors) -> None:
    decoder = ValueGuided(n=4, top=5)
    whole = rows_of(decoder(actors, prompts_of(rewards=rewards), num_samples=SAMPLES, **OPTIONS))
    for rows in ([PROMPTS[1]], [PROMPTS[2], PROMPTS[0]]):
        found = rows_of(decoder(actors, prompts_of(rows, rewards=rewards), num_samples=SAMPLES, **OPTIONS))
        for row, group in zip(rows, found, strict=True):
            for ours, theirs in zip(group, whole[PROMPTS.index(row)], strict=True):
                assert (ours[0], ours[2]) == (theirs[0], theirs[2])
                assert ours[1] == pytest.approx(theirs[1], abs=1e-5)


@pytest.mark.parametrize("options", [{"top": 5}, {"top": 2, "draws": 3}], ids=["top", "drawn"])
def test_logits_are_weighed_some_rows_at_once(
    options: dict[str, int], actors: Actors, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, sizes = ValueGuided(n=4, **options), []
    whole = decoder(actors, prompts_of(), num_samples=SAMPLES, **OPTIONS)

    def two_rows(logits: Tensor) -> list[slice]:
        return decode.bounded_rows(logits, 2 * logits.shape[-1])

    def sized(log_reference: Tensor, **given: Any) -> Any:
        sizes.append(len(log_reference))
        return draw_candidates(log_reference, **given)

    monkeypatch.setattr(value_guided, "bounded_rows", two_rows)
    monkeypatch.setattr(value_guided, "draw_candidates", sized)
    found = decoder(actors, prompts_of(), num_samples=SAMPLES, **OPTIONS)
    assert max(sizes) == 2
    assert torch.equal(found.tokens, whole.tokens) and torch.equal(found.mask, whole.mask)


def test_the_distribution_of_the_reward_is_the_tables_unless_amortised(actors: Actors) -> None:
    def kl(decoder: ValueGuided, rewards: bool) -> Tensor:
        found = decoder(actors, prompts_of(rewards=rewards), num_samples=SAMPLES, **OPTIONS).token_kl
        assert found is not None
        return found[..., 0]

    assert torch.equal(kl(ValueGuided(n=4, amortised=True), True), kl(ValueGuided(n=4), False))
    assert not torch.allclose(kl(ValueGuided(n=4, amortised=True), True), kl(ValueGuided(n=4), True), atol=1e-3)


def test_a_model_that_cannot_look_ahead(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    actors = load(files, "value of llama")
    expected = rows_of(ValueGuided(n=4)(actors, prompts_of(), num_samples=2, **OPTIONS))
    monkeypatch.setattr(lookahead, "can_look_ahead", lambda _: False)
    found = rows_of(ValueGuided(n=4)(actors, prompts_of(), num_samples=2, **OPTIONS))
    assert [[row[0] for row in group] for group in found] == [[row[0] for row in group] for group in expected]


def test_finished_responses_leave_and_what_it_costs(files: Path) -> None:
    actors = load(files)
    assert actors.value is not None
    assert actors.reference is not None
    lookahead.can_look_ahead(actors.value.model)  # these run the models to know
    runs_plain(actors.reference)
    reads: list[tuple[int, ...]] = []
    rows: list[int] = []
    actors.value.model.body.register_forward_hook(
        lambda _, arguments, options, out: reads.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    actors.reference.get_input_embeddings().register_forward_hook(lambda _, arguments, out: rows.append(len(out)))
    found = ValueGuided(n=4, top=7, draws=0)(actors, prompts_of(), num_samples=SAMPLES, **OPTIONS)
    running = found.mask.sum((0, 1)).tolist()
    assert running[0] == 15 > running[-1] > 0
    assert rows == [3, *running[1:]], "prompts, then what still runs"
    assert [shape for shape in reads if shape[1] == 7] == [(count, 7) for count in running]
    assert [shape for shape in reads if shape[1] == 1] == [(count, 1) for count in running[1:]]
    generated, value_tokens, calls = found.cost[:3]
    assert (generated, calls) == (sum(running), 0)
    # Candidates, the tokens themselves, and the prompts.
    assert 7 * generated < value_tokens <= 8 * generated + 8


def test_no_longer_than_the_longest_response(actors: Actors) -> None:
    def decode(step: int) -> Decoded:
        return ValueGuided(n=4)(actors, prompts_of([PROMPTS[1]]), num_samples=1, **(OPTIONS | {"step": step}))

    found = next(one for step in range(100) if (one := decode(step)).finished.all() and one.tokens.shape[-1] < LENGTH)
    assert found.mask.all()
    assert found.tokens[0, 0, -1] == EOS


def test_it_is_no_sample_of_a_policy(actors: Actors) -> None:
    found: Any = ValueGuided()(actors, prompts_of(), num_samples=1, **OPTIONS)
    assert not isinstance(found, Completions)
    assert not hasattr(found, "log_probs")
    assert ValueGuided.needs_value_model


# -- drawn candidates --


class Choice(NamedTuple):
    """What is chosen among candidates, by hand."""

    tokens: Tensor
    """``[k]``."""
    share: Tensor
    """``[k]``: with which probability."""
    tilt: float
    """The KL of the choice to the candidates' own masses."""


def choice_by_hand(ref: Tensor, after: Tensor, likely: Tensor, drawn: list[int]) -> Choice:
    """Return the choice among the likely tokens and some of the rest, of worth ``after [V]``."""
    rest = 1 - float(ref[likely].sum())
    tokens = torch.cat([likely, torch.tensor(drawn)])
    mass = torch.cat([ref[likely], torch.full((len(drawn),), rest / len(drawn), dtype=torch.float64)])
    share = mass * after[tokens]
    share = share / share.sum()
    return Choice(tokens, share, float((share * (share / mass).log()).sum()))


def values_by_hand(actors: Actors, prompt: list[int], response: list[int], weights: Tensor) -> Tensor:
    """Return W ``[V]`` after each token."""
    prefix = torch.tensor(prompt + response)
    every = torch.cat([prefix.expand(11, -1), torch.arange(11)[:, None]], dim=1)
    assert actors.value is not None
    return worth(actors.value, every, len(response) + 1, weights)


@pytest.mark.parametrize(
    ("top", "draws", "n", "amortised"), [(2, 3, 4.0, False), (0, 4, 2.5, True), (11, 2, 4.0, False)]
)
def test_drawn_candidates_equal_slow_decoding(top: int, draws: int, n: float, amortised: bool, actors: Actors) -> None:
    decoder = ValueGuided(n=n, top=top, draws=draws, amortised=amortised)
    found = decoder(actors, prompts_of(), num_samples=SAMPLES, **OPTIONS)
    noise = prompt_noise([0, 1, 2], num_samples=SAMPLES, length=LENGTH * (1 + draws), **OPTIONS)
    noise = noise.view(3, SAMPLES, LENGTH, 1 + draws)
    for place, group in enumerate(rows_of(found)):
        weights = log_weights(actors, place, n, amortised)
        for sample, (tokens, kl, finished) in enumerate(group):
            for length, token in enumerate(tokens):
                ref = plain(actors, PROMPTS[place] + tokens[:length])
                after = values_by_hand(actors, PROMPTS[place], tokens[:length], weights)
                likely = ref.argsort(descending=True)[:top]
                rest = ref.index_fill(0, likely, 0.0)
                first, *others = noise[place, sample, length].tolist()
                strata = [(number + u) / draws * float(rest.sum()) for number, u in enumerate(others)]
                drawn = [int((rest.cumsum(0) <= at).sum()) for at in strata] if top < 11 else []
                hand = choice_by_hand(ref, after, likely, drawn) if drawn else exact_by_hand(ref, after, likely)
                assert token == hand.tokens[int((hand.share.cumsum(0) <= first).sum())]
                assert kl[length] == pytest.approx(hand.tilt, abs=1e-4)
            assert finished == (tokens[-1] == EOS)
            assert finished or len(tokens) == LENGTH


def exact_by_hand(ref: Tensor, after: Tensor, tokens: Tensor) -> Choice:
    share = (ref * after / (ref * after).sum())[tokens]
    return Choice(tokens, share, float((share * (share / ref[tokens]).log()).sum()))


def test_drawn_candidates_are_on_average_those_of_all_draws(actors: Actors) -> None:
    """Of two draws each has one half of the rest: the probability of every pair of tokens is exact."""
    samples, prompt, top = 6000, PROMPTS[0], 2
    actors.max_new_tokens = 1
    try:
        found = ValueGuided(n=4, top=top, draws=2)(actors, prompts_of([prompt]), num_samples=samples, **OPTIONS)
    finally:
        actors.max_new_tokens = LENGTH
    ref = plain(actors, prompt)
    after = values_by_hand(actors, prompt, [], log_weights(actors, 0, 4, False))
    likely = ref.argsort(descending=True)[:top]
    rest = ref.index_fill(0, likely, 0.0)
    rest = rest / rest.sum()
    upto = rest.cumsum(0)
    # How much of each token's piece of [0, 1) lies in the first half, and how much in the second.
    first = 2 * (upto.clamp(max=0.5) - (upto - rest).clamp(max=0.5))
    second = 2 * rest - first
    expected, tilt = torch.zeros(11, dtype=torch.float64), 0.0
    for one in range(11):
        for other in range(11):
            chance = float(first[one] * second[other])
            if chance > 0:
                hand = choice_by_hand(ref, after, likely, [one, other])
                expected.index_add_(0, hand.tokens, chance * hand.share)
                tilt += chance * hand.tilt
    assert float(expected.sum()) == pytest.approx(1)
    counts = torch.bincount(found.tokens.flatten(), minlength=11).double()
    assert float((counts / samples - expected).abs().sum()) / 2 < 0.025
    likely_enough = samples * expected > 5
    statistic = ((counts - samples * expected).square() / (samples * expected))[likely_enough].sum()
    assert float(statistic) < chi2.ppf(0.999, int(likely_enough.sum()))
    # Near Best-of-N's own distribution, far from the reference's.
    exact = ref * after / (ref * after).sum()
    assert float((expected - exact).abs().sum()) < 0.5 * float((ref - exact).abs().sum())
    # What it says of its KL is that of candidate and choice together: no less than the choice's own.
    assert found.token_kl is not None
    assert float(found.token_kl.double().mean()) == pytest.approx(tilt, rel=0.02)
    assert tilt >= float((expected * (expected / ref).log()).sum())


def test_draws_change_what_is_chosen(actors: Actors) -> None:
    def decode(**options: int) -> tuple[Any, Tensor]:
        found = ValueGuided(n=4, **options)(actors, prompts_of(), num_samples=SAMPLES, **OPTIONS)
        assert found.token_kl is not None
        return actors.token_ids(found), found.token_kl[..., 0]

    few, more, none = (decode(top=2, draws=draws) for draws in (2, 5, 0))
    for one, other in ((few, more), (few, none), (more, none)):
        assert one[0] != other[0]
        assert not torch.allclose(one[1], other[1], atol=1e-4)
    # Where all tokens are candidates there is nothing to draw.
    all_of_them, drawn = decode(top=11, draws=0), decode(top=11, draws=5)
    torch.testing.assert_close(all_of_them[1], drawn[1], atol=1e-5, rtol=1e-5)
    assert ValueGuided().draws == 16


# -- what is refused --


@pytest.mark.parametrize("n", [1, 0.5, math.inf, math.nan, True, "4"])
def test_an_n_that_makes_no_sense(n: Any) -> None:
    with pytest.raises(ValueError, match="n must be a number > 1, got"):
        ValueGuided(n=n)


def test_one_candidate_is_none() -> None:
    for top, draws in ((1, 0), (0, 1), (-1, 5), (5, -1)):
        with pytest.raises(ValueError, match=f"must together name at least 2 candidates, got {top}, {draws}"):
            ValueGuided(top=top, draws=draws)


def test_it_needs_a_value_model(files: Path) -> None:
    with pytest.raises(ValueError, match=r"ValueGuided needs a value model: name one as data.value_model"):
        ValueGuided()(load(files, None), prompts_of(), num_samples=1, **OPTIONS)


def test_the_context_must_hold_the_response(files: Path) -> None:
    long = batch_of([[3] * 60])
    with pytest.raises(ValueError, match="exceed the model's context of 64 tokens"):
        ValueGuided()(load(files), long, num_samples=1, **OPTIONS)
