"""``vbon sample`` as it is typed."""

from __future__ import annotations

import io
import json
import sys
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from tests.helpers import save_tiny_model
from tests.modules.setting import ALPHABET
from vbon_lightning import cli, sample
from vbon_lightning.actors import ActorSpec
from vbon_lightning.commands import sample as command
from vbon_lightning.data import AlignmentDataModule
from vbon_lightning.decoding import BestOfN, ValueGuided
from vbon_lightning.decoding.drawing import Drawn
from vbon_lightning.reference_table import ReferenceTableError
from vbon_lightning.rewards import CallableReward, RewardCalls, RewardError

REWARD = """
def vowels(prompts, responses):
    return [[float(sum(char in "ae" for char in text)) for text in texts] for texts in responses]

def picky(prompts, completions):
    return [None if text[:1] in ("a", "b", "c", "") else 1.0 for text in completions]

def letters(prompts, completions, letter):
    return [float(text.count(one)) for text, one in zip(completions, letter)]
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_tiny_model(tmp_path / "policy", alphabet=ALPHABET, seed=1, spread=2.0)
    (tmp_path / "prompts.txt").write_text("ab\n\ncde\nh\n")
    (tmp_path / "sample_rewards.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def vbon(*arguments: str) -> None:
    command.main(["--policy", "./policy", "--max_new_tokens", "5", "--device", "cpu", *arguments])


def read(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


VOWELS = ("--reward", "CallableReward", "--reward.function", "sample_rewards.vowels")
PLAIN = ("--policy", "./policy", "--prompts", "prompts.txt")
BEST = ("--decoder", "best_of_n", "--n", "3", *VOWELS)


def test_a_file_of_prompts_becomes_json_lines(files: Path) -> None:
    vbon("--prompts", "prompts.txt", "--output", "out/plain.jsonl", "--samples", "3")
    plain = read("out/plain.jsonl")
    assert [(line["row"], line["sample"], line["prompt"]) for line in plain] == [
        (row, place, text) for row, text in enumerate(["ab", "cde", "h"]) for place in range(3)
    ]
    assert {line["reward"] for line in plain} == {None}
    assert set(plain[0]) == {"row", "sample", "prompt", "response", "reward", "log_prob", "tokens", "finished"}
    vbon("--prompts", "prompts.txt", "--output", "best.jsonl", *BEST)
    for line in read("best.jsonl"):
        group = [other for other in plain if other["row"] == line["row"]]
        assert line["reward"] == max(sum(c in "ae" for c in other["response"]) for other in group)


def test_standard_input_and_output(files: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    vbon("--prompts", "prompts.txt", "--output", "out.jsonl")
    for prompts in ((), ("--prompts", "-")):
        monkeypatch.setattr(sys, "stdin", io.StringIO("ab\n\ncde\nh\n"))
        capsys.readouterr()
        vbon(*prompts)
        assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == read("out.jsonl")
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    with pytest.raises(command.SampleError, match="standard input holds no prompt"):
        vbon()


@pytest.mark.parametrize("kept", [0, 1, 2, 3, 5, 6])
def test_an_interrupted_run_goes_on(kept: int, files: Path) -> None:
    arguments = ("--prompts", "prompts.txt", "--samples", "2", "--batch_size", "2", "--output")
    vbon(*arguments, "whole.jsonl")
    vbon(*arguments, "cut.jsonl")
    text = Path("whole.jsonl").read_text()
    lines = text.splitlines(keepends=True)
    Path("cut.jsonl").write_text("".join(lines[:kept]) + (lines[kept][:20] if kept < len(lines) else ""))
    vbon(*arguments, "cut.jsonl")
    assert Path("cut.jsonl").read_text() == text
    assert sorted(path.name for path in files.iterdir() if path.name.startswith((".", "cut"))) == [
        "cut.jsonl",
        "cut.jsonl.settings.json",
    ]


def test_another_runs_output_is_left_alone(files: Path) -> None:
    vbon("--prompts", "prompts.txt", "--output", "out.jsonl")
    before = Path("out.jsonl").read_text()
    with pytest.raises(
        ValueError, match=r"was made with other settings:\n  seed: 0 there, 1 here\nName another --output"
    ):
        vbon("--prompts", "prompts.txt", "--output", "out.jsonl", "--seed", "1")
    with pytest.raises(ValueError, match="made with other settings"):
        vbon("--prompts", "prompts.txt", "--output", "out.jsonl", *BEST)
    (files / "others.txt").write_text("ab\nhh\nh\n")
    with pytest.raises(command.SampleError, match=r"out.jsonl, line 2: of other prompts than these; name an"):
        vbon("--prompts", "others.txt", "--output", "out.jsonl")
    assert Path("out.jsonl").read_text() == before
    (files / "out.jsonl.settings.json").unlink()
    with pytest.raises(command.SampleError, match="out.jsonl exists, and out.jsonl.settings.json, which"):
        vbon("--prompts", "prompts.txt", "--output", "out.jsonl")


# -- what an output depends on ----------------------------------------------------------------------

DEPENDS: dict[str, list[str]] = {
    "policy": ["--policy", "./other"],
    "decoder": ["--decoder", "SoftBestOfN", "--decoder.n", "3"],
    "n": ["--n", "4"],
    "reward": ["--reward.function", "sample_rewards.picky"],
    "samples": ["--samples", "2"],
    "max_new_tokens": ["--max_new_tokens", "4"],
    "temperature": ["--temperature", "0.7"],
    "seed": ["--seed", "1"],
    "data.missing_eos_penalty": ["--data.missing_eos_penalty", "0.5"],
    "data.end_tokens": ["--data.end_tokens", "[b]"],
    "data.sampler": ["--data.sampler", "vllm"],
    "data.engine_options": ["--data.sampler", "vllm", "--data.engine_options", "{quantization: fp8}"],
    "data.value_model": ["--decoder", "value_guided", "--data.value_model", "./other"],
    "data.reward_calls": ["--data.reward_calls.on_missing", "skip"],
}
"""Options that change responses or rewards, and such a change."""

PASSED_OVER = {
    "prompts": "the prompts themselves are compared",
    "split": "the prompts themselves are compared",
    "chat": "the prompts' texts and tokens are compared",
    "output": "where it is written",
    "batch_size": "the noise belongs to the prompts; an output is gone on with in whole batches",
    "device": "as in training, rounding alone",
    "data": "its options are below",
    "data.policy": "is `policy`",
    "data.reward": "is `reward`",
    "data.max_new_tokens": "is `max_new_tokens`",
    "data.temperature": "is `temperature`",
    "data.reference": "the policy is decoded from",
    "data.max_rows": "the noise belongs to the rows",
    "data.chat": "the prompts' texts and tokens are compared",
    "data.reward_columns": "the prompts' columns are compared",
    "data.max_prompt_tokens": "the prompts' tokens are compared",
    "data.too_long": "the prompts' tokens are compared",
    "data.reference_table": "the rewards that are read from it are compared",
    "data.table_samples": "the rewards that are read from it are compared",
    "data.table_skip": "the rewards that are read from it are compared",
    "data.table_seed": "the rewards that are read from it are compared",
    **{f"data.{name}": "is a source of prompts" for name in ("train", "val", "test")},
    **{
        f"data.{name}": "is of training alone"
        for name in (
            "table_splits",
            "batch_size",
            "eval_batch_size",
            "max_text_tokens",
            "long_text",
            "num_workers",
            "seed",
        )
    },
}
"""Options that do not, with the reason."""


def test_every_option_is_in_what_an_output_depends_on_or_has_a_reason() -> None:
    options = list(signature(command.sample_command).parameters)
    for kind in (AlignmentDataModule, ActorSpec):
        options += [f"data.{name}" for name in signature(kind).parameters if name != "actors"]
    assert sorted([*DEPENDS, *PASSED_OVER]) == sorted(set(options))


@pytest.fixture
def written(files: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Return the arguments of an output that is there; no model is loaded for another."""
    save_tiny_model(files / "other", alphabet=ALPHABET, seed=3)
    arguments = ("--prompts", "prompts.txt", "--output", "out.jsonl", *BEST)
    vbon(*arguments)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(command, "load_actors", refuse)
    vbon(*arguments)
    return arguments


