"""Best-of-N token by token, against a decoder that runs every prefix and candidate by itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from tests.helpers import EOS
from tests.modules.setting import VowelReward, make_data, make_files
from tests.sampling.test_decode import batch_of
from tests.sampling.test_distilling import teacher_by_hand
from tests.test_value_models import save_value_model
from vbon_lightning.actors import Actors, ActorSpec
from vbon_lightning.decoding import Decoded, ValueGuided
from vbon_lightning.functional import bon_bin_log_weights, edge_log_cdf, predicted_log_cdf
from vbon_lightning.sampling import lookahead, prompt_noise
from vbon_lightning.sampling.distilling import CandidateRequest
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
    lookahead.can_look_ahead(actors.value.model)  # it runs the model to know
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
    generated, value_tokens, calls = found.cost
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


def test_drawn_candidates_are_on_average_what_the_teacher_by_hand_draws(files: Path) -> None:
    """With drawn candidates the first token is the mean, over their draws, of the teachers that they make."""
    actors = load(files)
    scorer = actors.value
    assert scorer is not None
    prompt, top, draws, samples = PROMPTS[0], 2, 2, 4000
    # At one token a response the first token is all there is.
    actors.max_new_tokens = 1
    decoder = ValueGuided(n=4, top=top, draws=draws)
    found = decoder(actors, prompts_of([prompt]), num_samples=samples, **OPTIONS)
    weights = bon_bin_log_weights(edge_log_cdf(REWARDS[:1], scorer.bins.edges), n=4)[0]
    grid, request = 12, CandidateRequest(top=top, draws=draws)
    expected: Any = 0.0
    for first in range(grid):
        for second in range(grid):
            uniforms = (torch.tensor([first, second], dtype=torch.float64) + 0.5) / grid
            hand = teacher_by_hand(
                actors.reference, scorer, prompt, [], weights, request, uniforms=uniforms, temperature=TEMPERATURE
            )
            ref = reference_probs(actors, prompt)
            expected = expected + chosen_by_hand(ref, hand.teacher, top) / grid**2
    share = torch.bincount(found.tokens.flatten(), minlength=len(expected)).double() / samples
    assert (share - expected).abs().sum() / 2 < 0.03
    exact = teacher_by_hand(
        actors.reference, scorer, prompt, [], weights, CandidateRequest(top=100, draws=0), temperature=TEMPERATURE
    ).teacher
    assert (share - exact).abs().sum() / 2 < 0.1, "and near Best-of-N's own"


def reference_probs(actors: Actors, prompt: list[int]) -> Tensor:
    assert actors.reference is not None
    with torch.no_grad():
        logits = actors.reference(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1].double()
    return (logits / TEMPERATURE).softmax(-1)


def chosen_by_hand(ref: Tensor, teacher: Tensor, top: int) -> Tensor:
    """Turn a teacher over drawn candidates into what is chosen among them: the untouched rest is taken off."""
    likely = ref.argsort(descending=True)[:top]
    rest = ref.clone().index_fill_(0, likely, 0.0)
    moved = teacher - ref
    # A drawn token carries the rest's mass; elsewhere the teacher is the reference itself, which nothing chooses.
    drawn = (moved.abs() > 1e-12) & (rest > 0)
    share = torch.zeros_like(ref)
    share[likely] = teacher[likely]
    count = int(drawn.sum())
    if count:
        mass = rest.sum() / 2  # two strata
        hits = torch.full((count,), 2 / count, dtype=torch.float64)
        share[drawn] = moved[drawn] + mass * hits
    return share
