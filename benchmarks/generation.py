"""Sampling: this package's decode loop against transformers' generate, as response tokens a second.

python -m benchmarks.generation

Both sample up to T tokens for each of B x G rows at temperature 1 without top-k or top-p, from the same weights.
``generate`` gets num_return_sequences = G and returns tokens alone; ours returns each token's log-probability, too.
In the fixed case no token ends a response. In the varied case so many do that lengths are geometric with a mean of
about 20, as a new model's nearly uniform distribution makes them. Runs alternate in one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from jsonargparse import auto_cli

from benchmarks.bench import answer, isolated, median, table, write
from benchmarks.models import LLAMA_10M

VOCABULARY = 4096
CASES: list[dict[str, Any]] = [
    {"prompt": prompt, "prompts": prompts, "samples": samples, "lengths": lengths}
    for prompt, prompts, samples in [(16, 8, 16), (128, 4, 32), (400, 2, 32)]
    for lengths in ("fixed", "varied")
]


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Time both on one case."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from vbon_lightning.sampling import SamplingRequest, prompt_noise, sample_completions

    entries = {key: value for key, value in LLAMA_10M.items() if key != "model_type"}
    if job["size"] == "2M":
        entries |= {"hidden_size": 128, "intermediate_size": 344, "num_attention_heads": 4, "num_key_value_heads": 4}
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=VOCABULARY, **entries)
    model = AutoModelForCausalLM.from_config(config).eval()
    rows, length = job["prompts"], job["length"]
    tokens = torch.randint(VOCABULARY // 2, VOCABULARY, (rows, job["prompt"]))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    # One token in twenty ends a response, or none does.
    ends = list(range(0, VOCABULARY, 20)) if job["lengths"] == "varied" else [VOCABULARY]
    drawn: dict[str, list[int]] = {"ours": [], "generate": []}

    def ours(step: int) -> None:
        noise = prompt_noise(range(rows), num_samples=job["samples"], length=length, seed=0, stream="b", step=step)
        found = sample_completions(model, SamplingRequest(tokens, mask, noise, end_ids=ends, pad_id=0))
        drawn["ours"].append(int(found.mask.sum()))

    def generate(step: int) -> None:
        found = model.generate(
            tokens,
            attention_mask=mask.long(),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            num_return_sequences=job["samples"],
            max_new_tokens=length,
            eos_token_id=ends,
            pad_token_id=0,
        )[:, tokens.shape[1] :]
        ended = torch.isin(found, torch.tensor(ends))
        real = (ended.long().cumsum(-1) - ended.long()) == 0
        drawn["generate"].append(int(real.sum()))

    sides: dict[str, Callable[[int], None]] = {"ours": ours, "generate": generate}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for step in range(job["repeats"] + 1):
        for side, call in sides.items():
            start = time.perf_counter()
            call(step)
            if step:  # the first warms up
                seconds[side].append(time.perf_counter() - start)
            else:
                drawn[side].clear()
    return {
        side: {
            "seconds": median(seconds[side]),
            "tokens": sum(drawn[side]) / len(drawn[side]),
            "tokens_per_second": median([count / took for count, took in zip(drawn[side], seconds[side], strict=True)]),
        }
        for side in sides
    }


def main(length: int = 64, repeats: int = 5, threads: int = 2) -> None:
    """Measure every case.

    Args:
        length: Most new tokens.
        repeats: Runs of each.
        threads: Threads that torch may use.
    """
    results, lines = [], []
    for size in ("2M", "10M"):
        for case in CASES:
            job = case | {"size": size, "length": length, "repeats": repeats}
            found = isolated(__file__, job, threads=threads)
            ratio = found["ours"]["tokens_per_second"] / found["generate"]["tokens_per_second"]
            results.append({**job, **found, "ratio": ratio})
            lines.append(
                [
                    f"{size}, {case['prompts']} prompts of {case['prompt']} tokens x {case['samples']}, "
                    f"{case['lengths']} lengths",
                    *(f"{found[side]['tokens_per_second']:,.0f}" for side in ("ours", "generate")),
                    *(f"{found[side]['tokens']:,.0f}" for side in ("ours", "generate")),
                    f"**{ratio:.1f}**",
                ]
            )
            print(lines[-1], flush=True)
    write(
        "generation",
        f"Sampling up to {length} tokens a row: response tokens a second, the median of {repeats} alternating runs, "
        f"{threads} threads.",
        table(["case", "ours", "generate", "tokens of ours", "of generate", "ratio"], lines),
        results,
        [],
    )


if __name__ == "__main__" and not answer(work):
    auto_cli(main, as_positional=False)
