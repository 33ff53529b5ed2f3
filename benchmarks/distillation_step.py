"""Steps of Best-of-N distillation, and the pass over candidate tokens they stand on, as response tokens a second.

python -m benchmarks.distillation_step

Whole steps of B prompts x G responses, an AdamW update each, in processes of their own that alternate:

- `BoNDistillation` from the reference table, n = 8, 8 + 8 candidates a token, on a plain and on a tilted policy; the
  value model is as large as the policy, and in float32 or bfloat16;
- TRL's `GKDTrainer` with `lmbda=0`: distillation of a teacher as large as the policy over responses that are given, its
  next-token distribution for one pass. It is the nearest peer, and does less: no value of any candidate;
- TRL's `RLOOTrainer`: as many responses sampled, scored and learnt from.

And the candidates alone: the value model's states after 16 candidates at every position of B x G responses, by our one
pass, by `transformers` with the response's cache, a position after the other, and by `transformers` with each candidate
as a sequence of its own.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from benchmarks import training_steps
from benchmarks.bench import answer, isolated, median, table, write
from benchmarks.models import directory, spec

PROMPTS, SAMPLES, CANDIDATES = training_steps.PROMPTS, 8, 16
CASES: list[dict[str, Any]] = [
    {"model": "demo", "words": 5, "length": 16},
    {"model": "demo", "words": 5, "length": 32},
    {"model": "10M", "words": 5, "length": 16},
]
STEPS = {
    "tilted": "tilted policy",
    "tilted_bf16": "tilted, bfloat16 value model",
    "plain": "plain policy",
    "gkd": "TRL GKD",
    "rloo": "TRL RLOO",
}
PASSES = {"one": "one pass", "cached": "transformers, cached", "apart": "transformers, a sequence each"}


def value_model(path: str, root: Path, fingerprint: dict[str, Any], longest: int) -> str:
    """Save an untrained value model on a body, once."""
    import torch

    from vbon_lightning.functional import reward_bins
    from vbon_lightning.models import ModelSpec, load_tokenizer, save_pretrained
    from vbon_lightning.models.value import new_value_model

    target = root / f"value-{Path(path).name}-{longest}"
    if not target.exists():
        bins = reward_bins(torch.linspace(-1, 1, 2000, dtype=torch.float64), bins=32)
        model = new_value_model(path, bins, longest=longest, fingerprint=fingerprint)
        save_pretrained(model, load_tokenizer(ModelSpec(path)), target)
    return str(target)


def ours(job: dict[str, Any]) -> dict[str, float]:
    """Time BoNDistillation's training steps in Lightning's Trainer."""
    import torch
    from lightning.pytorch import Callback, Trainer

    from vbon_lightning import BoNDistillation

    made = training_steps.data_with_table(job)
    value = value_model(job["path"], Path(job["root"]), made.fingerprint(), job["length"])
    policy = job["path"] if job["side"] == "plain" else {"name": job["path"], "tilt": value}
    dtype = "bfloat16" if job["side"] == "tilted_bf16" else "float32"
    run = training_steps.data_module(job, policy=policy, value_model={"name": value, "dtype": dtype})
    marks, tokens = [], []

    class Clock(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            marks.append(time.perf_counter())

    module = BoNDistillation(
        run.actors,
        n=8,
        responses_per_prompt=SAMPLES,
        top=CANDIDATES // 2,
        draws=CANDIDATES // 2,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-6),
    )
    whole = module.distil

    def counted(prompts: Any, cached: Any, step: int) -> Any:
        # Of the cached responses G a prompt are picked.
        tokens.append(round(float(cached.mask.sum()) * SAMPLES / cached.mask.shape[1]))
        return whole(prompts, cached, step)

    module.distil = counted  # type: ignore[method-assign]
    Trainer(**training_steps.QUIET, max_steps=job["steps"], enable_checkpointing=False, callbacks=[Clock()]).fit(
        module, run
    )
    return training_steps.rate(marks, tokens)


def gkd(job: dict[str, Any]) -> dict[str, float]:
    """Time GKD's training steps in TRL's trainer, over responses that are given."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    tokenizer = AutoTokenizer.from_pretrained(job["path"])
    tokenizer.chat_template = "{{ messages }}"  # asked for, not used
    encoded = [tokenizer(text)["input_ids"] for text in training_steps.prompts(job["words"])]
    model, teacher = (AutoModelForCausalLM.from_pretrained(job["path"], dtype="float32") for _ in range(2))
    marks, tokens = [], []

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        widest = max(len(row["prompt_ids"]) for row in rows)
        generator = torch.Generator().manual_seed(len(marks))
        answers = torch.randint(10, len(tokenizer), (len(rows), job["length"]), generator=generator)
        prompts = torch.full((len(rows), widest), tokenizer.eos_token_id)
        seen = torch.zeros_like(prompts)
        for place, row in enumerate(rows):
            prompts[place, widest - len(row["prompt_ids"]) :] = torch.tensor(row["prompt_ids"])
            seen[place, widest - len(row["prompt_ids"]) :] = 1
        tokens.append(answers.numel())
        return {
            "input_ids": torch.cat([prompts, answers], dim=1),
            "attention_mask": torch.cat([seen, torch.ones_like(answers)], dim=1),
            "labels": torch.cat([torch.full_like(prompts, -100), answers], dim=1),
            "prompts": prompts,
            "prompt_attention_mask": seen,
        }

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

    trainer = GKDTrainer(
        model=model,
        teacher_model=teacher,
        processing_class=tokenizer,
        data_collator=collate,
        train_dataset=Dataset.from_list([{"prompt_ids": ids} for ids in encoded for _ in range(SAMPLES)]),
        callbacks=[Clock()],
        args=GKDConfig(
            per_device_train_batch_size=PROMPTS * SAMPLES,
            lmbda=0.0,
            beta=0.0,
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            **training_steps.trl_arguments(job),
        ),
    )
    trainer.train()
    return training_steps.rate(marks, tokens[: len(marks)])