@pytest.mark.parametrize("option", DEPENDS)
def test_an_output_of_another_option_is_left_alone(option: str, written: tuple[str, ...]) -> None:
    arguments = written
    if DEPENDS[option][0] == "--decoder":
        arguments = tuple(one for one in written if one not in ("--n", "3"))
    before = Path("out.jsonl").read_text()
    name = {"n": r"decoder\.n", "data.reward_calls": "on_missing"}.get(option, option.removeprefix("data."))
    with pytest.raises(command.SampleError, match=rf"was made with other settings:(\n.*)*\n  {name}[.:].* there, "):
        vbon(*arguments, *DEPENDS[option])
    assert Path("out.jsonl").read_text() == before


def test_an_output_of_other_prompts_is_left_alone(written: tuple[str, ...], files: Path) -> None:
    """Fewer of them, others, or others in what is not written: nothing is lost."""
    before = Path("out.jsonl").read_text()
    for prompts, message in (
        ("ab\ncde\n", "out.jsonl is of 3 prompts, and here are 2: name another output"),
        ("ab\nh\nh\n", "out.jsonl, line 2: of other prompts than these"),
    ):
        (files / "prompts.txt").write_text(prompts)
        with pytest.raises(command.SampleError, match=message):
            vbon(*written)
    (files / "prompts.txt").write_text("ab\ncde\nh\n")
    with pytest.raises(command.SampleError, match="out.jsonl, line 2: of other prompts than these"):
        vbon(*written, "--data.max_prompt_tokens", "2", "--data.too_long", "truncate_left")
    assert Path("out.jsonl").read_text() == before
    Path("out.jsonl").write_text(before.replace('"row": 1', '"row": 1,,'))
    with pytest.raises(command.SampleError, match="out.jsonl, line 2: of other prompts than these"):
        vbon(*written)


