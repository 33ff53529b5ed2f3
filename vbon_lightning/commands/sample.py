"""``vbon sample``: responses to take away, from a policy or by a decoder, into a JSON Lines file."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TextIO

from torch import Tensor
from tqdm.auto import tqdm

from vbon_lightning._json_lines import parse_json
from vbon_lightning._visible import is_text, visible, visible_json
from vbon_lightning.actors import Actors, ActorSpec
from vbon_lightning.checks import differences, plain
from vbon_lightning.commands.parsers import ArgumentParser, description_of, parse_beside_run, pass_over_run
from vbon_lightning.data import AlignmentDataModule, Split
from vbon_lightning.data.dealing import Rows
from vbon_lightning.data.encoding import EncodedPrompt
from vbon_lightning.data.preparing import prepare_rows
from vbon_lightning.data.sources import TextRow, TextSource, as_row, read_rows
from vbon_lightning.decoding import (
    BestOfN,
    Decoder,
    InferenceTimePessimism,
    SequentialMonteCarlo,
    SoftBestOfN,
    SpeculativeRejection,
    TreeBoN,
    ValueGuided,
)
from vbon_lightning.decoding.cost import DecodingCost, describe_cost
from vbon_lightning.decoding.drawing import Drawn, check_decoding, device_named, draw, load_actors, sampling_spec
from vbon_lightning.decoding.options import check_counts
from vbon_lightning.models import vocabulary_size
from vbon_lightning.reference_table import ReferenceTableError
from vbon_lightning.rewards import RewardModel
from vbon_lightning.whole_files import atomic_file

Named = Literal[
    "policy",
    "best_of_n",
    "value_guided",
    "soft_best_of_n",
    "speculative_rejection",
    "tree_bon",
    "inference_time_pessimism",
    "sequential_monte_carlo",
]

NAMED: dict[str, Any] = {
    "policy": None,
    "best_of_n": BestOfN,
    "value_guided": ValueGuided,
    "soft_best_of_n": SoftBestOfN,
    "speculative_rejection": SpeculativeRejection,
    "tree_bon": TreeBoN,
    "inference_time_pessimism": InferenceTimePessimism,
    "sequential_monte_carlo": SequentialMonteCarlo,
}
"""Decoders by the names that the command line knows them by: those that an N is enough for."""


class SampleError(ValueError):
    """An output that is another run's, or arguments that do not go together."""