def rloo(job: dict[str, Any]) -> dict[str, float]:
    """Time RLOO's training steps in TRL's trainer, with as many responses."""
    training_steps.SAMPLES = SAMPLES
    return training_steps.trl(job)


def candidates(job: dict[str, Any]) -> dict[str, float]:
    """Time the states after every candidate, and how far they are from our own."""
    import torch
    from transformers import DynamicCache

    from vbon_lightning.models import load_causal_lm
    from vbon_lightning.sampling.lookahead import lookahead_states
    from vbon_lightning.types import PromptBatch, Responses

    model = load_causal_lm(spec(job["model"]), trainable=False)
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randint(10, 2000, shape, generator=generator)

    rows, length = PROMPTS * SAMPLES, job["length"]
    prompt, answers, ahead = (
        some(PROMPTS, 8),
        some(PROMPTS, SAMPLES, length),
        some(PROMPTS, SAMPLES, length, CANDIDATES),
    )
    prompts = PromptBatch(
        tokens=prompt,
        mask=torch.ones_like(prompt, dtype=torch.bool),
        text=[""] * PROMPTS,
        index=torch.arange(PROMPTS),
        valid=torch.ones(PROMPTS, dtype=torch.bool),
    )
    responses = Responses(answers, torch.ones_like(answers, dtype=torch.bool))
    whole = torch.cat([prompt.repeat_interleave(SAMPLES, dim=0), answers.flatten(0, 1)], dim=1)

    def one() -> torch.Tensor:
        return lookahead_states(model, prompts, responses, ahead).flatten(0, 1)

    def cached() -> torch.Tensor:
        found, cache = [], DynamicCache(config=model.config)
        body = model.base_model
        body(input_ids=whole[:, :8], past_key_values=cache, use_cache=True)
        for place in range(length):
            if place:
                body(input_ids=whole[:, 7 + place : 8 + place], past_key_values=cache, use_cache=True)
            branch = DynamicCache(config=model.config)
            for number, layer in enumerate(cache.layers):
                branch.update(layer.keys.clone(), layer.values.clone(), number)  # type: ignore[union-attr]
            branch.batch_repeat_interleave(CANDIDATES)
            tokens = ahead[:, :, place].reshape(-1, 1)
            out = body(input_ids=tokens, past_key_values=branch, use_cache=True)
            found.append(out.last_hidden_state.view(rows, CANDIDATES, -1))
        return torch.stack(found, dim=1)

    def apart() -> torch.Tensor:
        found = []
        for place in range(length):
            before = whole[:, : 8 + place].repeat_interleave(CANDIDATES, dim=0)
            tokens = torch.cat([before, ahead[:, :, place].reshape(-1, 1)], dim=1)
            out = model.base_model(input_ids=tokens, use_cache=False)
            found.append(out.last_hidden_state[:, -1].view(rows, CANDIDATES, -1))
        return torch.stack(found, dim=1)

    ways = {"one": one, "cached": cached, "apart": apart}
    with torch.no_grad():
        expected = one()
        error = max(float((way() - expected).abs().max()) for way in ways.values())
        seconds = {}
        for name, way in ways.items():
            taken = []
            for _ in range(job["repeats"]):
                began = time.perf_counter()
                way()
                taken.append(time.perf_counter() - began)
            seconds[name] = median(taken)
    return {"largest difference": error} | {name: rows * length * CANDIDATES / s for name, s in seconds.items()}


