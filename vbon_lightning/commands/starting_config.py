"""The text of a starting config: one YAML for all commands, with the choices that matter explained where they stand."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from vbon_lightning.commands.layouts import Layout

NEW_TOKENS = 64
"""Longest response where the context allows it."""
SAMPLES = 64
"""M, the reference table's responses a prompt."""
TRAINED = 1000
"""Most prompts that the table is filled for at first: at M responses each it costs time."""


class Found(NamedTuple):
    """What looking at data and tokenizer brought."""

    layout: Layout
    prompts: int
    """Prompts that were read."""
    whole: bool
    """Whether these are all."""
    longest: int
    """Tokens of the longest prompt."""
    context: int | None
    """Tokens that the tokenizer says its model takes; None where it does not say."""
    is_chat: bool
    """Whether the tokenizer has a chat template."""


_MODELS = {
    "vbon": """  class_path: VBoN
  init_args:
    # The N of Best-of-N, any real number above 1. It says how far to go: about log N - (N-1)/N nats of KL, 0.64
    # at N = 4. There is no KL coefficient beside it.
    n: 4
    # Ends the target's lower tail, whose noise dominates short runs; moves the optimum by at most exp(-4). null: exact.
    log_ratio_floor: -4.0
    # Responses a prompt and step. More make a less noisy gradient.
    samples_per_prompt: 8
""",
    "kl_rl": """  class_path: KLRL
  init_args:
    # Weight of the KL to the reference, in units of reward a nat: depends on the reward's scale. Smaller goes further.
    beta: 0.5
    # Responses a prompt and step. More make a less noisy gradient.
    samples_per_prompt: 8
""",
    "rloo": """  class_path: RLOO
  init_args:
    # Weight of the KL to the reference, in units of reward a nat: depends on the reward's scale. Smaller goes further.
    beta: 0.5
    # Responses a prompt and step, each with the mean of the others as its baseline.
    samples_per_prompt: 8
""",
    "grpo": """  class_path: GRPO
  init_args:
    # Weight of the KL to the reference, in standard deviations of a prompt's rewards a nat; 0 for none.
    beta: 0.04
    # Responses a prompt and step, which are compared with each other.
    samples_per_prompt: 8
    # What a response counts: grpo (the mean over its tokens), dr_grpo (their sum) or dapo (the mean over all tokens).
    length_norm: grpo
""",
    "sft": """  class_path: SFT
  init_args:
""",
    "bon_sft": """  class_path: BoNSFT
  init_args:
    # The best of N of the table's responses is learnt: an integer above 1, far below the table's {samples}.
    n: 4
    responses_per_prompt: 4
""",
    "dpo": """  class_path: DPO
  init_args:
    # In groups of N of the table's {samples} responses the best is preferred to the worst; a step takes
    # n * pairs_per_prompt of them.
    n: 4
    # How closely the policy is kept to the reference. Smaller goes further.
    beta: 0.1
    pairs_per_prompt: 4
""",
}

_OPTIMIZER = """    optimizer:
      class_path: torch.optim.AdamW
      # A careful start for pretrained models; the small one that ships with the package takes {rate} (1.9M parameters).
      init_args: {{lr: 1.0e-5, betas: [0.9, 0.95], weight_decay: 0.0}}
"""

_SMALL_RATES = {
    **dict.fromkeys(("vbon", "kl_rl", "rloo", "grpo"), "6.0e-4"),
    "sft": "1.0e-3",
    "bon_sft": "3.0e-4",
    "dpo": "3.0e-4",
}
"""The learning rates of configs/demo and configs/sentiment."""


