"""Responses of several policies to the same prompts, side by side, for people to read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from vbon_lightning._markdown import markdown_cell, markdown_table, reward_cell
from vbon_lightning.data.conversations import shown_prompts
from vbon_lightning.types import Rollout, known_rewards


class ScoredText(NamedTuple):
    """A response and its reward."""

    text: str
    reward: float | None
    """None where it has none."""
    finished: bool = True
    """False where the length limit cut it."""


class TextSample(NamedTuple):
    """A prompt with responses of each policy."""

    prompt: str
    """Conversations turn by turn."""
    responses: dict[str, list[ScoredText]]
    """By the policy's name, in the order in which they are to be shown: the reference first."""


_Prompt = tuple[int, str]


def text_samples(rollouts: Mapping[str, Iterable[Rollout]], *, prompts: int = 8, samples: int = 2) -> list[TextSample]:
    """Take the first responses of each policy to the same prompts.

    Args:
        rollouts: Rollouts by policy, the reference ("before") first; only as many as are needed are read.
        prompts: How many prompts.
        samples: How many responses a prompt and policy.
    """
    found: dict[str, dict[_Prompt, list[ScoredText]]] = {}
    shown: dict[_Prompt, str] = {}
    chosen: list[_Prompt] | None = None
    for name, parts in rollouts.items():
        found[name] = _responses(parts, prompts, samples, chosen, shown)
        chosen = list(found[name]) if chosen is None else chosen
    return [
        TextSample(shown[prompt], {name: responses[prompt] for name, responses in found.items() if prompt in responses})
        for prompt in chosen or []
    ]


def samples_markdown(samples: Sequence[TextSample]) -> str:
    """Format samples as Markdown: a heading and a table a prompt."""
    sections = []
    for number, sample in enumerate(samples, start=1):
        rows = [
            [
                markdown_cell(name),
                markdown_cell(response.text) + ("" if response.finished else " […]"),
                reward_cell(response.reward),
            ]
            for name, responses in sample.responses.items()
            for response in responses
        ]
        table = markdown_table(["policy", "response", "reward"], rows, align="llr")
        sections.append(f"## {number}. {markdown_cell(sample.prompt)}\n\n{table}")
    return "\n".join(sections)


def _responses(
    rollouts: Iterable[Rollout],
    prompts: int,
    samples: int,
    chosen: list[_Prompt] | None,
    shown: dict[_Prompt, str],
) -> dict[_Prompt, list[ScoredText]]:
    # The first prompts, or those another policy was already shown on: batches need not be alike. `shown` gets them as
    # people read them.
    found: dict[_Prompt, list[ScoredText]] = {}
    wanted = prompts if chosen is None else len(chosen)
    for rollout in rollouts:
        rewards, finished = known_rewards(rollout.rewards), rollout.completions.finished.tolist()
        index, valid = rollout.prompts.index.tolist(), rollout.prompts.valid.tolist()
        readable = shown_prompts(rollout.prompts.text, rollout.prompts.messages)
        for row, text in enumerate(rollout.prompts.text):
            key = (index[row], text)
            if valid[row] and len(found) < wanted and (chosen is None or key in chosen):
                shown[key] = readable[row]
                few = range(min(samples, len(rewards[row])))
                found[key] = [ScoredText(rollout.responses[row][i], rewards[row][i], finished[row][i]) for i in few]
        if len(found) >= wanted:
            break
    return found