def test_an_output_of_prompts_with_other_columns_is_left_alone(files: Path) -> None:
    letters = ("--prompts", "rows.jsonl", "--reward", "CallableReward", "--reward.function", "sample_rewards.letters")
    for letter in "ab":
        (files / "rows.jsonl").write_text(json.dumps({"prompt": "ab", "letter": letter}) + "\n")
        if letter == "a":
            vbon(*letters, "--output", "out.jsonl")
    with pytest.raises(command.SampleError, match="the same texts, but other tokens, or other columns beside them"):
        vbon(*letters, "--output", "out.jsonl")


def test_prompts_may_be_added(files: Path) -> None:
    arguments = ("--samples", "2", "--batch_size", "3", "--output")
    vbon("--prompts", "prompts.txt", *arguments, "grown.jsonl")
    (files / "prompts.txt").write_text("ab\ncde\nh\nab\n")
    vbon("--prompts", "prompts.txt", *arguments, "grown.jsonl")
    vbon("--prompts", "prompts.txt", *arguments, "whole.jsonl")
    for name in ("{}", "{}.settings.json"):
        assert Path(name.format("grown.jsonl")).read_text() == Path(name.format("whole.jsonl")).read_text()


def test_the_table_that_a_decoder_reads_counts(files: Path) -> None:
    spec = ActorSpec("./policy", value_model="./policy")
    how: dict[str, Any] = {"decoder": ValueGuided(2), "samples": 1, "seed": 0}
    one, same, other = (
        command.settings_of(spec, **how, reference_rewards=None if last is None else torch.tensor([[0.0, last]]))
        for last in (1.0, 1.0, 2.0)
    )
    assert one == same != other and "value_model" in one
    assert set(one) - set(command.settings_of(spec, **how)) == {"table_rewards"}
    assert "value_model" not in command.settings_of(spec, **(how | {"decoder": BestOfN(2)}))


