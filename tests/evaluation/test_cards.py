"""A comparison in the cards of what was compared."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from tests.hostile import HOSTILE, RENDERERS, Seen, squeezed
from vbon_lightning._visible import visible
from vbon_lightning.evaluation.cards import write_cards
from vbon_lightning.evaluation.intervals import Estimate
from vbon_lightning.evaluation.reports import PolicyReport

CARD = """---
library_name: transformers
tags:
- vbon-lightning
- vbon
---

# Mine

Something to keep.

## How to load it

Thus.
"""


def report(name: str, reward: float = 1.0, n: int | None = None, **values: Any) -> PolicyReport:
    numbers = {"reward": Estimate(reward, 0.1), "kl": Estimate(0.5, None), "win_rate": Estimate(0.75, 0.02)}
    return PolicyReport(name=name, method=name, prompts=7, samples=5, kl_estimator="exact", n=n, **(numbers | values))


def write(directory: Path, reports: list[PolicyReport], *names: str, **changes: Any) -> list[Path]:
    options = {"dataset": "posts.jsonl", "split": "test", "settings": {"seed": "3"}} | changes
    best = report("Best-of-4", n=4)
    return write_cards([best, *reports], dict.fromkeys(names or ("mine",), directory), **options)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    directory = tmp_path / "run" / "export"
    directory.mkdir(parents=True)
    (directory / "README.md").write_text(CARD)
    return directory


def test_a_table_and_metadata(export: Path) -> None:
    (path,) = write(export, [report("mine", win_rate_vs_bon={4: Estimate(0.4, 0.1)}), report("other")])
    text = path.read_text()
    card = ModelCard(text)
    assert "| Best-of-4 | 0.750 ± 0.020 | 1.000 ± 0.100 | 0.500 |" in text
    assert "| **mine** | 0.750 ± 0.020 | 1.000 ± 0.100 | 0.500 |" in text
    assert "other" not in text  # somebody else's
    assert "- prompts: 7, the test split of posts.jsonl\n- responses a prompt: 5\n- seed: 3\n" in text
    assert text.index("Something to keep.") < text.index("## Compared with Best-of-N") < text.index("## How to load it")
    assert card.data.model_name == "run" and card.data.tags == ["vbon-lightning", "vbon"]
    found = {one.metric_type: one for one in card.data.eval_results}
    assert {key: one.metric_value for key, one in found.items()} == {
        "win_rate": 0.75,
        "reward": 1.0,
        "kl": 0.5,
        "win_rate_vs_bon4": 0.4,
    }
    assert found["reward"].metric_args == {"prompts": 7, "samples": 5, "half_width_95": 0.1}
    assert found["kl"].metric_args == {"prompts": 7, "samples": 5}
    assert (found["kl"].dataset_name, found["kl"].dataset_split) == ("posts.jsonl", "test")


def test_a_second_comparison_replaces_the_first(export: Path) -> None:
    write(export, [report("mine", reward=1.0)])
    first = (export / "README.md").read_text()
    write(export, [report("mine", reward=2.0)])
    second = (export / "README.md").read_text()
    assert (
        second.count("## Compared") == 1 and "2.000 ± 0.100" in second and "**mine** | 0.750 ± 0.020 | 1.000" in first
    )
    write(export, [report("mine", reward=1.0)])
    assert (export / "README.md").read_text() == first
    assert [path.name for path in export.iterdir()] == ["README.md"]


def test_one_directory_at_several_n(export: Path) -> None:
    write(export, [report("Tilted n=2"), report("Tilted n=8", reward=3.0)], "Tilted n=2", "Tilted n=8")
    text = (export / "README.md").read_text()
    assert text.count("| **Tilted n=") == 2
    results = ModelCard(text).data.eval_results
    rewards = {one.metric_name: one.metric_value for one in results if one.metric_type == "reward"}
    assert rewards == {"Tilted n=2: Reward": 1.0, "Tilted n=8: Reward": 3.0}


def test_a_judge_is_shown_where_there_is_one(export: Path) -> None:
    write(export, [report("mine")])
    assert "Judge" not in (export / "README.md").read_text()
    write(export, [report("mine", judge_reward=Estimate(0.25, 0.01))])
    assert "| 0.250 ± 0.010 |" in (export / "README.md").read_text()


NASTY = "a|b\n---\n<!-- vbon compare: end --> <script> `x`"


def test_hostile_names_stay_in_their_cells(export: Path) -> None:
    for _ in range(2):
        write(export, [report(NASTY)], NASTY, dataset=NASTY, settings={"reward": NASTY})
    text = (export / "README.md").read_text()
    assert text.count("vbon compare: end -->\n") == 1 and "<script>" not in text.split("---\n")[-1]
    card = ModelCard(text)
    assert card.data.eval_results[0].dataset_name == NASTY
    assert "Something to keep." in card.text and "Thus." in card.text
    (row,) = [line for line in text.splitlines() if line.startswith("| **a")]
    assert row.replace("\\|", "").count("|") == 5


def test_no_name_turns_the_metadata_round(export: Path) -> None:
    """Two policies of one directory, so that each result says whose it is."""
    names = ["\u202efirst\x1b[2J", "second"]
    write(export, [report(name) for name in names], *names, dataset="d\u202e")
    text = (export / "README.md").read_text()
    assert "\u202e" not in text and "\x1b" not in text
    results = ModelCard(text).data.eval_results
    assert {result.dataset_name for result in results} == {"d\\u202e"}
    assert any(result.metric_name.startswith("\\u202efirst\\x1b[2J: ") for result in results)


def test_only_our_own_cards_are_written(export: Path, tmp_path: Path) -> None:
    foreign = CARD.replace("vbon-lightning", "other")
    (export / "README.md").write_text(foreign)
    assert write(export, [report("mine")]) == []
    assert (export / "README.md").read_text() == foreign
    assert write(tmp_path / "nowhere", [report("mine")]) == []


def test_a_broken_card_costs_a_warning(export: Path) -> None:
    broken = CARD.replace("library_name: transformers", "library_name: [")
    (export / "README.md").write_text(broken)
    with pytest.warns(UserWarning, match=r"model card .*README\.md did not get the comparison"):
        assert write(export, [report("mine")]) == []
    assert (export / "README.md").read_text() == broken


def test_a_card_without_the_heading_gets_it_at_its_end(export: Path) -> None:
    (export / "README.md").write_text(CARD.partition("## How")[0])
    write(export, [report("mine")])
    write(export, [report("mine")])
    text = (export / "README.md").read_text()
    assert text.count("## Compared") == 1 and text.index("to keep") < text.index("## Compared")


@pytest.mark.parametrize("text", HOSTILE)
def test_names_are_shown_and_leave_the_metadata_whole(export: Path, text: str) -> None:
    front, end = "---\ntags: []\n---", "<!-- vbon compare: end -->## How to load it"
    named = [report(f"{text} {front} {end}"), report("other")]
    settings = {"reward": text, text: "x"}
    (path,) = write(export, named, *(one.name for one in named), dataset=f"{text}: - x", settings=settings)
    card = ModelCard(path.read_text(encoding="utf-8"))
    assert card.data.tags == ["vbon-lightning", "vbon"]
    assert {result.metric_name for result in card.data.eval_results} >= {"other: Reward"}
    seen = Seen(RENDERERS["commonmark"](re.sub("<!-- vbon compare: (begin|end) -->", "", card.text)))
    assert not [tag for tag, _ in seen.tags if tag in ("a", "img", "script", "em", "code", "blockquote")]
    assert squeezed(visible(f"{text} {front}")) in squeezed(seen.text)
    again = path.read_bytes()
    write(export, named, *(one.name for one in named), dataset=f"{text}: - x", settings=settings)
    assert path.read_bytes() == again, "a later comparison finds the place of the earlier one"
