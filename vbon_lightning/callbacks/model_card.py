"""The model card of an exported policy."""

from __future__ import annotations

import json
import platform
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from lightning.pytorch import LightningModule, Trainer

from vbon_lightning._markdown import markdown_cell, markdown_code, markdown_table
from vbon_lightning.checks import plain
from vbon_lightning.models import TiltedLM, ValueModel, describe_ends
from vbon_lightning.paths import public_name

_PACKAGES = ("vbon-lightning", "lightning", "torch", "transformers", "tokenizers", "datasets")

_CARD = """---
library_name: transformers
{task_entry}{base_entry}{data_entry}tags:
- vbon-lightning
- {tag}
---

# {title}

A {kind} trained with {method} by `vbon_lightning`.

- **Method:** {method}
- **Base model:** {base}
- **Reward:** {reward}
{data}{command}- **Optimizer steps:** {steps}
{ends}{weights}
{usage}
## Hyper-parameters

{settings}
## Metrics

The last values logged in training, on the training run's own data.

{metrics}
## Versions

{versions}"""


_GENERATES = """## How to load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")
inputs = tokenizer("Your prompt", return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**inputs), skip_special_tokens=True)[0])
```

The generation config holds the sampling settings the policy was trained at.
"""

_CHAT = """
Conversations are rendered by the tokenizer's chat template:

```python
messages = [{"role": "user", "content": "Your prompt"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
```
"""

_TILTED = (
    _GENERATES.replace('directory")\ntok', 'directory", trust_remote_code=True)\ntok')
    + """
It is two models: a frozen base and a tower that tilts its next-token distribution towards Best-of-N's, in `tilted.py`
beside the weights. `model.turn(n)` sets N, any real number from 1, where it is the base, upwards.
Where its config has a `calibration`, N is that of the Best-of-N whose KL the policy has.
"""
)

_CLASSIFIES = """## How to load it

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("path/to/this/directory")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")
print(model(**tokenizer("Your text", return_tensors="pt")).logits)
```

Or as the reward of a run, in its YAML:

```yaml
data:
  reward:
    class_path: vbon_lightning.rewards.ClassifierReward
    init_args: {model: path/to/this/directory}
```
"""


_FORECASTS = """## How to load it

It predicts, for a prompt and each prefix of a response, which reward the response will end with.

```python
from vbon_lightning.models import load_value_model

model = load_value_model("path/to/this/directory")
```

`AutoModel.from_pretrained` loads it too, after `import vbon_lightning.models`.

As the value model of a run, in its YAML:

```yaml
data:
  value_model: path/to/this/directory
```
"""


class _Kind(NamedTuple):
    """What a card says about a kind of model."""

    name: str
    task: str | None
    """Which of the hub's pipelines runs it."""
    usage: str


_KINDS = {
    "generates": _Kind("language model", "text-generation", _GENERATES),
    "tilted": _Kind("tilted language model", "text-generation", _TILTED),
    "classifies": _Kind("sequence classifier", "text-classification", _CLASSIFIES),
    "forecasts": _Kind("value model", None, _FORECASTS),
}


class BestWeights(NamedTuple):
    """The checkpoint whose weights are exported, where these are not the last ones."""

    step: int
    """Optimizer steps it was made after."""
    monitor: str
    """The metric that it is the best by."""
    score: float
    """The metric's value."""


