"""The decode in fixed shapes against the eager loop, under the same noise."""

from __future__ import annotations

import gc
import warnings
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers import tiny_gpt2, tiny_llama
from tests.sampling.test_decode import DEEPER, MODELS, PAD, PROMPTS, VOCABULARY, noise_of, other_model, pad_left
from vbon_lightning.adapters import adapters_off, add_lora
from vbon_lightning.sampling import sample_completions
from vbon_lightning.sampling import static as static_module
from vbon_lightning.sampling.request import SamplingRequest
from vbon_lightning.sampling.static import GraphSampler, row_bucket, why_not_static
from vbon_lightning.types import Completions


def model_of(kind: str, **changes: Any) -> Any:
    return MODELS[kind](VOCABULARY, seed=1, spread=2.0, **(DEEPER[kind] | changes))


def assert_equal(ours: Completions, theirs: Completions, tolerance: float = 3e-5) -> None:
    for name in ("tokens", "mask", "finished"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert ours.log_probs.dtype == torch.float32
    assert (ours.log_probs - theirs.log_probs).abs().max() <= tolerance


def compare(sampler: Any, model: Any, prompts: list[list[int]] = PROMPTS, **changes: Any) -> Completions:
    arguments: dict[str, Any] = {"samples": 6, "length": 10, "end_ids": [2, 7, 20], "temperature": 0.7} | changes
    noise = noise_of(list(range(len(prompts))), arguments.pop("samples"), arguments.pop("length"))
    theirs = sample_completions(model, SamplingRequest(*pad_left(prompts), noise, pad_id=PAD, **arguments))
    ours = sampler(model, SamplingRequest(*pad_left(prompts), noise, pad_id=PAD, **arguments))
    assert_equal(ours, theirs)
    return ours


@pytest.fixture(autouse=True)
def _no_fallback():
    """Let no comparison pass because both sides were the eager loop."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*data.sampler=graph.*")
        yield


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "ends",
    [[2, 7, 20], [VOCABULARY + 1], [2, *range(10, 20)], list(range(VOCABULARY))],
    ids=["some", "none", "most", "at once"],
)
def test_the_same_as_the_eager_loop(kind, ends, attention):
    model = model_of(kind)
    model.set_attn_implementation(attention)
    drawn = compare(GraphSampler(), model, end_ids=ends)
    if len(ends) == 3:
        assert drawn.finished.any()
        assert len(set(drawn.mask.sum(-1).flatten().tolist())) > 3, "responses end at various places"


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("samples", [1, 9], ids=["one sample", "padded rows"])
@pytest.mark.parametrize("prompts", [[[3, 4, 5], [6, 7, 8]], [[4]], PROMPTS], ids=["one width", "one", "padded"])
def test_rows_and_widths(kind, samples, prompts):
    compare(GraphSampler(), model_of(kind), prompts, samples=samples)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_short_responses(length):
    drawn = compare(GraphSampler(), model_of("llama"), length=length)
    assert drawn.tokens.shape[-1] <= length


def test_one_state_serves_batches_of_a_bucket_and_keeps_nothing():
    sampler, model = GraphSampler(width_step=8), model_of("gpt2")
    batches = [PROMPTS, [[5], [6, 7, 8, 9, 10, 11, 12], [13]], [[20, 21]], PROMPTS[::-1]]
    for prompts in batches:
        compare(sampler, model, prompts, samples=24 // len(prompts))
    (decoders,) = sampler._decoders.values()
    assert len(decoders) == 1, "all are 24 rows, padded to 32, of at most 8 tokens"
    compare(sampler, model, samples=12)
    assert len(decoders) == 2


def test_states_are_few_and_go_with_their_model():
    sampler, model = GraphSampler(keep=2), model_of("llama")
    for length in (2, 3, 4, 5):
        compare(sampler, model, length=length)
    assert len(sampler._decoders[model]) == 2
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert not len(sampler._decoders)


@pytest.mark.parametrize(("rows", "padded"), [(1, 1), (3, 4), (5, 8), (32, 32), (33, 64), (250, 256), (257, 288)])
def test_row_buckets(rows, padded):
    assert row_bucket(rows) == padded


def test_what_is_returned_is_not_written_to_again():
    sampler, model = GraphSampler(), model_of("llama")
    first = compare(sampler, model)
    kept = first.tokens.clone(), first.log_probs.clone()
    compare(sampler, model, PROMPTS[::-1], temperature=0.7)
    assert torch.equal(first.tokens, kept[0])
    assert torch.equal(first.log_probs, kept[1])


@pytest.mark.parametrize("kind", MODELS)
def test_new_weights_are_seen(kind):
    sampler, model = GraphSampler(), model_of(kind)
    before = compare(sampler, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    model(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    optimizer.step()
    after = compare(sampler, model)
    assert before.tokens.shape != after.tokens.shape or not torch.equal(before.tokens, after.tokens)
    (decoders,) = sampler._decoders.values()
    assert len(decoders) == 1, "an update in place needs no new state"
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    compare(sampler, model)
    assert len(decoders) == 2, "parameters elsewhere do"


def test_policy_and_reference_share_a_base():
    model = model_of("llama")
    add_lora(model, {"r": 2, "lora_alpha": 8})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    sampler = GraphSampler()
    for _ in range(2):
        adapted = compare(sampler, model)
        with adapters_off(model):
            plain = compare(sampler, model)
        assert adapted.tokens.shape != plain.tokens.shape or not torch.equal(adapted.tokens, plain.tokens)
    assert len(sampler._decoders[model]) == 2, "one with adapters, one without"


def test_inference_mode_leaves_a_state_that_others_can_use():
    sampler, model = GraphSampler(), model_of("llama")
    with torch.inference_mode():
        compare(sampler, model)
    compare(sampler, model)
    with torch.inference_mode():
        compare(sampler, model)


def test_autocast_and_a_gradient_after_it():
    sampler, model = GraphSampler(), model_of("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        noise = noise_of([0, 1, 2, 3])
        theirs = sample_completions(model, SamplingRequest(*pad_left(PROMPTS), noise, end_ids=[2], pad_id=PAD))
        ours = sampler(model, SamplingRequest(*pad_left(PROMPTS), noise, end_ids=[2], pad_id=PAD))
        # The two add up in other orders: half a bfloat16 digit turns a token here and there.
        same = (ours.tokens == theirs.tokens)[ours.mask & theirs.mask]
        assert same.float().mean() > 0.8
        model(input_ids=torch.tensor([[3, 4]])).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    compare(sampler, model)


def test_half_precision():
    model = model_of("llama").to(torch.bfloat16)
    noise = noise_of([0, 1, 2, 3])
    theirs = sample_completions(model, SamplingRequest(*pad_left(PROMPTS), noise, end_ids=[2], pad_id=PAD))
    ours = GraphSampler()(model, SamplingRequest(*pad_left(PROMPTS), noise, end_ids=[2], pad_id=PAD))
    assert ours.log_probs.dtype == torch.float32
    assert (ours.tokens == theirs.tokens)[ours.mask & theirs.mask].float().mean() > 0.8


def test_gradient_checkpointing():
    model = model_of("llama").train()
    model.gradient_checkpointing_enable()
    compare(GraphSampler(), model)
    assert model.training


@pytest.mark.filterwarnings("default:.*data.sampler=graph.*")
@pytest.mark.parametrize(("kind", "plain"), [("mistral", False), ("gemma2", False), ("qwen2", True)])
def test_other_models_are_noticed_and_sampled_right(kind, plain):
    model, sampler = other_model(kind), GraphSampler()
    assert (why_not_static(model) is None) == plain
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            compare(sampler, model)
    told = [str(warning.message) for warning in seen if "data.sampler=graph" in str(warning.message)]
    assert len(told) == (0 if plain else 1), "once"
    assert plain or "sampled by the eager loop: its cache is not a plain one" in told[0]


def test_attention_without_a_mask_is_noticed():
    model = model_of("llama")
    model.config._attn_implementation = "flash_attention_2"
    assert "its attention (flash_attention_2) takes no mask of its own" in str(why_not_static(model))


def test_sharded_parameters_are_noticed():
    class FullyShardedDataParallel(torch.nn.Module):
        pass

    model = model_of("llama")
    model.model.wrapper = FullyShardedDataParallel()
    assert "sharded" in str(why_not_static(model))


def test_a_step_that_computes_something_else_is_noticed(monkeypatch):
    def late(self: Any) -> None:
        self.number.zero_()
        self.slot.fill_(self.width - 1)  # over the prompt's last token

    monkeypatch.setattr(static_module.StaticDecoder, "restart", late)
    assert why_not_static(model_of("llama")) == "it computes something else on a cache of fixed size"


def test_a_model_that_breaks_on_it_is_noticed(monkeypatch):
    def broken(self: Any, *_: Any, **__: Any) -> None:
        raise RuntimeError("no such cache")

    monkeypatch.setattr(static_module.StaticLayer, "update", broken)
    assert "(no such cache)" in str(why_not_static(model_of("llama")))


@pytest.mark.parametrize(("every", "looks"), [(1, 9), (4, 2), (100, 0)])
def test_the_host_looks_every_so_many_steps(every, looks, monkeypatch):
    model, sampler = model_of("llama"), GraphSampler(check_every=every)
    compare(sampler, model, end_ids=[99])
    (decoder,) = sampler._decoders[model].values()
    seen = []
    whole = torch.Tensor.all
    monkeypatch.setattr(torch.Tensor, "all", lambda t, *a: (seen.append(t is decoder.finished), whole(t, *a))[1])
    noise = noise_of([0, 1, 2, 3])
    sampler(model, SamplingRequest(*pad_left(PROMPTS), noise, end_ids=[99], pad_id=PAD, temperature=0.7))
    assert sum(seen) == looks


def test_a_step_is_one_function_of_fixed_shapes():
    """What a capture needs, as far as it shows without CUDA: steps allocate no state and take nothing from the host."""
    model = model_of("llama")
    with torch.no_grad():
        prompts, logits = static_module.prefill(model, *pad_left(PROMPTS), True)
        decoder = static_module.StaticDecoder(prompts, logits, rows=8, width=8, length=6, temperature=1.0, pad_id=PAD)
        decoder.load(prompts, logits, pad_left(PROMPTS)[1], noise_of([0, 1, 2, 3], 2, 6), [2])
        state = [value for value in vars(decoder).values() if isinstance(value, torch.Tensor)]
        state += [getattr(layer, name) for layer in decoder.cache.layers for name in ("keys", "values", "slot")]
        places = [tensor.data_ptr() for tensor in state]
        shapes = []
        forward = model.forward
        model.forward = lambda **given: (
            shapes.append({k: getattr(v, "shape", None) for k, v in given.items()}),
            forward(**given),
        )[1]
        host: list[str] = []
        with HostReads(host):
            for _ in range(5):
                decoder.run(model)
    assert [tensor.data_ptr() for tensor in state] == places
    assert all(shape == shapes[0] for shape in shapes)
    assert not host, "a number read from a tensor would stall the device and cannot be captured"


class HostReads(torch.utils._python_dispatch.TorchDispatchMode):
    """Note the operations that need a tensor's value on the host, or whose shape depends on one."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name()
        if any(part in name for part in ("_local_scalar_dense", "nonzero", "unique", "masked_select", "is_nonzero")):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_host_reads_are_seen():
    found: list[str] = []
    with HostReads(found):
        bool(torch.ones(2).sum() > 1)
        torch.ones(2).nonzero()
    assert len(found) == 2


def test_refuses_what_the_eager_loop_refuses():
    sampler = GraphSampler()
    with pytest.raises(ValueError, match="exceed the model's context of 8 tokens"):
        sampler(
            tiny_llama(VOCABULARY, max_position_embeddings=8),
            SamplingRequest(
                *pad_left(PROMPTS),
                noise_of([0, 1, 2, 3]),
                end_ids=[2],
                pad_id=PAD,
            ),
        )
    with pytest.raises(ValueError, match="temperature must be positive and finite"):
        sampler(
            tiny_gpt2(VOCABULARY),
            SamplingRequest(*pad_left(PROMPTS), noise_of([0, 1, 2, 3]), end_ids=[2], pad_id=PAD, temperature=0.0),
        )


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_cuda(rows: list[list[int]], noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, mask = pad_left(rows)
    return tokens.cuda(), mask.cuda(), noise


def compare_on_cuda(sampler: GraphSampler, model: Any, prompts: list[list[int]] = PROMPTS, **changes: Any) -> None:
    settings: dict[str, Any] = {"end_ids": [2, 7, 20], "pad_id": PAD, "temperature": 0.7} | changes
    arguments = on_cuda(prompts, noise_of(list(range(len(prompts))), 6, 10))
    theirs = sample_completions(model, SamplingRequest(*arguments, **settings))
    ours = sampler(model, SamplingRequest(*arguments, **settings))
    # Other kernels: a rounding may turn a token at the edge of two, which ends the comparison of its row.
    longest = min(ours.tokens.shape[-1], theirs.tokens.shape[-1])
    same = (ours.tokens[..., :longest] == theirs.tokens[..., :longest]).cumprod(-1).bool()
    assert same.all(-1).float().mean() > 0.9
    found = same & ours.mask[..., :longest]
    assert (ours.log_probs[..., :longest] - theirs.log_probs[..., :longest])[found].abs().max() < 1e-4


@cuda
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_captured_step_samples_the_same(kind, attention):
    model = model_of(kind).cuda()
    model.set_attn_implementation(attention)
    sampler = GraphSampler()
    for prompts in (PROMPTS, PROMPTS[::-1], [[5], [6, 7, 8], [9], [10]]):
        compare_on_cuda(sampler, model, prompts)
    (decoder,) = sampler._decoders[model].values()
    assert decoder.graph is not None, "captured once, replayed for every batch"


@cuda
def test_a_replay_sees_new_weights():
    model = model_of("llama").cuda()
    sampler = GraphSampler()
    compare_on_cuda(sampler, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(2):
        tokens = torch.tensor([[3, 4, 5]], device="cuda")
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        compare_on_cuda(sampler, model)
    assert len(sampler._decoders[model]) == 1


@cuda
def test_a_replay_sees_new_weights_under_autocast():
    model = model_of("llama").cuda()
    sampler = GraphSampler()
    arguments = on_cuda(PROMPTS, noise_of([0, 1, 2, 3], 6, 10))
    for _ in range(2):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            theirs = sample_completions(model, SamplingRequest(*arguments, end_ids=[99], pad_id=PAD))
            ours = sampler(model, SamplingRequest(*arguments, end_ids=[99], pad_id=PAD))
        assert (ours.tokens == theirs.tokens).float().mean() > 0.7
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    (decoder,) = sampler._decoders[model].values()
    assert decoder.graph is not None


@cuda
def test_a_replayed_loop_never_waits_for_the_device():
    model = model_of("llama").cuda()
    sampler = GraphSampler(check_every=100)
    compare_on_cuda(sampler, model, end_ids=[99])
    (decoder,) = sampler._decoders[model].values()
    decoder.restart()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            for _ in range(5):
                decoder.run(model)
                decoder.step(model)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@cuda
@pytest.mark.filterwarnings("default:.*data.sampler=graph.*")
def test_a_step_that_cannot_be_captured_runs_uncaptured():
    model = model_of("llama").cuda()
    assert why_not_static(model) is None
    model.register_forward_hook(lambda module, given, output: (output.logits.sum().item(), output)[1])
    sampler = GraphSampler()
    with pytest.warns(UserWarning, match="could not be captured and runs uncaptured"):
        compare_on_cuda(sampler, model)
    compare_on_cuda(sampler, model)
    (decoder,) = sampler._decoders[model].values()
    assert decoder.graph is None
    assert torch.cuda.get_sync_debug_mode() == 0


@cuda
@pytest.mark.filterwarnings("default:.*data.sampler=graph.*")
def test_after_a_capture_that_breaks_off_all_goes_on():
    """Of such a wait torch knows nothing until the capture is under way; the next capture, and dropout, must work."""
    model = model_of("llama").cuda()
    model.register_forward_hook(lambda module, given, output: (torch.cuda.synchronize(), output)[1])
    torch.manual_seed(3)
    expected = torch.randn(4, device="cuda")
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="could not be captured and runs uncaptured"):
        compare_on_cuda(GraphSampler(), model)
    assert torch.equal(torch.randn(4, device="cuda"), expected)
    sampler, model = GraphSampler(), model_of("llama").cuda()
    compare_on_cuda(sampler, model)
    (decoder,) = sampler._decoders[model].values()
    assert decoder.graph is not None
    assert torch.nn.functional.dropout(torch.ones(100, device="cuda")).count_nonzero() < 100


def test_a_capture_that_fails_falls_back(monkeypatch):
    """The way around a failed capture, driven without CUDA: the capture is made to be tried and to fail."""

    def fails(self: Any, model: Any, pool: Any) -> None:
        self.graph = "half made"
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(static_module.StaticDecoder, "capture", fails)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    sampler, model = GraphSampler(), model_of("llama")
    compare(sampler, model)
    (decoder,) = sampler._decoders[model].values()
    with pytest.warns(UserWarning, match="could not be captured and runs uncaptured: operation not permitted"):
        sampler._capture(decoder, model)
    assert decoder.graph is None
    assert model in sampler._uncaptured, "not tried again for other shapes"
    assert sampler._pool is None, "in use by the broken one"
    compare(sampler, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler._capture(decoder, model)  # told once


def test_a_capture_that_breaks_off_is_mended_and_one_that_does_not_begin_is_not(monkeypatch):
    """Driven without CUDA: what is called, in which case."""

    class Nothing:
        def __init__(self, *args: Any, **kwargs: Any) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *args: object) -> None: ...
        def wait_stream(self, stream: Any) -> None: ...
        def clone_state(self) -> str:
            return "a copy"

        def graphsafe_set_state(self, state: str) -> None:
            called.append(state)

    class Broken(Nothing):
        def __enter__(self) -> None:
            called.append("begun")
            raise RuntimeError("operation failed due to a previous error during capture")

    called: list[Any] = []
    fakes = dict.fromkeys(("CUDAGraph", "Stream", "device", "stream"), Nothing)
    fakes |= {"current_stream": lambda device=None: Nothing(), "graph": Broken, "default_generators": [Nothing()]}
    fakes |= {"get_sync_debug_mode": lambda: 1, "set_sync_debug_mode": called.append}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *given, name=name: called.append((name, *given)), raising=False)
    sampler, model = GraphSampler(), model_of("llama")
    compare(sampler, model)
    (decoder,) = sampler._decoders[model].values()
    decoder.logits = SimpleNamespace(device=torch.device("cuda:0"))
    monkeypatch.setattr(decoder, "restart", lambda: None)
    monkeypatch.setattr(decoder, "step", lambda model: None)
    with pytest.raises(RuntimeError, match="previous error during capture"):
        decoder.capture(model, "pool")
    ends = [("_cuda_endAllocateToPool", 0, "pool"), ("_cuda_releasePool", 0, "pool")]
    assert called == ["error", 1, "begun", "a copy", *ends]
    assert decoder.graph is None
    called.clear()

    def waits(model: Any) -> None:
        raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(decoder, "step", waits)
    with pytest.raises(RuntimeError, match="synchronizing"):
        decoder.capture(model, "pool")
    assert called == []


def test_a_captured_step_is_replayed_and_counted_right():
    """What is around the graph, driven without CUDA: a graph that runs the step, as a replay would."""
    sampler, model = GraphSampler(), model_of("llama")
    compare(sampler, model)
    (decoder,) = sampler._decoders[model].values()

    class Graph:
        replays = 0

        def replay(self) -> None:
            self.replays += 1
            decoder.step(model)

    decoder.graph = Graph()
    compare(sampler, model, end_ids=[99])
    assert decoder.graph.replays == 9, "ten tokens: the first is of the prompts' pass"