def sample_command(
    policy: str | None = None,
    prompts: str | TextSource | None = None,
    decoder: Decoder | Named = "policy",
    n: int | float | None = None,
    reward: RewardModel | None = None,
    split: Split | None = None,
    samples: int = 1,
    output: str | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    batch_size: int = 8,
    seed: int = 0,
    device: str = "auto",
    chat: bool | None = None,
    *,
    data: AlignmentDataModule | None = None,
) -> None:
    """Draw responses from a policy, or the best of several, and write them as JSON Lines.

    Prompts come from a file (or any source that `data.train` takes), from standard input, a line each, or from a split
    of the data; without any, at a terminal, they are asked for one by one.

    Each line of the output has the prompt and its row, the response and its place among those to the prompt, the
    reward (null where it says nothing of it and `data.reward_calls.on_missing` is skip), the log-probability under the
    policy, the token ids, and whether the response finished. A run that was interrupted goes on where its output ends.

    Args:
        policy: The model to sample from: a hub name or a directory; `data.policy` by default.
        prompts: A file of prompts, a source with its path, column and so on, or `-` for standard input.
        decoder: How a response is chosen: `policy` for plain samples, the name of one that `n` is enough for, or a
            decoder's class with its arguments. What a response takes to make is then said at the end.
        n: N of Best-of-N, or responses to begin with, for the decoders that are given by name; as the decoder has it by
            default. Any real number above 1 for `value_guided`.
        reward: What scores the responses, and what Best-of-N chooses by; `data.reward` by default. With
            `data.missing_eos_penalty` that of a response without an end is lower.
        split: Split of the data whose prompts to take.
        samples: Responses a prompt.
        output: The file to write; standard output by default.
        max_new_tokens: Longest response in tokens; by default what the data say, and where they name no policy, that
            of `policy`'s generation config.
        temperature: Sampling temperature; by default as `max_new_tokens`.
        batch_size: Prompts that are answered together; at a terminal each is answered by itself.
        seed: Seeds the noise.
        device: `cpu`, `cuda`, or `auto` for a GPU where there is one.
        chat: Whether a line of text is what a user says, to be rendered by the policy's chat template: by default what
            is typed at a terminal is, where the policy has a template. Conversations in a file always are.
        data: The data: a split's prompts, the reward and how it is called, lengths, temperature, how responses are
            sampled, the value model, and, for a split, the reference table where the decoder reads one. What is of
            training alone is passed over, the reference too: `policy` is decoded from.
    """
    check_counts(samples=samples, batch_size=batch_size, max_new_tokens=max_new_tokens)
    if temperature is not None and not 0 < temperature < math.inf:
        raise SampleError(f"--temperature must be positive and finite, got {temperature}")
    device_named(device)
    chosen = _decoder(decoder, n)
    if policy is None and not (data is not None and data.actors.policy):
        raise SampleError("nothing to sample from: name a policy with --policy, or data with --config")
    if split is not None and (data is None or not any(data.sources.values())):
        raise SampleError("--split is a split of the data, and no data is named: give --config or --prompts")
    if split is not None and prompts is not None:
        raise SampleError("the prompts of --prompts or those of --split: one of the two")
    if split is not None and chat is not None:
        raise SampleError("--chat is for lines of text; a split's prompts are conversations where its rows are")
    typed = prompts is None and split is None and sys.stdin.isatty()
    if typed and output is not None:
        raise SampleError("--output is for the answers to --prompts or --split; what is typed is answered here")
    data = data or AlignmentDataModule(policy="")
    spec = data.actors = _spec(data.actors, policy, reward, max_new_tokens, temperature)
    if chosen is not None:
        check_decoding(spec, chosen)
    drawing: dict[str, Any] = {"decoder": chosen, "samples": samples, "seed": seed}
    if typed:
        _converse(load_actors(spec, chosen, device), data, drawing, chat)
        return
    encoded = _encoded(prompts or "-", data, bool(chat)) if split is None else data.prompts(split)
    if split is not None and chosen is not None and chosen.reads_table and data.reference_table is not None:
        try:
            drawing["reference_rewards"] = data.table_rewards(encoded)
        except ReferenceTableError as problem:
            raise SampleError(
                f"{problem}; or let the value model predict the reference's rewards: give {type(chosen).__name__} "
                "amortised: true, or --data.reference_table null"
            ) from problem
    done = 0
    if output is not None:
        done = _resumed(Path(output), settings_of(spec, **drawing), encoded, samples, batch_size)
    left = list(enumerate(encoded))[done:]
    if not left:
        print(f"{output} has all {len(encoded)} prompts already", file=sys.stderr)
        return
    actors = load_actors(spec, chosen, device)
    if "reference_rewards" in drawing:
        data.table().check_tokens(vocabulary_size(actors.policy), actors.end_ids)
    costs: list[DecodingCost] = []
    drawn = draw(actors, iter(left), batch_size=batch_size, costs=costs, **drawing)
    shown = tqdm(drawn, total=len(left) * samples, unit="response", disable=None, file=sys.stderr)
    if output is None:
        _write(shown, sys.stdout)
    else:
        with Path(output).open("a", encoding="utf-8") as stream:
            _write(shown, stream)
        print(f"wrote {output}", file=sys.stderr)
    if costs:
        print(describe_cost(costs, len(left) * samples), file=sys.stderr)
    if actors.record.missing:
        print(f"{actors.record.missing} responses were left without a reward", file=sys.stderr)


def _decoder(decoder: str | Decoder, n: float | None) -> Decoder | None:
    if not isinstance(decoder, str):
        if n is not None:
            raise SampleError(
                f"--n is for decoders that are given by name, and {type(decoder).__name__} is given by its class: name "
                "it among that one's own arguments (--decoder.n), or leave --n out"
            )
        return decoder
    if decoder not in NAMED:
        raise SampleError(f"--decoder must be one of {', '.join(NAMED)}, or a decoder's class; got {decoder!r}")
    made = NAMED[decoder]
    if made is None and n is not None:
        raise SampleError("--n is a decoder's, and plain samples have none: give --decoder best_of_n, or leave --n out")
    return None if made is None else made() if n is None else made(n)


def _spec(
    said: ActorSpec,
    policy: str | None,
    reward: RewardModel | None,
    max_new_tokens: int | None,
    temperature: float | None,
) -> ActorSpec:
    """Say what to sample with: what is given, before what data with a policy say, or its own generation config."""
    if policy is not None and not said.policy:
        own = sampling_spec(policy, None, max_new_tokens, temperature)
        max_new_tokens, temperature = own.max_new_tokens, own.temperature
    return said.replaced(
        policy=policy or said.policy,
        reference=None,
        reward=reward or said.reward,
        max_new_tokens=max_new_tokens or said.max_new_tokens,
        temperature=temperature or said.temperature,
    )


