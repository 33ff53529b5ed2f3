"""Measure how noisy the policy gradient is under each KL estimator, along a vBoN run.

python benchmarks/kl_estimators.py --config configs/demo/data.yaml --config configs/demo/vader.yaml

With `data.value_model` also advantages from a value model, at several lambdas. All but those with a lambda below 1 are
unbiased (tests/functional/test_targets.py and test_prefix_values.py show it by enumeration), so they differ in their
variance alone. At several points of a run, K batches of the same rollouts are turned into gradients by each of
them; what is reported is the total variance of the gradient (the trace of its covariance), the squared norm of its
mean (less the part that is noise), and their ratio.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from jsonargparse import auto_cli

from vbon_lightning import AlignmentDataModule, VBoN
from vbon_lightning.functional import kl_penalty, reinforce_loss

ESTIMATORS = ("rao_blackwell", "prefix_baseline", "sampled")
LAMBDAS = {"value, lambda 1": 1.0, "value, lambda .95": 0.95, "value, lambda .5": 0.5, "value, lambda 0": 0.0}


def estimators(module: VBoN) -> tuple[str, ...]:
    """Return the estimators to compare: those of a value model where one is loaded."""
    return ESTIMATORS if module.loaded.value is None else (*ESTIMATORS, *LAMBDAS)


def gradients(module: VBoN, batch: object, number: int, parameters: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the gradient of one batch's loss under each estimator, from the same rollout and the same pass."""
    live, _ = module._evaluate_responses(module._sample(batch, number))
    mask = live.completions.mask
    fixed = live._replace(log_probs=live.log_probs.detach(), token_kl=live.token_kl.detach())
    target, found = module.target(fixed), {}
    for name in estimators(module):
        module.uses_value_model = name in LAMBDAS
        module.kl_estimator = "rao_blackwell" if name in LAMBDAS else name
        module.value_lambda = LAMBDAS.get(name, 1.0)
        advantages, _ = module._advantages(target, fixed, None)
        loss = reinforce_loss(live.log_probs, advantages, mask)
        if name != "sampled":
            loss = loss + target.kl_coef * kl_penalty(live.token_kl, mask)
        parts = torch.autograd.grad(loss, parameters, retain_graph=True)
        found[name] = torch.cat([part.flatten() for part in parts])
    return found


def measure(module: VBoN, batches: list[object], parameters: list[torch.Tensor], start: int) -> dict[str, dict]:
    """Return variance and squared mean of the gradient under each estimator, over the batches."""
    sums = {name: torch.zeros(sum(p.numel() for p in parameters)) for name in estimators(module)}
    squares = dict.fromkeys(estimators(module), 0.0)
    for number, batch in enumerate(batches):
        for name, gradient in gradients(module, batch, start + number, parameters).items():
            sums[name] += gradient
            squares[name] += float(gradient.square().sum())
    count, found = len(batches), {}
    for name in estimators(module):
        mean = sums[name] / count
        variance = (squares[name] / count - float(mean.square().sum())) * count / (count - 1)
        signal = float(mean.square().sum()) - variance / count
        found[name] = {"variance": variance, "signal": signal, "variance_over_signal": variance / max(signal, 1e-12)}
    return found


def main(
    data: AlignmentDataModule,
    n: float = 8.0,
    samples_per_prompt: int = 8,
    steps: int = 32,
    every: int = 16,
    batches: int = 12,
    lr: float = 5e-4,
    output: str = "benchmarks/results/kl_estimators",
) -> None:
    """Train by vBoN and measure the gradient's noise on the way.

    Args:
        data: Prompts, policy, reference, reward and reference table.
        n: N of Best-of-N.
        samples_per_prompt: Responses a prompt.
        steps: Training steps.
        every: Steps between measurements.
        batches: Rollouts a measurement.
        lr: Learning rate of AdamW.
        output: Results go to this path, as .json and .md.
    """
    torch.manual_seed(0)
    module = VBoN(data.actors, n=n, samples_per_prompt=samples_per_prompt)
    module.configure_model()
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    prompts = list(data.split_dataloader("train"))
    rows = []
    for step in range(steps + 1):
        if step % every == 0:
            # The same prompts throughout, so that the variance is that of sampling.
            found = measure(module, [prompts[0]] * batches, parameters, 1_000_000)
            kl = module.loaded.rollout(prompts[0], num_samples=32, seed=1, stream="measure", step=0).token_kl
            rows.append({"step": step, "kl": float(kl.sum(-1).mean()), "estimators": found})
            print(json.dumps(rows[-1]), flush=True)
        module.kl_estimator, module.uses_value_model = "rao_blackwell", False
        loss, _, _ = module._on_policy_update(module._sample(prompts[step % len(prompts)], step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    names = estimators(module)
    lines = ["| step | KL (nats) | " + " | ".join(names) + " |", "| ---: " * (2 + len(names)) + "|"]
    for row in rows:
        cells = [f"{row['estimators'][name]['variance']:.3g}" for name in names]
        lines.append(f"| {row['step']} | {row['kl']:.2f} | " + " | ".join(cells) + " |")
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.with_suffix(".json").write_text(json.dumps(rows, indent=2) + "\n")
    target.with_suffix(".md").write_text("Total variance of the policy gradient.\n\n" + "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
