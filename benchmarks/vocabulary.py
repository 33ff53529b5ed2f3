"""The memory of sampling, scoring and supervised steps at Qwen's vocabulary, against transformers on the same model.

python -m benchmarks.vocabulary

A Llama of one layer and 64 hidden units has 151,936 tokens: what it takes is logits, and hardly anything else. Peak
memory is the process's above what it held with the model loaded, its gradients there. Each number is of a process
of its own. transformers samples with ``generate``, and scores and trains on the logits of one pass over whole texts.
"""

from __future__ import annotations

from typing import Any

from jsonargparse import auto_cli

from benchmarks.bench import answer, isolated, table, write
from benchmarks.growth import peak

VOCABULARY = 151_936
PROMPT = 16
STAGES = {
    "sample": "{rows} responses of {length} tokens",
    "vBoN's statistics and backward": "{rows} responses of {length} tokens, policy and reference",
    "SFT's loss and backward": "{rows} texts of {length} tokens",
}
SIZES: dict[str, list[tuple[int, int]]] = {
    "sample": [(64, 4), (256, 4)],
    "vBoN's statistics and backward": [(32, 16), (64, 32)],
    "SFT's loss and backward": [(4, 128), (16, 128)],
}


def work(job: dict[str, Any]) -> dict[str, float]:
    """Measure one stage of one side."""
    import torch

    from tests.helpers import tiny_llama
    from vbon_lightning.sampling import (
        SamplingRequest,
        prompt_noise,
        response_statistics,
        sample_completions,
        text_log_probs,
    )
    from vbon_lightning.types import PromptBatch, Responses

    rows, length, ours = job["rows"], job["length"], job["side"] == "vbon"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "max_position_embeddings": 512}
    policy, reference = (tiny_llama(VOCABULARY, seed=seed, **sizes) for seed in (0, 1))
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    noise = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, VOCABULARY, (rows, PROMPT), generator=noise)
    mask = torch.ones_like(prompts, dtype=torch.bool)
    tokens = torch.randint(3, VOCABULARY, (rows, length), generator=noise)
    batch = PromptBatch(torch.arange(rows), mask[:, 0], prompts, mask, [""] * rows, None)

    def sample() -> None:
        if ours:
            uniforms = prompt_noise(range(rows), num_samples=1, length=length, seed=0, stream="b", step=0)
            sample_completions(policy, SamplingRequest(prompts, mask, uniforms, end_ids=[VOCABULARY], pad_id=0))
        else:
            policy.generate(prompts, do_sample=True, top_k=0, min_new_tokens=length, max_new_tokens=length)

    def statistics() -> None:
        if ours:
            given = Responses(tokens[:, None], torch.ones(rows, 1, length, dtype=torch.bool))
            found = response_statistics(policy, reference, batch, given)
            (found.log_probs + found.kl).sum().backward()
            return
        text = torch.cat([prompts, tokens], dim=-1)
        log_policy = policy(input_ids=text).logits[:, PROMPT - 1 : -1].log_softmax(-1)
        with torch.no_grad():
            log_reference = reference(input_ids=text).logits[:, PROMPT - 1 : -1].log_softmax(-1)
        kl = (log_policy.exp() * (log_policy - log_reference)).sum(-1)
        (log_policy.gather(-1, tokens[..., None]).squeeze(-1) + kl).sum().backward()

    def supervised() -> None:
        if ours:
            everything = torch.ones_like(tokens, dtype=torch.bool)
            text_log_probs(policy, tokens, everything, everything).sum().backward()
        else:
            policy(input_ids=tokens, labels=tokens).loss.backward()

    held = peak()
    dict(zip(STAGES, (sample, statistics, supervised), strict=True))[job["stage"]]()
    return {"peak_mib": (peak() - held) / 2**20}


def main(threads: int = 2) -> None:
    """Measure every stage.

    Args:
        threads: Threads that torch may use.
    """
    results, lines = [], []
    for stage, sizes in SIZES.items():
        for rows, length in sizes:
            job = {"stage": stage, "rows": rows, "length": length}
            found = {
                side: isolated(__file__, job | {"side": side}, threads=threads) for side in ("vbon", "transformers")
            }
            mib = {side: values["peak_mib"] for side, values in found.items()}
            results.append(job | mib)
            what = f"{stage}: {STAGES[stage].format(**job)}"
            share = mib["vbon"] / mib["transformers"]
            lines.append([what, f"{mib['vbon']:,.0f} MiB", f"{mib['transformers']:,.0f} MiB", f"**{share:.2f}**"])
            print(*lines[-1], flush=True)
    write(
        "vocabulary",
        f"Peak memory at a vocabulary of {VOCABULARY:,}, beyond the model and its gradients, in float32 on the CPU.",
        table(["stage", "here", "transformers", "ratio"], lines),
        results,
        [],
    )


if __name__ == "__main__" and not answer(work):
    auto_cli(main, as_positional=False)
