"""The ``vbon dial`` command: a tilted policy, turned to an N."""

from __future__ import annotations

from collections.abc import Sequence

from vbon_lightning.commands.parsers import ArgumentParser, description_of
from vbon_lightning.models import ModelSpec, load_causal_lm, load_tokenizer, save_pretrained


def dial(policy: str, n: float, output: str) -> None:
    """Write a tilted policy turned to an N; transformers alone can load it (trust_remote_code).

    Args:
        policy: The export of a tilted policy, best one that was trained for every N (``n_range``).
        n: The N, any real number >= 1.
        output: Directory to write to; replaced if it exists.
    """
    spec = ModelSpec(name=policy, dial=n, dtype="auto")
    save_pretrained(load_causal_lm(spec, trainable=False), load_tokenizer(spec), output)
    print(f"wrote the policy for N = {n:g} to {output}")


def build_parser() -> ArgumentParser:
    """Return the parser of ``vbon dial``."""
    parser = ArgumentParser(prog="vbon dial", description=description_of(dial))
    parser.add_argument("-c", "--config", action="config", help="Path to a YAML file with these options.")
    parser.add_function_arguments(dial)
    return parser


def main(args: Sequence[str]) -> None:
    """Parse the arguments of ``vbon dial`` and run it."""
    values = build_parser().parse_args(list(args)).as_dict()
    values.pop("config", None)
    dial(**values)