def settings_of(
    spec: ActorSpec, *, decoder: Decoder | None, samples: int, seed: int, reference_rewards: Tensor | None = None
) -> dict[str, Any]:
    """Describe what responses and their rewards depend on beside the prompts, in plain values.

    An output is gone on with by a run that has the same.

    Args:
        spec: What is sampled with.
        decoder: How a response is chosen.
        samples: Responses a prompt.
        seed: Seeds the noise.
        reference_rewards: ``[P, M]`` the table's rewards, where the decoder reads them.
    """
    valued = decoder is not None and decoder.needs_value_model
    read = spec if valued else spec.replaced(value_model=None)
    return {
        **read.identity(reference=False),
        "decoder": "policy" if decoder is None else decoder.identity(),
        "samples": samples,
        "seed": seed,
        **({"engine_options": plain(spec.engine_options or {})} if spec.sampler == "vllm" else {}),
        **({} if reference_rewards is None else {"table_rewards": Rows(reference_rewards.tolist()).digest}),
    }


def _encoded(prompts: str | TextSource, data: AlignmentDataModule, said: bool) -> list[EncodedPrompt]:
    """Read and encode prompts; ``said`` makes lines of text what a user says."""
    columns = data.columns_read
    source = None
    if prompts == "-":
        rows = _typed_rows({number: line.rstrip("\r\n") for number, line in enumerate(sys.stdin, start=1)}, columns)
    else:
        source = prompts if isinstance(prompts, TextSource) else TextSource(prompts)
        rows = read_rows(source, columns)
    if said:
        rows = [row if row.messages is not None else _said(row) for row in rows]
    tokenizer = data.tokenizer
    if not said and tokenizer.chat_template and all(row.messages is None for row in rows):
        print(
            "The prompts are text to go on with; --chat true makes each a user's turn, rendered by the chat template",
            file=sys.stderr,
        )
    return _prepared(rows, data, source=source, key_columns=columns)


def _prepared(rows: Sequence[TextRow], data: AlignmentDataModule, **more: Any) -> list[EncodedPrompt]:
    """Encode rows as the data have it."""
    return prepare_rows(
        rows,
        "prompts",
        data.tokenizer,
        chat=data.actors.chat,
        max_prompt_tokens=data.max_prompt_tokens,
        too_long=data.too_long,
        **more,
    )


def _typed_rows(typed: dict[int, str], columns: Sequence[str]) -> list[TextRow]:
    """Return rows of lines of text, or of JSON Lines, by their numbers."""
    lines = {number: line for number, line in typed.items() if line.strip()}
    if not lines:
        raise SampleError("standard input holds no prompt: a line each, of text or of JSON")
    for number, line in lines.items():
        if not is_text(line):
            raise SampleError(f"standard input, line {number}: not UTF-8 text")
    if not all(_is_record(line) for line in lines.values()):
        return [as_row(line, place) for place, line in enumerate(lines.values(), start=1)]
    records = []
    for number, line in lines.items():
        try:
            records.append(parse_json(line))
        except ValueError as problem:
            raise SampleError(f"standard input, line {number}: {problem}") from problem
    return read_rows(TextSource.of(records), columns)