@pytest.mark.parametrize("amortised", [False, True])
def test_a_splits_table_is_read_as_vbon_compare_reads_it(
    amortised: bool, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards, given = torch.tensor([[0.5, 1.5]]), list[Any]()

    def check(vocabulary: int | None, end_ids: tuple[int, ...]) -> None:
        given.append((vocabulary, end_ids))

    monkeypatch.setattr(AlignmentDataModule, "table_rewards", lambda *_: rewards)
    monkeypatch.setattr(AlignmentDataModule, "table", lambda *_: SimpleNamespace(check_tokens=check))
    policy = torch.nn.Embedding(7, 2)
    monkeypatch.setattr(command, "vocabulary_size", lambda model: model.num_embeddings)
    loaded = SimpleNamespace(policy=policy, end_ids=(2,), record=SimpleNamespace(missing=0))
    monkeypatch.setattr(command, "load_actors", lambda *_: loaded)
    monkeypatch.setattr(command, "draw", lambda *_, **how: given.append(how.get("reference_rewards")) or iter(()))
    table = ("--data.test", "[{text: ab}]", "--split", "test", "--data.reference_table", "./table")
    valued = (
        "--data.value_model",
        "./policy",
        "--decoder",
        "ValueGuided",
        "--decoder.amortised",
        str(amortised).lower(),
    )
    vbon(*table, *valued)
    assert given == ([None] if amortised else [(7, (2,)), rewards])


def test_prompts_that_the_table_lacks(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: Any) -> Any:
        raise ReferenceTableError("prompt 'ab' is not in the table: add it with `vbon predict`")

    monkeypatch.setattr(AlignmentDataModule, "table_rewards", lacking)
    table = ("--data.test", "[{text: ab}]", "--split", "test", "--data.reference_table", "./table")
    with pytest.raises(command.SampleError, match=r"`vbon predict`; or .* ValueGuided amortised: true, or --data\.ref"):
        vbon(*table, "--data.value_model", "./policy", "--decoder", "ValueGuided")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], (3, 0.5)),  # the generation config's
        (["--data.max_new_tokens", "7"], (7, 0.5)),
        (["--data.max_new_tokens", "32", "--data.temperature", "1.0"], (32, 1.0)),  # the data's defaults, but said
        (["--config", "data.yaml"], (32, 1.0)),
        (["--config", "data.yaml", "--max_new_tokens", "4", "--temperature", "0.25"], (4, 0.25)),
        (["--config", "data.yaml", "--data.temperature", "0.75"], (32, 0.75)),
        (["--data.policy", "./policy"], (32, 1.0)),  # data with a policy count as a whole
    ],
)
def test_what_is_said_of_length_and_temperature_counts(
    arguments: list[str], expected: tuple[int, float], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saying = GenerationConfig(do_sample=True, temperature=0.5, max_new_tokens=3)
    saying.save_pretrained(files / "policy")
    (files / "data.yaml").write_text("data:\n  max_new_tokens: 32\n  temperature: 1.0\n")
    seen: list[ActorSpec] = []

    def load(spec: ActorSpec, *rest: Any) -> Any:
        seen.append(spec)
        raise InterruptedError

    monkeypatch.setattr(command, "load_actors", load)
    with pytest.raises(InterruptedError):
        command.main([*PLAIN, "--data.missing_eos_penalty", "1", *arguments])
    assert (seen[0].max_new_tokens, seen[0].temperature) == expected
    assert seen[0].missing_eos_penalty == 1


def test_the_penalty_for_a_missing_end_counts(files: Path) -> None:
    """As in training and in `vbon compare`: by the reward that is chosen by and written."""
    arguments = (
        "--prompts",
        "prompts.txt",
        "--samples",
        "8",
        "--data.missing_eos_penalty",
        "3",
        "--data.end_tokens",
        "[b]",
        *VOWELS,
    )
    vbon(*arguments, "--output", "plain.jsonl")
    plain = read("plain.jsonl")
    for line in plain:
        assert line["reward"] == sum(char in "ae" for char in line["response"]) - 3 * (not line["finished"])
    assert {line["finished"] for line in plain} == {True, False}
    vbon(*arguments, "--output", "best.jsonl", "--samples", "2", "--decoder", "best_of_n", "--n", "4")
    for line in read("best.jsonl"):
        group = [other for other in plain if other["row"] == line["row"]][4 * line["sample"] : 4 * line["sample"] + 4]
        assert line["reward"] == max(other["reward"] for other in group)


def test_a_decoder_with_a_model_of_its_own(files: Path, capsys: Any) -> None:
    """It is named beside the policy; what a response takes is said, and what the output depends on kept."""
    save_tiny_model(files / "other", alphabet=ALPHABET, seed=3)
    arguments = ("--prompts", "prompts.txt", "--samples", "2", "--output")
    mixed = ("--decoder", "DeRa", "--decoder.reference", "./other", "--decoder.strength")
    vbon(*arguments, "policy.jsonl")
    vbon(*arguments, "whole.jsonl", *mixed, "1.0")
    said = capsys.readouterr().err
    assert "a response took generated tokens " in said and "peak cache of a batch " in said
    assert [one["tokens"] for one in read("whole.jsonl")] == [one["tokens"] for one in read("policy.jsonl")]
    vbon(*arguments, "half.jsonl", *mixed, "0.5")
    assert [one["tokens"] for one in read("half.jsonl")] != [one["tokens"] for one in read("policy.jsonl")]
    with pytest.raises(command.SampleError, match=r"decoder\.strength: 0\.5 there, 0\.7 here"):
        vbon(*arguments, "half.jsonl", *mixed, "0.7")
    save_tiny_model(files / "other", alphabet=ALPHABET, seed=4)
    with pytest.raises(command.SampleError, match=r"decoder\.reference\.weights: "):
        vbon(*arguments, "half.jsonl", *mixed, "0.5")


def test_any_real_n_where_one_makes_sense() -> None:
    parsed = command.build_parser().parse_args([*PLAIN, "--decoder", "value_guided", "--n", "6.5"])
    assert command._decoder(parsed.decoder, parsed.n).identity() == ValueGuided(6.5).identity()  # type: ignore[union-attr]
    for name, kind in command.NAMED.items():
        if kind is not None:
            assert command._decoder(name, None).identity() == kind().identity()  # type: ignore[union-attr]


@pytest.mark.parametrize("name", [name for name in command.NAMED if name not in ("policy", "value_guided")])
def test_decoders_by_name(name: str, files: Path, capsys: Any) -> None:
    vbon("--prompts", "prompts.txt", "--output", "named.jsonl", "--decoder", name, "--n", "4", *VOWELS)
    made = command.NAMED[name](4)
    (settings,) = [json.loads(path.read_text()) for path in files.glob("named.jsonl.settings.json")]
    assert settings["decoder"] == made.identity() and made.n == 4
    assert len(read("named.jsonl")) == 3 and "reward calls" in capsys.readouterr().err


def test_a_source_with_columns_and_a_split_of_the_data(files: Path) -> None:
    rows = [{"q": "ab", "letter": "a"}, {"q": "ab", "letter": "b"}]
    (files / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = ("--reward", "CallableReward", "--reward.function", "sample_rewards.letters")
    vbon("--prompts.path", "rows.jsonl", "--prompts.column", "q", *reward, "--output", "out.jsonl")
    for line, row in zip(read("out.jsonl"), rows, strict=True):
        assert line["reward"] == line["response"].count(row["letter"])
    (files / "data.yaml").write_text(
        "data:\n  policy: ./policy\n  test: {path: ./rows.jsonl, column: q}\n  max_new_tokens: 5\n  reward:\n"
        "    class_path: vbon_lightning.rewards.CallableReward\n    init_args: {function: sample_rewards.letters}\n"
    )
    command.main(["--config", "data.yaml", "--split", "test", "--output", "split.jsonl", "--device", "cpu"])
    assert read("split.jsonl") == read("out.jsonl")


def test_at_a_terminal_it_asks(files: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    typed = iter(["ab", "ab", ""])
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    vbon(*VOWELS)
    first, second = capsys.readouterr().out.splitlines()
    assert first != second, "the same prompt twice has two answers"
    text, _, score = first.partition("    [reward ")
    assert float(score.rstrip("]")) == sum(char in "ae" for char in text)

    def ended(prompt: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", ended)
    vbon()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "prompts.txt"], "nothing to sample from: name a policy with --policy"),
        (["--policy", "./policy", "--split", "test"], "--split is a split of the data, and no data is named"),
        (["--policy", "./policy", "--prompts", "none.txt"], "none.txt does not exist"),
        (["--policy", "./policy", "--prompts", "prompts.txt", "--decoder", "best_of_n"], "BestOfN chooses by a reward"),
        (
            ["--policy", "./policy", "--prompts", "prompts.txt", "--decoder", "DeRa"],
            "give DeRa its strength, or the policy",
        ),
        (
            ["--policy", "./policy", "--prompts", "prompts.txt", "--decoder", "DeRa", "--decoder.strength", "0.5"],
            "DeRa mixes the model that is decoded from with another one",
        ),
        ([*PLAIN, "--n", "4"], "--n is a decoder's, and plain samples have none: give --decoder best_of_n"),
        (
            [*PLAIN, "--n", "4", "--decoder", "BestOfN"],
            r"--n is for decoders that are given by name, and BestOfN is given by its class: name .*--decoder\.n",
        ),
        ([*PLAIN, "--n", "6.5", "--decoder", "best_of_n", *VOWELS], "n must be an integer >= 1, got 6.5"),
        (
            [*PLAIN, "--decoder", "speculative_rejection", *VOWELS, "--max_new_tokens", "1"],
            "every is 1, and a response has at most 1 tokens",
        ),
        ([*PLAIN, "--decoder", "tree_bon", "--n", "8", *VOWELS, "--data.max_rows", "2"], "data.max_rows is 2, and Tre"),
        (
            ["--policy", "./policy", "--data.test", "[{text: ab}]", "--split", "test", "--chat", "true"],
            "--chat is for lines of text",
        ),
        (["--policy", "./policy", "--prompts", "prompts.txt", "--samples", "0"], "samples must be an integer >= 1"),
    ],
)
def test_what_does_not_go_together(
    arguments: list[str], message: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["vbon", "sample", *arguments])
    with pytest.raises(SystemExit, match=message):
        cli.main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--decoder", "soft_best_of_n"],
            "--decoder is soft_best_of_n: give --decoder soft_best_of_n --n N, or --decoder SoftBestOfN with that",
        ),
        ([], "--decoder is policy: give --decoder best_of_n --n N, or --decoder BestOfN with that one's own options"),
    ],
)
def test_an_option_of_a_class_beside_a_name(
    arguments: list[str], message: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main([*PLAIN, *arguments, "--decoder.n", "8"])
    assert message in capsys.readouterr().err


def test_conversations_are_answered_through_the_chat_template(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    template = "{% for m in messages %}{{ m.content }}b{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    talks = [[{"role": "user", "content": text}] for text in ("cd", "e")]
    (files / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        vbon("--prompts", "talks.jsonl")
    (files / "policy" / "chat_template.jinja").write_text(template)
    vbon("--prompts", "talks.jsonl", "--output", "talks.out")
    (files / "rendered.txt").write_text("cdba\neba\n")
    vbon("--prompts", "rendered.txt", "--output", "plain.out")
    assert read("talks.out") == read("plain.out")
    (files / "said.txt").write_text("cd\ne\n")
    vbon("--prompts", "said.txt", "--chat", "true", "--output", "said.out")
    assert read("said.out") == read("plain.out")
    in_python = sample("./policy", talks, max_new_tokens=5, device="cpu")
    assert [one._asdict() for one in in_python] == read("plain.out")
    other = sample("./policy", talks, max_new_tokens=5, device="cpu", chat={"template": "f" + template})
    assert [one.prompt for one in other] == ["fcdba", "feba"]

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for said, prompts in ((), ["cd"]), (("--chat", "false"), ["cdba"]):
        typed = iter([*prompts, ""])
        monkeypatch.setattr(sys, "stdin", Terminal())
        monkeypatch.setattr("builtins.input", lambda prompt, typed=typed: next(typed))
        capsys.readouterr()
        vbon(*said)
        assert capsys.readouterr().out.splitlines() == [read("plain.out")[0]["response"]]


PICKY = ("--reward", "CallableReward", "--reward.function", "sample_rewards.picky")
SKIP = ("--data.reward_calls.on_missing", "skip", "--data.reward_calls.workers", "2")


@pytest.mark.filterwarnings("ignore:the reward says None")
def test_a_response_without_a_reward_is_written_with_null(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = ("--prompts", "prompts.txt", "--samples", "8")
    with pytest.raises(RewardError, match="is nan .*on_missing: skip"):
        vbon(*some, "--output", "stop.jsonl", *PICKY)
    vbon(*some, "--output", "skip.jsonl", *PICKY, *SKIP)
    lines = read("skip.jsonl")
    assert [line["reward"] is None for line in lines] == [line["response"][:1] in ("a", "b", "c", "") for line in lines]
    missing = sum(line["reward"] is None for line in lines)
    assert 0 < missing < len(lines) == 24
    assert f"{missing} responses were left without a reward" in capsys.readouterr().err
    with pytest.raises(command.SampleError, match="on_missing"):
        vbon(*some, "--output", "skip.jsonl", *PICKY)


@pytest.mark.filterwarnings("ignore:the reward says None")
def test_in_python_too(files: Path) -> None:
    found = sample(
        "./policy",
        ["ab"],
        reward=CallableReward("sample_rewards.picky"),
        samples=8,
        device="cpu",
        reward_calls=RewardCalls(on_missing="skip"),
    )
    assert {one.reward is None for one in found} == {True, False}


def test_rows_of_a_data_set_bring_their_columns(files: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    rows = [{"prompt": "ab", "letter": "e"}, {"prompt": "cde", "letter": "a"}]
    letters = CallableReward("sample_rewards.letters")
    found = list(sample("./policy", rows, reward=letters, max_new_tokens=5, device="cpu"))
    assert [one.reward for one in found] == [
        one.response.count(row["letter"]) for one, row in zip(found, rows, strict=True)
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(json.dumps(row) + "\n" for row in rows)))
    vbon("--prompts", "-", "--reward", "CallableReward", "--reward.function", "sample_rewards.letters")
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [one._asdict() for one in found]


def test_text_for_a_model_with_a_template_is_said_to_be_text(files: Path, capsys: Any) -> None:
    (files / "policy" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    vbon("--prompts", "prompts.txt", "--output", "a.out")
    assert "--chat true makes each a user's turn" in capsys.readouterr().err
    vbon("--prompts", "prompts.txt", "--chat", "true", "--output", "b.out")
    assert "--chat true" not in capsys.readouterr().err


# -- what nobody should obey, and what is refused --------------------------------------------------


def test_what_a_model_says_is_no_command_to_the_terminal(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    said = "\x1b]0;title\x07a\x9b2J\u202eb\r\x00\nnext line"
    one = Drawn(0, 0, said, said, None, -1.0, [3], True)
    monkeypatch.setattr(command, "draw", lambda *_, **__: iter([one]))
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab\n"))
    vbon()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.isprintable() and json.loads(line) == one._asdict()
    vbon("--prompts", "prompts.txt", "--output", "out.jsonl")
    assert read("out.jsonl") == [one._asdict()], "and lossless in a file"

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    typed = iter(["ab", "\udcff", "ab", ""])
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    capsys.readouterr()
    vbon()
    shown = capsys.readouterr()
    assert shown.out == "\\x1b]0;title\\x07a\\x9b2J\\u202eb\\r\\x00\nnext line\n" * 2
    assert "that is not UTF-8 text" in shown.err


@pytest.mark.parametrize(
    ("arguments", "typed", "message"),
    [
        (["--samples", "0"], "ab", "samples must be an integer >= 1, got 0"),
        (["--batch_size", "0", "--output", "out.jsonl"], "ab", "batch_size must be an integer >= 1, got 0"),
        (["--max_new_tokens", "0"], "ab", "max_new_tokens must be an integer >= 1, got 0"),
        (["--temperature", "0"], "ab", "--temperature must be positive and finite, got 0"),
        (["--temperature", ".inf"], "ab", "--temperature must be positive and finite, got inf"),
        (["--device", "cuda:77"], "ab", "device 'cuda:77' is not there"),
        (["--decoder", "best_of_n", "--n", "0"], "ab", "n must be an integer >= 1, got 0"),
        ([], '{"text": "a"}\n\n{"text": "b", "text": "c"}', "standard input, line 3: the key 'text' is there twice"),
        ([], '{"text": "\\ud800"}', "standard input, line 1: half a character"),
        ([], "a\n\udcff", "standard input, line 2: not UTF-8 text"),
    ],
)
def test_what_is_refused_before_a_model_is_loaded(
    arguments: list[str], typed: str, message: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(command, "load_actors", refuse)
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    with pytest.raises(ValueError, match=message):
        vbon(*arguments)
    assert not Path("out.jsonl").exists()


@pytest.mark.parametrize("options", [{"samples": 0}, {"batch_size": 0}, {"max_new_tokens": 0}, {"temperature": 0.0}])
def test_numbers_are_refused_in_python_too(options: dict[str, Any], files: Path) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        next(sample("./policy", ["ab"], **options))
