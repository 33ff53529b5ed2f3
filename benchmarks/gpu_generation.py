"""Sampling on a GPU: the eager loop, the same replayed as a CUDA graph, and transformers' generate.

python -m benchmarks.gpu_generation

A Llama with the sizes of SmolLM2-135M and random weights in bfloat16 samples T tokens for each of B x G rows at
temperature 1; no token ends a response. All three get the same prompts. Runs alternate in one process.

Every decode step has to read the weights and the rows' keys and values: their bytes over the bandwidth of a plain
copy on the same device are the floor, and the share of the floor is that time over the one measured. The floor leaves
out the prompts' pass and counts a cache of its own for every row, as ``generate`` has it.

Without CUDA it says so and stops; ``--device cpu --size tiny`` runs the same on the CPU, to try the
program; it writes no results.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, Literal

from jsonargparse import auto_cli

from benchmarks.bench import answer, isolated, median, table, write

SIZES: dict[str, dict[str, Any]] = {
    "135M": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 2048,
    },
    "tiny": {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    },
}

HEADER = ["case", "tokens a second", "against generate", "share of the floor"]


def step_bytes(config: Any, weights: int, rows: int, tokens: float, item: int) -> float:
    """Return the bytes that a decode step reads at least: the weights once, and each row's keys and values.

    Args:
        config: A Llama's config.
        weights: Parameters, tied ones counted once.
        rows: Rows.
        tokens: Tokens a row has in the cache.
        item: Bytes a number.
    """
    head = config.hidden_size // config.num_attention_heads
    return item * (weights + rows * tokens * 2 * config.num_hidden_layers * config.num_key_value_heads * head)


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Time all three."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from vbon_lightning.sampling import SamplingRequest, prompt_noise, sample_completions
    from vbon_lightning.sampling.static import GraphSampler

    device = torch.device(job["device"])
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", tie_word_embeddings=True, **SIZES[job["size"]])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(device).eval().requires_grad_(False)
    prompts, samples, length = job["prompts"], job["rows"] // job["prompts"], job["length"]
    tokens = torch.randint(config.vocab_size, (prompts, job["prompt"]), device=device)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    nothing = config.vocab_size
    graph = GraphSampler()

    def sampled(sampler: Callable[..., Any], step: int) -> int:
        noise = prompt_noise(range(prompts), num_samples=samples, length=length, seed=0, stream="b", step=step)
        return int(sampler(model, SamplingRequest(tokens, mask, noise, end_ids=[nothing], pad_id=0)).mask.sum())

    def generate(step: int) -> int:
        found = model.generate(
            tokens,
            attention_mask=mask.long(),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            num_return_sequences=samples,
            min_new_tokens=length,
            max_new_tokens=length,
            pad_token_id=0,
        )
        return found[:, job["prompt"] :].numel()

    sides: dict[str, Callable[[int], int]] = {
        "eager": lambda step: sampled(sample_completions, step),
        "graph": lambda step: sampled(graph, step),
        "generate": generate,
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for step in range(job["repeats"] + 2):
        for side, call in sides.items():
            wait()
            start = time.perf_counter()
            count = call(step)
            wait()
            assert count == job["rows"] * length, f"{side} made {count} tokens"
            if step >= 2:  # the first ones warm up, and capture
                seconds[side].append(time.perf_counter() - start)

    bandwidth = _copy_bandwidth(torch, device, wait, 2**30 if device.type == "cuda" else 2**24)
    weights = sum(parameter.numel() for parameter in model.parameters())
    one = step_bytes(config, weights, job["rows"], job["prompt"] + length / 2, 2)
    floor = (length - 1) * one / bandwidth
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "no accelerator",
        "captured": all(d.graph is not None for states in graph._decoders.values() for d in states.values()),
        "parameters": weights,
        "copy_bytes_per_second": bandwidth,
        "floor_seconds": floor,
        **{
            side: {
                "seconds": median(took),
                "tokens_per_second": job["rows"] * length / median(took),
                "share_of_floor": floor / median(took),
            }
            for side, took in seconds.items()
        },
    }


def _copy_bandwidth(torch: Any, device: Any, wait: Callable[[], None], size: int) -> float:
    """Measure how many bytes a second a plain copy reads and writes, the best of several."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(10):
        wait()
        start = time.perf_counter()
        target.copy_(source)
        wait()
        best = max(best, 2 * size / (time.perf_counter() - start))
    return best


def main(
    device: str = "cuda",
    size: Literal["135M", "tiny"] = "135M",
    rows: list[int] = [256, 1024],  # noqa: B006 (never mutated)
    prompts: int = 16,
    prompt: int = 64,
    length: int = 64,
    repeats: int = 5,
    threads: int = 4,
) -> None:
    """Measure every number of rows.

    Args:
        device: Where to.
        size: The model.
        rows: B x G, a case each.
        prompts: B.
        prompt: Tokens a prompt.
        length: New tokens.
        repeats: Runs of each.
        threads: Threads that torch may use on the CPU.
    """
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("benchmarks.gpu_generation measures a CUDA device, and there is none here; see its --help for the CPU")
    results, lines = [], []
    for count in rows:
        job = {"device": device, "size": size, "rows": count, "prompts": prompts, "prompt": prompt}
        job |= {"length": length, "repeats": repeats}
        found = isolated(__file__, job, threads=threads)
        results.append({**job, **found})
        lines += report(job, found)
        print(*lines[-3:], sep="\n", flush=True)
    if not device.startswith("cuda"):  # a trial of the program, not a result
        print(table(HEADER, lines))
        return
    write(
        "gpu_generation",
        f"Sampling {length} tokens a row behind prompts of {prompt} tokens, {prompts} prompts, a Llama of "
        f"{results[-1]['parameters'] / 1e6:,.0f} million parameters in bfloat16; the median of {repeats} alternating "
        "runs. The floor is the time to read weights and cache at the bandwidth of a copy, "
        f"{results[-1]['copy_bytes_per_second'] / 1e9:,.0f} GB/s.",
        table(HEADER, lines),
        results,
        [],
        accelerator=results[-1]["device"],
    )


def report(job: dict[str, Any], found: dict[str, Any]) -> list[list[str]]:
    """Return the table's lines of a case."""
    names = {
        "eager": "eager loop",
        "graph": "graph" if found["captured"] else "graph, not captured",
        "generate": "transformers.generate",
    }
    return [
        [
            f"{job['rows']} rows, {name}",
            f"{found[side]['tokens_per_second']:,.0f}",
            f"**{found[side]['tokens_per_second'] / found['generate']['tokens_per_second']:.1f}**",
            f"{found[side]['share_of_floor']:.0%}",
        ]
        for side, name in names.items()
    ]


if __name__ == "__main__" and not answer(work):
    auto_cli(main, as_positional=False)