def _is_record(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _said(row: TextRow) -> TextRow:
    return row._replace(messages=[{"role": "user", "content": row.prompt}])


def _resumed(output: Path, settings: dict[str, Any], prompts: Sequence[EncodedPrompt], samples: int, batch: int) -> int:
    """Return how many prompts an output has already, in whole batches, and drop what was written of the next one.

    In whole batches, so that what is added is the same to the last digit: a log-probability is rounded otherwise in
    other company.

    Raises:
        SampleError: If the output is of other prompts, or was made with other settings.
    """
    beside = output.with_name(output.name + ".settings.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    made_of = {"count": len(prompts), "digest": Rows(prompts).digest}
    told = json.dumps({**settings, "prompts": made_of}, indent=1) + "\n"
    if not output.exists():
        _replace(beside, told)
        return 0
    if not beside.exists():
        raise SampleError(f"{output} exists, and {beside.name}, which says what made it, does not: name another output")
    its = json.loads(beside.read_text())
    made_of = its.pop("prompts", {"count": 0, "digest": ""})
    if found := differences(its, settings):
        lines = "".join(f"\n  {name}: {its!r} there, {ours!r} here" for name, (its, ours) in found.items())
        raise SampleError(f"{output} was made with other settings:{lines}\nName another --output, or remove it")
    if made_of["count"] > len(prompts):
        raise SampleError(
            f"{output} is of {made_of['count']} prompts, and here are {len(prompts)}: name another output"
        )
    text = output.read_text(encoding="utf-8")
    kept = text.split("\n")[:-1]  # the last line may be half a line
    for number, line in enumerate(kept, start=1):
        row = (number - 1) // samples
        if row >= len(prompts) or _made_of(line) != (row, prompts[row].text):
            raise SampleError(f"{output}, line {number}: of other prompts than these; name another output")
    if Rows(prompts[: made_of["count"]]).digest != made_of["digest"]:
        raise SampleError(
            f"{output} was made of prompts with the same texts, but other tokens, or other columns beside them: name "
            "another output"
        )
    done = len(kept) // samples
    done -= done % batch if done < len(prompts) else 0
    whole = "".join(f"{line}\n" for line in kept[: done * samples])
    if whole != text:
        _replace(output, whole)
    _replace(beside, told)
    return done


def _made_of(line: str) -> tuple[Any, Any] | None:
    """Return the row and the prompt of an output's line; None for a line that is none."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    return (record.get("row"), record.get("prompt")) if isinstance(record, dict) else None


def _replace(path: Path, text: str) -> None:
    with atomic_file(path) as stream:
        stream.write(text.encode())


def _write(drawn: Iterator[Drawn], stream: TextIO) -> None:
    for one in drawn:
        line = json.dumps(one._asdict(), ensure_ascii=False)
        stream.write((visible_json(line) if stream is sys.stdout else line) + "\n")
        stream.flush()


def _converse(actors: Actors, data: AlignmentDataModule, drawing: dict[str, Any], chat: bool | None) -> None:
    """Answer prompts as they are typed, each by itself; the same prompt twice gets two answers."""
    said = bool(actors.tokenizer.chat_template) if chat is None else chat
    how = "rendered by the chat template" if said else "as text to go on with"
    print(f"A prompt a line, {how}; an empty line or Ctrl-D ends.", file=sys.stderr)
    for number in range(sys.maxsize):
        try:
            text = input("> ")
        except EOFError:
            break
        if not text.strip():
            break
        if not is_text(text):
            print("that is not UTF-8 text; again, please", file=sys.stderr)
            continue
        row = as_row(text, number + 1)
        prompts = _prepared([_said(row) if said else row], data)
        for one in draw(actors, enumerate(prompts), step=number, **drawing):
            shown = visible(one.response)
            print(shown if one.reward is None else f"{shown}    [reward {one.reward:.3f}]")


class _SampleParser(ArgumentParser):
    """Says what to do about arguments of a decoder that is given by its name, or not at all."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        found = re.search(r'key "decoder":.*?import path string: (\w+)', message, re.DOTALL)
        if found and found[1] in NAMED:
            named = "best_of_n" if NAMED[found[1]] is None else found[1]
            message = (
                f"--decoder.OPTION is for a decoder that is given by its class, and --decoder is {found[1]}: give "
                f"--decoder {named} --n N, or --decoder {NAMED[named].__name__} with that one's own options"
            )
        super().error(message, ex)


def build_parser() -> ArgumentParser:
    """Return the parser of ``vbon sample``."""
    parser = _SampleParser(prog="vbon sample", description=description_of(sample_command))
    parser.add_argument(
        "-c", "--config", action="config", help="Path to a YAML file with these options, or that of a run."
    )
    pass_over_run(parser)
    parser.add_function_arguments(sample_command, skip={"data"})
    parser.add_class_arguments(AlignmentDataModule, "data")
    parser.set_defaults({"data.policy": ""})  # the policy may be all that is named
    return parser


def main(args: Sequence[str]) -> None:
    """Parse the arguments of ``vbon sample`` and run it."""
    parser = build_parser()
    values = parse_beside_run(parser, args)
    # What is said of the data counts, were it what they have by default; their policy need not be named.
    said = parser.parse_args(["--data.policy", "", *args], defaults=False)
    for name in ("max_new_tokens", "temperature"):
        if values[name] is None:
            values[name] = said.get(f"data.{name}")
    sample_command(**values)
