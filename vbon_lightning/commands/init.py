"""``vbon init``: a commented starting config for a model, a data file and a reward."""

from __future__ import annotations

import inspect
import os
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig

from vbon_lightning import rewards
from vbon_lightning.commands.layouts import FIRST_WORDS, Layout, layout_of
from vbon_lightning.commands.parsers import ArgumentParser, description_of
from vbon_lightning.commands.starting_config import Found, starting_config
from vbon_lightning.data import AlignmentDataModule
from vbon_lightning.data.sources import SourceError, TextSource, first_records
from vbon_lightning.models import locate
from vbon_lightning.rewards import CallableReward, RewardError, RewardModel
from vbon_lightning.whole_files import atomic_file

Method = Literal["vbon", "kl_rl", "rloo", "grpo", "sft", "bon_sft", "dpo"]

LOOKED_AT = 10_000
"""Rows that are read to see what the data is."""


class InitError(ValueError):
    """A starting config that cannot be written."""


def init(
    policy: str,
    data: str,
    reward: str | None = None,
    method: Method = "vbon",
    output: str = "config.yaml",
    prompt_column: str | None = None,
    response_column: str | None = None,
    chat_template: str | None = None,
) -> None:
    """Write a commented starting config, which `vbon fit`, `predict`, `compare` and `sample` take as it is.

    It looks at the data and at the policy's tokenizer: which column is the prompt, how long prompts are, how many there
    are to hold out. Nothing that exists is overwritten.

    Args:
        policy: The model to train: a hub name or a local directory.
        data: A file of any format that `data.train` reads, or a data set of the hub.
        reward: What scores responses: a class of `vbon_lightning.rewards` such as `VaderReward`, a function or class
            as `package.module.name`, or a sequence classifier as a hub name or directory. Only `sft` does without.
        method: How to train: `vbon`, `kl_rl`, `rloo`, `grpo`, `sft`, `bon_sft` or `dpo`.
        output: The file to write.
        prompt_column: The column that holds prompts, texts or messages; told from the data by default.
        response_column: The column that holds responses (for `sft`) or right answers; told from the data by default.
        chat_template: A file with the template (Jinja) that renders conversations, for a policy that has none.
    """
    target = Path(output)
    if target.exists():
        raise InitError(f"{output} exists: name another --output, or remove it")
    if reward is None and method != "sft":
        raise InitError(f"--method {method} needs a reward: name a class, a function or a classifier with --reward")
    layout = layout_of(first_records(TextSource(data), 100), prompt_column, response_column)
    section = None if reward is None else reward_section(reward, layout)
    source = source_section(data, layout, method)
    chat = {} if chat_template is None else {"template": Path(chat_template).read_text(encoding="utf-8")}
    module = AlignmentDataModule(policy=policy, chat=chat, train=TextSource(**{**source, "stop": LOOKED_AT}))
    prompts = module.prompts("train")
    if len(prompts) < 3:
        raise InitError(f"{data} holds {len(prompts)} prompts: three at least, to train, to validate and to test on")
    found = Found(
        layout=layout,
        prompts=len(prompts),
        whole=len(prompts) < LOOKED_AT,
        longest=module.longest(),
        context=_context(policy, module.tokenizer.model_max_length),
        is_chat=module.tokenizer.chat_template is not None,
    )
    text = starting_config(
        policy=policy, source=source, reward=section, method=method, output=output, found=found, chat=chat
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(target) as stream:
        stream.write(text.encode())
    commands = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# vbon ")]
    print("\n".join([f"wrote {output}; read it, then", *(f"  {line}" for line in commands)]))


def source_section(data: str, layout: Layout, method: str) -> dict[str, Any]:
    """Return the arguments of the :class:`TextSource` that reads the data so."""
    source: dict[str, Any] = {"path": data, "column": layout.column}
    # A response beside a prompt; whole conversations have theirs within.
    beside = layout.kind == "prompts" or (layout.kind == "conversations" and layout.column == "prompt")
    if method == "sft" and layout.response is not None and beside:
        return source | {"response_column": layout.response}
    if layout.kind == "texts":
        source |= {"min_words": FIRST_WORDS, "first_words": FIRST_WORDS}
    return source | {"unique": True}


def reward_section(reward: str, layout: Layout) -> dict[str, Any]:
    """Return class and arguments of a reward that is named in one word, and see that it can be had.

    Raises:
        RewardError: If there is no such class or function, or one that needs what no word says.
        SourceError: If it reads a column that the data lacks.
    """
    kind = getattr(rewards, reward, None) or _imported(reward)
    if isinstance(kind, type) and issubclass(kind, RewardModel):
        made, section = _of_class(kind, layout)
    elif _is_function(reward):
        made, section = CallableReward(reward), {"class_path": _path(CallableReward), "init_args": {"function": reward}}
    else:
        return _classifier(reward)
    for column in made.columns:
        if column not in layout.columns and not (column == "messages" and layout.kind == "conversations"):
            raise SourceError(
                f"--reward {reward} reads the column {column!r}, which the data lacks: the columns are "
                f"{', '.join(map(repr, layout.columns))}"
            )
    return section


def _of_class(kind: type[RewardModel], layout: Layout) -> tuple[RewardModel, dict[str, Any]]:
    parameters = inspect.signature(kind).parameters
    needed = [name for name, one in parameters.items() if one.default is one.empty and one.kind != one.VAR_KEYWORD]
    if needed or inspect.isabstract(kind):
        raise RewardError(
            f"--reward {kind.__name__} needs arguments ({', '.join(needed) or 'it is a base'}): write a config with "
            "another reward, and this one into its `data.reward` (docs/rewards.md)"
        )
    arguments = {"column": layout.response} if "column" in parameters and layout.response is not None else {}
    return kind(**arguments), {"class_path": _path(kind), **({"init_args": arguments} if arguments else {})}


def _classifier(name: str) -> dict[str, Any]:
    place, _ = locate("--reward", name)
    section: dict[str, Any] = {"model": name}
    try:
        config = AutoConfig.from_pretrained(place)
    except Exception as error:  # transformers raises many types here; every one means the same to a user
        raise RewardError(
            f"--reward {name!r} is no class of vbon_lightning.rewards ({', '.join(_names())}), no importable function, "
            "and no sequence classifier in a directory or on the hub that can be reached"
        ) from error
    if config.num_labels > 1:
        section |= {"label": config.id2label[config.num_labels - 1], "output": "log_odds"}
    return {"class_path": "vbon_lightning.rewards.ClassifierReward", "init_args": section}


def _context(policy: str, says: int) -> int | None:
    """Return how many tokens a model takes, as its config and its tokenizer say, None where neither does."""
    name, gguf_file = locate("--policy", policy)
    config = None if gguf_file else AutoConfig.from_pretrained(name).get_text_config()
    known = [getattr(config, "max_position_embeddings", None), says if says < 10**9 else None]
    return min((int(one) for one in known if one), default=None)


def _is_function(reward: str) -> bool:
    if os.path.isdir(reward) or "/" in reward:
        return False
    return ":" in reward or ("." in reward and not reward.startswith("."))


def _names() -> list[str]:
    kinds = {name: getattr(rewards, name) for name in rewards.__all__}
    return [name for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, RewardModel)]


def _imported(name: str) -> Any:
    """Return what a dotted name stands for, None where nothing has it; what is wrong with it is told elsewhere."""
    if not _is_function(name):
        return None
    try:
        return pkgutil.resolve_name(name)
    except (Exception, SystemExit):  # whatever an import may raise
        return None


def _path(kind: type) -> str:
    module = "vbon_lightning.rewards" if kind.__module__.startswith("vbon_lightning.rewards.") else kind.__module__
    return f"{module}.{kind.__name__}"


def build_parser() -> ArgumentParser:
    """Return the parser of ``vbon init``."""
    parser = ArgumentParser(prog="vbon init", description=description_of(init))
    parser.add_function_arguments(init)
    return parser


def main(args: Sequence[str]) -> None:
    """Parse the arguments of ``vbon init`` and run it."""
    init(**build_parser().parse_args(list(args)).as_dict())