def main(steps: int = 8, repeats: int = 3, threads: int = 2) -> None:
    """Measure every case.

    Args:
        steps: Training steps a run, the first two of which do not count.
        repeats: Runs of each side, and of each way to the candidates.
        threads: Threads that torch may use.
    """
    results, rows, ahead = [], [], []
    with tempfile.TemporaryDirectory() as root:
        for case in CASES:
            name = f"{case['model']}, prompts of {case['words']} words, {case['length']} new tokens"
            job = case | {"root": root, "path": directory(case["model"], Path(root)), "steps": steps}
            found: dict[str, list[dict[str, float]]] = {side: [] for side in STEPS}
            for _ in range(repeats):
                for side in found:
                    found[side].append(isolated(__file__, job | {"side": side}, threads=threads))
            speed = {side: median([run["tokens_per_second"] for run in runs]) for side, runs in found.items()}
            step = {side: median([run["seconds_per_step"] for run in runs]) for side, runs in found.items()}
            ratios = [speed["tilted_bf16"] / speed[peer] for peer in ("gkd", "rloo")]
            rows.append(
                [name, *(f"{speed[side]:,.0f} ({step[side]:.2f} s)" for side in STEPS)]
                + [f"**{ratio:.2f}**" for ratio in ratios]
            )
            made = isolated(__file__, job | {"side": "candidates", "repeats": repeats}, threads=threads)
            ahead.append([name, *(f"{made[way]:,.0f}" for way in PASSES), f"**{made['one'] / made['cached']:.1f}**"])
            ahead[-1].append(f"**{made['one'] / made['apart']:.1f}**")
            results.append({**case, "runs": found, "candidates": made})
            print(rows[-1], ahead[-1], flush=True)
    heads = [*STEPS.values(), "tilted, bfloat16 / GKD", "tilted, bfloat16 / RLOO"]
    write(
        "distillation_step",
        f"Whole steps of {PROMPTS} prompts x {SAMPLES} responses with {CANDIDATES} candidates a token: response tokens "
        f"a second (seconds a step), the median step of the median of {repeats} alternating runs, {threads} threads.",
        table(["case", *heads], rows)
        + "\nThe candidates alone: a second, after every position of those responses.\n\n"
        + table(["case", *PASSES.values(), "one pass / cached", "one pass / a sequence each"], ahead),
        results,
        ["lightning", "trl", "accelerate"],
    )


_SIDES = {"tilted": ours, "tilted_bf16": ours, "plain": ours, "gkd": gkd, "rloo": rloo, "candidates": candidates}

if __name__ == "__main__" and not answer(lambda job: _SIDES[job["side"]](job)):
    auto_cli(main, as_positional=False)
