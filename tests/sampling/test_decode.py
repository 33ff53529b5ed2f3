"""The decode loop against a slow one without a cache, and what a row may depend on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, MistralConfig, Qwen2Config

from tests.helpers import tiny_gpt2, tiny_llama
from vbon_lightning.functional import response_mask, token_log_probs
from vbon_lightning.sampling import decode as decode_module
from vbon_lightning.sampling import prompt_noise, response_logits, sample_completions
from vbon_lightning.sampling.cache import can_share_prompts
from vbon_lightning.sampling.plain import runs_plain
from vbon_lightning.sampling.request import SamplingRequest
from vbon_lightning.sharding import Lockstep
from vbon_lightning.types import Completions, PromptBatch

VOCABULARY, PAD = 24, 0
MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}
DEEPER = {
    "llama": {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt2": {"n_layer": 2},
}
PROMPTS = [[3, 4, 5, 6, 7], [9], [11, 12, 5], [3, 4]]


def pad_left(rows: list[list[int]], width: int | None = None) -> tuple[Tensor, Tensor]:
    width = width or max(map(len, rows))
    tokens = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    return tokens, mask


def batch_of(rows: list[list[int]]) -> PromptBatch:
    tokens, mask = pad_left(rows)
    return PromptBatch(torch.arange(len(rows)), torch.ones(len(rows), dtype=torch.bool), tokens, mask, [""] * len(rows))


def noise_of(identities: list[int], samples: int = 6, length: int = 10, **settings: object) -> Tensor:
    entries: dict = {"seed": 5, "stream": "train", "step": 0} | settings
    return prompt_noise(identities, num_samples=samples, length=length, **entries)


def slow_decode(
    model: nn.Module, prompt: list[int], uniforms: Tensor, ends: list[int], temperature: float
) -> tuple[list[int], list[float], bool]:
    """Decode one response: a whole forward pass a token, and the inverse CDF written as a loop."""
    tokens, log_probs = [], []
    for uniform in uniforms.tolist():
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[0, -1]
        probabilities = torch.softmax(logits.double() / temperature, dim=-1).tolist()
        token, total = 0, probabilities[0]
        while uniform >= total:
            token += 1
            total += probabilities[token]
        tokens.append(token)
        log_probs.append(math.log(probabilities[token]))
        if token in ends:
            return tokens, log_probs, True
    return tokens, log_probs, False


def rows_of(completions: Completions) -> list[list[tuple[list[int], list[float], bool]]]:
    rows = []
    for prompt in range(completions.tokens.shape[0]):
        group = []
        for sample in range(completions.tokens.shape[1]):
            length = int(completions.mask[prompt, sample].sum())
            assert completions.mask[prompt, sample, :length].all()
            assert not completions.mask[prompt, sample, length:].any()
            assert (completions.log_probs[prompt, sample, length:] == 0).all()
            assert (completions.tokens[prompt, sample, length:] == PAD).all()
            group.append(
                (
                    completions.tokens[prompt, sample, :length].tolist(),
                    completions.log_probs[prompt, sample, :length].tolist(),
                    bool(completions.finished[prompt, sample]),
                )
            )
        rows.append(group)
    return rows


def assert_same(ours: tuple[list[int], list[float], bool], theirs: tuple[list[int], list[float], bool]) -> None:
    assert ours[0] == theirs[0]
    assert ours[1] == pytest.approx(theirs[1], abs=1e-5)
    assert ours[2] == theirs[2]


@pytest.fixture(params=[False, True], ids=["copied prompts", "shared prompts"])
def shared(request, monkeypatch):
    """Whether the decode loop holds each prompt once, however short it is."""
    monkeypatch.setattr(decode_module, "SHARE_FROM", 1 if request.param else 10**9)
    return request.param


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("ends", "early"), [([2, 7, 20], 0.3), ([], 0.0), ([2, *range(10, 20)], 0.9)], ids=["some", "none", "most"]
)
def test_equals_a_decode_without_cache(kind, ends, early, shared, monkeypatch):
    model = MODELS[kind](VOCABULARY, seed=1, spread=2.0, **DEEPER[kind])
    assert can_share_prompts(model) and not runs_plain(model)
    before = model.config._attn_implementation
    ends = ends or [VOCABULARY + 1]
    kept: list[int] = []
    select = decode_module.DynamicCache.batch_select_indices

    def counting(cache: object, indices: Tensor) -> None:
        kept.append(len(indices))
        select(cache, indices)

    monkeypatch.setattr(decode_module.DynamicCache, "batch_select_indices", counting)
    noise = noise_of([0, 1, 2, 3])
    ours = sample_completions(
        model, SamplingRequest(*pad_left(PROMPTS), noise, end_ids=ends, pad_id=PAD, temperature=0.7)
    )
    finished = 0
    for prompt, group, uniforms in zip(PROMPTS, rows_of(ours), noise, strict=True):
        for row, uniform in zip(group, uniforms, strict=True):
            assert_same(row, slow_decode(model, prompt, uniform, ends, 0.7))
            finished += row[2]
    assert finished >= early * 24, "the case does not finish as many rows as it should"
    assert bool(kept) == (early > 0), "finished rows leave the cache where there are some"
    assert kept == sorted(kept, reverse=True)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("kind", MODELS)
def test_prompts_of_one_length_need_no_mask(kind, shared):
    model = MODELS[kind](VOCABULARY, seed=2)
    prompts = [[3, 4, 5], [6, 7, 8]]
    noise = noise_of([0, 1])
    ours = sample_completions(model, SamplingRequest(*pad_left(prompts), noise, end_ids=[2, 4, 5], pad_id=PAD))
    for prompt, group, uniforms in zip(prompts, rows_of(ours), noise, strict=True):
        for row, uniform in zip(group, uniforms, strict=True):
            assert_same(row, slow_decode(model, prompt, uniform, [2, 4, 5], 1.0))


@pytest.mark.parametrize("kind", MODELS)
def test_a_row_depends_on_no_other(kind, shared):
    model = MODELS[kind](VOCABULARY, seed=3, spread=2.0)
    together = rows_of(
        sample_completions(
            model, SamplingRequest(*pad_left(PROMPTS, 9), noise_of([0, 1, 2, 3]), end_ids=[2, 9], pad_id=PAD)
        )
    )
    for place, prompt in enumerate(PROMPTS):
        alone = rows_of(
            sample_completions(
                model, SamplingRequest(*pad_left([prompt]), noise_of([place]), end_ids=[2, 9], pad_id=PAD)
            )
        )
        for ours, theirs in zip(alone[0], together[place], strict=True):
            assert_same(ours, theirs)
    backwards = sample_completions(
        model, SamplingRequest(*pad_left(PROMPTS[::-1]), noise_of([3, 2, 1, 0]), end_ids=[2, 9], pad_id=PAD)
    )
    for group, other in zip(rows_of(backwards)[::-1], together, strict=True):
        for ours, theirs in zip(group, other, strict=True):
            assert_same(ours, theirs)


def test_what_stands_in_the_padding_changes_nothing():
    model = tiny_gpt2(VOCABULARY, seed=3)
    tokens, mask = pad_left(PROMPTS)
    noise = noise_of([0, 1, 2, 3])
    one = sample_completions(model, SamplingRequest(tokens, mask, noise, end_ids=[2], pad_id=PAD))
    other = sample_completions(
        model, SamplingRequest(torch.where(mask, tokens, 17), mask, noise, end_ids=[2], pad_id=PAD)
    )
    assert torch.equal(one.tokens, other.tokens)
    assert torch.allclose(one.log_probs, other.log_probs, atol=1e-6)


class Unigram(nn.Module):
    """A language model that says the same after every text; what it lacks of a transformer is never asked for."""

    def __init__(self, logits: Tensor, model: nn.Module) -> None:
        super().__init__()
        self.inner, self.values, self.config = model, logits, model.config

    def forward(self, input_ids: Tensor, **arguments: object) -> object:
        output = self.inner(input_ids=input_ids, **arguments)
        output.logits = self.values.expand(*output.logits.shape[:2], -1)
        return output


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_samples_follow_the_tempered_distribution(temperature):
    probabilities = torch.tensor([0.05, 0.4, 0.0, 0.2, 0.25, 0.1])
    model = Unigram(probabilities.log(), tiny_llama(6))
    samples = 20_000
    noise = noise_of([0], samples=samples, length=1)
    drawn = sample_completions(
        model, SamplingRequest(*pad_left([[3]]), noise, end_ids=[5], pad_id=PAD, temperature=temperature)
    )
    counts = torch.bincount(drawn.tokens.flatten(), minlength=6).double()
    tempered = probabilities.double() ** (1 / temperature)
    expected = samples * tempered / tempered.sum()
    assert counts[2] == 0, "a token of probability zero is never drawn"
    possible = expected > 0
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert statistic < 18.5  # the 0.999 quantile of chi-square with 4 degrees of freedom
    assert drawn.log_probs.flatten().exp().double().numpy() == pytest.approx(
        (tempered / tempered.sum())[drawn.tokens.flatten()].numpy(), abs=1e-6
    )


def test_the_extreme_uniforms_draw_the_first_and_the_last_possible_token():
    model = Unigram(torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0]).log(), tiny_llama(5))
    noise = torch.tensor([0.0, 0.49999, 0.50001, 1 - 2**-53], dtype=torch.float64).view(1, 4, 1)
    drawn = sample_completions(model, SamplingRequest(*pad_left([[3]]), noise, end_ids=[2], pad_id=PAD))
    assert drawn.tokens.flatten().tolist() == [1, 1, 3, 3]


def test_two_tokens_follow_the_joint_distribution():
    model = tiny_llama(4, seed=4, spread=3.0)
    samples = 20_000
    drawn = sample_completions(
        model, SamplingRequest(*pad_left([[3, 1]]), noise_of([0], samples=samples, length=2), end_ids=[2], pad_id=PAD)
    )
    counts: dict[tuple[int, ...], int] = {}
    for tokens, _, _ in rows_of(drawn)[0]:
        counts[tuple(tokens)] = counts.get(tuple(tokens), 0) + 1
    statistic, outcomes, total = 0.0, 0, 0.0
    with torch.no_grad():
        first = model(input_ids=torch.tensor([[3, 1]])).logits[0, -1].double().softmax(-1)
        for one in range(4):
            after = model(input_ids=torch.tensor([[3, 1, one]])).logits[0, -1].double().softmax(-1)
            for sequence in [(one,)] if one == 2 else [(one, two) for two in range(4)]:
                probability = float(first[one] * (after[sequence[1]] if len(sequence) > 1 else 1))
                total += probability
                expected = samples * probability
                statistic += (counts.pop(sequence, 0) - expected) ** 2 / expected
                outcomes += 1
    assert total == pytest.approx(1, abs=1e-6)
    assert not counts
    assert outcomes == 13
    assert statistic < 32.9  # the 0.999 quantile with 12 degrees of freedom


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_equal_teacher_forced_ones(kind, temperature):
    model = MODELS[kind](VOCABULARY, seed=5, spread=2.0)
    prompts = batch_of(PROMPTS)
    drawn = sample_completions(
        model,
        SamplingRequest(
            prompts.tokens,
            prompts.mask,
            noise_of([0, 1, 2, 3]),
            end_ids=[2, 9, 15],
            pad_id=PAD,
            temperature=temperature,
        ),
    )
    assert drawn.finished.any()
    assert not drawn.finished.all()
    logits = response_logits(model, prompts, drawn).logits
    scored = token_log_probs(logits, drawn.tokens.reshape(24, -1), temperature=temperature).view(drawn.mask.shape)
    assert (scored - drawn.log_probs)[drawn.mask].abs().max() < 1e-4
    untempered = token_log_probs(logits, drawn.tokens.reshape(24, -1)).view(drawn.mask.shape)
    assert temperature == 1 or (untempered - drawn.log_probs)[drawn.mask].abs().max() > 0.05


@pytest.mark.parametrize("pad_id", [PAD, 2], ids=["pad", "pad is eos"])
def test_masks_come_from_the_first_eos(pad_id):
    model = tiny_llama(VOCABULARY, seed=6)
    drawn = sample_completions(
        model, SamplingRequest(*pad_left(PROMPTS), noise_of([0, 1, 2, 3], length=12), end_ids=[2, 5, 6], pad_id=pad_id)
    )
    assert torch.equal(drawn.mask, response_mask(drawn.tokens, eos_id=[2, 5, 6]))
    lengths = drawn.mask.sum(-1)
    last = drawn.tokens.gather(-1, (lengths - 1)[..., None]).squeeze(-1)
    ended = torch.isin(last, torch.tensor([2, 5, 6]))
    assert torch.equal(ended, drawn.finished)
    assert drawn.finished.any()
    assert not drawn.finished.all()
    assert (lengths[~drawn.finished] == 12).all(), "a cut response has its full length and no EOS"
    assert (drawn.tokens[~drawn.mask] == pad_id).all()


def test_no_longer_than_the_longest_response():
    certain = torch.full((6,), -torch.inf)
    certain[2] = 0.0
    drawn = sample_completions(
        Unigram(certain, tiny_llama(6)),
        SamplingRequest(*pad_left([[3], [4, 5]]), noise_of([0, 1]), end_ids=[2], pad_id=PAD),
    )
    assert drawn.tokens.shape == (2, 6, 1)
    assert (drawn.tokens == 2).all()
    assert drawn.mask.all()
    assert drawn.finished.all()


def test_half_precision(shared):
    model = tiny_llama(VOCABULARY, seed=7).to(torch.bfloat16)
    prompts = batch_of(PROMPTS)
    drawn = sample_completions(
        model, SamplingRequest(prompts.tokens, prompts.mask, noise_of([0, 1, 2, 3]), end_ids=[2, 3], pad_id=PAD)
    )
    assert drawn.log_probs.dtype == torch.float32
    scored = token_log_probs(response_logits(model, prompts, drawn).logits, drawn.tokens.reshape(24, -1))
    assert scored.dtype == torch.float32
    # The two passes add up in different orders: half a bfloat16 digit here and there.
    assert (scored.view(drawn.mask.shape) - drawn.log_probs)[drawn.mask].abs().max() < 0.1


@pytest.mark.parametrize("kind", MODELS)
def test_autocast_and_a_gradient_after_it(kind, shared):
    model = MODELS[kind](VOCABULARY, seed=8).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    prompts = batch_of(PROMPTS)
    noise = noise_of([0, 1, 2, 3], length=4)
    plain = sample_completions(model, SamplingRequest(prompts.tokens, prompts.mask, noise, end_ids=[2], pad_id=PAD))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        drawn = sample_completions(model, SamplingRequest(prompts.tokens, prompts.mask, noise, end_ids=[2], pad_id=PAD))
        assert drawn.log_probs.dtype == torch.float32
        scored = token_log_probs(response_logits(model, prompts, drawn).logits, drawn.tokens.reshape(24, -1))
    assert (scored.view(drawn.mask.shape) - drawn.log_probs)[drawn.mask].abs().max() < 0.1
    same = (drawn.tokens == plain.tokens).float().mean() if drawn.tokens.shape == plain.tokens.shape else 0.0
    assert same > 0.8
    scored.sum().backward()
    # Casting without a gradient must not leave weights without one.
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_nothing_is_recorded_for_a_gradient():
    model = tiny_llama(VOCABULARY)
    drawn = sample_completions(model, SamplingRequest(*pad_left([[3]]), noise_of([0]), end_ids=[2], pad_id=PAD))
    assert not drawn.log_probs.requires_grad


@pytest.mark.parametrize("kind", MODELS)
def test_prompt_and_response_must_fit_the_context(kind):
    sizes = {"llama": {"max_position_embeddings": 8}, "gpt2": {"n_positions": 8}}[kind]
    model = MODELS[kind](VOCABULARY, **sizes)
    tokens, mask = pad_left([[3, 4, 5], [6]])
    drawn = sample_completions(
        model, SamplingRequest(tokens, mask, noise_of([0, 1], length=5), end_ids=[99], pad_id=PAD)
    )
    assert drawn.tokens.shape[-1] == 5
    message = "a prompt of 3 tokens and a response of up to 6 exceed the model's context of 8 tokens: lower"
    with pytest.raises(ValueError, match=message):
        sample_completions(model, SamplingRequest(tokens, mask, noise_of([0, 1], length=6), end_ids=[99], pad_id=PAD))
    # Padding takes no room.
    sample_completions(
        model, SamplingRequest(*pad_left([[3, 4, 5], [6]], 7), noise_of([0, 1], length=5), end_ids=[99], pad_id=PAD)
    )


def other_model(kind: str) -> nn.Module:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": PAD,
    }
    config = {
        "gemma2": lambda: Gemma2Config(**sizes, head_dim=8, attn_logit_softcapping=0.5, sliding_window=64),
        "mistral": lambda: MistralConfig(**sizes, sliding_window=4),
        "qwen2": lambda: Qwen2Config(**sizes),
    }[kind]()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()


class _Waiting(Lockstep):
    """Stands for another process whose longest response has ten tokens."""

    def rows_to_run(self, running: Tensor) -> Tensor | None:
        return running if len(running) else running.new_zeros(1)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("plain", [False, True])
def test_passes_for_another_process_change_no_response(kind: str, plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS[kind](VOCABULARY, **DEEPER[kind])
    tokens, mask = pad_left(PROMPTS)
    request = SamplingRequest(tokens, mask, noise_of([0, 1, 2, 3], samples=2), list(range(12)), PAD)
    monkeypatch.setattr(decode_module, "runs_plain", lambda model: plain)
    monkeypatch.setattr(decode_module, "refuse_plain", lambda *_: None)
    expected = sample_completions(model, request)
    longest = expected.tokens.shape[-1]
    assert longest < 10, "all responses are to end early"
    monkeypatch.setattr(decode_module, "Lockstep", _Waiting)
    found = sample_completions(model, request)
    assert found.tokens.shape[-1] == 10
    assert torch.equal(found.finished, expected.finished)
    for ours, theirs, fill in zip(found[:2], expected[:2], (PAD, False), strict=True):
        assert torch.equal(ours[..., :longest], theirs)
        assert (ours[..., longest:] == fill).all()
    assert torch.equal(found.log_probs[..., :longest], expected.log_probs)
    assert not found.log_probs[..., longest:].any()
