"""Responses of several policies to the same prompts, side by side, for people to read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from vbon_lightning._markdown import markdown_cell, markdown_table
from vbon_lightning.types import Rollout


class ScoredText(NamedTuple):
    """A response and its reward."""

    text: str
    reward: float
    finished: bool = True
    """False where the length limit cut it."""


class TextSample(NamedTuple):
    """A prompt with responses of each policy."""

    prompt: str
    responses: dict[str, list[ScoredText]]
    """By the policy's name, in the order in which they are to be shown: the reference first."""


def text_samples(
    rollouts: Mapping[str, Iterable[Rollout]], *, prompts: int = 8, samples: int = 2
) -> list[TextSample]:
    """Take the first responses of each policy to the same prompts.

    Args:
        rollouts: Rollouts by policy, the reference ("before") first; only as many as are needed are read.
        prompts: How many prompts.
        samples: How many responses a prompt and policy.
    """
    by_policy = {name: _first_responses(parts, prompts, samples) for name, parts in rollouts.items()}
    chosen = next(iter(by_policy.values()), {})
    return [
        TextSample(
            prompt,
            {name: found[index, prompt] for name, found in by_policy.items() if (index, prompt) in found},
        )
        for index, prompt in chosen
    ]


def samples_markdown(samples: Sequence[TextSample]) -> str:
    """Format samples as Markdown: a heading and a table a prompt."""
    sections = []
    for number, sample in enumerate(samples, start=1):
        rows = [
            [
                markdown_cell(name),
                markdown_cell(response.text + ("" if response.finished else " […]")),
                f"{response.reward:.3f}",
            ]
            for name, responses in sample.responses.items()
            for response in responses
        ]
        table = markdown_table(["policy", "response", "reward"], rows, align="llr")
        sections.append(f"## {number}. {markdown_cell(sample.prompt)}\n\n{table}")
    return "\n".join(sections)


def _first_responses(
    rollouts: Iterable[Rollout], prompts: int, samples: int
) -> dict[tuple[int, str], list[ScoredText]]:
    found: dict[tuple[int, str], list[ScoredText]] = {}
    for rollout in rollouts:
        rewards, finished = rollout.rewards.tolist(), rollout.completions.finished.tolist()
        index, valid = rollout.prompts.index.tolist(), rollout.prompts.valid.tolist()
        for row, prompt in enumerate(rollout.prompts.text):
            if len(found) == prompts:
                return found
            if valid[row]:
                shown = range(min(samples, len(rewards[row])))
                found[index[row], prompt] = [
                    ScoredText(rollout.responses[row][i], rewards[row][i], finished[row][i]) for i in shown
                ]
    return found
