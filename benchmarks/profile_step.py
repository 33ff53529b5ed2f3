"""Where a training step's time goes: sampling, text and reward, scoring under both models, backward, the rest.

python -m benchmarks.profile_step

Runs vBoN in Lightning's Trainer on the demo's model with clocks around its parts. "Models" is the time inside the
transformers forward passes and the backward pass; what is not models is overhead.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from benchmarks.bench import answer, isolated, median, table, write
from benchmarks.models import directory
from benchmarks.training_steps import PROMPTS, SAMPLES, TABLE, prompts

PARTS = ("sampling", "text and reward", "log-probs and KL", "backward", "optimizer and trainer")


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Profile some steps."""
    import torch
    from lightning.pytorch import Callback, Trainer

    from vbon_lightning import AlignmentDataModule, TextSource, VBoN
    from vbon_lightning.actors import Actors
    from vbon_lightning.rewards import VaderReward

    root = Path(job["root"])
    file = root / "prompts.txt"
    file.write_text("\n".join(prompts(job["words"])) + "\n")
    data = AlignmentDataModule(
        policy=job["path"],
        reward=VaderReward(),
        train=TextSource(path=str(file)),
        max_new_tokens=job["length"],
        batch_size=PROMPTS,
    )
    spent: dict[str, float] = defaultdict(float)
    steps: list[dict[str, float]] = []

    def clocked(owner: Any, name: str, part: str) -> None:
        call: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                spent[part] += time.perf_counter() - start

        setattr(owner, name, timed)

    class Clock(Callback):
        start = 0.0

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            actors: Actors = pl_module.loaded
            clocked(actors, "sample", "sampling")
            for name in ("token_ids", "decode", "score"):
                clocked(actors, name, "text and reward")
            clocked(actors, "statistics", "log-probs and KL")
            clocked(trainer.strategy, "backward", "backward")
            for model in (actors.policy, actors.reference):
                for inner in (model, model.base_model):
                    hook(inner)
            self.start = time.perf_counter()

        def on_train_batch_end(self, *_: Any) -> None:
            now = time.perf_counter()
            steps.append({**spent, "step": now - self.start})
            self.start = now
            spent.clear()

    depth = [0]

    def hook(model: Any) -> None:
        begun: list[float] = []

        def before(*_: Any) -> None:
            depth[0] += 1
            begun.append(time.perf_counter())

        def after(*_: Any) -> None:
            took = time.perf_counter() - begun.pop()
            depth[0] -= 1
            if depth[0] == 0:  # a body within its model counts once
                spent["forward"] += took

        model.register_forward_pre_hook(before)
        model.register_forward_hook(after)

    module = VBoN(
        data.actors,
        n=4,
        samples_per_prompt=SAMPLES,
        reference_samples=0,
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-6),
    )
    rewards = torch.randn(PROMPTS, TABLE)
    module.target = with_rewards(module.target, rewards)  # type: ignore[method-assign]
    module.setup = lambda stage: None  # type: ignore[method-assign]  # the table is made up: its cost is not a step's
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(**quiet, max_steps=job["steps"], enable_checkpointing=False, callbacks=[Clock()]).fit(module, data)
    return {"steps": steps[2:]}


def with_rewards(target: Callable[[Any], Any], rewards: Any) -> Callable[[Any], Any]:
    """Give every rollout the same reference rewards."""
    return lambda rollout: target(rollout._replace(reference_rewards=rewards))


def main(steps: int = 12, threads: int = 2) -> None:
    """Profile the demo's model.

    Args:
        steps: Training steps, the first two of which do not count.
        threads: Threads that torch may use.
    """
    results, rows = [], []
    with tempfile.TemporaryDirectory() as root:
        for words, length in ((5, 12), (5, 32), (60, 32)):
            job = {"root": root, "path": directory("demo", Path(root)), "steps": steps}
            job |= {"words": words, "length": length}
            found = isolated(__file__, job, threads=threads)["steps"]
            whole = median([step["step"] for step in found])
            share = {part: median([step.get(part, 0.0) / step["step"] for step in found]) for part in PARTS[:-1]}
            share[PARTS[-1]] = 1 - sum(share.values())
            models = median([(step["forward"] + step["backward"]) / step["step"] for step in found])
            results.append({"words": words, "length": length, "seconds": whole, "share": share, "models": models})
            rows.append(
                [
                    f"prompts of {words} words, {length} new tokens",
                    f"{whole:.2f} s",
                    *(f"{share[part]:.0%}" for part in PARTS),
                    f"**{1 - models:.0%}**",
                ]
            )
            print(rows[-1], flush=True)
    write(
        "profile_step",
        f"Share of a vBoN step's time by part, {PROMPTS} prompts x {SAMPLES} responses of the embedded model, "
        f"{threads} threads. Overhead is all that is outside the models' forward and backward passes: sampling tokens "
        "from logits, the loss, text, reward, optimizer, Trainer.",
        table(["case", "step", *PARTS, "overhead"], rows),
        results,
        ["lightning"],
    )


if __name__ == "__main__" and not answer(work):
    auto_cli(main, as_positional=False)