def model_card(
    trainer: Trainer, pl_module: LightningModule, best: BestWeights | None = None, name: str | None = None
) -> str:
    """Write a model card: method, base, reward, hyper-parameters, metrics, versions and how to load it.

    Args:
        trainer: For the metrics and the number of steps.
        pl_module: For the method, its hyper-parameters and, as far as it has them, the names of its models.
        best: Whose weights are exported; the last ones by default.
        name: What to load it by, such as its name on the hub; by default its directory.
    """
    method = type(pl_module).__name__
    actors = getattr(pl_module, "actor_spec", None)
    base, is_hub_name = _base(getattr(pl_module, "body", None) or getattr(actors, "policy_spec", None))
    policy = getattr(pl_module, "policy", None)
    data, data_entry = _data(getattr(trainer, "datamodule", None))
    if isinstance(policy, ValueModel):
        kind = _KINDS["forecasts"]
    elif isinstance(policy, TiltedLM):
        kind = _KINDS["tilted"]
    else:
        kind = _KINDS["generates" if getattr(policy, "can_generate", lambda: True)() else "classifies"]
    return _CARD.format(
        base_entry=f"base_model: {_yaml(base)}\n" if is_hub_name else "",
        tag=method.lower(),
        task_entry="" if kind.task is None else f"pipeline_tag: {kind.task}\n",
        kind=kind.name,
        usage=_usage(kind, name, getattr(pl_module, "tokenizer", None)),
        weights=""
        if best is None
        else f"- **Weights:** after step {best.step}, the best {markdown_code(best.monitor)} ({_number(best.score)})\n",
        title=f"{markdown_cell(base)} after {method}" if actors is not None else f"A policy after {method}",
        method=method,
        base=markdown_cell(base),
        reward=_reward(actors) if getattr(pl_module, "uses_reward", True) else "none",
        data_entry=data_entry,
        data=data,
        command=_command(),
        steps=trainer.global_step,
        ends=_ends(getattr(pl_module, "actors", None)) if kind.task == "text-generation" else "",
        settings=_table(("setting", "value"), _flatten(dict(pl_module.hparams)), "ll"),
        metrics=_table(("metric", "value"), {k: _number(v) for k, v in trainer.callback_metrics.items()}, "lr"),
        versions=_table(("package", "version"), _versions(), "ll"),
    )


def _usage(kind: _Kind, name: str | None, tokenizer: Any) -> str:
    usage = kind.usage if name is None else kind.usage.replace("path/to/this/directory", name)
    if kind.task == "text-generation" and getattr(tokenizer, "chat_template", None):
        usage += _CHAT
    return usage


def _ends(actors: Any) -> str:
    if actors is None:
        return ""
    return f"- **A response ends at:** {markdown_cell(describe_ends(actors.tokenizer, actors.end_ids))}\n"


def _base(spec: Any) -> tuple[str, bool]:
    name = getattr(spec, "name", None)
    if name is None:
        config = getattr(spec, "config", None)
        return (f"a new {config.get('model_type', 'model')} from a config" if config else "not recorded"), False
    return public_name(str(name))


def _reward(actors: Any) -> str:
    identity = getattr(getattr(actors, "reward", None), "identity", None)
    return markdown_code(json.dumps(identity(), sort_keys=True)) if callable(identity) else "none"


def _data(module: Any) -> tuple[str, str]:
    """Say where the training rows came from and which were taken: for people, and, of the hub's, for the hub."""
    source = getattr(module, "sources", {}).get("train")
    if source is None:
        return "", ""
    name, is_hub_name = source.public_name
    usual = {field.name: field.default for field in fields(source)}
    taken = {name: value for name, value in source.settings().items() if name != "path" and value != usual[name]}
    taken = {"path": name, **plain(taken)}
    said = f"- **Data:** {markdown_code(json.dumps(taken, ensure_ascii=False))}\n"
    return said, f"datasets:\n- {_yaml(name)}\n" if is_hub_name and not Path(name).suffix else ""


def _yaml(text: str) -> str:
    return str(yaml.safe_dump(text, default_style='"', width=sys.maxsize)).strip()


def _command() -> str:
    """Say which command made it, where one did; of directories in it only the last names are kept."""
    program = Path(sys.argv[0])
    if program.stem != "vbon" and program.parent.name != "vbon_lightning":
        return ""
    words = ["vbon", *(_DIRECTORIES.sub("", word) for word in sys.argv[1:])]
    return f"- **Command:** {markdown_code(shlex.join(words))}\n"


_DIRECTORIES = re.compile(r"(?<![^\s='\"\[{:,])(?:~|\.{1,2}|[A-Za-z]:)?[/\\](?:[^\s'\",\]}/\\]+[/\\])*")
"""What stands before the last name of an absolute path, or of one that starts here or at home."""


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def _number(value: Any) -> str:
    return f"{float(value):.5g}" if isinstance(value, (int, float, torch.Tensor)) else str(value)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _table(header: tuple[str, str], values: Mapping[str, str], align: str) -> str:
    if not values:
        return "None.\n"
    rows = [[markdown_cell(key), markdown_cell(value)] for key, value in sorted(values.items())]
    return markdown_table(header, rows, align=align)
