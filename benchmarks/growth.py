"""How a step's time and peak memory grow with its sizes, one at a time, and the table's with prompts x M.

python -m benchmarks.growth

A step is a rollout, its rewards, the statistics under both models and a backward pass. Peak memory is the process's
above what it held once the models were loaded. Each point is a process of its own.
"""

from __future__ import annotations

import resource
import time
from typing import Any

from jsonargparse import auto_cli

from benchmarks.bench import answer, isolated, table, write
from benchmarks.models import DEMO

BASE: dict[str, Any] = {"prompts": 8, "samples": 8, "length": 32, "vocabulary": 4096, "reference_rewards": 64, "n": 4}
SWEEPS: dict[str, list[Any]] = {
    "prompts": [4, 8, 16, 32],
    "samples": [4, 8, 16, 32],
    "length": [16, 32, 64, 128],
    "vocabulary": [4096, 8192, 16384, 65536],
    "reference_rewards": [64, 512, 4096, 32768],
    "n": [2, 64, 4096, 1_000_000],
}
TABLE = [(8, 32), (8, 128), (16, 128), (32, 128)]


def peak() -> int:
    """Return the most memory the process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(job: dict[str, Any]) -> dict[str, float]:
    """Time one point."""
    import torch

    from vbon_lightning import VBoN
    from vbon_lightning.actors import ActorSpec
    from vbon_lightning.models import ModelSpec
    from vbon_lightning.rewards import CallableReward
    from vbon_lightning.types import PromptBatch

    config = {
        "model_type": "llama",
        "vocab_size": job["vocabulary"],
        "hidden_size": 128,
        "intermediate_size": 344,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    }
    spec = ActorSpec(
        ModelSpec(config=config, tokenizer=DEMO),
        reward=CallableReward("benchmarks.growth.token_sum"),
        max_new_tokens=job["length"],
    )
    module = VBoN(spec, n=job["n"], samples_per_prompt=job["samples"])
    module.configure_model()
    tokens = torch.randint(10, 4000, (job["prompts"], 16), generator=torch.Generator().manual_seed(0))

    def batch(prompts: int, rewards: bool) -> PromptBatch:
        return PromptBatch(
            torch.arange(prompts),
            torch.ones(prompts, dtype=torch.bool),
            tokens[:prompts],
            torch.ones(prompts, 16, dtype=torch.bool),
            [""] * prompts,
            torch.randn(prompts, job["reference_rewards"]) if rewards else None,
        )

    actors = module.loaded

    def step(number: int) -> None:
        if job.get("table"):
            actors.reference_rewards(
                batch(job["prompts"], False), num_samples=job["samples"], seed=0, stream="table", step=number
            )
        else:
            loss, _, _ = module._on_policy_update(module._sample(batch(job["prompts"], True), number))
            loss.backward()

    held = peak()
    step(0)
    times = []
    for number in (1, 2, 3):
        start = time.perf_counter()
        step(number)
        times.append(time.perf_counter() - start)
    return {"seconds": sorted(times)[1], "peak_mib": (peak() - held) / 2**20}


def token_sum(prompts: Any, responses: Any, token_ids: Any) -> list[list[float]]:
    """Reward a response by its token ids, at no cost."""
    return [[float(sum(ids) % 1009) for ids in group] for group in token_ids]


def main(threads: int = 2) -> None:
    """Measure every point.

    Args:
        threads: Threads that torch may use.
    """
    results, rows = [], []
    for name, values in SWEEPS.items():
        for value in values:
            found = isolated(__file__, BASE | {name: value}, threads=threads)
            results.append({"varied": name, "value": value, **found})
            rows.append([name, f"{value:,}", f"{found['seconds']:.3f} s", f"{found['peak_mib']:,.0f} MiB"])
            print(rows[-1], flush=True)
    for prompts, samples in TABLE:
        job = BASE | {"prompts": prompts, "samples": samples, "table": True}
        found = isolated(__file__, job, threads=threads)
        results.append({"varied": "table", "value": [prompts, samples], **found})
        rate = f" ({prompts * samples / found['seconds']:,.0f} responses a second)"
        time_taken = f"{found['seconds']:.3f} s{rate}"
        rows.append(["table", f"{prompts} x {samples}", time_taken, f"{found['peak_mib']:,.0f} MiB"])
        print(rows[-1], flush=True)
    base = ", ".join(f"{name} {value}" for name, value in BASE.items())
    write(
        "growth",
        f"Time and peak memory of a step of a new 1-million-parameter model (more with the vocabulary), one size "
        f"varied at a time from {base}; and of M reference responses to each of some prompts. {threads} threads.",
        table(["varied", "value", "time", "peak memory"], rows),
        results,
        [],
    )


if __name__ == "__main__" and not answer(work):
    auto_cli(main, as_positional=False)
