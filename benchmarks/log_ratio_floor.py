"""What a floor of the log-ratio buys: vBoN trained with several, compared on held-out prompts.

python -m benchmarks.log_ratio_floor --config configs/demo/data.yaml --config configs/demo/vader.yaml

Needs the demo's SFT export and a reference table (the commands of configs/demo/sft.yaml and vader.yaml). The held-out
prompts are neither those trained on nor those the demo reports.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
from jsonargparse import auto_cli
from tqdm.auto import tqdm

from benchmarks.bench import table, write
from vbon_lightning import AlignmentDataModule, TextSource, VBoN
from vbon_lightning.evaluation.intervals import Estimate, estimate_mean
from vbon_lightning.types import PromptBatch


def held_out(module: VBoN, prompts: list[PromptBatch], references: list[torch.Tensor]) -> dict[str, Estimate]:
    """Return reward, win rate over the reference and exact KL, with 95% intervals over prompts."""
    found: dict[str, list[torch.Tensor]] = {"reward": [], "win_rate": [], "kl": []}
    for batch, reference in zip(prompts, references, strict=True):
        rollout = module.loaded.rollout(batch, num_samples=32, seed=9, stream="held out", step=0)
        mine, theirs = rollout.rewards[:, :, None], reference[:, None]
        found["reward"].append(rollout.rewards.mean(1))
        found["win_rate"].append(((mine > theirs).float() + (mine == theirs).float() / 2).mean((1, 2)))
        found["kl"].append(rollout.token_kl.sum(-1).mean(1))
    return {name: estimate_mean(torch.cat(values)) for name, values in found.items()}


def train(data: AlignmentDataModule, n: float, floor: float | None, steps: int, lr: float) -> VBoN:
    """Train on the demo's prompts and return the module."""
    torch.manual_seed(0)
    module = VBoN(data.actors, n=n, samples_per_prompt=16, log_ratio_floor=floor)
    module.configure_model()
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    batches = list(data.split_dataloader("train"))
    for step in tqdm(range(steps), desc=f"floor {floor}"):
        loss, _, _ = module._on_policy_update(module._sample(batches[step % len(batches)], step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 20.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return module


def main(
    data: AlignmentDataModule,
    n: float = 8.0,
    floors: list[float | None] = [None, -8.0, -4.0, -2.0],  # noqa: B006
    steps: int = 56,
    lr: float = 4e-4,
    start: int = 112,
    stop: int = 160,
) -> None:
    """Train with each floor and compare.

    Args:
        data: Prompts, policy, reference, reward and reference table.
        n: N of Best-of-N.
        floors: Floors in nats, None for the exact target.
        steps: Training steps.
        lr: Learning rate of AdamW.
        start: First held-out prompt, in the numbering of data.train.
        stop: The prompt after the last.
    """
    source = data.sources["train"]
    assert source is not None
    held = AlignmentDataModule(
        policy=data.actors.policy,
        reward=data.actors.reward,
        val=TextSource(**{**vars(source), "start": start, "stop": stop}),
        max_new_tokens=data.actors.max_new_tokens,
        eval_batch_size=8,
    )
    prompts = list(held.split_dataloader("val"))
    results, rows, references = [], [], None
    for floor in floors:
        module = train(data, n, floor, steps, lr)
        if references is None:
            references = [
                module.loaded.reference_rewards(batch, num_samples=64, seed=3, stream="reference", step=0)
                for batch in prompts
            ]
        found = held_out(module, prompts, references)
        results.append({"floor": floor, **{name: asdict(value) for name, value in found.items()}})
        rows.append(["none (exact)" if floor is None else f"{floor:g}", *map(str, found.values())])
        print(rows[-1], flush=True)
    write(
        f"log_ratio_floor_n{n:g}",
        f"vBoN at n = {n:g}, {steps} steps of {data.batch_size} x 16 responses, learning rate {lr:g}; "
        f"{stop - start} held-out prompts, means ± half of the 95% interval over prompts, one seed.",
        table(["floor (nats)", "reward", "win rate over the reference", "KL (nats)"], rows),
        results,
        [],
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
