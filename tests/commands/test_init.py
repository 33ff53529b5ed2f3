"""``vbon init``: what it writes runs as it is."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from tests.helpers import save_tiny_classifier, save_tiny_model
from vbon_lightning import cli
from vbon_lightning.commands import init as command
from vbon_lightning.data.sources import TextSource, first_records

EMBEDDED = "package:vbon_lightning/assets/demo_lm"
QUESTIONS = [{"question": f"what is {n} and {n + 1}", "answer": str(2 * n + 1)} for n in range(12)]
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} {% endfor %}"
REWARD = """
from vbon_lightning.rewards import RewardModel
def letters(prompts, responses):
    return [[float(text.count("e")) for text in texts] for texts in responses]

class Own(RewardModel):
    def __call__(self, *arguments):
        return None

    def identity(self):
        return {}

def needs(prompts, responses, answer):
    return [[0.0 for _ in texts] for texts in responses]
"""


def lines(path: str, rows: list[dict[str, Any]]) -> str:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "init_rewards.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    lines("questions.jsonl", QUESTIONS)
    lines(
        "texts.jsonl", [{"text": f"the film was number {n} of very many that " + "I have seen " * 5} for n in range(12)]
    )
    Path("prompts.txt").write_text("".join(f"the film number {n} was\n" for n in range(12)))
    return tmp_path


def vbon(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["vbon", *arguments])
    cli.main()


def written(**changes: str) -> dict[str, Any]:
    """Run the command in its shortest form and return what it wrote."""
    given = {"policy": EMBEDDED, "data": "prompts.txt", "reward": "init_rewards.letters"} | changes
    command.main([f"--{name}={value}" for name, value in given.items()])
    return yaml.safe_load(Path(given.get("output", "config.yaml")).read_text())


def commands() -> list[list[str]]:
    head = [line[2:] for line in Path("config.yaml").read_text().splitlines() if line.startswith("# vbon ")]
    return [shlex.split(line)[1:] for line in head]


SHORT = {
    "predict": ["--model.samples", "16", "--data.max_new_tokens", "4"],
    "fit": [
        "--trainer.max_steps=1",
        "--trainer.val_check_interval=1",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--data.max_new_tokens=4",
    ],
    "compare": ["--n=[2]", "--samples=2", "--device=cpu", "--data.max_new_tokens", "4"],
    "sample": ["--device=cpu", "--max_new_tokens=4"],
}


@pytest.mark.parametrize(
    ("method", "data"),
    [("vbon", "prompts.txt"), ("kl_rl", "questions.jsonl"), ("bon_sft", "texts.jsonl"), ("dpo", "prompts.txt")],
)
def test_the_commands_in_its_head_run(method: str, data: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    written(method=method, data=data)
    said = capsys.readouterr().out
    assert [words[0] for words in commands()] == ["predict", "fit", "compare", "sample"]
    for words in commands():
        assert shlex.join(words) in said
        vbon(monkeypatch, *words, *SHORT[words[0]])
    assert Path(f"runs/{method}/export/model.safetensors").is_file()
    assert len(Path(f"runs/{method}/responses.jsonl").read_text().splitlines()) == 2
    reports = json.loads(Path(f"runs/{method}/comparison/comparison.json").read_text())["reports"]
    assert [report["name"] for report in reports] == ["reference", "Best-of-2", method]


def test_fine_tuning_does_without_a_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    command.main(["--policy", EMBEDDED, "--data", "questions.jsonl", "--method", "sft"])
    found = yaml.safe_load(Path("config.yaml").read_text())
    assert found["data"]["train"]["response_column"] == "answer" and "reward" not in found["data"]
    for words in commands():
        vbon(monkeypatch, *words, *SHORT[words[0]])
    assert Path("runs/sft/export/model.safetensors").is_file()


@pytest.mark.parametrize("method", get_args(command.Method))
def test_it_prints_as_a_whole_config(method: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    written(method=method, output="mine/first try.yaml")
    text = Path("mine/first try.yaml").read_text()
    assert "runs/first-try" in text
    assert not [line for line in text.splitlines() if len(line) > 120 and not line.startswith("# vbon ")]
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        vbon(monkeypatch, "fit", "-c", "mine/first try.yaml", "--print_config")
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["max_steps"] == 200


def test_losses_that_add_up_tokens_have_larger_gradients_to_clip() -> None:
    clipped = {
        method: written(method=method, output=f"{method}.yaml")["trainer"]["gradient_clip_val"]
        for method in get_args(command.Method)
    }
    assert {method for method, value in clipped.items() if value == 20.0} == {"vbon", "kl_rl", "rloo"}
    assert set(clipped.values()) == {20.0, 1.0}


def test_splits_do_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    data = written()["data"]
    assert (data["test"]["start"], data["test"]["stop"]) == (0, 2)
    assert (data["val"]["start"], data["val"]["stop"]) == (2, 4)
    assert data["train"]["start"] == 4 and "stop" not in data["train"]
    assert data["batch_size"] == 8  # of 8 that are left
    assert {part["shuffle_seed"] for part in (data["train"], data["val"], data["test"])} == {0}


def test_a_table_for_a_thousand_prompts_at_first() -> None:
    Path("many.txt").write_text("".join(f"prompt {n}\n" for n in range(1500)))
    train = written(data="many.txt")["data"]["train"]
    assert (train["start"], train["stop"]) == (128, 1128)
    assert "stop" not in written(data="many.txt", method="sft", output="other.yaml", reward="null")["data"]["train"]


# -- options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        ("VaderReward", {"class_path": "vbon_lightning.rewards.VaderReward"}),
        ("vbon_lightning.rewards.VaderReward", {"class_path": "vbon_lightning.rewards.VaderReward"}),
        ("init_rewards.Own", {"class_path": "init_rewards.Own"}),
        (
            "ExactMatchReward",
            {"class_path": "vbon_lightning.rewards.ExactMatchReward", "init_args": {"column": "answer"}},
        ),
        (
            "init_rewards:needs",
            {"class_path": "vbon_lightning.rewards.CallableReward", "init_args": {"function": "init_rewards:needs"}},
        ),
        (
            "./classifier",
            {
                "class_path": "vbon_lightning.rewards.ClassifierReward",
                "init_args": {"model": "./classifier", "label": "POSITIVE", "output": "log_odds"},
            },
        ),
        (
            "./scalar",
            {"class_path": "vbon_lightning.rewards.ClassifierReward", "init_args": {"model": "./scalar"}},
        ),
    ],
)
def test_rewards(reward: str, expected: dict[str, Any]) -> None:
    save_tiny_classifier("classifier")
    save_tiny_classifier("scalar", labels=("SCORE",))
    assert written(reward=reward, data="questions.jsonl")["data"]["reward"] == expected


def test_columns_that_are_named() -> None:
    lines("other.jsonl", [{"title": f"title {n}", "prompt": "x", "note": "y"} for n in range(5)])
    given = {"data": "other.jsonl", "method": "sft"}
    found = written(**given, prompt_column="title", response_column="note")
    assert (found["data"]["train"]["column"], found["data"]["train"]["response_column"]) == ("title", "note")


def test_long_texts_are_cut_to_prompts() -> None:
    train = written(data="texts.jsonl")["data"]["train"]
    assert (train["column"], train["first_words"], train["min_words"], train["unique"]) == ("text", 8, 8, True)


def test_conversations(directory: Path) -> None:
    policy = save_tiny_model(directory / "chat")
    lines("chats.jsonl", [{"messages": [{"role": "user", "content": f"hello {n}"}]} for n in range(5)])
    with pytest.raises(ValueError, match="chat template"):
        written(policy=policy, data="chats.jsonl")
    config = json.loads((directory / "chat/tokenizer_config.json").read_text())
    (directory / "chat/tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    assert written(policy=policy, data="chats.jsonl")["data"]["train"]["column"] == "messages"
    assert "rendered by the tokenizer's chat template" in Path("config.yaml").read_text()


def test_prompts_that_leave_no_room(directory: Path) -> None:
    policy = save_tiny_model(directory / "short")  # 64 tokens
    Path("long.txt").write_text("".join(f"{n} {'word ' * 10}\n" for n in range(5)))
    data = written(policy=policy, data="long.txt")["data"]
    assert (data["max_new_tokens"], data["max_prompt_tokens"], data["too_long"]) == (32, 32, "truncate_left")
    assert "max_prompt_tokens" not in written(output="other.yaml")["data"]


# -- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": "RegexReward"}, r"RegexReward needs arguments \(pattern\)"),
        ({"reward": "ResponseReward"}, "needs arguments .it is a base."),
        ({"reward": "init_rewards.needs"}, "reads the column 'answer', which the data lacks: the columns are 'text'"),
        ({"reward": "nowhere.reward"}, "cannot import 'nowhere.reward'"),
        ({"reward": "./nowhere"}, "--reward.*'./nowhere' does not exist"),
        ({"reward": "VadderReward"}, "'VadderReward' is no class of vbon_lightning.rewards .*VaderReward"),
        ({"data": "nowhere.txt"}, "nowhere.txt does not exist"),
        ({"data": "empty.txt"}, "empty.txt is empty"),
        ({"data": "two.txt"}, "holds 2 prompts: three at least"),
        ({"policy": "./nowhere"}, "'./nowhere' does not exist"),
    ],
    ids=str,
)
def test_refusals(changes: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("empty.txt").write_text("")
    Path("two.txt").write_text("a\nb\n")
    with pytest.raises((ValueError, OSError), match=re.compile(message, re.DOTALL)):
        written(**changes)
    assert not Path("config.yaml").exists()


def test_nothing_is_overwritten() -> None:
    written()
    with pytest.raises(command.InitError, match=r"config\.yaml exists: name another --output"):
        written()
    with pytest.raises(command.InitError, match="--method vbon needs a reward"):
        command.init(EMBEDDED, "prompts.txt", output="other.yaml")


def test_first_records() -> None:
    assert first_records(TextSource("questions.jsonl"), 2) == QUESTIONS[:2]


CHATS = [
    [{"role": "user", "content": f"film {n}?"}, {"role": "assistant", "content": f"it was {n}"}] for n in range(12)
]
LAYOUTS: dict[str, list[dict[str, Any]]] = {
    "messages": [{"messages": chat} for chat in CHATS],
    "prompt": [{"prompt": chat[:1], "completion": chat[1:]} for chat in CHATS],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_conversations_are_learnt_with_a_template_from_a_file(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines("chats.jsonl", LAYOUTS[layout])
    Path("chat.jinja").write_text(TEMPLATE)
    given = ["--policy", EMBEDDED, "--data", "chats.jsonl", "--method", "sft"]
    with pytest.raises(ValueError, match="no chat template"):
        command.main(given)
    command.main([*given, "--chat_template", "chat.jinja"])
    found = yaml.safe_load(Path("config.yaml").read_text())
    assert found["data"]["chat"] == {"template": TEMPLATE}
    assert found["data"]["train"].get("response_column") == (None if layout == "messages" else "completion")
    for words in commands():
        vbon(monkeypatch, *words, *SHORT[words[0]])
    assert Path("runs/sft/export/chat_template.jinja").read_text() == TEMPLATE
    assert len(Path("runs/sft/responses.jsonl").read_text().splitlines()) == 2


def test_what_it_says_of_the_best_policy_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    written(method="sft", data="texts.jsonl")
    text = Path("config.yaml").read_text()
    assert text.count("# - {class_path: BestPolicy") == 1
    Path("config.yaml").write_text(text.replace("# - {class_path: BestPolicy", "- {class_path: BestPolicy"))
    (fit,) = [words for words in commands() if words[0] == "fit"]
    vbon(monkeypatch, *fit, *SHORT["fit"])
    assert list(Path("runs/sft").rglob("best-step=*.ckpt"))