def starting_config(
    *,
    policy: str,
    source: Mapping[str, Any],
    reward: Mapping[str, Any] | None,
    method: str,
    output: str,
    found: Found,
    chat: Mapping[str, Any] = {},
) -> str:
    """Write a YAML that `vbon fit`, `predict`, `compare` and `sample` take as it is.

    Args:
        policy: The model's name.
        source: What reads the data, all of its rows.
        reward: The reward's class and arguments; None without one.
        method: One of ``vbon``, ``kl_rl``, ``rloo``, ``grpo``, ``sft``, ``bon_sft`` and ``dpo``.
        output: The name of the file that it will be, for the commands in its head.
        found: What looking at the data brought.
        chat: How conversations are rendered, where the tokenizer does not say.
    """
    stem = re.sub(r"[^\w.-]+", "-", Path(output).stem)
    run = f"runs/{method if stem == 'config' else stem}"
    # Held-out prompts, to watch a run and to judge it: a fifth each, 64 at most.
    held = max(1, min(64, found.prompts // 5))
    left = found.prompts - 2 * held
    model = _MODELS[method].format(samples=SAMPLES) + _OPTIMIZER.format(rate=_SMALL_RATES[method])
    parts = [
        _head(output, run, reward is not None, method),
        "seed_everything: 0\n\nmodel:\n" + model,
        _data(policy, source, reward, run, found, held, left, method, chat),
        _trainer(run, method),
    ]
    return "\n".join(parts)


def _head(output: str, run: str, has_reward: bool, method: str) -> str:
    file = shlex.quote(output)
    fit = f"# vbon fit -c {file}\n"
    sample = f"# vbon sample -c {file} --policy {run}/export --split test --output {run}/responses.jsonl\n"
    if not has_reward:
        return (
            "# Supervised fine-tuning, then a response to each held-out prompt:\n#\n" + fit + sample + "#\n"
            "# Every option: vbon fit --help, vbon fit --model.help SFT.\n"
        )
    table = f"# vbon predict -c {file} --model ReferenceSampler --model.samples {SAMPLES}\n"
    compare = f"# vbon compare -c {file} --policies.{method} {run}/export --output {run}/comparison\n"
    return (
        f"# The reference table ({SAMPLES} responses and rewards a prompt: the more, the better Best-of-N is known), "
        "training,\n# a comparison with Best-of-N on held-out prompts, and a response to each of them:\n#\n"
        f"{table}{fit}{compare}{sample}#\n"
        "# Every option: vbon fit --help, vbon fit --model.help CLASS. The table belongs to policy, reward, "
        "temperature and\n# length: remove it when one of them changes.\n"
    )


def _data(
    policy: str,
    source: Mapping[str, Any],
    reward: Mapping[str, Any] | None,
    run: str,
    found: Found,
    held: int,
    left: int,
    method: str,
    chat: Mapping[str, Any],
) -> str:
    lines = [
        "data:",
        f"  policy: {_scalar(policy)}",
        "  # Adapters alone, for less memory:",
        f"  # policy: {{name: {_scalar(policy)}, lora: {{r: 16, lora_alpha: 32}}}}",
        "  # The reference, which the policy stays close to, is its own start unless another is named (`reference`).",
    ]
    if chat:
        lines += ["  # How conversations are rendered; exports carry it.", f"  chat: {_scalar(dict(chat))}"]
    if reward is not None:
        lines += ["  reward:", *(f"    {name}: {_scalar(value)}" for name, value in reward.items())]
        if "label" in reward.get("init_args", {}):
            lines += ["    # The label is the classifier's last; see that it is the one you want more of."]
    stop = []
    if reward is not None and left > TRAINED:
        stop = [f"    stop: {2 * held + TRAINED}  # the table has {SAMPLES} responses to each; null takes all rows"]
    at_least = "" if found.whole else "at least "
    lines += [
        f"  # {at_least}{found.prompts} prompts, the longest of {found.longest} tokens. {_reading(found, source)}",
        "  train: &rows",
        *(f"    {name}: {_scalar(value)}" for name, value in source.items()),
        "    shuffle_seed: 0",
        f"    start: {2 * held}",
        *stop,
        "  # To watch the run on, and to judge it by.",
        f"  val: {{<<: *rows, start: {held}, stop: {2 * held}}}",
        f"  test: {{<<: *rows, start: 0, stop: {held}}}",
    ]
    if reward is not None:
        lines += [f"  reference_table: {run}/table"]
    new = NEW_TOKENS
    if found.context is not None and found.longest + new > found.context:
        new = max(1, min(NEW_TOKENS, found.context // 2))
    lines += ["  # Longest response, in tokens; one that is cut has no end.", f"  max_new_tokens: {new}"]
    if found.context is not None and found.longest + new > found.context:
        lines += [
            f"  # The model takes {found.context} tokens in all: longer prompts lose their start.",
            f"  max_prompt_tokens: {found.context - new}",
            "  too_long: truncate_left",
        ]
    if method == "sft":
        lines += ["  # Longest text to learn from; of a longer one the end is cut off.", "  # max_text_tokens: 512"]
    lines += [
        "  temperature: 1.0",
        "  # Prompts a step. More make a less noisy gradient; data.max_rows bounds how many are sampled at once.",
        f"  batch_size: {min(8, left)}",
    ]
    return "\n".join(lines) + "\n"


def _reading(found: Found, source: Mapping[str, Any]) -> str:
    layout = found.layout
    column = repr(layout.column)
    if layout.kind == "conversations":
        return f"Column {column} holds messages, rendered by the tokenizer's chat template."
    if "first_words" in source:
        return f"Column {column} holds texts: their first {source['first_words']} words are the prompts."
    said = f"Column {column} is the prompt"
    if "response_column" in source:
        said += f", {source['response_column']!r} the response"
    if found.is_chat:
        return said + ", as plain text: the tokenizer's chat template is for columns of messages."
    return said + "."


def _trainer(run: str, method: str) -> str:
    best = "monitor: val/nll" if method == "sft" else "max_kl: 1.0"
    what = "with the lowest loss" if method == "sft" else "with the highest win rate within so many nats of KL"
    lines = [
        "trainer:",
        "  accelerator: auto",
        "  # precision: bf16-mixed  # on a GPU",
        "  max_steps: 200",
        "  check_val_every_n_epoch: null",
        "  val_check_interval: 50",
        "  num_sanity_val_steps: 0",
        f"  gradient_clip_val: {20.0 if method in ('vbon', 'kl_rl', 'rloo') else 1.0}",
        "  log_every_n_steps: 5",
        f"  # Reward, KL, win rates and samples: tensorboard --logdir {run}",
        f"  default_root_dir: {run}",
        "  callbacks:",
        f"    # Goes on after a kill: vbon fit ... --ckpt_path {run}/checkpoints/last.ckpt",
        "    - class_path: lightning.pytorch.callbacks.ModelCheckpoint",
        f"      init_args: {{dirpath: {run}/checkpoints, every_n_train_steps: 50, save_last: true}}",
        f"    # Keeps the checkpoint {what}, for `best: true` below:",
        f"    # - {{class_path: BestPolicy, init_args: {{{best}}}}}",
        f"    # What to take home: {run}/export. `push_to_hub: ORGANISATION/NAME` uploads it too, `best: true` takes",
        "    # the best checkpoint's weights.",
        "    - class_path: vbon_lightning.callbacks.PolicyExport",
        "      init_args: {push_to_hub: null, best: false}",
    ]
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    """Write a value in a line, as YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")
